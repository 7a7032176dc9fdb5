"""Checkpoints that are complete or do not count, and signals that end a training with one.

A directory `checkpoint-N` counts as a checkpoint once it holds `manifest.json`, which is written last: after every
process has flushed its files to the disk, one process lists them all with their sizes. A run that is killed while it
saves leaves a directory without one, and a disk that lost the end of a file leaves one that does not agree; both are
passed over when training resumes, and the checkpoint before them is taken.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from ..files import atomic_file


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# By what torch.save's errors are known: a full disk is a RuntimeError to it, whose text depends on where it noticed.
TORCH_SAVE_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream error")


@contextmanager
def complete_save(trainer: Trainer, directory: Path) -> Iterator[None]:
    """Makes what every process saves inside a complete checkpoint, and only then removes older ones.

    Raises:
        OSError: on the process that could not write, with what is left to resume from.
    """
    args = trainer.args
    if args.should_save:
        remove_checkpoint(directory)  # what a run that was killed left behind
    trainer.accelerator.wait_for_everyone()
    # Trainer would remove older checkpoints before this one is complete.
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield
        flush(directory)
        args.save_total_limit = limit
        trainer.accelerator.wait_for_everyone()
        if args.should_save:
            torch.save(args, directory / TRAINING_ARGS_NAME)
            write_manifest(directory)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in TORCH_SAVE_ERRORS):
            raise
        raise OSError(
            f"{directory} could not be saved: {' '.join(str(error).split())} "
            f"({shutil.disk_usage(args.output_dir).free / 2**30:.1f} GiB are free). Make room, or lower "
            "`save_total_limit`, and resume with `resume_from_checkpoint: auto`; earlier checkpoints are intact."
        ) from error
    finally:
        args.save_total_limit = limit
    if args.should_save:
        remove_old_checkpoints(args.output_dir, limit, trainer.state.best_model_checkpoint)


def flush(directory: Path) -> None:
    """Waits until all files of a directory, and their names, are on the disk."""
    for path in (directory, *directory.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_manifest(directory: Path) -> None:
    """Declares a directory complete: the manifest appears in one step, with its content or not at all."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in files}
    with atomic_file(directory / MANIFEST) as path:
        path.write_text(json.dumps({"files": sizes}, indent=2) + "\n", encoding="utf-8")
        flush(directory)
    flush(directory)  # the new name, too


def find_fault(directory: Path) -> str | None:
    """What keeps a directory from being a complete checkpoint; None if nothing does."""
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
            return f"its {name} has {found} bytes, expected {size}" if found is not None else f"its {name} is missing"
    return None


def find_checkpoint(output_dir: str) -> str | None:
    """The newest complete checkpoint of an output directory, or None; those passed over are logged."""
    for directory in reversed(sort_checkpoints(output_dir)):
        fault = find_fault(Path(directory))
        if fault is None:
            return directory
        logger.warning("%s is passed over: %s.", directory, fault)
    return None


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """The directory to resume from, the same on every process.

    Args:
        resume_from_checkpoint: "auto": the newest complete checkpoint, or a new start if there is none; True: as auto,
            but there must be one; a directory; None or False: a new start.

    Raises:
        ValueError: there is no complete checkpoint in the place named.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint in ("auto", True):
        # One process looks, else another might see a directory that is being removed.
        (found,) = broadcast_object_list([find_checkpoint(output_dir)])
        if found is None and resume_from_checkpoint is True:
            raise ValueError(f"{output_dir} has no complete checkpoint. Start anew without resume_from_checkpoint.")
        logger.info("Resuming from %s." if found else "No complete checkpoint in %s, starting.", found or output_dir)
        return found
    if not Path(resume_from_checkpoint).is_dir():
        raise ValueError(f"resume_from_checkpoint: {resume_from_checkpoint} does not exist. Name another, or `auto`.")
    if fault := find_fault(Path(resume_from_checkpoint)):
        raise ValueError(
            f"{resume_from_checkpoint} is no complete checkpoint: {fault}. Name another, or `auto` for the newest one "
            "that is complete."
        )
    return resume_from_checkpoint


def remove_old_checkpoints(output_dir: str, save_total_limit: int | None, best_model_checkpoint: str | None) -> None:
    """Removes what `save_total_limit` has no place for; incomplete directories go first."""
    if not save_total_limit:
        return
    for directory in sort_checkpoints(output_dir):
        if find_fault(Path(directory)):
            remove_checkpoint(Path(directory))
    rotate_checkpoints(output_dir, save_total_limit, best_model_checkpoint, use_mtime=True)


def remove_checkpoint(directory: Path) -> None:
    """Removes a directory so that it does not count as complete at any moment."""
    (directory / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
