"""How much memory a training step will take on each GPU, told before any weight is loaded.

A model is built without weights and prepared as for training. Weights, gradients and optimizer states follow from the
sizes of its parameters and from how DDP, ZeRO-2 and ZeRO-3 share them out, to the byte. Activations are measured: one
forward and backward pass runs on tensors that have shapes but no numbers, and what lives at the same time is counted.
"""

import dataclasses
import logging
import math
import weakref
from contextlib import nullcontext

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data.collator import LisaDataCollator
from ..data.masks import Mask, encode_mask
from ..data.prompts import Question
from ..model.configuration_lisa import LisaConfig
from ..model.losses import IGNORE_INDEX
from ..model.modeling_lisa import UNQUANTIZED_MODULES, LisaForConditionalGeneration
from ..model.packing import resolve_packing
from ..model.processing_lisa import LisaProcessor
from .arguments import DataArguments, LisaTrainingArguments, ModelArguments
from .build import build_model
from .trainable import prepare_for_training
from .trainer import LisaTrainer


logger = logging.getLogger(__name__)

IMAGE_SIZE = (480, 640)  # of the photo that stands for all, (H, W) in pixels: COCO's
BLOCK, NESTED_BLOCK = 64, 256  # numbers that share a scale in 4 bits, and scales that share one in 8


@dataclasses.dataclass
class MemoryEstimate:
    """Bytes on the process's GPU, and on its host if optimizer states or weights are offloaded.

    Args:
        weights: all of the model, with PEFT's copies of parts that train and with buffers.
        gradients: of the weights that train, as they are kept between accumulation steps.
        optimizer: its states and, with DeepSpeed, the weights in float32 that it works on.
        activations: the most that lives beside these during a forward and a backward pass.
        communication: buckets in which gradients travel and, with ZeRO-3, weights that are gathered for a layer. These
            alone are rules of thumb.
        host: what is offloaded.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int = 0
    communication: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.communication


def report_memory(
    config: LisaConfig,
    processor: LisaProcessor,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: LisaTrainingArguments,
) -> str:
    """A line about the memory that each process will need; a warning with remedies where its GPU has not as much."""
    model = prepare_for_training(build_model(model_args, config, empty=True), **model_args.adaptation)
    packing = resolve_packing(model.config, data_args.packing)
    collator = LisaDataCollator(processor, data_args.max_length, packing=packing)
    batch = example_batch(collator, args.per_device_train_batch_size, data_args.num_questions)
    estimate = estimate_memory(model, model_args, args, batch)
    rows, length = batch["input_ids"].shape
    names = [field.name for field in dataclasses.fields(estimate) if getattr(estimate, field.name)]
    parts = ", ".join(f"{name} {_format(getattr(estimate, name))}" for name in names if name != "host")
    host = f" (and {_format(estimate.host)} of the host's)" if estimate.host else ""
    if args.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(args.device)
        if estimate.total > free:
            logger.warning(
                "A step will need about %s of GPU memory, and %s are free. What needs less: %s.",
                _format(estimate.total),
                _format(free),
                "; ".join(_remedies(model_args, args)),
            )
    return (
        f"Memory per process, estimated: {_format(estimate.total)}{host}: {parts}; for "
        f"{args.per_device_train_batch_size} images of {IMAGE_SIZE[1]} x {IMAGE_SIZE[0]} at a time, with {rows} rows "
        f"of {length} tokens{'' if data_args.max_length else ' (an example; without max_length rows may be longer)'}."
    )


def _format(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _remedies(model_args: ModelArguments, args: LisaTrainingArguments) -> list[str]:
    """What is not yet in use, the cheapest first."""
    stage = args.deepspeed_plugin.zero_stage if args.deepspeed_plugin else 0
    is_shared = args.world_size > 1 and not args.shards_weights
    remedies = {
        "activation_checkpointing: true": not args.activation_checkpointing,
        "dtype: bfloat16 and bf16: true": not (args.bf16 or args.fp16),
        "per_device_train_batch_size: 1 with more gradient_accumulation_steps": args.per_device_train_batch_size > 1,
        "lora_r: 8 instead of the whole language model": model_args.lora_r == 0,
        "load_in_4bit: true": model_args.lora_r > 0 and not model_args.load_in_4bit and stage < 3,
        "recipes/accelerate/zero2.yaml": is_shared and stage < 2,
        "recipes/accelerate/zero3.yaml": is_shared and not model_args.load_in_4bit,
        "ds_configs/zero2_offload.json or zero3_offload.json": stage > 0,
    }
    return [remedy for remedy, is_open in remedies.items() if is_open] or ["GPUs with more memory"]


def estimate_memory(
    model: LisaForConditionalGeneration | PeftModel,
    model_args: ModelArguments,
    args: LisaTrainingArguments,
    batch: dict,
) -> MemoryEstimate:
    """Estimates what a step of a process takes.

    Args:
        model: an empty one of [`build_model`], after `prepare_for_training`; it is of no other use any more.
        batch: of one micro-step, on the CPU; see [`example_batch`].
    """
    plugin, half = args.deepspeed_plugin, torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if plugin is not None and half is not None:
        for parameter in model.parameters():  # as DeepSpeed does; buffers stay as they are
            parameter.data = parameter.data.to(half)
    quantized = _quantized_weights(model) if model_args.load_in_8bit or model_args.load_in_4bit else []
    saved = sum(weight.nbytes for weight in quantized) - _quantized_bytes(quantized, model_args)
    scratch = max((weight.nbytes for weight in quantized), default=0)  # a layer is multiplied in full precision
    _make_fake(model)
    optimizer = _create_optimizer(model, args)
    if plugin is None:
        estimate = _unshared(model, args, optimizer)
    elif plugin.zero_stage < 3:
        estimate = _zero2(model, args, optimizer)
    else:
        estimate = _zero3(model, args, optimizer)
    estimate.weights -= saved
    estimate.activations = scratch + activation_bytes(model, args, batch)
    return estimate


# ---- weights, gradients, optimizer ----------------------------------------------------------------------------------


def _unshared(model: nn.Module, args: LisaTrainingArguments, optimizer: Optimizer) -> MemoryEstimate:
    """Alone and under DDP, each process holds everything."""
    gradients = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return MemoryEstimate(
        weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        gradients=gradients,
        optimizer=_state_bytes(optimizer),
        communication=gradients if args.world_size > 1 else 0,  # DDP's buckets
    )


def _zero2(model: nn.Module, args: LisaTrainingArguments, optimizer: Optimizer) -> MemoryEstimate:
    """Each group of the optimizer is one flat tensor, of a length that twice the number of processes divides."""
    lengths = [sum(parameter.numel() for parameter in group["params"]) for group in optimizer.param_groups]
    padded = [math.ceil(length / (2 * args.world_size)) * 2 * args.world_size for length in lengths]
    shares = [length // args.world_size for length in padded]
    itemsize = optimizer.param_groups[0]["params"][0].element_size()
    bucket = min(_from_config(args, "reduce_bucket_size", model.config.hidden_size**2), sum(lengths))
    estimate = MemoryEstimate(
        weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        + itemsize * (sum(padded) - sum(lengths)),
        gradients=sum(
            _gradients_of_share(group["params"], share, args.process_index)
            for group, share in zip(optimizer.param_groups, shares)
        ),
        optimizer=4 * sum(shares) + _state_bytes(optimizer, shares),  # ... and the weights that it works on
        communication=2 * itemsize * bucket,
    )
    if args.deepspeed_plugin.offload_optimizer_device in ("cpu", "nvme"):
        estimate.host = estimate.optimizer + 4 * sum(shares)  # gradients in float32
        estimate.optimizer = estimate.gradients = 0
    return estimate


def _gradients_of_share(parameters: list[nn.Parameter], share: int, rank: int) -> int:
    """Bytes of the gradients that have a part in a process's share of a flat tensor; they are kept whole."""
    start = total = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        if start < (rank + 1) * share and stop > rank * share:
            total += parameter.nbytes
        start = stop
    padding = (rank + 1) * share - max(start, rank * share)
    return total + parameters[0].element_size() * max(padding, 0)


def _zero3(model: nn.Module, args: LisaTrainingArguments, optimizer: Optimizer) -> MemoryEstimate:
    """Each weight is cut by itself; small ones are kept whole beside their pieces once they were used."""
    pieces = {parameter: math.ceil(parameter.numel() / args.world_size) for parameter in model.parameters()}
    threshold = _from_config(args, "stage3_param_persistence_threshold", 10 * model.config.hidden_size)
    whole = sum(
        parameter.element_size() * piece * args.world_size  # as they are put together, with what the last piece pads
        for parameter, piece in pieces.items()
        if parameter.numel() <= threshold
    )
    cut = sum(parameter.element_size() * piece for parameter, piece in pieces.items())
    shares = [sum(pieces[parameter] for parameter in group["params"]) for group in optimizer.param_groups]
    dtype = optimizer.param_groups[0]["params"][0].dtype
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    largest_layer = max(sum(weight.nbytes for weight in layer.parameters()) for layer in layers)
    plugin = args.deepspeed_plugin
    estimate = MemoryEstimate(
        weights=cut + whole + sum(buffer.nbytes for buffer in model.buffers()),
        gradients=dtype.itemsize * sum(shares),
        optimizer=4 * sum(shares) + _state_bytes(optimizer, shares),
        # The layer that is computed and the next one.
        communication=dtype.itemsize * _from_config(args, "reduce_bucket_size", model.config.hidden_size**2)
        + 2 * largest_layer,
    )
    if plugin.offload_optimizer_device in ("cpu", "nvme"):
        estimate.host = estimate.optimizer + estimate.gradients + 4 * sum(shares)
        estimate.optimizer = estimate.gradients = 0
    if plugin.offload_param_device in ("cpu", "nvme"):
        estimate.host += cut
        estimate.weights -= cut
    return estimate


def _from_config(args: LisaTrainingArguments, key: str, auto: int) -> int:
    """A value of the DeepSpeed file; `auto` is what Trainer will put there for "auto"."""
    value = args.deepspeed_plugin.hf_ds_config.get_value(f"zero_optimization.{key}", "auto")
    return auto if value == "auto" else int(value)


def _create_optimizer(model: nn.Module, args: LisaTrainingArguments) -> Optimizer:
    """The optimizer that the trainer will make, of which only this method runs: it would move the model."""
    trainer = LisaTrainer.__new__(LisaTrainer)
    trainer.args, trainer.model, trainer.optimizer, trainer.optimizer_cls_and_kwargs = args, model, None, None
    optimizer = trainer.create_optimizer()
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


def _state_bytes(optimizer: Optimizer, shares: list[int] | None = None) -> int:
    """Bytes of the optimizer's states after a step on the parameters, or on one flat float32 share of each group."""
    groups = optimizer.param_groups
    for group, share in zip(groups, shares or [None] * len(groups)):
        parameters = group["params"] if share is None else [_fake_like(torch.empty(share, device="meta"))]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        group["params"] = parameters
    optimizer.step()
    states = [leaf for leaf in tree_leaves(optimizer.state_dict()) if isinstance(leaf, torch.Tensor)]
    optimizer.zero_grad()
    return sum(state.nbytes for state in states)


def _quantized_weights(model: nn.Module) -> list[nn.Parameter]:
    """Of the layers that `load_in_8bit` and `load_in_4bit` convert."""
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not {*UNQUANTIZED_MODULES, "lora_A", "lora_B"} & set(name.split("."))
    ]


def _quantized_bytes(weights: list[nn.Parameter], arguments: ModelArguments) -> int:
    """What bitsandbytes holds of them: the numbers, their scales and the tables of the values that they stand for."""
    if arguments.load_in_8bit:
        return sum(weight.numel() + 4 * weight.shape[0] for weight in weights)
    total = 0
    for weight in weights:
        num_scales = math.ceil(weight.numel() / BLOCK)
        total += math.ceil(weight.numel() / 2) + 4 * 16
        if arguments.bnb_4bit_use_double_quant:
            total += num_scales + 4 * math.ceil(num_scales / NESTED_BLOCK) + 4 * 256 + 4  # ..., their table and mean
        else:
            total += 4 * num_scales
    return total


# ---- activations ----------------------------------------------------------------------------------------------------


def activation_bytes(model: nn.Module, args: LisaTrainingArguments, batch: dict) -> int:
    """The most that lives during a forward and a backward pass, beside weights and their gradients.

    Args:
        model: with fake or meta weights; they stay so.
        batch: its floating-point tensors are replaced by fake ones, the others decide about shapes and stay.
    """
    _make_fake(model)
    model.train()
    if args.activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=args.activation_checkpointing_kwargs)
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    has_autocast = half is not None and args.deepspeed_plugin is None
    batch = {name: _fake_like(value) if _is_float(value) else value for name, value in batch.items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    with _LiveBytes(held) as live, torch.autocast("cpu", half) if has_autocast else nullcontext():
        loss = model(**batch).loss
    with live:
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that live at the same time, as operations make them and nobody holds them.

    Args:
        held: what is there anyway and does not count.
    """

    def __init__(self, held: list[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index.Tensor:
            # How many elements a mask selects is told by the mask, but a fake tensor will not look into it.
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
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int):
        self._known.discard(key)
        self.live -= size


def _as_positions(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    is_mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return list(index.nonzero(as_tuple=True)) if is_mask else [index]


def _is_float(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


_FAKE_MODE = FakeTensorMode(allow_non_fake_inputs=True)


def _fake_like(tensor: torch.Tensor) -> torch.Tensor:
    with _FAKE_MODE:
        return torch.empty(tensor.shape, dtype=tensor.dtype)


def _make_fake(model: nn.Module) -> None:
    """Puts tensors of the same shapes, on the CPU but without memory, in the place of the parameters."""
    made = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, FakeTensor):
                if parameter not in made:
                    made[parameter] = nn.Parameter(_fake_like(parameter), parameter.requires_grad)
                module._parameters[name] = made[parameter]


# ---- the batch ------------------------------------------------------------------------------------------------------


def example_batch(collator: LisaDataCollator, num_images: int, num_questions: int) -> dict:
    """A batch as training will make them, of blank photos of `IMAGE_SIZE`, rows as long as `max_length` allows."""
    mask = Mask.from_rle(encode_mask(np.ones(IMAGE_SIZE, dtype=bool)))
    questions = [
        Question(
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is {number}?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "It is [SEG]."}]},
            ],
            [mask],
        )
        for number in range(num_questions)
    ]
    item = {
        "image": Image.new("RGB", IMAGE_SIZE[::-1]),
        "original_size": list(IMAGE_SIZE),
        "features": None,
        "image_id": "",
        "source": "",
        "questions": questions,
        "ignore": None,
    }
    batch = collator([item] * num_images)
    del batch["meta"]
    if collator.max_length is not None:
        length, prefix, num_segments = batch["input_ids"].shape[1], 0, 1
        if "segment_ids" in batch:
            prefix, num_segments = int((batch["segment_ids"][0] == 0).sum()), num_questions
        missing = prefix + num_segments * (collator.max_length - prefix) - length
        for name, tensor in batch.items():
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (length,) and not tensor.is_floating_point():
                last = tensor[..., -1:].expand(*tensor.shape[:-1], max(missing, 0))
                filler = torch.full_like(last, IGNORE_INDEX) if "labels" in name else last
                batch[name] = torch.cat([tensor, filler], -1)
    return batch
