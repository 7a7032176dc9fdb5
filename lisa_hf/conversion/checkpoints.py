"""Read checkpoints as mappings from names to tensors."""

import functools
import json
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .fsdp_checkpoints import is_fsdp_checkpoint, open_fsdp_checkpoint
from .lazy_tensors import LazyTensor


def open_checkpoint(path: Path) -> dict[str, LazyTensor]:
    """Return all tensors of a checkpoint.

    Args:
        path: File (`.bin`, `.pth`, `.safetensors`), or directory with such a file, its shards and their index, or FSDP
            shards.

    Raises:
        ValueError: A file is missing, cannot be read, or lacks tensors that the index lists.
    """
    if is_fsdp_checkpoint(path):
        return open_fsdp_checkpoint(path)
    files, indexed = _find_files(path)
    tensors = {}
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"{file} is missing: expected every shard in the index, got none here. Download it again."
            )
        tensors |= _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
    if missing := sorted(indexed - tensors.keys()):
        raise ValueError(
            f"{path}: expected every tensor of the index in its shards, got none of {missing}. Download it again."
        )
    return tensors


def close_files() -> None:
    """Free the memory of the files read last; they are opened again on demand."""
    _load_pickle.cache_clear()


# Files of LISA v0 that its index does not list.
LISA_V0_FILES = ("pytorch_model-visual_model.bin", "pytorch_model-text_hidden_fcs.bin")


def _find_files(path: Path) -> tuple[list[Path], set[str]]:
    """Return the files of a checkpoint, and the tensor names in its index (empty without an index)."""
    if path.is_file():
        return [path], set()
    beside = [path / name for name in LISA_V0_FILES] if (path / LISA_V0_FILES[0]).is_file() else []
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if index.is_file():
            weight_map = read_index(index)
            return [path / shard for shard in sorted(set(weight_map.values()))] + beside, set(weight_map)
        if (path / name).is_file():
            return [path / name, *beside], set()
    raise ValueError(
        f"{path}: expected a checkpoint file, or a directory with pytorch_model.bin or model.safetensors (or their "
        "shards and index), got neither. Name another path."
    )


def read_index(file: Path) -> dict[str, str]:
    """Return the file of each tensor, by name, in the index of a checkpoint in several files.

    Raises:
        ValueError: It is no index, or names a file outside of its directory, which may be somebody else's.
    """
    try:
        weight_map = json.loads(file.read_text("utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        strangers = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: expected an index with the file of each tensor as `weight_map`, got another file "
            f"({type(error).__name__}: {error}). Download it again."
        ) from error
    if strangers:
        raise ValueError(
            f"{file}: expected files in this directory, got {strangers[0]}. Download it again, from a source that you "
            "trust."
        )
    return weight_map


def _open_safetensors(file: Path) -> dict[str, LazyTensor]:
    def read(name: str) -> torch.Tensor:
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name)

    try:
        with safe_open(file, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}
            return {
                # A slice has its dtype only in safetensors' spelling; an empty or 0-dim tensor of it costs nothing.
                name: LazyTensor(
                    torch.Size(part.get_shape()),
                    (part[:0] if part.get_shape() else tensors.get_tensor(name)).dtype,
                    functools.partial(read, name),
                )
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(
            f"{file} cannot be read: expected a safetensors file, got a truncated or other one ({error}). "
            "Download it again."
        ) from error


def _open_pickle(file: Path) -> dict[str, LazyTensor]:
    def read(name: str) -> torch.Tensor:
        return _load_pickle(file)[name]

    return {
        name: LazyTensor(tensor.shape, tensor.dtype, functools.partial(read, name))
        for name, tensor in _read_pickle(file, "meta").items()
    }


@functools.lru_cache(maxsize=2)  # A delta and its base are read in turns.
def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    return _read_pickle(file, "cpu")


def _read_pickle(file: Path, device: str) -> dict[str, torch.Tensor]:
    try:
        # A mapped file takes memory only for tensors in use. The format before PyTorch 1.6 is not a zip file: read it
        # whole.
        content = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} cannot be read: expected a PyTorch file with nothing but tensors, got a truncated or other one "
            f"({error}). Download it again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        found = f"a dict with {list(content)[:8]}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{file}: expected a dict of named tensors, got {found}. Save only the state dict.")
    return content
