"""A tiny training run in one or more processes, in which something goes wrong at a chosen moment.

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
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from fixtures.rows import one_source
from fixtures.tiny_training import ENGINES, LISA_PARTS, Items, build_model, engine_state, make_trainer
from torch.utils.data import get_worker_info

from lisa_hf.data.streaming import StreamingMixtureDataset
from lisa_hf.errors import report_user_errors
from lisa_hf.training.arguments import LisaTrainingArguments, ModelArguments
from lisa_hf.training.build import build_config_and_processor, build_for_training
from lisa_hf.training.callbacks import StopOnSignal
from lisa_hf.training.trainer import LisaTrainer


NUM_STEPS = 6
FINAL = "final.pt"
# What a process is doing, by the method with which that begins.
METHODS = {
    "starting": "train",
    "training": "training_step",
    "saving": "_save_checkpoint",
    "evaluating": "evaluation_loop",
}
PHASES = list(METHODS)
logger = logging.getLogger(__name__)
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["fault_worker", "deepspeed"])


@dataclass
class Fault:
    """A failure in process `rank`, or in all if that is None, in the `occurrence`-th `phase` of its kind.

    Kinds: "kill": SIGKILL, `delay` seconds after the phase has begun, whatever is being done then; "full_disk" and
    "signal" of a `number`: as it begins; "bad_row" and "worker_killed": in the training data, in whatever phase.
    """

    kind: str
    phase: str = "training"
    occurrence: int = 1
    delay: float = 0.0
    rank: int | None = 0
    number: signal.Signals = signal.SIGUSR1

    def strike(self):
        if self.kind == "full_disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        elif self.kind == "signal":
            os.kill(os.getpid(), self.number)


class Progress:
    """What one process is doing, for the one that watches it to see: it outlives a SIGKILL."""

    def __init__(self):
        self._phase = context.RawValue("i", PHASES.index("starting"))
        self._begun = context.RawArray("i", len(PHASES))
        self._seconds = context.RawArray("d", len(PHASES))

    @property
    def phase(self) -> str:
        """The one that is on, or was when the process ended."""
        return PHASES[self._phase.value]

    def begun(self, phase: str) -> int:
        """Number of phases of a kind that have started."""
        return self._begun[PHASES.index(phase)]

    def mean_seconds(self, phase: str) -> float:
        """Average duration of a phase of a kind."""
        return self._seconds[PHASES.index(phase)] / self.begun(phase)

    def follow(self, fault: Fault | None):
        """Called in the process itself; `fault` then strikes there, unless it comes from outside."""
        since = time.perf_counter()

        def enter(phase: str):
            nonlocal since
            now = time.perf_counter()
            self._seconds[self._phase.value] += now - since
            self._phase.value, since = PHASES.index(phase), now

        def wrap(phase: str, original):
            def method(*args, **kwargs):
                enter(phase)
                self._begun[PHASES.index(phase)] += 1
                if fault and (fault.phase, fault.occurrence) == (phase, self.begun(phase)):
                    fault.strike()
                result = original(*args, **kwargs)
                enter("training")  # what is neither saved nor evaluated belongs to a step
                return result

            return method

        for phase, name in METHODS.items():
            setattr(LisaTrainer, name, wrap(phase, getattr(LisaTrainer, name)))


@dataclass
class Outcome:
    """How the processes of a training ended.

    Args:
        seconds: from the end of the first one to that of the last.
    """

    exit_codes: list[int]
    progress: list[Progress]
    seconds: float

    @property
    def is_good(self) -> bool:
        return not any(self.exit_codes)


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


def work(
    directory: Path,
    rank: int,
    num_ranks: int,
    port: int,
    engine: str,
    streaming: bool,
    fault: Fault | None,
    progress: Progress,
    items_per_step: int | None,
):
    """One process; it trains as recipes/train.py does, and resumes by itself."""
    with open(directory / f"rank{rank}.log", "a") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    is_plain = engine == "plain"
    if not is_plain:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fault = fault if fault and fault.rank in (rank, None) else None
    progress.follow(fault)
    kind = fault.kind if fault else None
    if streaming:
        dataset = StreamingMixtureDataset(one_source(64, 4, directory), rank=rank, num_ranks=num_ranks)
    else:
        dataset = BadItems(kind) if kind in ("bad_row", "worker_killed") else Items()
    settings = {} if is_plain else ENGINES[engine]
    with nullcontext() if is_plain else engine_state(engine), report_user_errors():
        model, processor = load_for_training(directory, settings, lora_dropout=0.0 if items_per_step else 0.2)
        trainer = make_trainer(
            model,
            processor,
            directory / "run",
            dataset,
            Items(3),
            max_steps=NUM_STEPS,
            per_device_train_batch_size=items_per_step // num_ranks if items_per_step else 2,
            optim="adamw_torch",
            learning_rate=1e-3,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            train_sampling_strategy="random",
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            dataloader_num_workers=1 if kind == "worker_killed" else 0,
            **settings,
        )
        trainer.remove_callback(trainer.recorder)
        trainer.add_callback(StopOnSignal(trainer))
        trainer.train(resume_from_checkpoint="auto")
        if trainer.state.global_step < NUM_STEPS:
            return
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # whole, by all processes together
    if rank == 0:
        logs = [
            {key: value for key, value in entry.items() if not key.endswith(("_second", "time", "_gb"))}
            for entry in trainer.state.log_history[:-1]
        ]
        best = (trainer.state.best_metric, trainer.state.best_global_step)
        torch.save({"weights": weights, "logs": logs, "best": best}, directory / FINAL)


def load_for_training(directory: Path, settings: dict, lora_dropout: float):
    """Load the model that `run_training` saved; with ZeRO-3, in shards."""
    arguments = ModelArguments(
        model=str(directory / "model"), trainable=LISA_PARTS, lora_r=4, lora_dropout=lora_dropout
    )
    config, processor = build_config_and_processor(arguments)
    args = LisaTrainingArguments(output_dir=str(directory / "run"), report_to="none", **{"use_cpu": True, **settings})
    torch.manual_seed(0)
    return build_for_training(arguments, config, args), processor


def run_training(
    directory: Path,
    engine: str = "plain",
    streaming: bool = False,
    fault: Fault | None = None,
    timeout: float = 600,
    num_ranks: int | None = None,
    items_per_step: int | None = None,
) -> Outcome:
    """Start or resume training in `directory`.

    The processes that outlive one that failed have a minute to notice; then this is an error. With `items_per_step`,
    a step is the same for any number of processes, which share its items and drop nothing out.
    """
    num_ranks = num_ranks or (1 if engine == "plain" else 2)
    if not (directory / "model").exists():
        for part in build_model():  # the model and its processor
            part.save_pretrained(directory / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    progress = [Progress() for _ in range(num_ranks)]
    processes = [
        context.Process(
            target=work,
            args=(directory, rank, num_ranks, port, engine, streaming, fault, progress[rank], items_per_step),
        )
        for rank in range(num_ranks)
    ]
    # The process that they are forked from finds what it imports by this variable alone.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        for process in processes:
            process.start()
    try:
        if fault and fault.kind == "kill":
            _kill(processes[fault.rank], progress[fault.rank], fault)
        first = multiprocessing.connection.wait([process.sentinel for process in processes], timeout)
        assert first, f"Still running after {timeout} s"
        started = time.perf_counter()
        for process in processes:
            process.join(60)
            assert process.exitcode is not None, "A process was still waiting for another after a minute"
        seconds = time.perf_counter() - started
    finally:
        for process in processes:
            process.kill()
    outcome = Outcome([process.exitcode for process in processes], progress, seconds)
    logger.info(
        "%s: %s while %s, all ended %.1f s after the first", engine, fault, [p.phase for p in progress], seconds
    )
    return outcome


def _kill(process: multiprocessing.Process, progress: Progress, fault: Fault):
    while progress.begun(fault.phase) < fault.occurrence and process.is_alive():
        time.sleep(0.0005)
    time.sleep(fault.delay)
    process.kill()
