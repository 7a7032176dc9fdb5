"""Train a tiny LISA for one step under ZeRO-2, ZeRO-3 or FSDP2, and write each process's true bytes and estimate.

accelerate launch --config_file recipes/accelerate/zero2.yaml tests/workers/memory_worker.py RESULTS zero2
"""

import copy
import dataclasses
import json
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from fixtures.tiny_training import ENGINES, LISA_PARTS, Items, build_model, collate, engine_state, make_trainer
from torch.utils._pytree import tree_leaves

from lisa_hf.training import build
from lisa_hf.training.arguments import ModelArguments
from lisa_hf.training.memory_estimate import Engine, estimate_memory
from lisa_hf.training.trainable import prepare_for_training


PARTS = {"trainable": LISA_PARTS, "lora_r": 4, "lora_dropout": 0.0}


def tensor_bytes(values) -> int:
    """Of all tensors in nested lists and dicts, memory that they share counted once."""
    storages = {}
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor):
            storages[leaf.untyped_storage()._cdata] = leaf.untyped_storage().nbytes()
    return sum(storages.values())


def measure(trainer, gradients: list[int]) -> dict[str, int]:
    """What a process holds after one step, from the tensors that it holds it in."""
    model, plugin = trainer.accelerator.unwrap_model(trainer.model), trainer.args.deepspeed_plugin
    if plugin is None:
        pieces = [parameter.to_local() for parameter in model.parameters()]
        states = [getattr(leaf, "_local_tensor", leaf) for leaf in tree_leaves(trainer.optimizer.state_dict())]
        return {
            "weights": tensor_bytes([*pieces, *model.buffers()]),
            "gradients": sum(piece.nbytes for piece in pieces if piece.requires_grad),
            "optimizer": tensor_bytes(states),
        }
    zero = trainer.model_wrapped.optimizer
    states = list(zero.optimizer.state.values())
    if plugin.zero_stage == 3:
        pieces = [parameter.ds_tensor for parameter in model.parameters()]
        whole = [parameter.data for parameter in model.parameters() if parameter.ds_persist]
        assert all(parameter.shape == parameter.ds_shape for parameter in model.parameters() if parameter.ds_persist)
        weights = tensor_bytes([*pieces, *whole, *model.buffers()])
        return {
            "weights": weights,
            "gradients": tensor_bytes(zero.grad_partitions_flat_buffer),
            "optimizer": tensor_bytes([states, zero.fp32_partitioned_groups_flat]),
        }
    return {
        "weights": tensor_bytes([*model.parameters(), *model.buffers()]),
        "gradients": gradients[0],
        "optimizer": tensor_bytes([states, zero.single_partition_of_fp32_groups]),
    }


@contextmanager
def zero2_gradients():
    """Yields a list that gets the bytes of ZeRO-2's gradients, which its step frees."""
    sizes, step = [], DeepSpeedZeroOptimizer.step

    def record(self, *args, **kwargs):
        sizes.append(tensor_bytes([list(tensors) for tensors in self.averaged_gradients.values()]))
        return step(self, *args, **kwargs)

    with mock.patch.object(DeepSpeedZeroOptimizer, "step", record):
        yield sizes


def run(engine: str, bf16: bool) -> dict:
    model, processor = build_model()
    model_args = ModelArguments(model="none", **PARTS)
    empty = prepare_for_training(build.build_model(model_args, model.config, empty=True), **PARTS)
    arguments = {"optim": "adamw_torch", "part_learning_rates": {"lora": 1e-3}, "weight_decay": 0.1, "bf16": bf16}
    arguments |= ENGINES[engine]
    with engine_state(engine), tempfile.TemporaryDirectory() as output_dir:
        model = prepare_for_training(model, **PARTS)
        trainer = make_trainer(model, processor, output_dir, Items(), per_device_train_batch_size=2, **arguments)
        trainer.remove_callback(trainer.recorder)
        batch = collate(processor, [Items()[0], Items()[1]])
        args = copy.copy(trainer.args)
        (estimate,) = estimate_memory(empty, model_args, args, batch, [Engine.of_this_run(args)])
        with zero2_gradients() as gradients:
            trainer.train()
        return {"estimate": dataclasses.asdict(estimate), "found": measure(trainer, gradients)}


if __name__ == "__main__":
    # Trainer refuses bf16 with `use_cpu: false`, which FSDP needs here.
    results = [run(sys.argv[2], bf16) for bf16 in ([False] if sys.argv[2] == "fsdp2" else [False, True])]
    Path(f"{sys.argv[1]}.{torch.distributed.get_rank()}").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
