"""A tiny training in one or more processes, in which something goes wrong at a chosen moment.

`run_training` starts the processes from one that has imported everything already, which saves most of their time.
"""

import logging
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import socket
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from distributed_worker import ENGINES, LISA_PARTS, process_state
from test_streaming import one_source
from tiny_training import Items, build_model, copy_state, make_trainer
from torch.utils.data import get_worker_info

from lisa_hf.arguments import exit_with_one_line
from lisa_hf.checkpointing import StopOnSignal
from lisa_hf.lora import prepare_for_training
from lisa_hf.streaming import StreamingMixtureDataset
from lisa_hf.trainer import LisaTrainer


NUM_STEPS = 6
FINAL = "final.pt"
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["fault_worker", "deepspeed"])


@dataclass
class Fault:
    """What goes wrong in process `rank`: `kind`, in the `occurrence`-th call of a method of the trainer.

    Kinds: "kill", `delay` seconds of CPU time later, whatever is being done then; "full_disk"; "signal".
    """

    kind: str
    method: str = "training_step"  # or _save_checkpoint, prediction_step
    occurrence: int = 1
    delay: float = 0.0
    rank: int = 0

    def install(self):
        original, calls = getattr(LisaTrainer, self.method), []

        def method(*args, **kwargs):
            calls.append(1)
            if len(calls) == self.occurrence:
                self.strike()
            return original(*args, **kwargs)

        setattr(LisaTrainer, self.method, method)

    def strike(self):
        if self.kind == "kill":
            # The default action of SIGPROF ends a process as SIGKILL does, in the midst of a system call.
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, max(self.delay, 1e-6))
        elif self.kind == "full_disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        elif self.kind == "signal":
            os.kill(os.getpid(), signal.SIGUSR1)


class BadItems(Items):
    """Items of which most raise, or kill the loader worker that reads them."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def __getitem__(self, index: int) -> dict:
        if index > 3:
            if self.kind == "bad_row":
                raise ValueError(f"Row 'drawn/{index}' of 'drawn': cannot read the mask")
            if get_worker_info() is not None:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def work(directory: Path, rank: int, num_ranks: int, port: int, engine: str, streaming: bool, fault: Fault | None):
    """One process; it trains as recipes/train.py does, and resumes by itself."""
    with open(directory / f"rank{rank}.log", "a") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    if num_ranks > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    kind = fault.kind if fault and fault.rank == rank else None
    if kind in ("kill", "full_disk", "signal"):
        fault.install()
    model, processor = build_model()
    torch.manual_seed(0)
    model = prepare_for_training(model, LISA_PARTS, lora_r=4, lora_dropout=0.2)
    if streaming:
        dataset = StreamingMixtureDataset(one_source(64, 4, directory), rank=rank, num_ranks=num_ranks)
    else:
        dataset = BadItems(kind) if kind in ("bad_row", "worker_killed") else Items()
    with process_state(engine) if num_ranks > 1 else nullcontext(), exit_with_one_line():
        trainer = make_trainer(
            model,
            processor,
            directory / "run",
            dataset,
            Items(3),
            max_steps=NUM_STEPS,
            per_device_train_batch_size=2,
            optim="adamw_torch",
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            train_sampling_strategy="random",
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            dataloader_num_workers=1 if kind == "worker_killed" else 0,
            **(ENGINES[engine] if num_ranks > 1 else {}),
        )
        trainer.remove_callback(trainer.recorder)
        trainer.add_callback(StopOnSignal())
        trainer.train(resume_from_checkpoint="auto")
    if rank == 0 and trainer.state.global_step == NUM_STEPS:
        logs = [
            {key: value for key, value in entry.items() if not key.endswith(("_second", "time", "_gb"))}
            for entry in trainer.state.log_history[:-1]
        ]
        best = (trainer.state.best_metric, trainer.state.best_global_step)
        torch.save({"weights": copy_state(trainer.model), "logs": logs, "best": best}, directory / FINAL)


def run_training(
    directory: Path, engine: str = "plain", streaming: bool = False, fault: Fault | None = None, timeout: float = 600
) -> list[int]:
    """Trains, or goes on training, in `directory`; returns the exit codes of the processes.

    The processes that outlive one that failed have a minute to notice; then this is an error.
    """
    num_ranks = 1 if engine == "plain" else 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=work, args=(directory, rank, num_ranks, port, engine, streaming, fault))
        for rank in range(num_ranks)
    ]
    # The process that they are forked from finds what it imports by this variable alone.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        for process in processes:
            process.start()
    try:
        first = multiprocessing.connection.wait([process.sentinel for process in processes], timeout)
        assert first, f"Still running after {timeout} s"
        for process in processes:
            process.join(60)
            assert process.exitcode is not None, "A process was still waiting for another after a minute"
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]
