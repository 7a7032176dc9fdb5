"""`run.json`: how a training run was started, written to its output directory before its first step.

Each checkpoint has a copy, which records what it was saved with even if the run is resumed with other arguments.

{
  "started": "2026-01-31T12:00:00+00:00",
  "command": "recipes/train.py --config recipes/configs/quickstart.yaml",
  "git_commit": "...",                      # of the code's checkout, "-dirty" if changed; or null
  "versions": {"python": ..., "cuda": ..., "torch": ..., ...},    # cuda: null with a CPU build of torch
  "hardware": {"device": ..., "num_processes": ..., "num_machines": ...},
  "launcher": {"distributed_type": "DEEPSPEED", "zero_stage": 2},    # accelerate's name; DeepSpeed's stage or null
  "arguments": {"model": {...}, "data": {...}, "training": {...}},    # the three dataclasses
  "data": {
    "train": [{"source", "split", "weight", "num_rows", "fingerprint"}, ...],    # weights sum to 1
    "eval": [{"source", "split", "num_rows", "fingerprint"}, ...]
  },
  "continues": {...},                       # record of the LISA model that `model` names; or null
  "earlier_starts": [{...}, ...]            # records of this run from before it was resumed
}

Next to it, `train_images.npz` has keys of the training images, see `lisa_hf.data.image_keys`, with which an evaluation
finds the images that a model has seen. The record of a converted model has "converted_from", and its authors'
statement about its "training_data".
"""

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, IterableDataset
from transformers.utils import cached_file

from ..data.image_keys import TRAIN_IMAGES, image_keys, merge_image_keys, read_image_keys, write_image_keys
from ..data.mixture import EvaluationDataset, Mixture
from ..files import atomic_file
from ..redaction import redact
from .arguments import DataArguments, LisaTrainingArguments, ModelArguments


RUN_RECORD = "run.json"
PACKAGES = (
    *("lisa-hf", "torch", "transformers", "tokenizers", "accelerate", "datasets", "peft", "deepspeed"),
    *("bitsandbytes", "flash-attn"),
)


def write_run_record(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: LisaTrainingArguments,
    train_dataset: Mixture,
    eval_datasets: dict[str, EvaluationDataset],
) -> None:
    """Write the `run.json` of a run that is about to start. Call it on the main process only.

    If the run resumes from a checkpoint, the records of its earlier starts are kept: the model has seen their data.

    Args:
        model_args: The model's arguments.
        data_args: The data's arguments.
        training_args: The trainer's arguments.
        train_dataset: The mixture.
        eval_datasets: Evaluation sets by source.
    """
    output_dir = Path(training_args.output_dir)
    earlier = read_run_record(output_dir) if training_args.resume_from_checkpoint else None
    evaluation = [_describe(name, data_args.eval_sources, dataset.rows) for name, dataset in eval_datasets.items()]
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "directory": os.getcwd(),
        **describe_software(),
        "hardware": describe_hardware(training_args),
        "launcher": {
            "distributed_type": AcceleratorState().distributed_type.value,
            "zero_stage": training_args.deepspeed_plugin.zero_stage if training_args.deepspeed_plugin else None,
        },
        "arguments": describe_arguments(model_args, data_args, training_args),
        "data": {"train": describe_mixture(data_args, train_dataset), "eval": evaluation},
        "continues": read_run_record(Path(model_args.model)) if model_args.model else None,
        "earlier_starts": [*earlier.pop("earlier_starts"), earlier] if earlier else [],
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    # Include what the model has seen before: in the model that this run continues, and before it was resumed.
    seen = [read_image_keys(Path(model_args.model))] if model_args.model else []
    here = read_image_keys(output_dir) if earlier else {}
    listed = {facts["source"]: facts["fingerprint"] for facts in earlier["data"]["train"]} if earlier else {}
    keys = {
        name: image_keys(rows)
        for name, rows in zip(train_dataset.names, train_dataset.sources)
        # A resumed run already has them, and millions take half a minute.
        if isinstance(rows, Dataset) and not (name in here and listed.get(name) == rows._fingerprint)
    }
    # Before the record, which tells which rows they belong to.
    write_image_keys(output_dir, merge_image_keys(*seen, here, keys))
    with atomic_file(output_dir / RUN_RECORD) as path:
        path.write_text(json.dumps(redact(record), indent=2) + "\n", encoding="utf-8")


def read_run_record(directory: Path) -> dict | None:
    """Return the record in a run's output directory or in an exported model, or None if there is none.

    Raises:
        ValueError: If `run.json` is not JSON.
    """
    path = directory / RUN_RECORD
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: expected JSON, got {error}. Restore it, or remove it to continue without."
        ) from error


def find_run_record(checkpoint: Path) -> dict | None:
    """Return the record of a checkpoint's run, from the checkpoint or the directory above it."""
    record = read_run_record(checkpoint)
    if record is None and checkpoint.name.startswith("checkpoint-"):
        record = read_run_record(checkpoint.resolve().parent)
    return record


def find_training_images(model: str) -> tuple[dict[str, np.ndarray] | None, str]:
    """Return the keys of a model's training images by source, None if unknown, and what else is known.

    Args:
        model: Directory or Hub id.
    """
    directory = Path(model)
    if not directory.is_dir():  # on the Hub
        missing = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        paths = [cached_file(model, name, **missing) for name in (RUN_RECORD, TRAIN_IMAGES)]
        directory = next((Path(path).parent for path in paths if path), directory)
    record, keys = find_run_record(directory), read_image_keys(directory)
    stages = list_stages(record) if record else []
    sources = {row["source"] for stage in stages for row in stage["data"]["train"]}
    notes = [stage["training_data"] for stage in stages if "training_data" in stage]
    if unknown := sorted(sources - keys.keys()):
        notes.append(f"Not compared: {', '.join(unknown)}, whose images were not recorded.")
    return keys or None, " ".join(notes)


def describe_arguments(
    model_args: ModelArguments, data_args: DataArguments, training_args: LisaTrainingArguments
) -> dict:
    """Return `arguments` as in a record, without secrets."""
    arguments = {"model": dataclasses.asdict(model_args), "data": dataclasses.asdict(data_args)}
    return redact(arguments | {"training": training_args.to_dict()})


def describe_mixture(data_args: DataArguments, train_dataset: Mixture) -> list[dict]:
    """Return `train` of `data` as in a record."""
    return [
        {**_describe(name, data_args.sources, rows), "weight": float(weight)}
        for name, rows, weight in zip(train_dataset.names, train_dataset.sources, train_dataset.probabilities)
    ]


def describe_software() -> dict:
    """Return `git_commit` and `versions` as in a record."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda} | _versions()
    return {"git_commit": _git_commit(), "versions": versions}


def describe_hardware(training_args: LisaTrainingArguments) -> dict:
    """Return `hardware` as in a record."""
    device = training_args.device
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "num_processes": training_args.world_size,
        "num_machines": int(os.environ.get("GROUP_WORLD_SIZE", 1)),  # set by torch's launcher
    }


def list_stages(record: dict) -> list[dict]:
    """Return all records of a model's history, newest first: its run, earlier starts, and the models it continues."""
    continued = record["continues"]
    return [record, *reversed(record["earlier_starts"]), *(list_stages(continued) if continued else [])]


def write_conversion_record(directory: Path, converted_from: str, training_data: str) -> None:
    """Write the `run.json` of a converted model.

    Args:
        directory: Directory of the model.
        converted_from: The original checkpoint.
        training_data: Sentence about its training data.
    """
    record = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "converted_from": converted_from}
    record |= {"training_data": training_data, "data": {"train": [], "eval": []}, **describe_software()}
    record |= {"continues": None, "earlier_starts": []}
    with atomic_file(directory / RUN_RECORD) as path:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _describe(name: str, options: dict[str, dict], rows: Dataset | IterableDataset) -> dict:
    is_prepared = isinstance(rows, Dataset)
    return {
        "source": name,
        "split": options[name]["split"],
        "num_rows": len(rows) if is_prepared else None,  # the length of a stream is unknown
        "fingerprint": rows._fingerprint if is_prepared else None,
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # git is not installed, or the disk is slow
        return None
    return found.stdout.strip() or None
