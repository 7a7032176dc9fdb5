"""LisaTrainer: transformers' Trainer with loss parts in the log, mask metrics in the evaluation and exact counts."""

import logging
from functools import partial
from pathlib import Path

import torch
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.collator import expand_batch
from ..data.streaming import StreamingMixtureDataset
from ..evaluation.benchmarks import PADDING, compute_metrics
from ..evaluation.metrics import intersection_and_union
from ..from_scratch.muon import use_muon
from ..model.losses import IGNORE_INDEX
from ..model.packing import TEXT_INPUTS, unpack_rows
from ..model.processing_lisa import LisaProcessor
from .callbacks import NonFiniteSteps, Progress
from .checkpointing import complete_save, resolve_checkpoint
from .model_card import write_model_card
from .run_record import find_run_record
from .trainable import rate_names


logger = logging.getLogger(__name__)

LOSS_PARTS = ("ce_loss", "mask_bce_loss", "mask_dice_loss")


class LisaTrainer(Trainer):
    """Trains and evaluates a [`LisaForConditionalGeneration`], plain or inside a `PeftModel`.

    Args are those of `Trainer`; `args` is a [`LisaTrainingArguments`] and `processing_class` the [`LisaProcessor`].

    The loss is divided by the labels and masks of the whole step, counted over accumulation steps and processes, so it
    does not depend on how a step is cut; LISA averages micro-batches of unequal weight.

    Evaluation has two protocols. Teacher-forced, as LISA validates: the true answer is given and its `[SEG]` are
    decoded (`giou`, `ciou`, ...). Generated, with `args.eval_generate`: the model answers by itself, a mask that is
    due and not given counts as empty (`generated_giou`, ..., and the `[SEG]` rates). These figures are exact on any
    number of processes; `eval_loss` is Trainer's mean over batches, which depends a little on how they are cut.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, compute_metrics=compute_metrics, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process sees {self.args.n_gpu} GPUs, and torch's DataParallel cannot split rows and images that "
                "differ in number. Start one process per GPU: `accelerate launch recipes/train.py ...`."
            )
        if not self.args.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices is False, expected True: the loss is divided by the labels and masks "
                "of all processes. Leave it out."
            )
        state_dict_type = self.accelerator.state.fsdp_plugin.state_dict_type.name if self.is_fsdp_enabled else None
        if state_dict_type not in (None, "FULL_STATE_DICT"):
            raise ValueError(
                f"fsdp_state_dict_type is {state_dict_type}, expected FULL_STATE_DICT, as in "
                "recipes/accelerate/fsdp2.yaml: Trainer saves no model otherwise, only the pieces to resume from."
            )
        metric, names = self.args.metric_for_best_model, self.eval_dataset
        if isinstance(names, dict) and metric and self.args.eval_strategy != "no":
            if not any(metric.removeprefix("eval_").startswith(f"{name}_") for name in names):
                raise ValueError(
                    f"metric_for_best_model is {metric}, expected it to begin with the data set that decides, one of "
                    f"{', '.join(names)}: {next(iter(names))}_{metric}, for example."
                )
        if self.args.compile_mask_encoder:
            self.model.mask_model.vision_encoder.compile(dynamic=False)
        self.num_skipped_rows = 0
        self._num_masks_in_batch = None
        self.nonfinite_steps = NonFiniteSteps(self.args.max_nonfinite_steps)
        self.progress = Progress()
        self.add_callback(self.progress)

    # ---- data -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return Trainer's loader; a [`StreamingMixtureDataset`] divides its rows among processes itself."""
        if isinstance(self.train_dataset, StreamingMixtureDataset):
            return self._get_streaming_dataloader(self.train_dataset)
        return super().get_train_dataloader()

    def _get_streaming_dataloader(self, dataset: StreamingMixtureDataset) -> DataLoader:
        """Trainer's own would divide the rows once more."""
        args = self.args
        if (dataset.rank, dataset.num_ranks) != (args.process_index, args.world_size):
            raise ValueError(
                f"Expected the stream of process {args.process_index} of {args.world_size}, found that of rank "
                f"{dataset.rank} of {dataset.num_ranks}. Make it with `rank=training_args.process_index, "
                "num_ranks=training_args.world_size`."
            )
        loader = DataLoader(
            dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )

    def _prepare_inputs(self, inputs):
        """Move a batch to the device, make its float pixels and its masks there, and take out its `meta`."""
        inputs = expand_batch(super()._prepare_inputs(inputs), self.processing_class)
        inputs.pop("meta")
        return inputs

    # ---- loss -------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        epoch_iterator = self.progress.watch(epoch_iterator)
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        metas = [batch["meta"] for batch in batches]
        self.nonfinite_steps.start_step([list(zip(meta.sources, meta.image_ids)) for meta in metas])
        if self.is_deepspeed_enabled:
            self.model_wrapped.optimizer.check_grad_overflow = True  # in every dtype, see `NonFiniteSteps`
        for batch in batches:
            self.progress.count(batch)
        num_skipped = sum(meta.num_skipped for meta in metas)
        num_masks = sum(len(masks) for batch in batches for masks in batch["mask_labels"])
        counts = self.accelerator.reduce(torch.tensor([num_masks, num_skipped], device=device), reduction="sum")
        self._num_masks_in_batch = counts[0]
        self.num_skipped_rows += int(counts[1])
        self._loss_parts_steps += 1
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        inputs = {**inputs, "num_masks_in_batch": self._num_masks_in_batch}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self.nonfinite_steps.add({part: outputs[part] for part in LOSS_PARTS})
        for part in LOSS_PARTS:
            # Trainer multiplies the loss by the number of processes, whose gradients it averages; so do the parts.
            value = outputs[part].detach() * self.accelerator.num_processes
            self._loss_parts[part] += value.where(value.isfinite(), 0)  # as Trainer does with the loss
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model):
        self._check_step(model)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:  # else it was clipped, and checked before
            self._check_step(model)
        return super()._get_grad_norm(model, grad_norm)

    def _check_step(self, model):
        self.nonfinite_steps.check(self, self.accelerator.unwrap_model(model), self.state.global_step + 1)
        if self.nonfinite_steps.error:
            self.control.should_save = self.control.should_training_stop = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            parts = torch.stack(
                [torch.as_tensor(value, device=self.args.device) for value in self._loss_parts.values()]
            )
            parts = self.accelerator.reduce(parts.float(), reduction="mean") / self._loss_parts_steps
            logs |= dict(zip(LOSS_PARTS, parts.tolist()))
            if self.num_skipped_rows:
                logs["num_skipped_rows"] = self.num_skipped_rows
            logs |= self.progress.figures()
            self._reset_loss_parts()
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As Trainer; `resume_from_checkpoint` may also be "auto", see [`checkpointing.resolve_checkpoint`]."""
        self._reset_loss_parts()
        self.progress.reset()
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        output = super().train(checkpoint, *args, **kwargs)
        if self.nonfinite_steps.error:
            raise ValueError(self.nonfinite_steps.error)
        return output

    def _run_epoch(self, *args, **kwargs):
        # Trainer would make one step more, if a run had made all of its steps when its last checkpoint was saved.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        if self.nonfinite_steps.spoils_weights:
            return
        directory = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with complete_save(self, directory):
            super()._save_checkpoint(model, trial)

    def _reset_loss_parts(self):
        self._loss_parts, self._loss_parts_steps = dict.fromkeys(LOSS_PARTS, 0.0), 0

    # ---- optimizer --------------------------------------------------------------------------------------------------

    def create_optimizer(self, model=None):
        """As Trainer, with the learning rates of the parts, or with Muon for those that are trained in full."""
        optimizer = super().create_optimizer(model)
        model = self.model if model is None else model
        if self.args.muon_learning_rate is not None:
            self.optimizer = use_muon(optimizer, model, self.args.muon_learning_rate)
            return self.optimizer
        if self.args.part_learning_rates:
            rates = {"other": self.args.learning_rate, **self.args.part_learning_rates}
            names = rate_names(model, self.args.part_learning_rates)
            names = {parameter: names[name] for name, parameter in model.named_parameters()}
            groups = []
            for group in optimizer.param_groups:
                for name in dict.fromkeys(names[parameter] for parameter in group["params"]):
                    params = [parameter for parameter in group["params"] if names[parameter] == name]
                    groups.append({**group, "name": name, "params": params, "lr": rates[name]})
            optimizer.param_groups[:] = groups
        return optimizer

    # ---- sharing ----------------------------------------------------------------------------------------------------

    def create_model_card(self, model_name: str | None = None, **kwargs):
        """Writes the model card of the run, which `push_to_hub` then uploads; see [`~model_card.write_model_card`].

        Without a `run.json`, which a recipe writes, it is Trainer's own draft; `kwargs` are for that one.
        """
        output_dir = Path(self.args.output_dir)
        if find_run_record(output_dir) is None:
            return super().create_model_card(model_name=model_name, **kwargs)
        if self.is_world_process_zero():
            model_id = self.hub_model_id or model_name or output_dir.name
            write_model_card(output_dir, output_dir, model_id, is_adapter=isinstance(self.model, PeftModel))

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args, **kwargs):
        # Iterating over a loader draws a seed; without the fork, dropout after an evaluation would be another one.
        with torch.random.fork_rng(devices=[]):
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """One evaluation batch, reduced to integers: one line per image, so that no gather can tear masks apart.

        Returns:
            The loss; a dict of int64 tensors `(B, ...)` padded with -100: `masks_due` and `num_seg_tokens` per
            question, `targets`, `intersections`, `unions` and, with `eval_generate`, `generated_*` per mask, in
            pixels; and `masks_due` again in the place of labels, without which Trainer computes no metrics.

        Raises:
            ValueError: the collator skipped a row, and a score over fewer rows is another score.
        """
        if num_skipped := inputs["meta"].num_skipped:
            raise ValueError(
                f"{num_skipped} evaluation rows were skipped, see the warnings above. Raise `max_length` or remove "
                "them."
            )
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        if "segment_ids" in inputs:  # the rest looks at one question per row
            inputs = unpack_rows(inputs)
        labels, image_indices = inputs["labels"], inputs["image_indices"]
        num_images = len(inputs["mask_labels"])
        masks_due = (labels == self.processing_class.seg_token_id).sum(1)
        predictions = {
            "masks_due": _by_image(masks_due, image_indices, num_images),
            "targets": _pad([(masks == 1).sum((-2, -1)) for masks in inputs["mask_labels"]]),
        }
        predictions |= _count_pixels("", [masks > 0 for masks in outputs.pred_masks], inputs["mask_labels"])
        if self.args.eval_generate:
            masks, num_seg_tokens = self.generate_masks(model, inputs)
            due = masks_due.tolist()
            per_image = [
                torch.cat(
                    [_exactly(masks[row], due[row]) for row in (image_indices == image).nonzero().flatten().tolist()]
                )
                for image in range(num_images)
            ]
            predictions |= _count_pixels("generated_", per_image, inputs["mask_labels"])
            predictions["num_seg_tokens"] = _by_image(num_seg_tokens, image_indices, num_images)
        return outputs.loss.detach(), predictions, predictions["masks_due"]

    def generate_masks(self, model, inputs: dict) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Answers the first question of every row of a training batch.

        Returns:
            List of N bool tensors `(M_n, H, W)`, the masks in each answer, and their number `(N,)`.
        """
        rows = cut_prompts(inputs, self.processing_class)
        shared = {key: value for key, value in inputs.items() if key not in (*TEXT_INPUTS, "labels", "mask_labels")}
        output = self.accelerator.unwrap_model(model).generate(
            **shared,
            **rows,
            max_new_tokens=self.args.generation_max_new_tokens,
            do_sample=False,
        )
        masks = self.processing_class.post_process_masks(
            output.low_res_masks,
            inputs["original_sizes"],
            inputs["reshaped_input_sizes"],
            output.seg_row_indices,
            inputs["image_indices"],
        )
        return masks, torch.bincount(output.seg_row_indices, minlength=len(masks))


def cut_prompts(inputs: dict, processor: LisaProcessor) -> dict[str, torch.Tensor]:
    """The rows of a training batch up to their first answer, `(N, L)`, padded on the left for generation."""
    labels = inputs["labels"]
    answers = labels != IGNORE_INDEX
    lengths = torch.where(answers.any(1), answers.long().argmax(1), inputs["attention_mask"].sum(1)).tolist()
    pad_ids = {"input_ids": processor.tokenizer.pad_token_id}
    rows = {}
    for name in TEXT_INPUTS:
        if name in inputs:
            cut = [row[:length].flip(0) for row, length in zip(inputs[name], lengths)]
            pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_value=pad_ids.get(name, 0))
            rows[name] = pad(cut).flip(1)
    return rows


def _by_image(values: torch.Tensor, image_indices: torch.Tensor, num_images: int) -> torch.Tensor:
    """Values of rows `(N,)`, one line per image, padded."""
    return _pad([values[image_indices == image] for image in range(num_images)])


def _pad(lines: list[torch.Tensor]) -> torch.Tensor:
    lines = [*lines, lines[0].new_zeros(1)]  # at least one column, which a gather over processes needs
    return torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=PADDING)[:-1].long()


def _exactly(masks: torch.Tensor, number: int) -> torch.Tensor:
    """The first `number` masks of `(M, H, W)`, empty ones where there are fewer."""
    missing = masks.new_zeros((max(number - len(masks), 0), *masks.shape[1:]))
    return torch.cat([masks[:number], missing])


def _count_pixels(prefix: str, masks: list[torch.Tensor], mask_labels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    counts = [intersection_and_union(predicted, labels) for predicted, labels in zip(masks, mask_labels)]
    intersections, unions = zip(*counts)
    return {f"{prefix}intersections": _pad(intersections), f"{prefix}unions": _pad(unions)}
