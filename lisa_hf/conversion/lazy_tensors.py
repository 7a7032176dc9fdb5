"""Tensors before their values are read: as stored in a file, or sums of others, such as a delta and its base.

A 13B checkpoint does not fit into the memory of a small machine, and does not have to: names, shapes and dtypes are
read first, values one tensor at a time.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch


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


# ---- sums of tensors ------------------------------------------------------------------------------------------------

# Tensors of a delta that may have more rows than its base; the rows of new tokens are stored in full.
GROWN_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
LORA_FACTOR = re.compile(r"(.+)\.lora_([AB])\.(?:default\.)?weight")


def add_delta(delta: dict[str, LazyTensor], base: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Add a published delta to the LLaMA that it was computed from.

    Raises:
        ValueError: The base lacks tensors of the language model, or has other tensors or shapes; all are listed.
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
        lora_alpha: Scale of the run's LoRA, which the tensors do not contain.

    Raises:
        ValueError: A factor lacks its partner or its weight; all are listed.
    """
    # Separate the factors from the weights, and remove PEFT's wrappers from the names.
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
