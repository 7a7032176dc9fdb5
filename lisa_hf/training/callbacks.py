"""What goes wrong in a training without an error: losses that are not finite, and figures that do not move."""

import importlib
import logging
import math
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
from transformers import BatchFeature, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..evaluation.predict import draw_predictions
from .trainable import find_parts, parameter_parts


logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

BAD_DICE_LOSS, BAD_GIOU, BAD_SEG_RATE = 0.6, 0.1, 0.5  # what a model that has learnt anything is better than


class NonFiniteSteps:
    """Leaves out steps whose loss or gradients are not finite, and says which rows and which parts they came from.

    Nothing of such a step reaches the weights. Only ZeRO-3 in float32 and bfloat16 cannot be kept from its step: there
    the run stops at once and saves nothing. Gradients that overflow in float16 while the loss is finite are the loss
    scaler's own business and do not count.

    Args:
        limit: how many steps of a run may be left out; with one more, `error` says what happened.
    """

    def __init__(self, limit: int):
        self.limit, self.number, self.error = limit, 0, None
        self.spoils_weights = False
        self._rows, self._losses = [], []

    def start_step(self, rows: list[list[tuple[str, str]]]):
        """Takes note of the images, as pairs of source and id, of each micro-batch of the coming step."""
        self._rows, self._losses = rows, []

    def add(self, losses: dict[str, torch.Tensor]):
        """Takes note of the parts of a micro-batch's loss."""
        self._losses.append({name: value.detach().float() for name, value in losses.items()})

    def check(self, trainer: Trainer, model: nn.Module, step: int) -> None:
        """Call it on all processes when the gradients of a step are there, and before they are clipped."""
        is_deepspeed = trainer.is_deepspeed_enabled
        if is_deepspeed:  # has made its step by now, or has left it out by itself
            norm = trainer.model_wrapped.get_global_grad_norm()
            is_skipped = trainer.accelerator.optimizer_step_was_skipped
            is_bad_gradient = is_skipped or (norm is not None and not math.isfinite(norm))
        else:
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            norms = torch._foreach_norm([getattr(gradient, "to_local", lambda: gradient)() for gradient in gradients])
            is_bad_gradient = not torch.stack(norms).isfinite().all()
        is_bad_loss = not torch.stack([value for losses in self._losses for value in losses.values()]).isfinite().all()
        flags = torch.tensor([is_bad_loss, is_bad_gradient], dtype=torch.float32, device=trainer.args.device)
        is_bad_loss, is_bad_gradient = trainer.accelerator.reduce(flags, reduction="sum").bool().tolist()
        if not is_bad_loss and (not is_bad_gradient or trainer.args.fp16):
            return
        culprits = [culprit for found in gather_object([self._describe()]) for culprit in found]
        if not culprits:
            culprits = ["gradients" if is_deepspeed else f"gradients of {', '.join(_parts_of_gradients(model))}"]
        if not is_deepspeed and not trainer.args.fp16:
            model.zero_grad()  # without a gradient, no optimizer touches a weight
        self.number += 1
        self.spoils_weights = is_deepspeed and trainer.args.deepspeed_plugin.zero_stage == 3 and not trainer.args.fp16
        what = f"step {step}: not finite: {'; '.join(culprits)}"
        if self.spoils_weights:
            self.error = f"{what}. ZeRO-3 has put it into the weights: resume from the last checkpoint, or use ZeRO-2."
        elif self.number > self.limit:
            self.error = (
                f"{what}. The run has stopped, since so were {self.number - 1} steps before, and "
                f"max_nonfinite_steps is {self.limit}; its weights are those of the last good step. Look at the rows, "
                "lower the learning rate, or use bf16 instead of fp16, and resume."
            )
        elif trainer.is_world_process_zero():
            logger.warning("%s. Left out (%d of at most %d).", what.capitalize(), self.number, self.limit)

    def _describe(self) -> list[str]:
        """The parts of the loss that are not finite on this process, with the images of their micro-batches."""
        found = []
        for rows, losses in zip(self._rows, self._losses):
            parts = [name for name, value in losses.items() if not value.isfinite()]
            if parts:
                found.append(f"{', '.join(parts)} of {', '.join(f'{name} of {source}' for source, name in rows)}")
        return found


def _parts_of_gradients(model: nn.Module) -> list[str]:
    parts = parameter_parts(model)
    bad = [
        name for name, weight in model.named_parameters() if weight.grad is not None and not _is_finite(weight.grad)
    ]
    return list(dict.fromkeys((parts[name] or [name])[0] for name in bad))


def _is_finite(gradient: torch.Tensor) -> bool:
    return bool(getattr(gradient, "to_local", lambda: gradient)().isfinite().all())


class FlatFigures(TrainerCallback):
    """Warns, once each, when figures stay as flat as in a training that fails in silence, and names likely causes.

    LISA's most reported trouble is a gIoU that stays between 0.02 and 0.07 while the loss of the text falls.

    Args:
        min_steps, min_logs: before so many steps, and so many logs of the loss, nothing is said.
        min_evaluations: so many evaluations in a row must be flat.
    """

    def __init__(self, min_steps: int = 300, min_logs: int = 30, min_evaluations: int = 3):
        self.min_steps, self.min_logs, self.min_evaluations = min_steps, min_logs, min_evaluations
        self._mask_losses, self._ce_losses, self._evaluations, self._said = [], [], {}, set()

    def on_log(self, args, state, control, logs, model=None, optimizer=None, **kwargs):
        if "mask_dice_loss" not in logs:
            return
        self._mask_losses.append(logs["mask_bce_loss"] + logs["mask_dice_loss"])
        self._ce_losses.append(logs["ce_loss"])
        if state.global_step >= self.min_steps and len(self._mask_losses) >= self.min_logs:
            dice_loss = logs["mask_dice_loss"] / (model.config.mask_dice_loss_weight or 1.0)
            is_bad = max(self._mask_losses) == 0 or dice_loss > BAD_DICE_LOSS
            if is_bad and _is_flat(self._mask_losses):
                what = f"The mask loss has not fallen in {state.global_step} steps"
                self._say("mask loss", what, state, model, optimizer)

    def on_evaluate(self, args, state, control, metrics=None, model=None, optimizer=None, **kwargs):
        if state.global_step == 0:
            return
        for name, value in (metrics or {}).items():
            figure = next((figure for figure in ("giou", "seg_rate") if name.endswith(figure)), None)
            if figure is None:
                continue
            values = self._evaluations.setdefault(name, [])
            values.append(value)
            last = values[-self.min_evaluations :]
            if len(last) < self.min_evaluations or state.global_step < self.min_steps:
                continue
            shown = ", ".join(f"{value:.3f}" for value in last)
            if figure == "giou" and max(last) < BAD_GIOU:
                self._say(name, f"{name} stays at {shown}", state, model, optimizer)
            elif figure == "seg_rate" and max(last) < BAD_SEG_RATE:
                self._say(name, f"Few answers have their [SEG]: {name} stays at {shown}", state, model, optimizer)

    def _say(self, key: str, what: str, state, model, optimizer):
        if key not in self._said:
            self._said.add(key)
            if state.is_world_process_zero:
                logger.warning("%s. Likely causes: %s.", what, "; ".join(self.find_causes(model, optimizer)))

    def find_causes(self, model, optimizer) -> list[str]:
        """What can be seen to be wrong, or else what most often is."""
        causes = []
        if max(self._mask_losses, default=math.inf) == 0:
            causes.append("no training row has a mask (look at the masks of a --dry_run)")
        if max(self._ce_losses, default=math.inf) == 0:
            causes.append("no answer is labelled (the chat template must mark it: look at [[ ]] in a --dry_run)")
        groups = getattr(optimizer, "param_groups", [])
        if groups and max(group.get("initial_lr", group["lr"]) for group in groups) == 0:
            causes.append("all learning rates are 0")
        trained = {part for part, is_trained in _trained_parts(model).items() if is_trained}
        for part in ("seg_projector", "mask_decoder"):
            if part not in trained:
                causes.append(f"{part} is frozen (trainable: name it)")
            else:
                rates = [group.get("initial_lr", group["lr"]) for group in groups if group.get("name") == part]
                if rates and max(rates) == 0:
                    causes.append(f"the learning rate of {part} is 0 (part_learning_rates)")
        return causes or [
            "a mask model without its pretrained weights",
            "masks that do not belong to their images or phrases (look at predictions.png)",
            "a learning rate that is far too low or too high",
            "too little weight of the mask losses",
        ]


def _trained_parts(model) -> dict[str, bool]:
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        part: any(weight.requires_grad for path in paths for weight in model.get_submodule(path).parameters())
        for part, paths in find_parts(model).items()
    }


def _is_flat(values: list[float]) -> bool:
    """Whether the last third lies no lower than the first third or three, by 1 % and beyond chance."""
    last = torch.tensor(values[-(len(values) // 3) :], dtype=torch.float64)
    for count in (3, len(last)):
        first = torch.tensor(values[:count], dtype=torch.float64)
        # A run that learns early varies most at its beginning, so chance is judged by its end.
        chance = last.std().item() * math.sqrt(1 / count + 1 / len(last))
        if (first.mean() - last.mean()).item() > max(0.01 * first.mean().item(), chance):
            return False
    return True


class Progress(TrainerCallback):
    """Counts what this process consumes from one log to the next, and times its steps.

    A step lasts from the request for its batches to its `on_step_end`; what lies between steps (logging, evaluation,
    saving) is no part of it. Nothing is synchronised for the clock: the host waits for the device before a step ends,
    because Trainer looks at every loss (`logging_nan_inf_filter`) and [`StopOnSignal`] at a flag on the device.
    """

    def __init__(self):
        self.reset()

    def reset(self):
        self.num_steps, self.items = 0, Counter()
        self.images = self.masks = self.tokens = 0
        self.step_time = self.data_wait_time = 0.0  # seconds, of all steps
        self.learning_rates = {}

    def watch(self, batches: Iterator) -> Iterator:
        """Begins a step: passes its batches on, and measures how long each took to come."""
        self._step_start = time.perf_counter()
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.data_wait_time += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def count(self, batch: BatchFeature):
        """Count the images, masks and tokens of a training batch."""
        self.items.update(batch["meta"].sources)
        self.images += len(batch["mask_labels"])
        self.masks += sum(map(len, batch["mask_labels"]))
        self.tokens = self.tokens + batch["attention_mask"].sum()  # stays on the device until a log

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        # Here as in Trainer's own `learning_rate`: what the step was made with, before the schedule goes on.
        self.learning_rates = {group["name"]: group["lr"] for group in optimizer.param_groups if "name" in group}

    def on_step_end(self, args, state, control, **kwargs):
        self.step_time += time.perf_counter() - self._step_start
        self.num_steps += 1

    def figures(self) -> dict[str, float]:
        """Figures over all processes since the last call, for the log; every process must call."""
        mine = {
            "counts": {f"items/{name}": number for name, number in self.items.items()},
            "amounts": {"images": self.images, "tokens": int(self.tokens), "masks": self.masks},
            "step_time": self.step_time,
            "data_wait_time": self.data_wait_time,
            "peak_memory_gb": peak_memory() / 1e9,
        }
        processes = gather_object([mine])
        counts, amounts = Counter(), Counter()
        for process in processes:
            counts.update(process["counts"])
            amounts.update(process["amounts"])
        # The slowest process holds up the others, which wait for its gradients.
        step_time, data_wait_time, peak_memory_gb = (
            max(process[name] for process in processes) for name in ("step_time", "data_wait_time", "peak_memory_gb")
        )
        figures = {
            **{f"learning_rate/{name}": rate for name, rate in self.learning_rates.items()},
            **dict(sorted(counts.items())),
            "data_wait_time": data_wait_time / self.num_steps,
            "compute_time": (step_time - data_wait_time) / self.num_steps,
            **{f"{name}_per_second": amount / step_time for name, amount in amounts.items()},
            "peak_memory_gb": peak_memory_gb,
        }
        self.reset()
        return figures


def peak_memory() -> int:
    """The most memory, in bytes, that this process has ever held: tensors on its GPU; on CPU, everything."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class PredictionSheet(TrainerCallback):
    """At each evaluation, draws what the model answers about the same few images, so that progress can be seen.

    The sheet is `predictions/step-N.png` in the output directory, the newest one `predictions.png` too. TensorBoard,
    trackio and wandb get it as an image where `report_to` names them. Among several evaluation sets it follows the
    first one's evaluation.

    Args:
        trainer: a [`LisaTrainer`]; `trainer.add_callback(PredictionSheet(trainer, dataset))`.
        dataset: of evaluation items, see [`EvaluationDataset`]; the first twelve are drawn.
    """

    def __init__(self, trainer: Trainer, dataset: Dataset):
        self.trainer, self.dataset = trainer, dataset
        self.drawn_step = None

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == self.drawn_step:
            return  # another evaluation set
        self.drawn_step = state.global_step
        trainer = self.trainer
        plugin = trainer.accelerator.state.deepspeed_plugin
        is_sharded = trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)
        # Where each process holds a piece of every weight, all have to answer.
        if not (is_sharded or state.is_world_process_zero):
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        sheet = draw_predictions(model, trainer.processing_class, self.dataset, args.generation_max_new_tokens)
        if state.is_world_process_zero:
            path = Path(args.output_dir, "predictions", f"step-{state.global_step}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path)
            shutil.copy(path, Path(args.output_dir, "predictions.png"))
            self._report(sheet, state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.drawn_step = None  # the best model may have been loaded since

    def _report(self, sheet: PIL.Image.Image, step: int):
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.tb_writer.add_image("eval/predictions", np.asarray(sheet), step, dataformats="HWC")
        for name in {"trackio", "wandb"} & set(self.trainer.args.report_to):
            tracker = importlib.import_module(name)
            tracker.log({"eval/predictions": tracker.Image(sheet), "train/global_step": step})


class StopOnSignal(TrainerCallback):
    """SIGTERM and SIGUSR1, with which schedulers announce the end, let the running step finish, then save and stop.

    transformers' own `enable_jit_checkpoint` does not serve here: its processes do not agree on the step they save
    at, which is a hang, it knows SIGTERM alone, and it saves in the midst of a step, where dropout has been drawn.
    """

    def __init__(self):
        self.received: signal.Signals | None = None  # by any of the processes
        self._handlers = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.received = None
        self._handlers = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}

    def _receive(self, number, frame):
        self.received = signal.Signals(number)

    def on_step_end(self, args, state, control, **kwargs):
        number = torch.tensor(self.received or 0, device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        if number := int(number):
            self.received = signal.Signals(number)
            logger.warning("%s: stopping after step %d, with a checkpoint.", self.received.name, state.global_step)
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
