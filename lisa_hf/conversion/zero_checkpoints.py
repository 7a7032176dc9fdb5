"""Read checkpoints of DeepSpeed's ZeRO: weights and optimizer states, merged from the parts of all processes."""

import functools
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .lazy_tensors import LazyTensor


def is_zero_checkpoint(path: Path) -> bool:
    """Return whether a directory is DeepSpeed's: one with `latest`, or a `global_step*` inside it."""
    return path.is_dir() and ((path / "latest").is_file() or any(path.glob("*_optim_states.pt")))


def open_zero_checkpoint(path: Path) -> dict[str, LazyTensor]:
    """Return all tensors of a DeepSpeed ZeRO checkpoint, each merged from all processes' parts when it is loaded.

    They are the same as from DeepSpeed's zero_to_fp32.py, which reads all of them at once, and runs code in them.

    Raises:
        ValueError: A file is missing, truncated, or contains more than tensors and DeepSpeed's own states.
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
    """Return the optimizer's states of a DeepSpeed ZeRO checkpoint, by trained weight and state name.

    Raises:
        ValueError: See [`open_zero_checkpoint`].
    """
    files = _read_zero_files(path)
    tensors = files.trained_tensors([files.weights(optimizer) for optimizer in files.optimizers])
    states = {name: {} for name in tensors}
    groups = [files.states(optimizer) for optimizer in files.optimizers]  # by process, then by group
    for key, value in groups[0][0].items():
        if torch.as_tensor(value).numel() == 1:  # the number of steps, the same for all
            of_weights = dict.fromkeys(tensors, LazyTensor.from_tensor(torch.as_tensor(value)))
        else:
            of_weights = files.trained_tensors([[group[key] for group in process] for process in groups])
        for name, tensor in of_weights.items():
            states[name][key] = tensor
    return states


@dataclass(frozen=True)
class _ZeroFiles:
    """Files saved by the processes, mapped from disk.

    Args:
        models: Model files: of the first process, or of each one with ZeRO-3, which also shards weights.
        optimizers: Optimizer files of each process.
    """

    models: list[dict]
    optimizers: list[dict]

    @property
    def cuts_each_weight(self) -> bool:
        """Whether each weight is sharded among the processes (ZeRO-3), or a row of a group's weights (ZeRO-1, 2)."""
        return self.optimizers[0]["zero_stage"] == 3

    def weights(self, optimizer: dict) -> list[torch.Tensor]:
        """Return the part of a process in each group: weights in one row."""
        return optimizer["fp32_flat_groups" if self.cuts_each_weight else "single_partition_of_fp32_groups"]

    def states(self, optimizer: dict) -> list[dict]:
        """Return the optimizer's states of the same parts, without the padding of the last part."""
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
        """Return the content of the parts of each process, by process and group, under the names of the weights."""
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
            # DeepSpeed pads a row to a multiple of twice the number of processes.
            multiple = 2 * len(parts)
            self._check_size(*(-(-size // multiple) * multiple for size in (end, sum(map(len, row)))))
        return tensors

    def _check_size(self, expected: int, found: int):
        if expected != found:
            raise ValueError(
                f"Expected {expected} values in DeepSpeed's *_optim_states.pt, got {found}: the files are from "
                "several checkpoints, or a version of DeepSpeed that this one cannot read. Copy the checkpoint again."
            )


def _slice_parts(parts: list[torch.Tensor], start: int, size: int) -> list[torch.Tensor]:
    """Return views of `size` values from `start` on, in a row that is split into parts."""
    views = []
    for part in parts:
        low, high = max(start, 0), min(start + size, len(part))
        if low < high:
            views.append(part[low:high])
        start -= len(part)
    return views


def _join_parts(parts: list, shape: torch.Size) -> torch.Tensor:
    """Return a tensor from its values in parts, or lists of parts, which may be padded with zeros."""
    flat = [part for entry in parts for part in (entry if isinstance(entry, list) else [entry])]
    return torch.cat(flat)[: shape.numel()].view(shape)


@contextmanager
def allow_zero_states() -> Iterator[None]:
    """Let `torch.load(weights_only=True)` read DeepSpeed's own states in this context."""
    # Imported here because it is slow and nothing else needs it.
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        yield


def _read_zero_files(path: Path) -> _ZeroFiles:
    def read(pattern: str) -> list[dict]:
        files = sorted(step.glob(pattern), key=lambda file: int(re.search(r"(\d+)_mp_rank|$", file.name)[1] or 0))
        return [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]

    is_root = (path / "latest").is_file()
    step = path / (path / "latest").read_text().strip() if is_root else path
    with allow_zero_states():
        try:
            _check_zero_files(step)
            optimizers = [file["optimizer_state_dict"] for file in read("*_optim_states.pt")]
            of_each = optimizers[0]["zero_stage"] == 3
            return _ZeroFiles(read("zero_pp_rank_*_model_states.pt" if of_each else "mp_rank_*"), optimizers)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{step} cannot be read: expected tensors and DeepSpeed's own states, got another object, which could "
                f"run code ({error}). Do not use the checkpoint unless you trust it: then consolidate it with its "
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
