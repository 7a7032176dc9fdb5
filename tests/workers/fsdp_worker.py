"""Load a LISA in several processes, sharded by FSDP2 as in training, and keep what each of them holds."""

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


def work(directory: Path, rank: int, num_ranks: int, port: int, model_args: ModelArguments):
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    model, processor = build(model_args)
    options = {"per_device_train_batch_size": 2, "max_steps": 1, **ENGINES["fsdp2"]}
    trainer = make_trainer(model, processor, directory, Items(), **options)
    trainer.remove_callback(trainer.recorder)
    trainer.add_callback(keep := KeepWeights())
    trainer.train()
    torch.save(keep.kept | {"loss": trainer.state.log_history[0]["loss"]}, directory / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def load_sharded(directory: Path, model_args: ModelArguments, num_ranks: int = 2) -> list[dict]:
    """Return what each process kept."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=work, args=(directory, rank, num_ranks, port, model_args)) for rank in range(num_ranks)
    ]
    # The process that they are forked from finds what it imports by this variable alone.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        for process in processes:
            process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * num_ranks
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(num_ranks)]
