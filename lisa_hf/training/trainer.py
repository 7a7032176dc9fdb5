"""LisaTrainer: transformers' Trainer with a loss that is exact for any split of a step, and mask metrics."""

import logging
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest import mock

import torch
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from ..data.collator import expand_batch
from ..data.streaming import CollateWithState, StreamingMixtureDataset
from ..errors import nearest_name
from ..evaluation.counts import (
    compute_metrics,
    count_generated,
    count_masks_due,
    count_teacher_forced,
    metric_names,
)
from ..evaluation.predict import generate_answers
from ..evaluation.predictions import PredictionWriter
from ..from_scratch.muon import use_muon
from ..model.packing import unpack_rows
from ..model.upstream_fixes import share_weights_files
from .callbacks import SkipNonFiniteSteps, Throughput
from .checkpointing import complete_save, find_best_checkpoint_here, find_fault, resolve_checkpoint
from .engine_change import allow_other_engine, load_best_weights
from .fsdp import match_saved_state_dict_type, save_shards, saves_shards, shard_before_loading
from .model_card import write_model_card
from .run_record import find_run_record
from .stream_position import StreamPosition
from .trainable import split_parameter_groups


logger = logging.getLogger(__name__)

LOSS_PARTS = ("ce_loss", "mask_bce_loss", "mask_dice_loss")


class LisaTrainer(Trainer):
    """Train and evaluate a [`LisaForConditionalGeneration`], plain or inside a `PeftModel`.

    The arguments are those of `Trainer`; `args` is a [`LisaTrainingArguments`], `processing_class` a
    [`LisaProcessor`] and `data_collator` a [`LisaDataCollator`].

    The loss is divided by the labels and masks of the whole step, counted over accumulation steps and processes, so it
    does not depend on how a step is split. LISA averages micro-batches of unequal weight.

    Evaluation has two protocols. Teacher-forced, as in LISA's validation: the true answer is given and its `[SEG]`
    tokens are decoded (`giou`, `ciou`, ...). Generated, with `args.eval_generate`: the model answers by itself, and a
    missing mask counts as empty (`generated_giou`, ..., and the `[SEG]` rates). These metrics are exact on any number
    of processes; `eval_loss` is Trainer's mean over batches, which depends slightly on the batches.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, compute_metrics=compute_metrics, **kwargs)
        self._check_settings()
        if self.args.compile_mask_encoder:
            self.model.mask_model.vision_encoder.compile(dynamic=False)
        self.num_skipped_rows = 0
        self._num_masks_in_batch = None
        self._best_step = None  # of the best model, once it is loaded
        self.nonfinite_steps = SkipNonFiniteSteps(self.args.max_nonfinite_steps)
        self.prediction_writer: PredictionWriter | None = None  # set to keep the predictions of an evaluation
        self.throughput = Throughput()
        self.add_callback(self.throughput)
        self.stream_position = None
        if isinstance(self.train_dataset, StreamingMixtureDataset):
            self.stream_position = StreamPosition(self.train_dataset, self.args.dataloader_num_workers)

    def _check_settings(self) -> None:
        if self.args.n_gpu > 1:
            # torch's DataParallel would split a batch, which has different numbers of rows and images.
            raise ValueError(
                f"expected one GPU per process, got {self.args.n_gpu} GPUs in one. Start one process per GPU: "
                "`accelerate launch recipes/train.py ...`."
            )
        if not self.args.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices: expected True, got False. Omit it: the loss is divided by the "
                "labels and masks of all processes."
            )
        if self.args.metric_for_best_model and self.args.eval_strategy != "no":
            self._check_best_metric()

    def _check_best_metric(self) -> None:
        metric, names = self.args.metric_for_best_model, self.eval_dataset
        name = metric.removeprefix("eval_")
        if isinstance(names, dict):
            sets = [dataset for dataset in names if name.startswith(f"{dataset}_")]
            if not sets:
                raise ValueError(
                    f"metric_for_best_model: expected a metric of one evaluation set ({', '.join(names)}), got "
                    f"{metric}. Name its set, as in {next(iter(names))}_{metric}."
                )
            name = name.removeprefix(f"{max(sets, key=len)}_")
        known = ["loss", *metric_names(self.args.eval_generate)]
        if name not in known:
            hint = f"Did you mean {nearest_name(name, known)}?"
            if name in metric_names(has_generated=True):
                hint = "Set eval_generate."
            raise ValueError(f"metric_for_best_model: expected one of {', '.join(known)}, got {metric}. {hint}")

    @property
    def weights_step(self) -> int:
        """The step of the weights, which is not the last one if the best model was loaded."""
        return self.state.global_step if self._best_step is None else self._best_step

    # ---- data -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return Trainer's loader; a [`StreamingMixtureDataset`] divides its rows among processes itself."""
        if isinstance(self.train_dataset, StreamingMixtureDataset):
            return self._get_streaming_dataloader(self.train_dataset)
        loader = super().get_train_dataloader()
        if has_length(loader) and len(loader) == 0:
            raise ValueError(
                f"dataloader_drop_last: expected items for a whole batch ({self._train_batch_size} for each process), "
                f"got {len(self.train_dataset)} in total. Omit it, or lower per_device_train_batch_size."
            )
        return loader

    def _get_streaming_dataloader(self, dataset: StreamingMixtureDataset) -> DataLoader:
        args = self.args
        if (dataset.rank, dataset.num_ranks) != (args.process_index, args.world_size):
            raise ValueError(
                f"expected the stream of process {args.process_index} of {args.world_size}, got that of rank "
                f"{dataset.rank} of {dataset.num_ranks}. Build it with `rank=training_args.process_index, "
                "num_ranks=training_args.world_size`."
            )
        loader = DataLoader(
            dataset,
            batch_size=self._train_batch_size,
            collate_fn=CollateWithState(dataset, self.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        # One "process": the stream has already divided its rows, and Trainer's loader would divide them again.
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )

    def _prepare_inputs(self, inputs):
        """Move a batch to the device, create its float pixels and masks there, and pop its `meta`."""
        inputs = expand_batch(super()._prepare_inputs(inputs), self.processing_class)
        inputs.pop("meta")
        return inputs

    # ---- loss -------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step and its label count; also count its masks over all processes."""
        batches, num_items_in_batch = super().get_batch_samples(
            self.throughput.watch(epoch_iterator), num_batches, device
        )
        if self.stream_position:
            self.stream_position.advance(batches)
        metas = [batch["meta"] for batch in batches]
        self.throughput.count(batches)
        self.nonfinite_steps.start_step([list(zip(meta.sources, meta.image_ids)) for meta in metas])
        if self.is_deepspeed_enabled:
            # DeepSpeed looks for overflows in fp16 only, unless told; see `SkipNonFiniteSteps`.
            self.model_wrapped.optimizer.check_grad_overflow = True
        num_masks = sum(len(masks) for batch in batches for masks in batch["mask_labels"])
        num_skipped = sum(meta.num_skipped for meta in metas)
        counts = self.accelerator.reduce(torch.tensor([num_masks, num_skipped], device=device), reduction="sum")
        self._num_masks_in_batch = counts[0]
        self.num_skipped_rows = self.num_skipped_rows + counts[1]  # stays on the device until a log
        self._loss_parts_steps += 1
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        inputs = {**inputs, "num_masks_in_batch": self._num_masks_in_batch}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self.nonfinite_steps.add({part: outputs[part] for part in LOSS_PARTS})
        for part in LOSS_PARTS:
            # Gradients are averaged over processes, so Trainer multiplies the loss by their number. Scale the parts
            # too.
            value = outputs[part].detach() * self.accelerator.num_processes
            self._loss_parts[part] += value.where(value.isfinite(), 0)  # Trainer logs the loss so
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model):
        self._check_step(model)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:  # otherwise gradients were clipped, and checked before
            self._check_step(model)
        return super()._get_grad_norm(model, grad_norm)

    def _check_step(self, model):
        """Check loss and gradients after the last backward pass of a step, before clipping mixes the gradients."""
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
                logs["num_skipped_rows"] = int(self.num_skipped_rows)
            logs |= self.throughput.compute()
            self._reset_loss_parts()
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train; `resume_from_checkpoint` may also be "auto", see [`checkpointing.resolve_checkpoint`]."""
        self._reset_loss_parts()
        self.throughput.reset()
        self._best_step = None
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        with ExitStack() as stack:
            stack.enter_context(find_best_checkpoint_here(self.args.output_dir))
            if checkpoint:
                stack.enter_context(allow_other_engine(self, Path(checkpoint)))
            if self.stream_position:
                place = None if self.args.ignore_data_skip else checkpoint
                stack.enter_context(self.stream_position.resume(place))
            output = super().train(checkpoint, *args, **kwargs)
        if self.nonfinite_steps.error:
            raise ValueError(self.nonfinite_steps.error)
        return output

    def _prepare_for_training(self, *args, **kwargs):
        with shard_before_loading() if self.is_fsdp_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        # A run that resumes from its last step would otherwise run one step too many.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        try:
            super()._run_epoch(*args, **kwargs)
        except ValueError:
            self._save_before_error()
            raise

    def _save_before_error(self) -> None:
        """Save the last finished step, for bad data have ended the run; alone, since other processes would wait."""
        step = self.state.global_step
        is_saved = find_fault(Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")) is None
        if self.args.world_size == 1 and step > self._initial_global_step and not is_saved:
            self._save_checkpoint(self.model, trial=None)
            logger.warning("Saved a checkpoint of step %d. Resume from it once the error below is corrected.", step)

    def _save_checkpoint(self, model, trial):
        if self.nonfinite_steps.spoils_weights:
            return
        directory = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with complete_save(self, directory):
            super()._save_checkpoint(model, trial)
            if self.stream_position:
                self.stream_position.save(directory)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Save the model as Trainer does, or in shards if FSDP is set to."""
        if saves_shards(self):
            save_shards(self, Path(output_dir or self.args.output_dir))
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            share_weights_files(Path(output_dir or self.args.output_dir))

    def _save_optimizer_and_scheduler(self, output_dir):
        # With shards, `save_model` has saved the weights that Trainer would save here.
        saved = mock.patch("transformers.trainer.save_fsdp_model") if saves_shards(self) else nullcontext()
        with saved:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with match_saved_state_dict_type(self, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result):
        # Tied weights are saved once. Trainer would warn of their other names at each resume.
        tied = self.model.all_tied_weights_keys
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with match_saved_state_dict_type(self, Path(checkpoint)) if checkpoint else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self):
        best, metric = Path(self.state.best_model_checkpoint), self.args.metric_for_best_model
        with match_saved_state_dict_type(self, best):
            is_loaded = load_best_weights(self, best)
        if not is_loaded:
            # The records of the run then do not show that the best model was saved.
            self.state.best_global_step = self.state.best_model_checkpoint = None
            return
        self._best_step = self.state.best_global_step
        if self.is_world_process_zero():
            logger.info(
                "Loaded the best model, of step %d (%s %.4g), instead of the last one, of step %d.",
                *(self._best_step, metric, self.state.best_metric, self.state.global_step),
            )

    def _reset_loss_parts(self):
        self._loss_parts, self._loss_parts_steps = dict.fromkeys(LOSS_PARTS, 0.0), 0

    # ---- optimizer --------------------------------------------------------------------------------------------------

    def create_optimizer(self, model=None):
        """Create Trainer's optimizer with a learning rate per part, or with Muon for the parts trained in full."""
        optimizer = super().create_optimizer(model)
        model = self.model if model is None else model
        if self.args.muon_learning_rate is not None:
            self.optimizer = use_muon(optimizer, model, self.args.muon_learning_rate)
        elif self.args.part_learning_rates:
            split_parameter_groups(optimizer, model, self.args)
        return self.optimizer

    # ---- sharing ----------------------------------------------------------------------------------------------------

    def create_model_card(self, model_name: str | None = None, **kwargs):
        """Write the model card of the run, which `push_to_hub` then uploads, see [`~model_card.write_model_card`].

        Without a `run.json`, which recipes write, this is Trainer's own draft; `kwargs` are passed to it.
        """
        output_dir = Path(self.args.output_dir)
        if find_run_record(output_dir) is None:
            return super().create_model_card(model_name=model_name, **kwargs)
        if self.is_world_process_zero():
            model_id = self.hub_model_id or model_name or output_dir.name
            write_model_card(output_dir, output_dir, model_id, is_adapter=isinstance(self.model, PeftModel))

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args, **kwargs):
        # ZeRO-1 and 2 shard only training state. transformers rejects them if there was no training before.
        is_enabled = self.is_deepspeed_enabled
        self.is_deepspeed_enabled = is_enabled and (self.deepspeed is not None or self.args.shards_weights)
        try:
            # Iterating over a loader draws a seed. The fork keeps this from changing dropout after the evaluation.
            with torch.random.fork_rng(devices=[]):
                return super().evaluation_loop(*args, **kwargs)
        finally:
            self.is_deepspeed_enabled = is_enabled

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Reduce one evaluation batch to integers.

        Returns:
            The loss; the counts of [`count_teacher_forced`] and, with `eval_generate`, of [`count_generated`]; and
            `masks_due` again as labels, without which Trainer computes no metrics.

        Raises:
            ValueError: If rows were skipped: a score over fewer rows is a different score.
        """
        if num_skipped := inputs["meta"].num_skipped:
            raise ValueError(
                f"expected all evaluation rows to fit, got {num_skipped} skipped ones, see the warnings above. Raise "
                "`max_length` or remove these rows."
            )
        image_ids = inputs["meta"].image_ids
        inputs = self._prepare_inputs(inputs)
        # 1. Decode the [SEG] tokens of the true answers.
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        # 2. Count per question, which needs a separate row for each.
        if "segment_ids" in inputs:
            inputs = unpack_rows(inputs)
        processor = self.processing_class
        masks = [logits > 0 for logits in outputs.pred_masks]  # B x [M_b, H_b, W_b]
        counts = count_teacher_forced(inputs, masks, processor.seg_token_id)
        # 3. Let the model answer by itself.
        answers = None
        if self.args.eval_generate:
            lisa = self.accelerator.unwrap_model(model)
            max_new_tokens = self.args.generation_max_new_tokens
            answers = generate_answers(lisa, processor, inputs, max_new_tokens, outputs.image_embeddings)
            counts |= count_generated(inputs, answers, processor.seg_token_id)
        # 4. Keep the masks.
        if self.prediction_writer is not None:
            masks_due = count_masks_due(inputs, processor.seg_token_id)
            self.prediction_writer.write(image_ids, inputs["image_indices"], masks_due, masks, answers)
        return outputs.loss.detach(), counts, counts["masks_due"]
