"""FSDP2 fixes for accelerate: each process loads and saves its own rows, and CPU processes shard too."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, patch_environment, save_fsdp_model
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import Trainer

from ..conversion.fsdp_checkpoints import FsdpReader, is_fsdp_checkpoint


SHARDED = "SHARDED_STATE_DICT"


def is_fsdp_requested(fsdp: bool | str | None) -> bool:
    """Return whether FSDP is enabled by Trainer's arguments or by the launcher."""
    return bool(fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


@contextmanager
def allow_fsdp_on_cpu() -> Iterator[None]:
    """Let FSDP take CPU processes that are initialized in this context.

    Version: accelerate 1.15.
    Symptom: accelerate silently trains with DDP, because it assumes that FSDP needs GPUs. torch's `fully_shard` works
        over gloo too.
    Remove when: accelerate shards among CPU processes; tests/training/test_distributed.py.
    """
    backend = ("gloo", DistributedType.MULTI_GPU)
    supports_bf16 = mock.patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # asked of GPUs
    environment = patch_environment(ACCELERATE_TORCH_DEVICE="cpu")
    with environment, supports_bf16, mock.patch.object(PartialState, "_prepare_backend", lambda *args: backend):
        yield


@contextmanager
def shard_before_loading() -> Iterator[None]:
    """Let each process read nothing but its own rows of a model that accelerate prepares in this context.

    `from_pretrained` memory-maps safetensors files without reading them, so it is enough to shard before copying.

    Version: accelerate 1.15.
    Symptom: every process copies whole layers to its device, or, with `cpu_ram_efficient_loading`, the first process
        reads the whole model and broadcasts it.
    Remove when: accelerate loads each process's rows;
        tests/training/test_fsdp.py::test_host_memory_of_loading_is_a_share_and_a_file.
    """
    with mock.patch("accelerate.accelerator.fsdp2_prepare_model", _shard_then_load):
        yield


def _shard_then_load(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    if isinstance(model, FSDPModule):  # prepared before
        return fsdp2_prepare_model(accelerator, model)
    is_offloaded = isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
    device = torch.device("cpu") if is_offloaded else accelerator.device
    whole = dict(model.named_parameters(remove_duplicate=False))
    _move_parameters_to_meta(model)
    model = fsdp2_prepare_model(accelerator, model)
    loaded = {}  # by sharded parameter, because a tied one has two names
    state_dict = model.state_dict(keep_vars=True)
    # Trained weights first, because PEFT's copies are in memory, then file by file: the last weight of a file unmaps
    # it.
    for name in sorted(whole, key=lambda name: not whole[name].requires_grad):
        weight, sharded = whole.pop(name), state_dict[name]
        if sharded not in loaded:
            loaded[sharded] = _load_rows(weight, sharded, device)
        state_dict[name] = loaded[sharded]
    model.load_state_dict(state_dict, assign=True)
    return model


def _move_parameters_to_meta(model: nn.Module) -> None:
    """Replace parameters with empty ones; tied parameters stay tied."""
    empty = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if weight not in empty:
                    empty[weight] = nn.Parameter(weight.data.to("meta"), requires_grad=weight.requires_grad)
                module._parameters[name] = empty[weight]


def _load_rows(weight: torch.Tensor, sharded: torch.Tensor, device: torch.device) -> nn.Parameter:
    """Return the parameter that replaces an empty one, with this process's part of a weight."""
    if isinstance(sharded, DTensor):
        layout = sharded.device_mesh, sharded.placements
        sizes, offsets = compute_local_shape_and_global_offset(sharded.shape, *layout)
        rows = weight.data[tuple(slice(start, start + size) for start, size in zip(offsets, sizes))]
        rows = rows.to(device, sharded.dtype, copy=True)
        rows = DTensor.from_local(rows, *layout, run_check=False, shape=sharded.shape, stride=sharded.stride())
    else:
        rows = weight.data.to(device)
    return nn.Parameter(rows, requires_grad=sharded.requires_grad)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def saves_shards(trainer: Trainer) -> bool:
    """Return whether each process saves its own part of the weights."""
    return trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.state_dict_type.name == SHARDED


def save_shards(trainer: Trainer, directory: Path) -> None:
    """Save the weights (in a LoRA run, the trained ones) from all processes, and their configuration."""
    accelerator = trainer.accelerator
    save_fsdp_model(accelerator.state.fsdp_plugin, accelerator, trainer.model, directory, adapter_only=True)
    if trainer.args.should_save:
        model = accelerator.unwrap_model(trainer.model)
        if isinstance(model, PeftModel):
            model.active_peft_config.save_pretrained(directory)
        else:
            model.config.save_pretrained(directory)
            model.generation_config.save_pretrained(directory)
        trainer.processing_class.save_pretrained(directory)


@contextmanager
def match_saved_state_dict_type(trainer: Trainer, checkpoint: Path) -> Iterator[None]:
    """Load checkpoints in this context by the type that they were saved with, without running code in them.

    Version: accelerate 1.15 with torch 2.14.
    Symptom: accelerate looks for shards or whole weights according to the run's settings, whatever the checkpoint has;
        torch unpickles the description of shards and everything in them except tensors, which may run code.
    Remove when: accelerate detects the type from the checkpoint, and torch restricts what it unpickles;
        tests/training/test_fsdp.py::test_shards_resume_on_another_number_of_processes_and_export_in_one.
    """
    if not trainer.is_fsdp_enabled:
        yield
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    names = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
    settings = {name: getattr(plugin, name) for name in names}
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type(SHARDED if is_fsdp_checkpoint(checkpoint) else "FULL_STATE_DICT")
    restricted = patch_environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="0")
    try:
        with restricted, mock.patch("torch.distributed.checkpoint.FileSystemReader", FsdpReader):
            yield
    finally:
        for name, value in settings.items():
            setattr(plugin, name, value)
