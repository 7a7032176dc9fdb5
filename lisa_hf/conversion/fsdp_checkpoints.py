"""Read checkpoints that FSDP saved in shards, without running code that a file may contain."""

import functools
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .lazy_tensors import LazyTensor


# Where accelerate saves FSDP's shards, in the format of torch.distributed.checkpoint.
FSDP_DIRECTORY, FSDP_OPTIMIZER_DIRECTORY = f"{FSDP_MODEL_NAME}_0", f"{OPTIMIZER_NAME}_0"
# The classes of those modules that a checkpoint's description consists of.
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # Python 3.13
    "torch": {
        "Size",
        *(str(dtype).removeprefix("torch.") for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
    },
}


def is_fsdp_checkpoint(path: Path) -> bool:
    """Return whether a directory holds shards of FSDP (`fsdp_state_dict_type: SHARDED_STATE_DICT`)."""
    return (path / FSDP_DIRECTORY).is_dir()


def open_fsdp_checkpoint(path: Path, directory: str = FSDP_DIRECTORY) -> dict[str, LazyTensor]:
    """Return all tensors that FSDP saved in shards, from any number of processes; each is merged when it is loaded.

    Args:
        path: Checkpoint.
        directory: Directory of the shards in it: weights, or states of the optimizer.

    Raises:
        ValueError: A file is missing, truncated, or describes more than tensors.
    """
    metadata = FsdpReader(path / directory).read_metadata()
    for part in metadata.storage_data.values():
        file = path / directory / part.relative_path
        if not file.is_file() or file.stat().st_size < part.offset + part.length:
            raise ValueError(f"{file} is missing or truncated: expected the shards of all processes. Copy them again.")

    def load(name: str) -> torch.Tensor:
        saved = metadata.state_dict_metadata[name]
        state_dict = {name: torch.empty(saved.size, dtype=saved.properties.dtype)}
        with warnings.catch_warnings(action="ignore"):  # about a single process
            reader = FsdpReader(path / directory)
            torch.distributed.checkpoint.load(state_dict, storage_reader=reader, no_dist=True)
        return state_dict[name]

    return {
        name.removeprefix("model."): LazyTensor(saved.size, saved.properties.dtype, functools.partial(load, name))
        for name, saved in metadata.state_dict_metadata.items()
        if isinstance(saved, TensorStorageMetadata)
    }


class FsdpReader(FileSystemReader):
    """Reader that only unpickles the description of tensors, whereas torch would run any code in the file."""

    def read_metadata(self, *args, **kwargs):
        restricted = SimpleNamespace(load=lambda file: _Unpickler(file).load())
        with mock.patch("torch.distributed.checkpoint.filesystem.pickle", restricted):
            return super().read_metadata(*args, **kwargs)


class _Unpickler(pickle._Unpickler):  # Python implementation: the C one allocates any amount that a file names
    def find_class(self, module: str, name: str):
        if name not in _METADATA_CLASSES.get(module, ()):
            raise ValueError(
                f"expected a description of tensors in a checkpoint of FSDP, got {module}.{name}, which could run "
                "code. Do not use this file."
            )
        return super().find_class(module, name)
