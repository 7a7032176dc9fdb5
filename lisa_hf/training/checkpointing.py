"""Fault tolerance: only complete checkpoints count.

A directory `checkpoint-N` counts as a checkpoint if it has a `manifest.json`, which is written last: every process
flushes its files to disk, then one process lists all of them with their sizes. A run killed while saving leaves a
directory without a manifest, and a disk that lost the end of a file leaves one that does not match. Resuming skips
both and uses the checkpoint before them.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from ..files import atomic_file
from .arguments import LisaTrainingArguments
from .run_record import RUN_RECORD


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MODEL_FILES = ("*.safetensors", "*.bin", "config.json")
LOCK = "_training.lock"  # Trainer uploads no file whose name begins with an underscore
# Texts of torch.save's errors: it reports a full disk as a RuntimeError, whose text depends on where it was noticed.
TORCH_SAVE_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream error")


@contextmanager
def claim_output_dir(args: LisaTrainingArguments) -> Iterator[None]:
    """Keep other runs out of the output directory, and this run from overwriting an earlier one.

    The lock belongs to the kernel, so it is released with the process, however that ends.

    Raises:
        ValueError: If another run uses the directory, or a new run would train over an earlier one.
    """
    if args.process_index != 0:
        yield
        return
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(output_dir / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"output_dir: expected a directory that no other run uses, got {output_dir}, where one is training. "
            "Wait for it, or name another directory."
        ) from error
    with lock:
        checkpoints = sort_checkpoints(str(output_dir))
        found = [Path(path).name for path in reversed(checkpoints)]
        found += [path.name for pattern in MODEL_FILES for path in output_dir.glob(pattern)]
        if found and args.overwrite_output_dir:
            for path in checkpoints:
                remove_checkpoint(Path(path))
        elif found and not args.resume_from_checkpoint:
            raise ValueError(
                f"output_dir: expected a directory without an earlier run, got {output_dir} with {found[0]}. Continue "
                "with `--resume_from_checkpoint auto`, name another directory, or start over with "
                "`--overwrite_output_dir`, which removes its checkpoints."
            )
        elif args.resume_from_checkpoint:
            _warn_of_later_checkpoints(Path(args.resume_from_checkpoint), checkpoints)
        yield


def _warn_of_later_checkpoints(resumed: Path, checkpoints: list[str]) -> None:
    places = [Path(path).resolve() for path in checkpoints]
    later = checkpoints[places.index(resumed.resolve()) + 1 :] if resumed.resolve() in places else []
    if later := [path for path in later if not find_fault(Path(path))]:
        logger.warning(
            "%s is not the newest checkpoint: until this run has passed it, `resume_from_checkpoint: auto` would "
            "resume from %s. Move later ones away if you do not want them.",
            *(resumed, later[-1]),
        )


@contextmanager
def complete_save(trainer: Trainer, directory: Path) -> Iterator[None]:
    """Turn what all processes save in this context into a complete checkpoint, and only then remove older ones.

    Args:
        trainer: The trainer that saves.
        directory: The checkpoint.

    Raises:
        OSError: On the process that could not write, with what is left to resume from.
    """
    args = trainer.args
    # 1. Remove leftovers of a killed run.
    if args.should_save:
        remove_checkpoint(directory)
    trainer.accelerator.wait_for_everyone()
    # 2. Save. Without the limit: Trainer would remove older checkpoints before this one is complete.
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield
        # 3. Once every process's files are on the disk, declare the checkpoint complete.
        flush(directory)
        args.save_total_limit = limit
        trainer.accelerator.wait_for_everyone()
        if args.should_save:
            torch.save(args, directory / TRAINING_ARGS_NAME)
            if (record := Path(args.output_dir, RUN_RECORD)).is_file():
                shutil.copyfile(record, directory / RUN_RECORD)
            write_manifest(directory)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in TORCH_SAVE_ERRORS):
            raise
        raise OSError(
            f"{directory}: expected to save a checkpoint, got {' '.join(str(error).split())} "
            f"({shutil.disk_usage(args.output_dir).free / 2**30:.1f} GiB are free). Free some space, or lower "
            "`save_total_limit`, and resume with `resume_from_checkpoint: auto`; earlier checkpoints are intact."
        ) from error
    finally:
        args.save_total_limit = limit
    # 4. Now remove older checkpoints.
    if args.should_save:
        remove_old_checkpoints(args.output_dir, limit, trainer.state.best_model_checkpoint)


def flush(directory: Path) -> None:
    """Wait until all files of a directory, and their names, are on disk."""
    for path in (directory, *directory.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_manifest(directory: Path) -> None:
    """Declare a directory complete with a manifest, which is written atomically."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in files}
    with atomic_file(directory / MANIFEST) as path:
        path.write_text(json.dumps({"files": sizes}, indent=2) + "\n", encoding="utf-8")
        flush(directory)
    flush(directory)  # including the new name


def find_fault(directory: Path) -> str | None:
    """Return why a directory is not a complete checkpoint, or None if it is."""
    try:
        sizes = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so its save was not finished"
    except (KeyError, TypeError, ValueError) as error:
        return f"its {MANIFEST} is damaged ({error})"
    for name, size in sizes.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"its {name} is missing" if found is None else f"expected {size} bytes in its {name}, got {found}"
    return None


def find_checkpoint(output_dir: str) -> str | None:
    """Return the newest complete checkpoint of an output directory, or None; log the skipped ones."""
    for directory in reversed(sort_checkpoints(output_dir)):
        fault = find_fault(Path(directory))
        if fault is None:
            return directory
        logger.warning("%s is skipped: %s.", directory, fault)
    return None


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """Return the directory to resume from, the same on every process.

    Args:
        resume_from_checkpoint: A directory; "auto" for the newest complete checkpoint, or a fresh start if there is
            none; True for the newest, which must exist; None or False for a fresh start.
        output_dir: Directory in which the run saves its checkpoints.

    Raises:
        ValueError: If there is no complete checkpoint.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint in ("auto", True):
        # Only one process looks: another one might see a directory that is being removed.
        (found,) = broadcast_object_list([find_checkpoint(output_dir)])
        if found is None and resume_from_checkpoint is True:
            raise ValueError(
                f"expected a complete checkpoint in {output_dir}, got none. Start without resume_from_checkpoint."
            )
        logger.info("Resuming from %s." if found else "No complete checkpoint in %s, starting.", found or output_dir)
        return found
    if not Path(resume_from_checkpoint).is_dir():
        raise ValueError(
            f"resume_from_checkpoint: expected a directory, got {resume_from_checkpoint}, which does not exist. Name "
            "another, or `auto`."
        )
    if fault := find_fault(Path(resume_from_checkpoint)):
        raise ValueError(
            f"{resume_from_checkpoint}: expected a complete checkpoint, but {fault}. Name another, or `auto` for the "
            "newest complete one."
        )
    return resume_from_checkpoint


@contextmanager
def find_best_checkpoint_here(output_dir: str) -> Iterator[None]:
    """Let a trainer that resumes in this context find the best checkpoint in `output_dir`.

    Its state has the path from when it was saved, but the directory may have been moved or copied.
    """
    load = TrainerState.load_from_json

    def load_state(path: str) -> TrainerState:
        state = load(path)
        if state.best_model_checkpoint:
            here = Path(output_dir, Path(state.best_model_checkpoint).name)
            if here.is_dir():
                state.best_model_checkpoint = str(here)
        return state

    with mock.patch.object(TrainerState, "load_from_json", load_state):
        yield


def remove_old_checkpoints(output_dir: str, save_total_limit: int | None, best_model_checkpoint: str | None) -> None:
    """Remove checkpoints beyond `save_total_limit`, incomplete ones first."""
    if not save_total_limit:
        return
    for directory in sort_checkpoints(output_dir):
        if find_fault(Path(directory)):
            remove_checkpoint(Path(directory))
    rotate_checkpoints(output_dir, save_total_limit, best_model_checkpoint, use_mtime=True)


def remove_checkpoint(directory: Path) -> None:
    """Remove a directory, manifest first, so that a partly removed one never counts as complete."""
    (directory / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
