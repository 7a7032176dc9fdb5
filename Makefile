# make quickstart   trains, evaluates and shows a tiny LISA on drawn scenes, on CPU
# make test         the whole test suite, offline, on CPU
# make lint         style
#
# Each sets up what it needs: a virtual environment in VENV with the releases of constraints.txt. A VENV that has a
# torch of its own keeps it (a CUDA build, say); otherwise torch comes from TORCH_INDEX, if given, or from pip's index.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
CORES ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.lisa-hf-installed
CHECK_VERSION := import sys; sys.exit(sys.version_info < (3, 11) and \
	f"error: expected Python 3.11 or later, found {sys.version.split()[0]} in {sys.executable}; use make PYTHON=...")
PRINT_TORCH := from importlib.metadata import version; print("torch==" + version("torch"))

# The code of this checkout, also in a VENV that another checkout was installed into.
export PYTHONPATH := $(CURDIR)

.PHONY: quickstart test lint

# Two processes of one thread each are faster than one of two; accelerate calls that multi_gpu, on CPUs too.
quickstart: $(INSTALLED)
	$(BIN)/accelerate launch --quiet --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no \
		--dynamo_backend no --num_cpu_threads_per_process 1 recipes/train.py --config recipes/configs/quickstart.yaml

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

$(INSTALLED): setup.cfg constraints.txt
	@test -x $(BIN)/pip || { $(PYTHON) -c '$(CHECK_VERSION)' && $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c '$(CHECK_VERSION)'
	@$(BIN)/python -c 'import torch' 2>/dev/null || \
		$(BIN)/pip install --no-deps -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@$(BIN)/python -c '$(PRINT_TORCH)' >> $(VENV)/constraints.txt
	$(BIN)/pip install -c $(VENV)/constraints.txt -e '.[test]'
	@touch $@
