"""Callbacks around training steps: check the model first, skip non-finite steps, measure throughput, draw predictions,
stop on a signal.
"""

import importlib
import logging
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import Dataset
from transformers import BatchFeature, IntervalStrategy, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..evaluation.predict import draw_answers
from ..model.self_check import check_against_vlm
from .trainable import parameter_parts


logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class SkipNonFiniteSteps:
    """Skip steps with a non-finite loss or gradient, and log the images and parts of the model they came from.

    Such a step does not change the weights. The exception is ZeRO-3 in float32 and bfloat16, which applies a step
    before it can be checked: the run stops immediately and saves nothing. Overflowing gradients in float16 with a
    finite loss are left to the loss scaler and do not count.

    Args:
        limit: Number of steps that a run may skip. One more sets `error`, which stops [`LisaTrainer`].
    """

    def __init__(self, limit: int):
        self.limit, self.num_skipped, self.error = limit, 0, None
        self.spoils_weights = False
        self._images, self._losses = [], []

    def start_step(self, images: list[list[tuple[str, str]]]) -> None:
        """Remember the images, as pairs of source and id, of each micro-batch of the coming step."""
        self._images, self._losses = images, []

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """Remember the loss parts of a micro-batch."""
        self._losses.append({name: value.detach().float() for name, value in losses.items()})

    def check(self, trainer: Trainer, model: nn.Module, step: int) -> None:
        """Check a step before its gradients are clipped; every process must call it.

        Args:
            trainer: The trainer that is about to step.
            model: The model without the wrappers of data parallelism.
            step: Number of the step, starting at 1.
        """
        # 1. Is anything not finite, on any process?
        losses = torch.stack([value for losses in self._losses for value in losses.values()])
        bad = torch.stack([~losses.isfinite().all(), self._has_bad_gradient(trainer, model)]).float()
        # The only synchronization with the GPU
        is_bad_loss, is_bad_gradient = trainer.accelerator.reduce(bad, reduction="sum").bool().tolist()
        if not is_bad_loss and (not is_bad_gradient or trainer.args.fp16):
            return
        # 2. Where does it come from?
        is_deepspeed = trainer.is_deepspeed_enabled
        causes = [cause for causes in gather_object([self._bad_losses()]) for cause in causes]
        if not causes:
            causes = ["gradients" if is_deepspeed else f"gradients of {', '.join(_bad_parts(model))}"]
        # 3. Skip the step. DeepSpeed and float16's loss scaler have already done so.
        if not is_deepspeed and not trainer.args.fp16:
            model.zero_grad()  # optimizers skip weights without a gradient
        self.num_skipped += 1
        self.spoils_weights = is_deepspeed and trainer.args.shards_weights and not trainer.args.fp16
        # 4. Report it.
        what = f"Step {step}: non-finite {'; '.join(causes)}"
        if self.spoils_weights:
            self.error = f"{what}. ZeRO-3 has applied it: resume from the last checkpoint, or use ZeRO-2."
        elif self.num_skipped > self.limit:
            self.error = (
                f"{what}. The run has stopped: expected at most {self.limit} skipped steps (max_nonfinite_steps), got "
                f"{self.num_skipped}. The weights are those of the last good step. Look at these images, lower the "
                "learning rate, or use bf16 instead of fp16, and resume."
            )
        elif trainer.is_world_process_zero():
            logger.warning("%s. Skipped (%d of at most %d).", what, self.num_skipped, self.limit)

    def _has_bad_gradient(self, trainer: Trainer, model: nn.Module) -> torch.Tensor:
        """Return whether a gradient of this process is not finite, as a bool scalar on the trainer's device."""
        device = trainer.args.device
        if trainer.is_deepspeed_enabled:  # has stepped, or skipped the step, in its backward pass
            norm = trainer.model_wrapped.get_global_grad_norm()
            is_bad = trainer.accelerator.optimizer_step_was_skipped or (norm is not None and not math.isfinite(norm))
            return torch.tensor(is_bad, device=device)
        gradients = [_local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        # In float32: the norm of finite gradients in float16 may be infinite. Offloaded ones are on the CPU.
        norms = torch._foreach_norm(gradients, dtype=torch.float32)
        return ~torch.stack([norm.to(device) for norm in norms]).isfinite().all()

    def _bad_losses(self) -> list[str]:
        """Describe the non-finite loss parts on this process, with the images of their micro-batches."""
        causes = []
        for images, losses in zip(self._images, self._losses):
            parts = [name for name, value in losses.items() if not value.isfinite()]
            if parts:
                causes.append(f"{', '.join(parts)} of {', '.join(f'{name} of {source}' for source, name in images)}")
        return causes


def _bad_parts(model: nn.Module) -> list[str]:
    """Name the parts of the model with non-finite gradients."""
    parts = parameter_parts(model)
    weights = [(name, weight) for name, weight in model.named_parameters() if weight.grad is not None]
    bad = [name for name, weight in weights if not _local(weight.grad).isfinite().all()]
    return list(dict.fromkeys((parts[name] or [name])[0] for name in bad))


def _local(gradient: torch.Tensor) -> torch.Tensor:
    """Return the part of a gradient on this process: all of it unless FSDP shards it."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


class Throughput(TrainerCallback):
    """Count what this process trains on between two logs, and time its steps.

    A step lasts from the request for its batches to its `on_step_end`, without logging, evaluation and saving. The
    clock needs no extra synchronization: the host waits for the device in every step, because [`SkipNonFiniteSteps`]
    looks at the gradients.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.num_steps, self.items = 0, Counter()
        self.images = self.masks = self.tokens = 0
        self.step_time = self.data_wait_time = 0.0  # seconds, sums over steps
        self.learning_rates = {}

    def watch(self, batches: Iterator) -> Iterator:
        """Start a step: pass its batches on, and measure how long each took to arrive."""
        self._step_start = time.perf_counter()
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.data_wait_time += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def count(self, batches: list[BatchFeature]) -> None:
        """Count the images, masks and tokens of a step."""
        for batch in batches:
            self.items.update(batch["meta"].sources)
            self.images += len(batch["mask_labels"])
            self.masks += sum(map(len, batch["mask_labels"]))
            self.tokens = self.tokens + batch["attention_mask"].sum()  # stays on the device until a log

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        # The rates of this step, before the schedule advances, including Trainer's own `learning_rate`.
        self.learning_rates = {group["name"]: group["lr"] for group in optimizer.param_groups if "name" in group}

    def on_step_end(self, args, state, control, **kwargs):
        self.step_time += time.perf_counter() - self._step_start
        self.num_steps += 1

    def compute(self) -> dict[str, float]:
        """Compute the metrics of all processes since the last call, for the log; every process must call it."""
        mine = {
            "counts": {f"items/{name}": number for name, number in self.items.items()},
            "amounts": {"images": self.images, "tokens": int(self.tokens), "masks": self.masks},
            "step_time": self.step_time,
            "data_wait_time": self.data_wait_time,
            "peak_memory_gb": peak_memory() / 1e9,
        }
        processes = gather_object([mine])
        # Counts add up over processes.
        counts, amounts = Counter(), Counter()
        for process in processes:
            counts.update(process["counts"])
            amounts.update(process["amounts"])
        # Times do not: all others wait for the gradients of the slowest process.
        step_time, data_wait_time, peak_memory_gb = (
            max(process[name] for process in processes) for name in ("step_time", "data_wait_time", "peak_memory_gb")
        )
        metrics = {
            **{f"learning_rate/{name}": rate for name, rate in self.learning_rates.items()},
            **dict(sorted(counts.items())),
            "data_wait_time": data_wait_time / self.num_steps,
            "compute_time": (step_time - data_wait_time) / self.num_steps,
            **{f"{name}_per_second": amount / step_time for name, amount in amounts.items()},
            "peak_memory_gb": peak_memory_gb,
        }
        self.reset()
        return metrics


def peak_memory() -> int:
    """Return the peak memory of this process in bytes: tensors on its GPU, or everything on CPU."""
    device = torch.get_device_module()  # of the kind of accelerator that torch was built for
    if hasattr(device, "max_memory_allocated") and device.is_initialized():
        return device.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class SelfCheck(TrainerCallback):
    """Compare LISA with its VLM alone before the first step, see [`check_against_vlm`].

    The weights are then in the same state as in training: on the device, quantized, sharded, resumed.

    Args:
        trainer: A [`LisaTrainer`]; `trainer.add_callback(SelfCheck(trainer))`.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        start = time.perf_counter()
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with self.trainer.accelerator.autocast():
            check_against_vlm(model, self.trainer.processing_class)
        logger.info(
            "Self-check: the VLM computes the same within LISA as alone (%.1f s).", time.perf_counter() - start
        )


class PredictionSheet(TrainerCallback):
    """Draw the model's answers about the same few images at each evaluation, to show progress.

    The sheet is `predictions/step-N.png` in the output directory, where N is the step of the weights; the newest one
    (at the end that of the best model, if it is loaded) is also `predictions.png`. With several evaluation sets, it is
    drawn after the first one. TensorBoard, trackio and wandb show it as an image, if `report_to` names them.

    Args:
        trainer: A [`LisaTrainer`]; `trainer.add_callback(PredictionSheet(trainer, dataset))`.
        dataset: Evaluation items, see [`EvaluationDataset`]. The first twelve are drawn.
    """

    def __init__(self, trainer: Trainer, dataset: Dataset):
        self.trainer, self.dataset = trainer, dataset
        self.drawn_step = None

    def on_evaluate(self, args, state, control, **kwargs):
        trainer = self.trainer
        step = trainer.weights_step
        if step == self.drawn_step:
            return  # this is another evaluation set of the same weights
        self.drawn_step = step
        # With sharded weights, a model can answer only if all processes take part.
        if not (args.shards_weights or state.is_world_process_zero):
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        sheet = draw_answers(model, trainer.processing_class, self.dataset, args.generation_max_new_tokens)
        if state.is_world_process_zero:
            path = Path(args.output_dir, "predictions", f"step-{step}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path)
            shutil.copy(path, Path(args.output_dir, "predictions.png"))
            self._report(sheet, state.global_step)

    def _report(self, sheet: PIL.Image.Image, step: int):
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.tb_writer.add_image("eval/predictions", np.asarray(sheet), step, dataformats="HWC")
        for name in {"trackio", "wandb"} & set(self.trainer.args.report_to):
            tracker = importlib.import_module(name)
            tracker.log({"eval/predictions": tracker.Image(sheet), "train/global_step": step})


class StopOnSignal(TrainerCallback):
    """Save and stop training on Ctrl-C, and on SIGTERM or SIGUSR1, with which schedulers announce the end.

    The current step is finished first; a second Ctrl-C ends the process immediately. transformers'
    `enable_jit_checkpoint` is no alternative: its processes do not agree on the step to save at, which hangs; it only
    handles SIGTERM; and it saves within a step, after dropout has been drawn.

    An evaluation due when training stops would take longer than schedulers wait. The resumed run does it before its
    first step.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.received: signal.Signals | None = None  # received by any process
        self._is_first_step = True
        self._handlers = {}
        self._process = os.getpid()

    def on_train_begin(self, args, state, control, **kwargs):
        self.received, self._is_first_step = None, True
        self._handlers = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}

    def _receive(self, number, frame):
        if os.getpid() != self._process:  # a loader worker, which inherits the handlers: the main process decides
            return
        if number == signal.SIGINT:
            is_second = self.received == signal.SIGINT
            line = "quitting now." if is_second else "saving after this step. Press it again to quit now."
            os.write(sys.stderr.fileno(), f"\nCtrl-C: {line}\n".encode())  # printing is not safe in a handler
            if is_second:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(self._process, signal.SIGINT)
        self.received = signal.Signals(number)

    def on_step_begin(self, args, state, control, **kwargs):
        # Here the random states are those of the checkpoint, as after the evaluation of an uninterrupted run.
        if self._is_first_step and _lacks_evaluation(args, state):
            self.trainer._determine_best_metric(self.trainer._evaluate(None, None), None)
        self._is_first_step = False

    def on_step_end(self, args, state, control, **kwargs):
        number = self.received
        if args.world_size > 1:
            received = torch.tensor(number or 0, device=args.device)
            torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
            number = int(received)
        if number:
            self.received = signal.Signals(number)
            logger.warning("%s: stopping after step %d, with a checkpoint.", self.received.name, state.global_step)
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.received:  # Trainer treats a stop as the end of the epoch
            control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def _lacks_evaluation(args: TrainingArguments, state: TrainerState) -> bool:
    """Return whether an evaluation was due at the last step and is not in the log."""
    step, epoch = state.global_step, state.epoch or 0
    is_due = {
        IntervalStrategy.STEPS: step % (state.eval_steps or 1) == 0 and step >= args.eval_delay,
        IntervalStrategy.EPOCH: math.isclose(epoch, round(epoch)) and epoch >= args.eval_delay,
    }.get(args.eval_strategy, False)
    is_logged = any(
        entry["step"] == step and any(name.startswith("eval_") for name in entry) for entry in state.log_history
    )
    return step > 0 and is_due and not is_logged
