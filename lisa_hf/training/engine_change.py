"""Resume from a checkpoint that another engine saved: weights, schedule and place in the data, but not the optimizer.

Engines keep the optimizer's states in layouts of their own, ZeRO in one per number of processes. Trainer stops at some
of them, and passes over others without a word.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import SCHEDULER_NAME

from ..conversion.checkpoints import open_checkpoint, open_zero_checkpoint


logger = logging.getLogger(__name__)


class Engine(NamedTuple):
    """What trains, as far as the layout of its checkpoints goes; `num_processes` is 0 where that does not matter."""

    name: str
    num_processes: int = 0

    def __str__(self) -> str:
        return f"{self.name} on {self.num_processes} processes" if self.num_processes else self.name


PLAIN, FSDP = Engine("DDP or one process"), Engine("FSDP")


def saved_engine(checkpoint: Path) -> Engine:
    """Return the engine that saved a checkpoint, by its files."""
    for step in checkpoint.glob("global_step*"):
        stage = "ZeRO-3" if any(step.glob("zero_pp_rank_*_model_states.pt")) else "ZeRO-1 or 2"
        return Engine(stage, len(list(step.glob("*_optim_states.pt"))))
    return FSDP if (checkpoint / "optimizer.bin").exists() else PLAIN


def running_engine(trainer: Trainer) -> Engine:
    """Return the engine of a trainer."""
    if trainer.is_deepspeed_enabled:
        stage = trainer.args.deepspeed_plugin.zero_stage
        return Engine("ZeRO-3" if stage == 3 else "ZeRO-1 or 2", trainer.args.world_size)
    return FSDP if trainer.is_fsdp_enabled else PLAIN


@contextmanager
def allow_other_engine(trainer: Trainer, checkpoint: Path) -> Iterator[None]:
    """Let a trainer resume in this context from a checkpoint, whatever engine saved it.

    If it was another engine, the weights are loaded here, before the engine takes the model, and the schedule instead
    of the engine's states.

    Raises:
        ValueError: If the checkpoint does not hold all weights that train.
    """
    saved, running = saved_engine(checkpoint), running_engine(trainer)
    if saved == running:
        yield
        return
    load_weights(trainer.model, checkpoint)
    if trainer.is_world_process_zero():
        logger.warning(
            "%s was saved with %s and is resumed with %s: weights, learning rates and place in the data go on. The "
            "optimizer's states do not fit and begin anew, so the next losses may be a little higher.",
            checkpoint,
            saved,
            running,
        )
    with (
        mock.patch("transformers.trainer.deepspeed_load_checkpoint"),
        mock.patch.object(trainer, "_load_from_checkpoint"),
        mock.patch.object(trainer, "_load_scaler"),
        mock.patch.object(trainer, "_load_optimizer_and_scheduler", lambda path: _load_schedule(trainer, Path(path))),
    ):
        yield


def load_best_weights(trainer: Trainer, checkpoint: Path) -> bool:
    """Load the weights of the best checkpoint, which another engine may have saved; return whether that was possible.

    Trainer passes over some checkpoints of other engines, and [`allow_other_engine`] over those of DeepSpeed.
    """
    if not checkpoint.is_dir():
        logger.warning("The best model, %s, is not there any more: the last one is evaluated and saved.", checkpoint)
        return False
    saved, running = saved_engine(checkpoint), running_engine(trainer)
    if saved == running:
        with mock.patch("transformers.trainer.deepspeed_load_checkpoint", deepspeed_load_checkpoint):
            Trainer._load_best_model(trainer)
        return True
    if not trainer.args.shards_weights:
        load_weights(trainer.accelerator.unwrap_model(trainer.model), checkpoint)
        return True
    if trainer.is_world_process_zero():
        logger.warning(
            "The best model, %s, was saved with %s and cannot be loaded with %s: the last one is evaluated and saved. "
            "Export the best one by `python recipes/export.py %s --output DIRECTORY`.",
            *(checkpoint, saved, running, checkpoint),
        )
    return False


def load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load the trained weights of a checkpoint into a model that no engine has wrapped yet.

    Raises:
        ValueError: If some that train are missing.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    is_sharded = saved_engine(checkpoint).name.startswith("ZeRO")
    if isinstance(model, PeftModel) and not is_sharded:
        weights = {name: tensor.load() for name, tensor in open_checkpoint(checkpoint / ADAPTER_WEIGHTS).items()}
        result = set_peft_model_state_dict(model, weights)
    else:
        weights = open_zero_checkpoint(checkpoint) if is_sharded else open_checkpoint(checkpoint)
        result = model.load_state_dict({name: tensor.load() for name, tensor in weights.items()}, strict=False)
    if missing := sorted(trained.intersection(result.missing_keys)):
        raise ValueError(
            f"{checkpoint}: expected all weights that train, got none of {', '.join(missing[:3])} and others "
            f"({len(missing)} in all). Resume with the options and the engine that the run was started with."
        )


def _load_schedule(trainer: Trainer, checkpoint: Path) -> None:
    """Set the learning rates to where they were."""
    path = checkpoint / SCHEDULER_NAME
    if not path.exists():
        logger.warning("%s has no schedule: the learning rate begins anew.", checkpoint)
        return
    trainer.lr_scheduler.load_state_dict(torch.load(path, weights_only=True))
    for group, learning_rate in zip(trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr()):
        group["lr"] = learning_rate
