"""Run `recipes/train.py`, on any number of processes, and save the answers of the model as it was trained.

    accelerate launch --config_file recipes/accelerate/ddp.yaml \\
        tests/workers/export_worker.py ANSWERS.safetensors --config ...

`test_export.py` compares it with what the exported model answers.
"""

import os
import sys
from pathlib import Path
from unittest import mock

import torch
from fixtures.recipes import run_here
from fixtures.tiny_training import engine_state
from safetensors.torch import load_file, save_file

import lisa_hf


class RecordingTrainer(lisa_hf.LisaTrainer):
    """Answer the first evaluation rows after training, before anything is merged or put together."""

    answers_file = None

    @torch.no_grad()
    def save_state(self):
        super().save_state()
        batch = self._prepare_inputs(self.data_collator([self.eval_dataset[0], self.eval_dataset[1]]))
        self.model_wrapped.eval()
        outputs = self.model_wrapped(**batch)  # on all processes: ZeRO-3 gathers the weights
        if self.is_world_process_zero():
            tensors = {f"inputs.{name}": value for name, value in batch.items() if isinstance(value, torch.Tensor)}
            tensors |= {name: outputs[name].float() for name in ("low_res_masks", "last_hidden_state")}
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.answers_file)


def train(answers_file: Path, *arguments) -> None:
    """Train in this process; `answers_file` gets inputs, masks and hidden states."""
    RecordingTrainer.answers_file = answers_file
    with mock.patch.object(lisa_hf, "LisaTrainer", RecordingTrainer):
        run_here("train.py", *arguments)


def largest_difference(model, answers_file: Path) -> float:
    """Between the masks of a model and those of the model in training."""
    tensors = load_file(answers_file)
    inputs = {name.removeprefix("inputs."): value for name, value in tensors.items() if name.startswith("inputs.")}
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    return max((outputs[name] - tensors[name]).abs().max().item() for name in ("low_res_masks", "last_hidden_state"))


if __name__ == "__main__":
    with engine_state("fsdp2" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else "ddp"):
        train(Path(sys.argv[1]), *sys.argv[2:])
