"""Train a LISA in several processes, sharded by FSDP2, or query one that is split by tensor parallelism."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path
from unittest import mock

import torch
import transformers
from fixtures.tiny_training import ENGINES, Items, make_trainer
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.distributed import DistributedConfig

from lisa_hf import LisaForConditionalGeneration
from lisa_hf.training.arguments import ModelArguments
from lisa_hf.training.build import build_config_and_processor, build_model
from lisa_hf.training.trainable import prepare_for_training


context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["workers.fsdp_worker"])


def build(model_args: ModelArguments):
    """The model as train.py builds it, the same in every process, and its processor."""
    config, processor = build_config_and_processor(model_args)
    transformers.set_seed(0)
    return prepare_for_training(build_model(model_args, config), **model_args.adaptation), processor


class KeepWeights(TrainerCallback):
    """Keeps the whole weights, and which names are those of one weight."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        weights = dict(model.named_parameters(remove_duplicate=False))
        names = {}
        for name, weight in weights.items():
            names.setdefault(weight, []).append(name)
        whole = {name: weight.full_tensor() for name, weight in weights.items()}
        self.kept = {"weights": whole, "ties": list(names.values())}
        self.kept["is_sharded"] = all(isinstance(weight, DTensor) for weight in weights.values())


def train(directory: Path, rank: int, num_ranks: int, model_args: ModelArguments, options: dict):
    resume_from_checkpoint = options.pop("resume_from_checkpoint", None)
    model, processor = build(model_args)
    options = {"per_device_train_batch_size": 4 // num_ranks, "max_steps": 1, **ENGINES["fsdp2"], **options}
    trainer = make_trainer(model, processor, directory / "run", Items(), **options)
    trainer.remove_callback(trainer.recorder)
    trainer.add_callback(keep := KeepWeights())
    trainer.train(resume_from_checkpoint)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = {name: weight.full_tensor() for name, weight in trainer.model.named_parameters()}
    torch.save(keep.kept | {"losses": losses, "trained": trained}, directory / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def train_sharded(directory: Path, model_args: ModelArguments, num_ranks: int = 2, **options) -> list[dict]:
    """Train on the first items, four in each step, and return what each process kept.

    Args:
        options: Of the trainer, and `resume_from_checkpoint`.
    """
    return run_processes(train, directory, num_ranks, model_args, options)


def answer(directory: Path, rank: int, num_ranks: int, batch: dict, prompt: dict):
    distributed_config = DistributedConfig(tp_size=num_ranks)
    model = LisaForConditionalGeneration.from_pretrained(directory / "model", distributed_config=distributed_config)
    with torch.no_grad():
        outputs = model(**batch)
    kept = {name: outputs[name] for name in ("low_res_masks", "last_hidden_state")}
    kept["sequences"] = model.generate(**prompt, max_new_tokens=4, do_sample=False).sequences
    kept["num_held"] = sum(
        (weight.to_local() if isinstance(weight, DTensor) else weight).numel() for weight in model.vlm.parameters()
    )
    torch.save(kept, directory / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def run_processes(target, directory: Path, num_ranks: int, *arguments) -> list[dict]:
    """Run a function of this module in several processes and return what each of them saved."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_start, args=(target, directory, rank, num_ranks, port, *arguments))
        for rank in range(num_ranks)
    ]
    # The process that they are forked from finds what it imports by this variable alone.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        for process in processes:
            process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * num_ranks
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(num_ranks)]


def _start(target, directory: Path, rank: int, num_ranks: int, port: int, *arguments):
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    target(directory, rank, num_ranks, *arguments)
