"""Measure the memory of a forward and a backward pass on fake tensors, which have shapes but no data.

torch's `MemTracker` is not an option: it fails on frozen weights.
"""

import weakref
from contextlib import nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .arguments import LisaTrainingArguments


def activation_bytes(
    model: nn.Module, args: LisaTrainingArguments, batch: dict, autocast: torch.dtype | None = None
) -> int:
    """Return the peak memory of a forward and a backward pass, without weights and their gradients.

    Args:
        model: Model whose parameters are replaced by fake ones.
        batch: Batch of real tensors: some VLMs look into them to see which images are padding.
        autocast: Dtype of mixed precision, which DeepSpeed does not use.
    """
    make_fake(model)
    model.train()
    if args.activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=args.activation_checkpointing_kwargs)
    # Gradients exist beforehand, as in all accumulation steps except the first.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    live = _LiveBytes([*model.parameters(), *model.buffers(), *(parameter.grad for parameter in trained)])
    with live, torch.autocast("cpu", autocast) if autocast else nullcontext():
        loss = model(**batch).loss
    with live:
        loss.backward()
    for parameter in trained:
        parameter.grad = None
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages alive at the same time, from the operation that creates one to its release.

    Args:
        held: Tensors that exist beforehand and are not counted.
    """

    def __init__(self, held: list[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index.Tensor:
            # Fake tensors do not know how many elements a mask selects; positions have a length.
            args = (args[0], [part for index in args[1] for part in _as_positions(index)])
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int):
        self._known.discard(key)
        self.live -= size


def _as_positions(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    is_mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return list(index.nonzero(as_tuple=True)) if is_mask else [index]


_FAKE_MODE = FakeTensorMode(allow_non_fake_inputs=True)


def fake_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return a fake CPU tensor with the shape and dtype of a tensor."""
    with _FAKE_MODE:
        return torch.empty(tensor.shape, dtype=tensor.dtype)


def make_fake(model: nn.Module) -> None:
    """Replace the parameters by fake ones on the CPU; tied parameters stay tied."""
    made = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, FakeTensor):
                if parameter not in made:
                    made[parameter] = nn.Parameter(fake_like(parameter), parameter.requires_grad)
                module._parameters[name] = made[parameter]
