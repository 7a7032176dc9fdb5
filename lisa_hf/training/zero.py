"""ZeRO-3 while a model is built: each process holds only its shard of the weights, from the first one on."""

import copy
import ctypes
import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import transformers.integrations.deepspeed
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import modeling_utils
from transformers.core_model_loading import WeightConverter
from transformers.integrations.deepspeed import (
    HfTrainerDeepSpeedConfig,
    deepspeed_config,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from .arguments import LisaTrainingArguments


# Parameters of glibc's `mallopt`, and the largest value that glibc sets for the first one by itself; see mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAX_MMAP_THRESHOLD = 32 * 2**20


@contextmanager
def zero3_init(args: LisaTrainingArguments) -> Iterator[None]:
    """Make `from_pretrained`, `resize_token_embeddings` and PEFT work on shards in this context, only under ZeRO-3.

    transformers builds each module under `zero.Init`, which shards it immediately; the first process reads the weights
    of a module and sends each other process its shard.
    """
    plugin = args.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        yield
        return
    import deepspeed

    deepspeed.init_distributed()  # before `zero.Init` compares the batch size with the number of processes
    # Trainer later completes the launcher's values in the same way. This config lives as long as the context.
    config = HfTrainerDeepSpeedConfig(copy.deepcopy(plugin.hf_ds_config.config))
    config.trainer_config_process(args)
    set_hf_deepspeed_config(config)
    try:
        with _load_one_file_at_a_time(), _return_freed_memory():
            yield
    finally:
        unset_hf_deepspeed_config()


@contextmanager
def _return_freed_memory() -> Iterator[None]:
    """Let glibc return the memory of weights freed in this context to the system.

    Otherwise it keeps freed pieces of up to 32 MB for reuse, and a process holds twice its share or more.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * MAX_MMAP_THRESHOLD)


@contextmanager
def _load_one_file_at_a_time() -> Iterator[None]:
    """Let models loaded in this context map one weights file at a time.

    Version: transformers 5.23.
    Symptom: with ZeRO-3, the first process maps all files until the last weight is loaded, and holds the whole model.
    Remove when: transformers reads file by file; tests/training/test_zero.py.
    """
    read, load, files = modeling_utils.load_state_dict, modeling_utils._load_state_dict_into_zero3_model, {}

    def read_shapes(file, map_location="cpu", **options):
        files[file] = {"map_location": map_location, **options}
        return read(file, map_location="meta", **options)

    def load_files(model, state_dict, load_config):
        parts = [functools.partial(read, file, **options) for file, options in files.items()]
        files.clear()
        if any(isinstance(entry, WeightConverter) for entry in load_config.weight_mapping or []):
            # Merged weights, such as experts, may be in several files.
            parts = [lambda whole=parts: {name: weight for part in whole for name, weight in part().items()}]
        errors, missing = [], set(model.state_dict())
        for read_part in parts or [lambda: state_dict]:
            part_errors, part_missing = load(model, read_part(), load_config)
            errors += part_errors
            missing &= part_missing
        return errors, missing

    with (
        mock.patch.object(modeling_utils, "load_state_dict", read_shapes),
        mock.patch.object(modeling_utils, "_load_state_dict_into_zero3_model", load_files),
    ):
        yield


@contextmanager
def disable_zero3_init() -> Iterator[None]:
    """Build whole models in this context, even inside [`zero3_init`]."""
    with mock.patch.object(transformers.integrations.deepspeed, "_hf_deepspeed_config_weak_ref", None):
        yield


def shard_new_weights(model: nn.Module) -> None:
    """Shard what was added to a sharded model: new embedding rows, a projector, LoRA, copies that are trained in full.

    An unsharded model is left unchanged.
    """
    sharded = next((weight for weight in model.parameters() if is_sharded(weight)), None)
    if sharded is None:
        return
    import deepspeed

    for weight in model.parameters():
        if not is_sharded(weight):
            weight.data = weight.data.to(sharded.dtype)  # like DeepSpeed casts a whole model
    deepspeed.zero.Init(module=model, config_dict_or_path=deepspeed_config())


@contextmanager
def shard_peft_copies() -> Iterator[None]:
    """Shard each module that PEFT copies in this context, to train it in full, before it copies the next one.

    Version: peft 0.21.
    Symptom: with ZeRO-3, PEFT gathers each module of `modules_to_save` to copy it and keeps the copies whole, so that
        every process holds all of them at once.
    Remove when: PEFT copies under `zero.Init`; `recipes/benchmarks/load_memory.py`.
    """
    update = ModulesToSaveWrapper.update

    def update_and_cut(wrapper, *args, **kwargs):
        update(wrapper, *args, **kwargs)
        shard_new_weights(wrapper)

    with mock.patch.object(ModulesToSaveWrapper, "update", update_and_cut):
        yield


@contextmanager
def gather_image_encoders(model: nn.Module) -> Iterator[None]:
    """Gather everything except the language model on each process in this context, if the model is sharded."""
    in_language_model = set(model.vlm.base_model.get_decoder().parameters())
    weights = [weight for weight in model.parameters() if is_sharded(weight) and weight not in in_language_model]
    if not weights:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(weights):
        yield


@contextmanager
def gather_parameters(weights: list[torch.Tensor]) -> Iterator[bool]:
    """Gather weights in this context, and yield whether this process's changes to them count."""
    if not any(map(is_sharded, weights)):
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(weights, modifier_rank=0):
        yield deepspeed.comm.get_rank() == 0


def is_sharded(weight: torch.Tensor) -> bool:
    """Return whether ZeRO-3 has sharded a weight."""
    return hasattr(weight, "ds_id")
