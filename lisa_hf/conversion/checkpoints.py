"""Read original checkpoints as mappings from names to tensors that are loaded only when they are needed.

A 13B checkpoint does not fit into the memory of a small machine and does not have to: names, shapes and dtypes are
read first, values one tensor at a time.
"""

import functools
import json
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor before its values are read.

    Args:
        shape: Shape of the tensor.
        dtype: Dtype of the tensor as stored; `load()` may return a more precise one.
        load: Function that reads or computes the values.
    """

    shape: torch.Size
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> "LazyTensor":
        return cls(tensor.shape, tensor.dtype, lambda: tensor)


# ---- files ----------------------------------------------------------------------------------------------------------


def open_checkpoint(path: Path) -> dict[str, LazyTensor]:
    """Return all tensors of a checkpoint.

    Args:
        path: File (`.bin`, `.pth`, `.safetensors`), or directory that holds one, or its shards and their index, or
            those of FSDP.

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
            weight_map = json.loads(index.read_text())["weight_map"]
            return [path / shard for shard in sorted(set(weight_map.values()))] + beside, set(weight_map)
        if (path / name).is_file():
            return [path / name, *beside], set()
    raise ValueError(
        f"{path}: expected a checkpoint file, or a directory with pytorch_model.bin or model.safetensors (or their "
        "shards and index), got neither. Name another path."
    )


def _open_safetensors(file: Path) -> dict[str, LazyTensor]:
    def read(name: str) -> torch.Tensor:
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name)

    try:
        with safe_open(file, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}
            return {
                # A slice knows its dtype only as safetensors spells it; an empty or 0-dim tensor of it costs nothing.
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
        # A mapped file takes memory only for tensors in use. The format before PyTorch 1.6 is no zip: read it whole.
        content = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} cannot be read: expected a PyTorch file with nothing but tensors, got a truncated or other one "
            f"({error}). Download it again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        found = f"a dict with {list(content)[:8]}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{file}: expected a dict of named tensors, got {found}. Save the state dict alone.")
    return content


# ---- which original it is -------------------------------------------------------------------------------------------

# RMSNorm scales are around 1 in a model, and their differences to the base's around 0 in a delta.
MAX_NORM_OF_DELTA = 0.2


def recognize_source(tensors: dict[str, LazyTensor]) -> str | None:
    """Return the source, as `recipes/convert_weights.py` names it, that tensors are of; None for no original's.

    Raises:
        ValueError: They are of a model that makes masks in another way.
    """
    if any(name.startswith("image_encoder.") for name in tensors):
        return "sam"
    if any(name.startswith("grounding_encoder.sam2_model.") for name in tensors):
        return "sa2va"
    if any(name.startswith("base_model.model.") or LORA_FACTOR.fullmatch(name) for name in tensors):
        return "lisa-train"
    if any(name.startswith("model.visual_model.") for name in tensors):
        return "lisa"
    if any(name.startswith("visual_model.") for name in tensors):
        return "lisa-v0"
    if any(name.startswith("model.grounding_encoder.") for name in tensors):
        return "glamm"
    if any(name.startswith("seg_head.") for name in tensors):
        raise ValueError(
            "--checkpoint: expected a model that prompts its mask decoder with one token per [SEG], got UniPixel, "
            "which makes two by a head of another kind, beside modules for objects that are pointed at. Use its code."
        )
    if not any(name.startswith("model.mm_projector.") for name in tensors):
        return None
    norm = tensors.get("model.norm.weight")
    is_delta = norm is not None and norm.load().float().abs().mean() < MAX_NORM_OF_DELTA
    close_files()
    return "llava-delta" if is_delta else "llava"


# ---- ZeRO -----------------------------------------------------------------------------------------------------------


def is_zero_checkpoint(path: Path) -> bool:
    """Return whether a directory is one of DeepSpeed's: one that holds `latest`, or a `global_step*` inside it."""
    return path.is_dir() and ((path / "latest").is_file() or any(path.glob("*_optim_states.pt")))


def open_zero_checkpoint(path: Path) -> dict[str, LazyTensor]:
    """Return all tensors of a DeepSpeed ZeRO checkpoint, each put together of all processes' parts when it is loaded.

    They are those that DeepSpeed's zero_to_fp32.py writes, which reads all of them at once, and runs code in them.

    Raises:
        ValueError: A file is missing, truncated, or holds more than tensors and DeepSpeed's own states.
    """
    files = _read_zero_files(path)
    first = files.models[0]
    buffers = {name: tensor for name, tensor in first["module"].items() if name in first["buffer_names"]}
    tensors = {
        name: LazyTensor.from_tensor(tensor.float() if tensor.is_floating_point() else tensor)
        for name, tensor in buffers.items()
    }
    for name, shape in (first.get("frozen_param_shapes") or {}).items():
        parts = [model["frozen_param_fragments"][name].flatten() for model in files.models]
        tensors[name] = LazyTensor(shape, parts[0].dtype, functools.partial(_join_parts, parts, shape))
    tensors |= files.trained_tensors([files.weights(optimizer) for optimizer in files.optimizers])
    return tensors | {name: tensors[same] for name, same in first["shared_params"].items() if same in tensors}


def open_zero_optimizer(path: Path) -> dict[str, dict[str, LazyTensor]]:
    """Return the optimizer's states of a DeepSpeed ZeRO checkpoint, by trained weight and name of the state.

    Raises:
        ValueError: See [`open_zero_checkpoint`].
    """
    files = _read_zero_files(path)
    tensors = files.trained_tensors([files.weights(optimizer) for optimizer in files.optimizers])
    states = {name: {} for name in tensors}
    groups = [files.states(optimizer) for optimizer in files.optimizers]  # by process, then by group
    for key, value in groups[0][0].items():
        if torch.as_tensor(value).numel() == 1:  # the number of steps, alike for all
            of_weights = dict.fromkeys(tensors, LazyTensor.from_tensor(torch.as_tensor(value)))
        else:
            of_weights = files.trained_tensors([[group[key] for group in process] for process in groups])
        for name, tensor in of_weights.items():
            states[name][key] = tensor
    return states


@dataclass(frozen=True)
class _ZeroFiles:
    """What the processes saved, mapped from the disk.

    Args:
        models: Of the first process, or of each one with ZeRO-3, which cuts weights too.
        optimizers: Of each process.
    """

    models: list[dict]
    optimizers: list[dict]

    @property
    def cuts_each_weight(self) -> bool:
        """Whether each weight is cut among the processes (ZeRO-3), or a row of all weights of a group (ZeRO-1, 2)."""
        return self.optimizers[0]["zero_stage"] == 3

    def weights(self, optimizer: dict) -> list[torch.Tensor]:
        """Return the part of a process in each group: weights in one row."""
        return optimizer["fp32_flat_groups" if self.cuts_each_weight else "single_partition_of_fp32_groups"]

    def states(self, optimizer: dict) -> list[dict]:
        """Return the optimizer's states of the same parts, without what fills the last part up."""
        states = optimizer["optimizer_state_dict" if self.cuts_each_weight else "base_optimizer_state"]["state"]
        return [
            {
                key: value[: len(part)] if torch.as_tensor(value).numel() > 1 else value
                for key, value in states[index].items()
            }
            for index, part in enumerate(self.weights(optimizer))
            if index in states
        ] or [{}]

    def trained_tensors(self, parts: list[list[torch.Tensor]]) -> dict[str, LazyTensor]:
        """Return what is in the parts of each process, by process and group, under the names of the weights."""
        groups = self.models[0]["param_shapes"]
        tensors, end = {}, 0
        if self.cuts_each_weight:
            for name, shape in (item for group in groups for item in group.items()):
                size = -(-shape.numel() // len(parts))
                slices = [_slice_parts(process, end, size) for process in parts]
                tensors[name] = LazyTensor(shape, parts[0][0].dtype, functools.partial(_join_parts, slices, shape))
                end += size
            self._check_size(end, sum(map(len, parts[0])))
            return tensors
        paddings = self.optimizers[0].get("param_alignment_paddings") or [[0] * len(group) for group in groups]
        for index, (group, padding) in enumerate(zip(groups, paddings, strict=True)):
            row, end = [process[index] for process in parts], 0
            for (name, shape), fill in zip(group.items(), padding, strict=True):
                slices = _slice_parts(row, end, shape.numel())
                tensors[name] = LazyTensor(shape, row[0].dtype, functools.partial(_join_parts, slices, shape))
                end += shape.numel() + fill
            # DeepSpeed fills a row up to a multiple of twice the number of processes.
            multiple = 2 * len(parts)
            self._check_size(*(-(-size // multiple) * multiple for size in (end, sum(map(len, row)))))
        return tensors

    def _check_size(self, expected: int, found: int):
        if expected != found:
            raise ValueError(
                f"Expected {expected} values in DeepSpeed's *_optim_states.pt, got {found}: the files are of several "
                "checkpoints, or of a version of DeepSpeed that this one cannot read. Copy the checkpoint again."
            )


def _slice_parts(parts: list[torch.Tensor], start: int, size: int) -> list[torch.Tensor]:
    """Return views of `size` values from `start` on in a row that is cut into parts."""
    views = []
    for part in parts:
        low, high = max(start, 0), min(start + size, len(part))
        if low < high:
            views.append(part[low:high])
        start -= len(part)
    return views


def _join_parts(parts: list, shape: torch.Size) -> torch.Tensor:
    """Return a tensor from its values in parts, or lists of parts, which zeros may fill up at the end."""
    flat = [part for entry in parts for part in (entry if isinstance(entry, list) else [entry])]
    return torch.cat(flat)[: shape.numel()].view(shape)


def _read_zero_files(path: Path) -> _ZeroFiles:
    # Imported here because it is slow and nothing else needs it.
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def read(pattern: str) -> list[dict]:
        files = sorted(step.glob(pattern), key=lambda file: int(re.search(r"(\d+)_mp_rank|$", file.name)[1] or 0))
        return [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]

    is_root = (path / "latest").is_file()
    step = path / (path / "latest").read_text().strip() if is_root else path
    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        try:
            _check_zero_files(step)
            optimizers = [file["optimizer_state_dict"] for file in read("*_optim_states.pt")]
            of_each = optimizers[0]["zero_stage"] == 3
            return _ZeroFiles(read("zero_pp_rank_*_model_states.pt" if of_each else "mp_rank_*"), optimizers)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{step} cannot be read: expected tensors and DeepSpeed's own states, got another object, which could "
                f"run code ({error}). Do not use the checkpoint unless you trust it: then consolidate it by its "
                "zero_to_fp32.py and name the result."
            ) from error


def _check_zero_files(step: Path) -> None:
    """Raise a `ValueError` that names missing or truncated files, which DeepSpeed only counts."""
    optimizer_files = sorted(step.glob("*_optim_states.pt"))
    if not optimizer_files:
        raise ValueError(f"{step}: expected DeepSpeed's *_optim_states.pt, got none. Name a ZeRO checkpoint.")
    for file in sorted(step.glob("*_states.pt")):
        if not zipfile.is_zipfile(file):
            raise ValueError(
                f"{file} cannot be read: expected a PyTorch file, got a truncated one. Copy the checkpoint again."
            )
    optimizer = torch.load(optimizer_files[0], map_location="cpu", mmap=True, weights_only=True)
    optimizer = optimizer["optimizer_state_dict"]
    counts = optimizer["partition_count"]  # ZeRO-2 has one per parameter group.
    num_processes = max(counts) if isinstance(counts, list) else counts
    prefix = re.match(r"(.*)zero_pp_rank_\d+", optimizer_files[0].name)[1]  # "bf16_" or nothing
    expected = [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(num_processes)]
    if optimizer["zero_stage"] == 3:
        expected += [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(num_processes)]
    else:
        expected.append("mp_rank_00_model_states.pt")
    if missing := [name for name in expected if not (step / name).is_file()]:
        raise ValueError(
            f"{step}: {', '.join(missing)} missing, expected the files of {num_processes} processes, got "
            f"{len(expected) - len(missing)} of {len(expected)}. Copy the checkpoint again."
        )


# ---- FSDP -----------------------------------------------------------------------------------------------------------

# Where accelerate saves FSDP's shards, in the format of torch.distributed.checkpoint.
FSDP_DIRECTORY, FSDP_OPTIMIZER_DIRECTORY = f"{FSDP_MODEL_NAME}_0", f"{OPTIMIZER_NAME}_0"
# Of those modules, what the description of a checkpoint consists of.
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
    """Return all tensors that FSDP saved in shards, by any number of processes; one is put together when it is loaded.

    Args:
        path: Checkpoint.
        directory: Where in it they are: weights, or states of the optimizer.

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
        with warnings.catch_warnings(action="ignore"):  # that this is one process
            reader = FsdpReader(path / directory)
            torch.distributed.checkpoint.load(state_dict, storage_reader=reader, no_dist=True)
        return state_dict[name]

    return {
        name.removeprefix("model."): LazyTensor(saved.size, saved.properties.dtype, functools.partial(load, name))
        for name, saved in metadata.state_dict_metadata.items()
        if isinstance(saved, TensorStorageMetadata)
    }


class FsdpReader(FileSystemReader):
    """A reader that unpickles nothing but the description of tensors, where torch would run any code in the file."""

    def read_metadata(self, *args, **kwargs):
        restricted = SimpleNamespace(load=lambda file: _Unpickler(file).load())
        with mock.patch("torch.distributed.checkpoint.filesystem.pickle", restricted):
            return super().read_metadata(*args, **kwargs)


class _Unpickler(pickle._Unpickler):  # in Python: the one in C allocates any amount that a file names
    def find_class(self, module: str, name: str):
        if name not in _METADATA_CLASSES.get(module, ()):
            raise ValueError(
                f"expected a description of tensors in a checkpoint of FSDP, got {module}.{name}, which could run "
                "code. Do not use this file."
            )
        return super().find_class(module, name)


# ---- sums of tensors ------------------------------------------------------------------------------------------------

# Tensors of a delta that may have more rows than its base has; the rows of new tokens are stored whole.
GROWN_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
LORA_FACTOR = re.compile(r"(.+)\.lora_([AB])\.(?:default\.)?weight")


def add_delta(delta: dict[str, LazyTensor], base: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Add a published delta to the LLaMA that it was computed from.

    Raises:
        ValueError: The base lacks tensors of the language model, has others, or has other shapes; all are listed.
    """
    # Rotary frequencies are computed from the configuration; only some bases store them.
    base = {name: tensor for name, tensor in base.items() if not name.endswith("rotary_emb.inv_freq")}
    problems = [f"{name}: only in the base" for name in base if name not in delta]
    total = {}
    for name, tensor in delta.items():
        if name in base:
            grown = name in GROWN_TENSORS and tensor.shape[0] >= base[name].shape[0]
            if tensor.shape != base[name].shape and not (grown and tensor.shape[1:] == base[name].shape[1:]):
                problems.append(f"{name}: {tuple(tensor.shape)} in the delta, {tuple(base[name].shape)} in the base")
        elif not name.startswith(("model.mm_projector.", "model.vision_tower.")) and "inv_freq" not in name:
            problems.append(f"{name}: only in the delta")
        total[name] = _sum(tensor, base[name]) if name in base else tensor
        logger.info("%s: %s", name, "delta + base" if name in base else "whole in the delta")
    if problems:
        raise ValueError(
            f"Expected the base that this delta was computed from, got one that differs: {'; '.join(problems)}. "
            "Name another --base."
        )
    return total


def _sum(tensor: LazyTensor, base: LazyTensor) -> LazyTensor:
    def load() -> torch.Tensor:
        total = tensor.load().to(torch.float32, copy=True)
        total[: base.shape[0]] += base.load().float()  # rows of new tokens come after the base's
        return total

    return LazyTensor(tensor.shape, tensor.dtype, load)


def merge_lora_tensors(tensors: dict[str, LazyTensor], lora_alpha: float) -> dict[str, LazyTensor]:
    """Fold LoRA factors into the weights that they adapt: `W + lora_alpha / r * B A`, with r from A's shape.

    Args:
        tensors: Tensors in PEFT's names, with or without `base_model.model.` and `base_layer.`. Without LoRA factors
            they are returned as they are.
        lora_alpha: Scale of the run's LoRA, which no tensor shows.

    Raises:
        ValueError: A factor lacks its partner or its weight; all are listed.
    """
    # Split the factors from the weights, and take PEFT's wrappers off the names.
    merged, factors = {}, {}
    for name, tensor in tensors.items():
        name = name.removeprefix("base_model.model.")
        if match := LORA_FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[2]] = tensor
        else:
            merged[name.replace(".base_layer.", ".")] = tensor
    incomplete = [name for name, pair in factors.items() if len(pair) < 2 or f"{name}.weight" not in merged]
    if incomplete:
        raise ValueError(
            f"Expected lora_A, lora_B and a weight for every LoRA layer, got less for {incomplete}. Save the whole "
            "state dict of the run."
        )
    for name, pair in factors.items():
        scale = lora_alpha / pair["A"].shape[0]
        logger.info("%s.weight + %g lora_B lora_A", name, scale)
        merged[f"{name}.weight"] = _add_lora(merged[f"{name}.weight"], pair["A"], pair["B"], scale)
    return merged


def _add_lora(weight: LazyTensor, factor_a: LazyTensor, factor_b: LazyTensor, scale: float) -> LazyTensor:
    def load() -> torch.Tensor:
        # [out, in] + scale * [out, r] @ [r, in]
        return weight.load().float() + scale * (factor_b.load().float() @ factor_a.load().float())

    return LazyTensor(weight.shape, weight.dtype, load)
