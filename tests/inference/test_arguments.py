"""Arguments of a model are checked before its weights are loaded."""

import argparse
from typing import get_args, get_type_hints

import pytest
import torch

from lisa_hf.conversion import saving
from lisa_hf.inference.arguments import DTYPES, add_model_arguments, fastest_device
from lisa_hf.training.arguments import ModelArguments


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return parser


def test_what_this_machine_can_do_is_taken(parser):
    args = parser.parse_args(["--device", "cpu", "--dtype", "bfloat16", "--max_new_tokens", "7"])
    assert (args.device, args.dtype, args.max_new_tokens) == (torch.device("cpu"), "bfloat16", 7)


@pytest.mark.parametrize("accelerator", [None, "cuda", "xpu", "mps"])
def test_the_accelerator_is_the_default(monkeypatch, accelerator):
    device = accelerator and torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
    assert fastest_device() == (accelerator or "cpu")


@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("--device", "gpu", "a device of this machine"),
        ("--device", "meta", "a device of this machine"),
        ("--device", f"cuda:{torch.cuda.device_count()}", "a device of this machine"),
        ("--dtype", "fp16", "auto or a dtype"),
        ("--dtype", "nn", "auto or a dtype"),
        ("--max_new_tokens", "0", "a number of 1 or more"),
        ("--max_new_tokens", "many", "a number of 1 or more"),
    ],
)
def test_others_are_answered_with_a_sentence(parser, capsys, option, value, expected):
    with pytest.raises(SystemExit):
        parser.parse_args([option, value])
    assert f"argument {option}: expected {expected}" in capsys.readouterr().err


def test_all_commands_take_the_same_dtypes():
    trained, _ = get_args(get_type_hints(ModelArguments)["dtype"])
    assert get_args(trained) == DTYPES == tuple(saving.DTYPES)
