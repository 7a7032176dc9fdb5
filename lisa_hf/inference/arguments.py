"""Command-line arguments shared by recipes/chat.py, demo.py and predict.py."""

import argparse

import torch


DTYPES = ("auto", "float32", "bfloat16", "float16")  # as in training, export and conversion


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for running a model."""
    default_device = fastest_device()
    for name, type, default, help in (
        ("--max_new_tokens", positive_int, 256, "maximum tokens of an answer"),
        ("--device", _available_device, default_device, "cpu, cuda, cuda:1, mps, ..."),
        ("--dtype", _dtype_name, "auto", f"dtype of the weights: {', '.join(DTYPES[1:])}; auto: as saved"),
    ):
        parser.add_argument(name, type=type, default=default, help=f"{help} (%(default)s)")


def fastest_device() -> str:
    """Return the kind of the machine's accelerator, or "cpu" if there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def positive_int(text: str) -> int:
    """Parse an int of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text!r}")
    return int(text)


def _available_device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        module = torch.get_device_module(device)
        is_available = module.is_available() and (device.index or 0) < module.device_count()
    except RuntimeError:  # no such kind of device
        is_available = False
    if not is_available:
        raise argparse.ArgumentTypeError(f"expected a device of this machine, such as cpu, got {text!r}")
    return device


def _dtype_name(text: str) -> str:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected auto or a dtype among {', '.join(DTYPES[1:])}, got {text!r}")
    return text
