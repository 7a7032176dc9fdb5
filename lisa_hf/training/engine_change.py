"""Resume from a checkpoint saved by another engine or number of processes, with everything that fits.

Each engine saves the optimizer's states in its own layout, ZeRO in one per number of processes. Trainer fails on some
of them, and silently ignores others. Here they are read weight by weight and sharded like the running engine does.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from accelerate.utils import patch_environment
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME

from ..conversion.checkpoints import open_checkpoint
from ..conversion.fsdp_checkpoints import FSDP_OPTIMIZER_DIRECTORY, is_fsdp_checkpoint, open_fsdp_checkpoint
from ..conversion.lazy_tensors import LazyTensor
from ..conversion.zero_checkpoints import allow_zero_states, open_zero_checkpoint, open_zero_optimizer
from .zero import gather_parameters, is_sharded


logger = logging.getLogger(__name__)

States = dict[str, dict[str, LazyTensor]]  # of an optimizer, by weight and name of the state


class Engine(NamedTuple):
    """What determines the layout of checkpoints; `num_processes` is 0 if it does not matter."""

    name: str
    num_processes: int = 0

    def __str__(self) -> str:
        return f"{self.name} on {self.num_processes} processes" if self.num_processes else self.name


PLAIN, FSDP = Engine("DDP or one process"), Engine("FSDP")


def saved_engine(checkpoint: Path) -> Engine:
    """Return the engine that saved a checkpoint, judging by its files."""
    for step in checkpoint.glob("global_step*"):
        stage = "ZeRO-3" if any(step.glob("zero_pp_rank_*_model_states.pt")) else "ZeRO-1 or 2"
        return Engine(stage, len(list(step.glob("*_optim_states.pt"))))
    return FSDP if is_fsdp_checkpoint(checkpoint) or (checkpoint / "optimizer.bin").exists() else PLAIN


def running_engine(trainer: Trainer) -> Engine:
    """Return the engine of a trainer."""
    if trainer.is_deepspeed_enabled:
        stage = trainer.args.deepspeed_plugin.zero_stage
        return Engine("ZeRO-3" if stage == 3 else "ZeRO-1 or 2", trainer.args.world_size)
    return FSDP if trainer.is_fsdp_enabled else PLAIN


@contextmanager
def allow_other_engine(trainer: Trainer, checkpoint: Path) -> Iterator[None]:
    """Let a trainer resume in this context from a checkpoint of any engine.

    For a checkpoint of another engine, the weights are loaded here, before the engine wraps the model, and then the
    optimizer's states and the schedule instead of the engine's own loading.

    Raises:
        ValueError: If the checkpoint does not hold all weights that train.
    """
    saved, running = saved_engine(checkpoint), running_engine(trainer)
    if saved == running:
        with mock.patch("transformers.trainer.deepspeed_load_checkpoint", _load_zero_checkpoint):
            yield
        return
    load_weights(trainer.model, checkpoint)
    names = []  # of the weights, in the order of a plain optimizer
    create_optimizer = trainer.create_optimizer

    def create_and_name(*args, **kwargs):
        optimizer = create_optimizer(*args, **kwargs)
        name_of = {id(weight): name for name, weight in trainer.model.named_parameters()}
        names[:] = [name_of[id(weight)] for group in optimizer.param_groups for weight in group["params"]]
        return optimizer

    def load_states(_):
        problem = _load_optimizer(trainer, checkpoint, names)
        if trainer.is_world_process_zero():
            logger.warning(
                "%s was saved with %s and is resumed with %s: weights, learning rates and data position continue. %s",
                *(checkpoint, saved, running),
                f"The optimizer's states start from scratch, so the next losses may be a little higher: {problem}"
                if problem
                else "So do the optimizer's states, and losses may differ by rounding.",
            )
        _load_schedule(trainer, checkpoint)

    with (
        mock.patch("transformers.trainer.deepspeed_load_checkpoint"),
        mock.patch.object(trainer, "create_optimizer", create_and_name),
        mock.patch.object(trainer, "_load_from_checkpoint"),
        mock.patch.object(trainer, "_load_scaler"),
        mock.patch.object(trainer, "_load_optimizer_and_scheduler", load_states),
    ):
        yield


def _load_zero_checkpoint(*args, **kwargs) -> None:
    """Load a checkpoint as transformers does, without running the code that DeepSpeed would run in its files."""
    restricted = patch_environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="0")
    with restricted, allow_zero_states():
        deepspeed_load_checkpoint(*args, **kwargs)


def load_best_weights(trainer: Trainer, checkpoint: Path) -> bool:
    """Load the weights of the best checkpoint, possibly of another engine; return whether that was possible.

    Trainer ignores some checkpoints of other engines, and [`allow_other_engine`] those of DeepSpeed.
    """
    if not checkpoint.is_dir():
        logger.warning("The best model, %s, no longer exists: the last one is evaluated and saved.", checkpoint)
        return False
    saved, running = saved_engine(checkpoint), running_engine(trainer)
    if saved == running:
        with mock.patch("transformers.trainer.deepspeed_load_checkpoint", _load_zero_checkpoint):
            Trainer._load_best_model(trainer)
        return True
    if trainer.is_deepspeed_enabled or not trainer.args.shards_weights:
        load_weights(trainer.accelerator.unwrap_model(trainer.model), checkpoint)
        return True
    if trainer.is_world_process_zero():
        logger.warning(
            "The best model, %s, was saved with %s and cannot be loaded with %s: the last one is evaluated and saved. "
            "Export the best one with `python recipes/export.py %s --output DIRECTORY`.",
            *(checkpoint, saved, running, checkpoint),
        )
    return False


# ---- weights --------------------------------------------------------------------------------------------------------


def load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load the trained weights of a checkpoint into a model, which may be sharded by ZeRO-3, one by one.

    Raises:
        ValueError: If trained weights are missing or have another shape.
    """
    saved = _open_weights(model, checkpoint)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    if missing := sorted(trained.difference(saved)):
        raise ValueError(
            f"{checkpoint}: expected all trained weights, got none of {', '.join(missing[:3])} and others "
            f"({len(missing)} in total). Resume with the options and the engine that the run was started with."
        )
    for name, weight in model.state_dict(keep_vars=True).items():
        if name not in saved:
            continue
        shape = getattr(weight, "ds_shape", weight.shape)
        if saved[name].shape != shape:
            raise ValueError(
                f"{checkpoint}: expected {tuple(shape)} as the shape of {name}, got {tuple(saved[name].shape)}. "
                "Resume with the options that the run was started with."
            )
        with torch.no_grad(), gather_parameters([weight]) as is_writer:
            if is_writer:
                weight.copy_(saved[name].load())


def _open_weights(model: torch.nn.Module, checkpoint: Path) -> dict[str, LazyTensor]:
    """Return the weights of a checkpoint by their names in a model."""
    if saved_engine(checkpoint).name.startswith("ZeRO"):
        return open_zero_checkpoint(checkpoint)
    if not isinstance(model, PeftModel):
        return open_checkpoint(checkpoint)
    saved = open_checkpoint(checkpoint if is_fsdp_checkpoint(checkpoint) else checkpoint / ADAPTER_WEIGHTS)
    names = {name: name for name in model.state_dict()}
    saved_names = get_peft_model_state_dict(model, state_dict=names, save_embedding_layers=False)
    return {name: saved[short] for short, name in saved_names.items() if short in saved}


# ---- optimizer ------------------------------------------------------------------------------------------------------


def _load_optimizer(trainer: Trainer, checkpoint: Path, names: list[str]) -> str | None:
    """Set the optimizer's states to those of a checkpoint; return the reason if that is impossible, else None.

    Args:
        names: Names of the weights, in the order of a plain optimizer.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    try:
        states = _open_optimizer(checkpoint, names)
    except (FileNotFoundError, KeyError, ValueError) as error:
        return f"they cannot be read ({error})."
    if not states or not states.keys() <= weights.keys():
        return "they belong to other weights than those trained now."
    for name, of_weight in states.items():
        shape = getattr(weights[name], "ds_shape", weights[name].shape)
        if any(state.shape not in (shape, torch.Size()) for state in of_weight.values()):
            return f"those of {name} have another shape."
    if trainer.is_deepspeed_enabled:
        saved_by_zero = saved_engine(checkpoint).name.startswith("ZeRO")
        _set_zero_states(trainer, weights, states, open_zero_checkpoint(checkpoint) if saved_by_zero else {})
    else:
        _set_states(trainer.optimizer, weights, states)
    return None


def _open_optimizer(checkpoint: Path, names: list[str]) -> States:
    if saved_engine(checkpoint).name.startswith("ZeRO"):
        return open_zero_optimizer(checkpoint)
    if is_fsdp_checkpoint(checkpoint):
        return _open_sharded_optimizer(checkpoint)
    by_name = saved_engine(checkpoint) == FSDP
    path = checkpoint / (OPTIMIZER_NAME_BIN if by_name else OPTIMIZER_NAME)
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    saved = content["state"]
    if not by_name:
        if (found := sum(len(group["params"]) for group in content["param_groups"])) != len(names):
            raise ValueError(f"expected those of {len(names)} weights, got those of {found}")
        saved = {names[index]: states for index, states in saved.items()}
    return {
        name: {key: LazyTensor.from_tensor(torch.as_tensor(value)) for key, value in states.items()}
        for name, states in saved.items()
    }


def _open_sharded_optimizer(checkpoint: Path) -> States:
    states = {}
    for name, tensor in open_fsdp_checkpoint(checkpoint, FSDP_OPTIMIZER_DIRECTORY).items():
        weight, _, key = name.removeprefix("optimizer.state.").rpartition(".")
        if name.startswith("optimizer.state."):  # not a setting
            states.setdefault(weight, {})[key] = tensor
    return states


def _set_states(optimizer: torch.optim.Optimizer, weights: dict[str, torch.nn.Parameter], states: States) -> None:
    """Set the states of an optimizer of whole weights, or of FSDP2's shards."""
    name_of = {id(weight): name for name, weight in weights.items()}
    order = [weight for group in optimizer.param_groups for weight in group["params"]]
    loaded = {
        index: {key: _cut_like(state.load(), weight) for key, state in states[name_of[id(weight)]].items()}
        for index, weight in enumerate(order)
        if name_of[id(weight)] in states
    }
    optimizer.load_state_dict({"state": loaded, "param_groups": optimizer.state_dict()["param_groups"]})


def _cut_like(state: torch.Tensor, weight: torch.nn.Parameter) -> torch.Tensor:
    if not isinstance(weight, DTensor) or state.dim() == 0:
        return state.clone()  # the optimizer changes it in place, which must affect neither the file nor other weights
    # Without a source rank, each process slices its own part.
    return distribute_tensor(state.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


def _set_zero_states(
    trainer: Trainer,
    weights: dict[str, torch.nn.Parameter],
    states: States,
    precise_weights: dict[str, LazyTensor],
) -> None:
    """Set the states of DeepSpeed's optimizer and its float32 copies of weights, one weight at a time.

    Args:
        precise_weights: The copies, if the checkpoint has any.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    zero = trainer.model_wrapped.optimizer
    is_stage_3 = trainer.args.deepspeed_plugin.zero_stage == 3
    # As in the first step of DeepSpeed's optimizer: zeros for each row of weights.
    example = next(iter(states.values()))
    steps = {key: state.load() for key, state in example.items() if not state.shape}
    if isinstance(zero.optimizer, (DeepSpeedCPUAdam, FusedAdam)):
        steps = {key: int(number) for key, number in steps.items()}
    elif any(group.get("fused") or group.get("capturable") for group in zero.optimizer.param_groups):
        steps = {key: number.to(trainer.args.device) for key, number in steps.items()}  # torch's kernels want it there
    for row in zero.fp32_partitioned_groups_flat if is_stage_3 else zero.single_partition_of_fp32_groups:
        zero.optimizer.state[row] = {
            key: copy.deepcopy(steps[key]) if key in steps else torch.zeros_like(row) for key in example
        }
    if not is_stage_3:
        zero._lazy_init_hp_params_optimizer_state()
    for name, weight in weights.items():
        tensors = {key: state for key, state in states.get(name, {}).items() if key not in steps}
        if name in precise_weights:
            tensors[None] = precise_weights[name]
        for key, tensor in tensors.items():
            _set_zero_state(weight, tensor.load(), key)


def _set_zero_state(weight: torch.nn.Parameter, value: torch.Tensor, key: str | None) -> None:
    """Set a state of a weight, or its float32 copy if `key` is None, on this process."""
    from deepspeed import comm, utils

    if not is_sharded(weight):
        set_fragment = utils.safe_set_full_fp32_param if key is None else utils.safe_set_full_optimizer_state
        set_fragment(weight, value, *([] if key is None else [key]))
        return
    # DeepSpeed's function for whole values fails on weights that are not divided evenly among the processes.
    size, rank = weight.ds_tensor.numel(), comm.get_rank(group=weight.ds_process_group)
    own = value.flatten()[rank * size : (rank + 1) * size]
    own = torch.nn.functional.pad(own, (0, size - len(own)))
    set_fragment = utils.safe_set_local_fp32_param if key is None else utils.safe_set_local_optimizer_state
    set_fragment(weight, own, *([] if key is None else [key]))


# ---- schedule -------------------------------------------------------------------------------------------------------


def _load_schedule(trainer: Trainer, checkpoint: Path) -> None:
    """Restore the learning rates."""
    path = checkpoint / SCHEDULER_NAME
    if not path.exists():
        logger.warning("%s has no schedule: the learning rate schedule starts over.", checkpoint)
        return
    trainer.lr_scheduler.load_state_dict(torch.load(path, weights_only=True))
    for group, learning_rate in zip(trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr()):
        group["lr"] = learning_rate
