# make install      create the virtual environment
# make quickstart   train, evaluate and show a tiny LISA on drawn scenes, on CPU
# make demo         talk to the quick start's model in the browser
# make docs         build the documentation into docs/_build/html, offline
# make test         run the whole test suite, offline, on CPU
# make lint         check the style
#
# Each target first creates the virtual environment VENV with the releases of constraints.txt. A VENV that already has
# torch keeps it; otherwise torch and torchvision come from TORCH_INDEX if given, else from pip's default index.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
CORES ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.lisa-hf-installed
CHECK_VERSION := import sys; sys.exit(sys.version_info < (3, 11) and \
	f"error: expected Python 3.11 or later, found {sys.version.split()[0]} in {sys.executable}; use make PYTHON=...")
PRINT_TORCH := from importlib.metadata import version; print("torch==" + version("torch"))

# Run the code of this checkout, even in a VENV that another checkout was installed into.
export PYTHONPATH := $(CURDIR)

.PHONY: install quickstart demo docs test lint

install: $(INSTALLED)

# Two processes with one thread each are faster than one with two. accelerate calls this multi_gpu, on CPU too.
quickstart: $(INSTALLED)
	$(BIN)/accelerate launch --quiet --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no \
		--dynamo_backend no --num_cpu_threads_per_process 1 recipes/train.py --config recipes/configs/quickstart.yaml \
		--overwrite_output_dir
	@echo "Talk to it in the browser: make demo"

demo: $(INSTALLED)
	@test -e outputs/quickstart/config.json || { echo "error: expected outputs/quickstart, got none. Run make quickstart."; exit 2; }
	$(BIN)/python recipes/demo.py outputs/quickstart

docs: $(INSTALLED)
	$(BIN)/python -m sphinx --fail-on-warning --quiet docs docs/_build/html

test: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# Importing lisa_hf at the end checks that torch and torchvision fit, with one line if they do not.
$(INSTALLED): setup.cfg constraints.txt
	@test -x $(BIN)/pip || { $(PYTHON) -c '$(CHECK_VERSION)' && $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c '$(CHECK_VERSION)'
	@$(BIN)/python -c 'import torch' 2>/dev/null || \
		$(BIN)/pip install --no-deps -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch torchvision
	@grep -vE '^torch(vision)?==' constraints.txt > $(VENV)/constraints.txt
	@$(BIN)/python -c '$(PRINT_TORCH)' >> $(VENV)/constraints.txt
	$(BIN)/pip install -c $(VENV)/constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[docs,test]'
	@$(BIN)/python -c 'import lisa_hf'
	@touch $@
