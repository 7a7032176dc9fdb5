"""Converted models on disk: checked before, written shard by shard, read again, and there as a whole or not at all."""

import json
import logging
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save

from .checkpoints import LazyTensor, close_files


logger = logging.getLogger(__name__)

# Memory holds two to three times as much at any depth (measured: 4.2 GB at 7B's widths, 6.6 GB for a 13B delta).
MAX_SHARD_SIZE = "2GB"


@dataclass
class ConvertedModel:
    """A model that was read from an original checkpoint.

    Args:
        model: without weights, on the meta device; its class, configuration and generation settings are saved.
        tensors: its weights, in its own names.
        processor: what makes its inputs.
    """

    model: PreTrainedModel
    tensors: dict[str, LazyTensor]
    processor: ProcessorMixin


def build_without_weights(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: names and shapes that cost no memory."""
    with torch.device("meta"):
        return model_class(config)


def save_converted(converted: ConvertedModel, output_dir: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a converted model and its processor, and reads both again.

    Args:
        output_dir: must not exist, or be empty. It appears when everything is written and verified.
        dtype: of the weights; by default the one that most of the original's numbers have.

    Raises:
        ValueError: the directory is taken, weights are missing, left over or of another shape, or what was written
            differs from what was read.
    """
    check_tensors(converted.model, converted.tensors)
    dtype = dtype or most_common_dtype(converted.tensors)
    logger.info("%d tensors fit %s; writing %s", len(converted.tensors), type(converted.model).__name__, dtype)
    with whole_directory(output_dir) as directory:
        _save_configuration(converted.model, directory, dtype)
        converted.processor.save_pretrained(directory)
        type(converted.processor).from_pretrained(directory)
        _save_tensors(converted.tensors, directory, dtype)


def check_tensors(model: PreTrainedModel, tensors: dict[str, LazyTensor]) -> None:
    """Raises a `ValueError` that lists every weight that is missing, left over, or of another shape."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"{len(missing)} tensors are missing: {missing}.")
    if left_over := [name for name in tensors if name not in expected]:
        problems.append(f"{len(left_over)} tensors are left over: {left_over}.")
    shapes = [
        f"{name} {tuple(tensors[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} tensors have another shape: {'; '.join(shapes)}.")
    if problems:
        problems.append(f"The checkpoint is not a whole {type(model).__name__}, or the configuration is another's.")
        raise ValueError(" ".join(problems))


def most_common_dtype(tensors: dict[str, LazyTensor] | dict[str, torch.Tensor]) -> torch.dtype:
    """The floating-point type of most of the numbers."""
    counts = Counter()
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point:
            counts[tensor.dtype] += tensor.shape.numel()
    return counts.most_common(1)[0][0]


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """A new directory to write to, which gets its name only if everything went well and is removed otherwise.

    Otherwise includes SIGTERM, which ends the program with code 143 here. For the main thread.

    Raises:
        ValueError: there is something of that name, other than an empty directory.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty: name a new directory, or remove it.")
    incomplete = directory.with_name(f"{directory.name}.incomplete")
    if incomplete.exists():  # of a run that was killed
        shutil.rmtree(incomplete)
    incomplete.mkdir(parents=True)
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield incomplete
        incomplete.rename(directory)
    except BaseException:
        shutil.rmtree(incomplete)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def _save_configuration(model: PreTrainedModel, directory: Path, dtype: torch.dtype) -> None:
    """What `save_pretrained` writes beside the weights."""
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    if model.is_remote_code():
        custom_object_save(model, directory, config=model.config)
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def _save_tensors(tensors: dict[str, LazyTensor], directory: Path, dtype: torch.dtype) -> None:
    """Writes shards of at most `MAX_SHARD_SIZE` and compares each, bit by bit, with the original's tensors."""

    def read(name: str) -> torch.Tensor:
        tensor = tensors[name].load()
        # A copy: safetensors refuses tensors that share memory, as SAM's one positional embedding under two names.
        return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()

    shapes = {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=MAX_SHARD_SIZE)
    for filename, names in split.filename_to_tensors.items():
        logger.info("%s: %d tensors", filename, len(names))
        save_file({name: read(name) for name in names}, directory / filename, metadata={"format": "pt"})
        close_files()
        with safe_open(directory / filename, "pt") as shard:
            different = [name for name in names if not torch.equal(shard.get_tensor(name), read(name))]
        if different:
            raise ValueError(
                f"{filename} does not hold what was written to it (or the original holds NaN): {different}. "
                "Check the disk and the checkpoint."
            )
        close_files()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
