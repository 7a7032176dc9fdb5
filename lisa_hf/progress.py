"""What can be watched of a training beside its loss: what it consumes, where its time and memory go, what it answers.

[`LisaTrainer`] measures with [`Progress`] and passes the figures through `log`, so every tracker of `report_to` gets
them; recipes/README.md has the table.
"""

import importlib
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset
from transformers import BatchFeature, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from .inference import draw_predictions


def collate_with_sources(collator: Callable, items: list[dict]) -> BatchFeature:
    """What the collator makes of B items, and the names of their B `sources` and `image_ids`."""
    batch = collator(items)
    batch["sources"] = [item["source"] for item in items]
    batch["image_ids"] = [item["image_id"] for item in items]
    return batch


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
        """Counts a training batch, and takes out of it what only serves counting."""
        self.items.update(batch.pop("sources", ()))
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
