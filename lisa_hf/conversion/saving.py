"""Save converted models: check every tensor, write shard by shard, read back, and rename the directory at the end."""

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save

from ..files import atomic_directory
from ..model.upstream_fixes import share_weights_files
from .checkpoints import close_files
from .lazy_tensors import LazyTensor


logger = logging.getLogger(__name__)

# Peak memory is two to three shards at any depth (measured: 4.2 GB at 7B's widths, 6.6 GB for a 13B delta).
MAX_SHARD_SIZE = "2GB"

# Values of the recipes' `--dtype`; None: that of the weights.
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ConvertedModel:
    """A model converted from an original checkpoint, before its weights are read.

    Args:
        model: Model on the meta device; its class, configuration and generation settings are saved.
        tensors: Weights of the model, by their names in it.
        processor: Processor that prepares its inputs.
        training_data: Its authors' statement about its training data, in one sentence.
    """

    model: PreTrainedModel
    tensors: dict[str, LazyTensor]
    processor: ProcessorMixin
    training_data: str = ""


def build_without_weights(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model on the meta device, with names and shapes but no memory."""
    with torch.device("meta"):
        return model_class(config)


def save_converted(converted: ConvertedModel, output_dir: Path, dtype: torch.dtype | None = None) -> None:
    """Save a converted model and its processor, and read both back.

    Args:
        converted: Model, tensors and processor to save.
        output_dir: Directory that does not exist or is empty. It appears once everything is written and verified.
        dtype: Dtype of the saved weights; by default the one that most of the original's values have.

    Raises:
        ValueError: The directory is not empty, weights are missing, left over or of another shape, or a file differs
            from what was written to it.
    """
    check_tensors(converted.model, converted.tensors)
    dtype = dtype or most_common_dtype(converted.tensors)
    logger.info("%d tensors fit %s; writing %s", len(converted.tensors), type(converted.model).__name__, dtype)
    with atomic_directory(output_dir) as directory:
        converted.processor.save_pretrained(directory)
        type(converted.processor).from_pretrained(directory)
        save_without_loading(converted.model, converted.tensors, directory, dtype, MAX_SHARD_SIZE)


def save_without_loading(
    model: PreTrainedModel,
    tensors: dict[str, LazyTensor],
    directory: Path,
    dtype: torch.dtype,
    max_shard_size: str,
) -> None:
    """Save a model like `save_pretrained`, with the weights of one file in memory at a time.

    Args:
        model: Model on the meta device.
        tensors: Weights to save, by their names in the model.
        directory: Directory to write to.
        dtype: Dtype of the saved weights.
        max_shard_size: Maximum size of a file.
    """
    _save_configuration(model, directory, dtype)
    _save_tensors(tensors, directory, dtype, max_shard_size)


def check_tensors(model: PreTrainedModel, tensors: dict[str, LazyTensor]) -> None:
    """Raise a `ValueError` that lists every weight that is missing, left over, or of another shape."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"{len(missing)} tensors are missing: {missing}")
    if left_over := [name for name in tensors if name not in expected]:
        problems.append(f"{len(left_over)} tensors are left over: {left_over}")
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise ValueError(
            f"Expected the {len(expected)} tensors of {type(model).__name__}, got {len(tensors)}: "
            f"{'; '.join(problems)}. Name a complete checkpoint and the configuration that belongs to it."
        )


def most_common_dtype(tensors: dict[str, LazyTensor] | dict[str, torch.Tensor]) -> torch.dtype:
    """Return the floating-point dtype that most values have."""
    counts = Counter()
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point:
            counts[tensor.dtype] += tensor.shape.numel()
    return counts.most_common(1)[0][0]


def _save_configuration(model: PreTrainedModel, directory: Path, dtype: torch.dtype) -> None:
    """Write everything that `save_pretrained` writes except the weights."""
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    if model.is_remote_code():
        custom_object_save(model, directory, config=model.config)
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def _save_tensors(tensors: dict[str, LazyTensor], directory: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Write shards of at most `max_shard_size` and compare each, bit by bit, with the original tensors."""

    def read(name: str) -> torch.Tensor:
        tensor = tensors[name].load()
        # Copy: safetensors rejects tensors that share memory, like SAM's positional embedding with its two names.
        return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()

    # Plan the shards from shapes, then hold the tensors of one shard at a time.
    shapes = {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        logger.info("%s: %d tensors", filename, len(names))
        save_file({name: read(name) for name in names}, directory / filename, metadata={"format": "pt"})
        close_files()
        with safe_open(directory / filename, "pt") as shard:
            different = [name for name in names if not torch.equal(shard.get_tensor(name), read(name))]
        if different:
            raise ValueError(
                f"{filename} differs from what was written: expected the original's values, got others (or NaN) in "
                f"{different}. Check the disk and the checkpoint."
            )
        close_files()
    share_weights_files(directory)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
