"""Estimate the memory that a training step needs on each GPU, before any weight is loaded.

The model is built without weights and prepared for training. Weights, gradients and optimizer states follow to the
byte from the parameter sizes and from how DDP, ZeRO and FSDP2 shard them, whereas DeepSpeed's
`estimate_zero*_model_states_mem_needs` assume that every weight is trained, in 16 bits and with Adam. Activations are
measured, see activation_memory.py.
"""

import dataclasses
import logging
import math

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from ..data.collator import LisaDataCollator
from ..data.masks import Mask, encode_mask
from ..data.prompts import Question
from ..model.configuration_lisa import LisaConfig
from ..model.conversation_text import user_message
from ..model.losses import IGNORE_INDEX
from ..model.modeling_lisa import UNQUANTIZED_MODULES, LisaForConditionalGeneration
from ..model.packing import resolve_packing
from ..model.processing_lisa import LisaProcessor
from .activation_memory import activation_bytes, fake_like, make_fake
from .arguments import DataArguments, LisaTrainingArguments, ModelArguments
from .build import build_model
from .trainable import prepare_for_training
from .trainer import LisaTrainer


logger = logging.getLogger(__name__)

IMAGE_SIZE = (480, 640)  # of the example photo, (H, W) in pixels, as in COCO


@dataclasses.dataclass
class Engine:
    """Distribution of a training step among processes with one GPU each.

    Args:
        num_processes: Number of processes.
        process_index: Rank of the process whose memory is estimated.
        zero: Section `zero_optimization` of a DeepSpeed file, in which "auto" is Trainer's choice. None: a single
            process, DDP or FSDP2.
        fsdp: Whether FSDP2 shards the model.
    """

    num_processes: int = 1
    process_index: int = 0
    zero: dict | None = None
    fsdp: bool = False

    @classmethod
    def of_this_run(cls, args: LisaTrainingArguments):
        plugin = args.deepspeed_plugin
        zero = None if plugin is None else plugin.hf_ds_config.config["zero_optimization"]
        return cls(args.world_size, args.process_index, zero, fsdp=zero is None and args.shards_weights)

    def zero_option(self, key: str, auto: int) -> int:
        """Return a number from the DeepSpeed file, or `auto`, Trainer's value for "auto"."""
        value = self.zero.get(key, "auto")
        return auto if value == "auto" else int(value)

    def offloads(self, what: str) -> bool:
        """Return whether "optimizer" states or "param" weights are in host memory."""
        return self.zero.get(f"offload_{what}", {}).get("device", "none") != "none"


@dataclasses.dataclass
class MemoryEstimate:
    """Bytes on the GPU of a process.

    Args:
        weights: The whole model with buffers and PEFT's copies of trained parts.
        gradients: Gradients of the trained weights, kept between accumulation steps.
        optimizer: Optimizer states and, with DeepSpeed, the float32 copies of the trained weights.
        activations: Peak of everything else during a forward and a backward pass; None if it could not be measured.
        communication: Gradient buckets; with ZeRO-3 and FSDP2, gathered weights of two layers and, with FSDP2, of
            everything outside the layers. A rule of thumb.
        host: Bytes in host memory instead: offloaded optimizer states, gradients and weights.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None = 0
    communication: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + (self.activations or 0) + self.communication


def report_memory(
    config: LisaConfig,
    processor: LisaProcessor,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: LisaTrainingArguments,
) -> str:
    """Return a line about the memory per process, and warn with remedies if the GPU has less."""
    model = prepare_for_training(build_model(model_args, config, empty=True), **model_args.adaptation)
    packing = resolve_packing(model.config, data_args.packing)
    collator = LisaDataCollator(processor, data_args.max_length, packing=packing)
    batch = example_batch(collator, args.per_device_train_batch_size, data_args.num_questions)
    (estimate,) = estimate_memory(model, model_args, args, batch, [Engine.of_this_run(args)])
    if args.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(args.device)
        if estimate.total > free:
            logger.warning(
                "A step needs about %s of GPU memory, but only %s are free. To need less: %s.",
                _format(estimate.total),
                _format(free),
                "; ".join(_remedies(model_args, args)),
            )
    parts = [f"{name} {_format(size)}" for name, size in vars(estimate).items() if size and name != "host"]
    host = f" (plus {_format(estimate.host)} of host memory)" if estimate.host else ""
    rows, length = batch["input_ids"].shape
    if estimate.activations is None:
        host += " without activations, which cannot be measured with this VLM"
    return (
        f"Estimated memory per process: {_format(estimate.total)}{host}: {', '.join(parts)}; for "
        f"{args.per_device_train_batch_size} images of {IMAGE_SIZE[1]} x {IMAGE_SIZE[0]} at a time, with {rows} rows "
        f"of {length} tokens{'' if data_args.max_length else ' (an example; without max_length rows may be longer)'}."
    )


def _format(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _remedies(model_args: ModelArguments, args: LisaTrainingArguments) -> list[str]:
    """Return the options that are not used yet, cheapest first."""
    stage = args.deepspeed_plugin.zero_stage if args.deepspeed_plugin else 0
    can_shard = args.world_size > 1 and not args.shards_weights
    remedies = {
        "activation_checkpointing: true": not args.activation_checkpointing,
        "dtype: bfloat16 and bf16: true": not (args.bf16 or args.fp16),
        "per_device_train_batch_size: 1 with more gradient_accumulation_steps": args.per_device_train_batch_size > 1,
        "lora_r: 8 instead of the whole language model": model_args.lora_r == 0,
        "load_in_4bit: true": model_args.lora_r > 0 and not model_args.load_in_4bit and stage < 3,
        "recipes/accelerate/zero2.yaml": can_shard and stage < 2,
        "recipes/accelerate/zero3.yaml": can_shard and not model_args.load_in_4bit,
        "ds_configs/zero2_offload.json or zero3_offload.json": stage > 0,
    }
    return [remedy for remedy, is_open in remedies.items() if is_open] or ["GPUs with more memory"]


def estimate_memory(
    model: LisaForConditionalGeneration | PeftModel,
    model_args: ModelArguments,
    args: LisaTrainingArguments,
    batch: dict,
    engines: list[Engine],
) -> list[MemoryEstimate]:
    """Estimate the memory of a training step in one process of each engine.

    Args:
        model: Empty model from [`build_model`] after `prepare_for_training`. It is unusable afterwards.
        batch: Batch of one micro-step on the CPU, see [`example_batch`].
        engines: Engines, either all or none with DeepSpeed, which determines the activations; these are the same in
            all processes.
    """
    (has_deepspeed,) = {engine.zero is not None for engine in engines}
    half = _half_precision(args)
    if has_deepspeed and half is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(half)  # DeepSpeed casts parameters and keeps buffers
    quantized = _quantized_weights(model) if model_args.load_in_8bit or model_args.load_in_4bit else []
    saved = sum(weight.nbytes - _quantized_bytes(weight, model_args) for weight in quantized)
    make_fake(model)
    estimates = [_model_states(model, engine, _create_optimizer(model, args), half) for engine in engines]
    fake_log = logging.getLogger(FakeTensorMode.__module__)
    was_disabled, fake_log.disabled = fake_log.disabled, True  # it logs errors with tracebacks
    try:
        activations = activation_bytes(model, args, batch, autocast=None if has_deepspeed else half)
        # A quantized layer is multiplied in full precision.
        activations += max((weight.nbytes for weight in quantized), default=0)
    except Exception:
        # Fake tensors lack some operations used in training, such as experts in float32.
        logger.debug("The activations could not be measured.", exc_info=True)
        activations = None
    finally:
        fake_log.disabled = was_disabled
    for estimate in estimates:
        estimate.weights -= saved
        estimate.activations = activations
    return estimates


def _half_precision(args: LisaTrainingArguments) -> torch.dtype | None:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


# ---- weights, gradients, optimizer states ---------------------------------------------------------------------------


def _model_states(model: nn.Module, engine: Engine, optimizer: Optimizer, half: torch.dtype | None) -> MemoryEstimate:
    """Compute weights, gradients and optimizer states as distributed by DDP, ZeRO-2, ZeRO-3 or FSDP2.

    Args:
        model: Model of fake parameters.
        engine: The engine.
        optimizer: Optimizer of the trained parameters.
        half: Dtype of mixed precision, if any.
    """
    world_size = engine.num_processes
    groups = [group["params"] for group in optimizer.param_groups]
    trained = [parameter for group in groups for parameter in group]
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    gradients = sum(parameter.nbytes for parameter in trained)
    if engine.fsdp:
        return _fsdp_states(model, engine, optimizer, half)
    if engine.zero is None:
        buckets = gradients if world_size > 1 else 0
        return MemoryEstimate(weights, gradients, _state_bytes(optimizer), communication=buckets)

    itemsize = trained[0].element_size()
    bucket = engine.zero_option("reduce_bucket_size", model.config.hidden_size**2)
    if engine.zero["stage"] < 3:
        # Each parameter group is one flat tensor, padded to a multiple of twice the processes.
        length = sum(parameter.numel() for parameter in trained)
        shards = [2 * math.ceil(sum(parameter.numel() for parameter in group) / (2 * world_size)) for group in groups]
        weights += itemsize * (world_size * sum(shards) - length)
        gradients = sum(_zero2_gradients(group, shard, engine.process_index) for group, shard in zip(groups, shards))
        communication = 2 * itemsize * min(bucket, length)
    else:
        # Each weight is sharded separately; small ones are also kept whole after their first use.
        sizes = {parameter: math.ceil(parameter.numel() / world_size) for parameter in model.parameters()}
        sharded = sum(parameter.element_size() * size for parameter, size in sizes.items())
        threshold = engine.zero_option("stage3_param_persistence_threshold", 10 * model.config.hidden_size)
        small = [parameter for parameter in sizes if parameter.numel() <= threshold]
        whole = sum(parameter.element_size() * sizes[parameter] * world_size for parameter in small)  # with padding
        shards = [sum(sizes[parameter] for parameter in group) for group in groups]
        weights = sharded + whole + sum(buffer.nbytes for buffer in model.buffers())
        gradients = itemsize * sum(shards)
        # The current layer and the next one are gathered.
        communication = itemsize * bucket + 2 * max(_layer_bytes(model))
    states = _state_bytes(optimizer, [[torch.Size([shard])] for shard in shards], torch.float32)
    optimizer_bytes = 4 * sum(shards) + states  # with float32 copies of the weights
    estimate = MemoryEstimate(weights, gradients, optimizer_bytes, communication=communication)
    if engine.offloads("optimizer"):
        estimate.host = optimizer_bytes + 4 * sum(shards)  # with float32 copies of the gradients
        estimate.host += gradients if engine.zero["stage"] == 3 else 0
        estimate.optimizer = estimate.gradients = 0
    if engine.zero["stage"] == 3 and engine.offloads("param"):
        estimate.host += sharded
        estimate.weights -= sharded
    return estimate


def _fsdp_states(model: nn.Module, engine: Engine, optimizer: Optimizer, half: torch.dtype | None) -> MemoryEstimate:
    """Compute what FSDP2 keeps on a process: some slices of each weight along its first dimension."""

    def shard_shape(parameter: nn.Parameter) -> torch.Size:
        count = math.ceil(len(parameter) / engine.num_processes)  # on every process except the last ones
        start = engine.process_index * count
        return torch.Size([min(count, max(len(parameter) - start, 0)), *parameter.shape[1:]])

    groups = [group["params"] for group in optimizer.param_groups]
    trained = {parameter for group in groups for parameter in group}
    # With mixed precision, accelerate keeps trained weights in float32.
    dtype = torch.float32 if half else next(iter(trained)).dtype
    sizes = {
        parameter: dtype.itemsize if parameter in trained else parameter.itemsize for parameter in model.parameters()
    }
    weights = sum(
        size * math.ceil(len(parameter) / engine.num_processes) * parameter[0].numel()  # padded
        for parameter, size in sizes.items()
    )
    shapes = [[shard_shape(parameter) for parameter in group] for group in groups]
    gradients = dtype.itemsize * sum(shape.numel() for group in shapes for shape in group)
    layers = _layer_bytes(model)
    outside = sum(parameter.nbytes for parameter in model.parameters()) - sum(layers)
    return MemoryEstimate(
        weights=weights + sum(buffer.nbytes for buffer in model.buffers()),
        gradients=gradients,
        optimizer=_state_bytes(optimizer, shapes, dtype),
        communication=outside + 2 * max(layers),
    )


def _layer_bytes(model: nn.Module) -> list[int]:
    """Return the bytes of the weights of each layer that is gathered as a unit."""
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    return [sum(weight.nbytes for weight in layer.parameters()) for layer in layers]


def _zero2_gradients(parameters: list[nn.Parameter], shard: int, rank: int) -> int:
    """Return the bytes of all gradients that overlap a process's shard, because ZeRO-2 keeps these whole."""
    start = total = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        if start < (rank + 1) * shard and stop > rank * shard:
            total += parameter.nbytes
        start = stop
    padding = (rank + 1) * shard - max(start, rank * shard)
    return total + parameters[0].element_size() * max(padding, 0)


def _create_optimizer(model: nn.Module, args: LisaTrainingArguments) -> Optimizer:
    """Create the trainer's optimizer without running Trainer.__init__, which would move the model."""
    trainer = LisaTrainer.__new__(LisaTrainer)
    trainer.args, trainer.model, trainer.optimizer, trainer.optimizer_cls_and_kwargs = args, model, None, None
    optimizer = trainer.create_optimizer()
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


def _state_bytes(
    optimizer: Optimizer, shards: list[list[torch.Size]] | None = None, dtype: torch.dtype | None = None
) -> int:
    """Return the bytes of the optimizer states after a step, on the parameters or on shards of each group."""
    for index, group in enumerate(optimizer.param_groups):
        if shards is not None:
            group["params"] = [fake_like(torch.empty(shape, dtype=dtype, device="meta")) for shape in shards[index]]
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return sum(leaf.nbytes for leaf in tree_leaves(optimizer.state_dict()) if isinstance(leaf, torch.Tensor))


def _quantized_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of the layers that `load_in_8bit` and `load_in_4bit` convert."""
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not {*UNQUANTIZED_MODULES, "lora_A", "lora_B"} & set(name.split("."))
    ]


def _quantized_bytes(weight: nn.Parameter, model_args: ModelArguments) -> int:
    """Return the bytes that bitsandbytes needs: the quantized numbers, their scales and lookup tables."""
    if model_args.load_in_8bit:
        return weight.numel() + 4 * weight.shape[0]  # a float32 scale per row
    num_scales = math.ceil(weight.numel() / 64)
    scales = 4 * num_scales
    if model_args.bnb_4bit_use_double_quant:
        # Scales in 8 bits with a float32 scale per 256 of them, their table of 256 values and their mean.
        scales = num_scales + 4 * math.ceil(num_scales / 256) + 4 * 256 + 4
    return math.ceil(weight.numel() / 2) + 4 * 16 + scales  # the table of 4-bit values has 16


# ---- the batch ------------------------------------------------------------------------------------------------------


def example_batch(collator: LisaDataCollator, num_images: int, num_questions: int) -> dict:
    """Build a training batch of blank photos of `IMAGE_SIZE` whose rows are as long as `max_length` allows."""
    mask = Mask.from_rle(encode_mask(np.ones(IMAGE_SIZE, dtype=bool)))
    questions = []
    for number in range(num_questions):  # packing would share the common prefix of equal questions
        answer = {"role": "assistant", "content": [{"type": "text", "text": "It is [SEG]."}]}
        messages = [user_message(f"What is {number}?"), answer]
        questions.append(Question(messages, [mask]))
    item = {
        "image": Image.new("RGB", IMAGE_SIZE[::-1]),
        "original_size": list(IMAGE_SIZE),
        "cached_features": None,
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
        full_length = max(length, prefix + num_segments * (collator.max_length - prefix))
        # Repeat the last token, without a label.
        positions = torch.arange(full_length).clamp(max=length - 1)
        for name, tensor in batch.items():
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (length,) and not tensor.is_floating_point():
                batch[name] = tensor[..., positions]
                if "labels" in name:
                    batch[name][..., length:] = IGNORE_INDEX
    return batch
