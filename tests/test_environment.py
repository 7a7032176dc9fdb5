"""What an environment needs is checked before anything runs."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]


def test_a_torchvision_of_another_torch_is_one_line(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator does not exist')\n")
    result = subprocess.run(
        [sys.executable, ROOT / "recipes" / "train.py", "--help-all"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT)))},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("ImportError: expected a torchvision that matches torch ") and "pip install" in line


def test_importing_does_not_touch_the_accelerator():
    """After a query for devices, CUDA fails in forked processes, such as those of accelerate's `notebook_launcher`."""
    code = """
import pkgutil, sys, torch
from importlib import import_module

def touched(*args):
    raise AssertionError("CUDA was asked for")

count_devices, torch._C._cuda_getDeviceCount = torch._C._cuda_getDeviceCount, touched
import lisa_hf
for module in pkgutil.walk_packages(lisa_hf.__path__, "lisa_hf."):
    if module.name != "lisa_hf.inference.lmms_eval_model":  # needs a package of its own
        import_module(module.name)
assert "deepspeed" not in sys.modules and not torch.cuda.is_initialized()

# DeepSpeed, which saving a model imports, asks, and does not warn if there is none.
torch._C._cuda_getDeviceCount = count_devices
import deepspeed
deepspeed.get_accelerator()
"""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "Setting accelerator" not in result.stdout + result.stderr
