"""Original checkpoints as mappings from names to tensors that are read only when they are needed.

A 13B checkpoint does not fit into the memory of a small machine, and need not: shapes and dtypes of all tensors come
first, their values one by one.
"""

import functools
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor before it is read.

    Args:
        shape: of the tensor.
        dtype: of the tensor as it is stored; `load()` may return a more precise one.
        load: reads or computes the values.
    """

    shape: torch.Size
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "LazyTensor":
        return cls(tensor.shape, tensor.dtype, lambda: tensor)


# ---- files ----------------------------------------------------------------------------------------------------------


def open_checkpoint(path: Path) -> dict[str, LazyTensor]:
    """All tensors of a checkpoint.

    Args:
        path: one file (`.bin`, `.pth`, `.safetensors`), or a directory with one, or with its shards and their index.

    Raises:
        ValueError: a file is missing, cannot be read, or lacks tensors that the index promises.
    """
    files, promised = _find_files(path)
    tensors = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing: the index beside it names it as a shard. Download it again.")
        tensors |= _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
    if missing := sorted(promised - tensors.keys()):
        raise ValueError(f"{path}: {len(missing)} tensors of the index are in none of its shards: {missing}.")
    return tensors


def close_files() -> None:
    """Gives back the memory of the files that were read last; they are opened again when they are needed."""
    _load.cache_clear()


def _find_files(path: Path) -> tuple[list[Path], set[str]]:
    """The files of a checkpoint, and the names of the tensors that its index promises (none without an index)."""
    if path.is_file():
        return [path], set()
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            return [path / shard for shard in sorted(set(weight_map.values()))], set(weight_map)
        if (path / name).is_file():
            return [path / name], set()
    raise ValueError(
        f"{path}: expected a checkpoint file, or a directory with pytorch_model.bin or model.safetensors (or with "
        "shards and their index), found neither."
    )


def _open_safetensors(file: Path) -> dict[str, LazyTensor]:
    def read(name: str) -> torch.Tensor:
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name)

    try:
        with safe_open(file, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}
            return {
                name: LazyTensor(torch.Size(part.get_shape()), part[:0].dtype, functools.partial(read, name))
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: it is truncated, or no safetensors file ({error}).") from error


def _open_pickle(file: Path) -> dict[str, LazyTensor]:
    def read(name: str) -> torch.Tensor:
        return _load(file)[name]

    return {
        name: LazyTensor(tensor.shape, tensor.dtype, functools.partial(read, name))
        for name, tensor in _read_pickle(file, "meta").items()
    }


@functools.lru_cache(maxsize=2)  # a delta and its base
def _load(file: Path) -> dict[str, torch.Tensor]:
    return _read_pickle(file, "cpu")


def _read_pickle(file: Path, device: str) -> dict[str, torch.Tensor]:
    try:
        # A mapped file takes memory only for the tensors in use. PyTorch's format before 1.6, no zip, is read whole.
        content = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} cannot be read: it is truncated, or no PyTorch file, or holds more than tensors ({error})."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        found = f"a dict with {list(content)[:8]}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{file}: expected a dict of nothing but named tensors, found {found}.")
    return content


# ---- ZeRO -----------------------------------------------------------------------------------------------------------


def is_zero_checkpoint(path: Path) -> bool:
    """Whether a directory is DeepSpeed's: the one that holds `latest`, or a `global_step*` in it."""
    return path.is_dir() and ((path / "latest").is_file() or any(path.glob("*_optim_states.pt")))


def open_zero_checkpoint(path: Path) -> dict[str, LazyTensor]:
    """All tensors of a DeepSpeed ZeRO checkpoint, put together by DeepSpeed's own function.

    That function reads the frozen weights whole and unpickles without restrictions: give it your own runs alone.

    Raises:
        ValueError: a file is missing or truncated, and which one.
    """
    # Slow to import, and only this needs it.
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    is_root = (path / "latest").is_file()
    step = path / (path / "latest").read_text().strip() if is_root else path
    _check_zero_files(step)
    root, tag = (path, None) if is_root else (path.parent, path.name)
    state_dict = get_fp32_state_dict_from_zero_checkpoint(root, tag=tag, lazy_mode=True)
    return {name: LazyTensor(value.shape, value.dtype, value.contiguous) for name, value in state_dict.items()}


def _check_zero_files(step: Path) -> None:
    """DeepSpeed counts its files, but does not say which one is missing."""
    optimizer_files = sorted(step.glob("*_optim_states.pt"))
    if not optimizer_files:
        raise ValueError(f"{step}: expected the *_optim_states.pt of a DeepSpeed checkpoint, found none.")
    for file in sorted(step.glob("*_states.pt")):
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{file} cannot be read: it is truncated. Copy the checkpoint again.")
    optimizer = torch.load(optimizer_files[0], map_location="cpu", mmap=True, weights_only=False)
    optimizer = optimizer["optimizer_state_dict"]
    counts = optimizer["partition_count"]  # one per parameter group in ZeRO-2
    num_processes = max(counts) if isinstance(counts, list) else counts
    prefix = re.match(r"(.*)zero_pp_rank_\d+", optimizer_files[0].name)[1]
    expected = [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(num_processes)]
    if optimizer["zero_stage"] == 3:
        expected += [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(num_processes)]
    else:
        expected.append("mp_rank_00_model_states.pt")
    if missing := [name for name in expected if not (step / name).is_file()]:
        raise ValueError(
            f"{step}: {', '.join(missing)} missing, of {num_processes} processes. Copy the checkpoint again."
        )


# ---- sums of tensors ------------------------------------------------------------------------------------------------

# Tensors of a delta that may have more rows than those of its base: the rows of new tokens are whole.
GROWN_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
LORA_FACTOR = re.compile(r"(.+)\.lora_([AB])\.(?:default\.)?weight")


def add_delta(delta: dict[str, LazyTensor], base: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors of the model whose difference to a LLaMA was published.

    Raises:
        ValueError: the base lacks tensors of the language model, has others, or their shapes differ; all are listed.
    """
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
        raise ValueError(f"The base is not the one that this delta belongs to: {'; '.join(problems)}.")
    return total


def merge_lora(tensors: dict[str, LazyTensor], lora_alpha: float) -> dict[str, LazyTensor]:
    """Folds LoRA into the weights that it adapts: `W + lora_alpha / r * B A`, with r from A's shape.

    Args:
        tensors: in PEFT's names, with or without `base_model.model.` and `base_layer.`; without LoRA nothing happens.

    Raises:
        ValueError: a factor without its partner or its weight; all are listed.
    """
    merged, factors = {}, {}
    for name, tensor in tensors.items():
        name = name.removeprefix("base_model.model.")
        if match := LORA_FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[2]] = tensor
        else:
            merged[name.replace(".base_layer.", ".")] = tensor
    incomplete = [name for name, pair in factors.items() if len(pair) < 2 or f"{name}.weight" not in merged]
    if incomplete:
        raise ValueError(f"LoRA without its weight, or without one of its two factors: {incomplete}.")
    for name, pair in factors.items():
        scale = lora_alpha / pair["A"].shape[0]
        logger.info("%s.weight + %g lora_B lora_A", name, scale)
        merged[f"{name}.weight"] = _with_lora(merged[f"{name}.weight"], pair["A"], pair["B"], scale)
    return merged


def _sum(tensor: LazyTensor, base: LazyTensor) -> LazyTensor:
    def load() -> torch.Tensor:
        total = tensor.load().to(torch.float32, copy=True)
        total[: base.shape[0]] += base.load().float()
        return total

    return LazyTensor(tensor.shape, tensor.dtype, load)


def _with_lora(weight: LazyTensor, factor_a: LazyTensor, factor_b: LazyTensor, scale: float) -> LazyTensor:
    def load() -> torch.Tensor:
        return weight.load().float() + scale * (factor_b.load().float() @ factor_a.load().float())

    return LazyTensor(weight.shape, weight.dtype, load)
