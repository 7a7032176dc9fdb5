"""Fine-tune a LISA model.

    accelerate launch recipes/train.py --config recipes/configs/quickstart.yaml --max_steps 20 --output_dir outputs/try
    accelerate launch --config_file recipes/accelerate/zero2.yaml --num_processes 2 recipes/train.py --config ...

The keys of the YAML file are the arguments listed by `--help`; the command line overrides the file. With
`--resume_from_checkpoint auto`, the same command starts a run and resumes it.
"""

import logging
import signal
import sys
from pathlib import Path


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):  # the imports below take seconds
    from train_help import print_help

    print_help(__doc__)
    sys.exit()

import transformers

from data_scripts import load_sources
from lisa_hf import LisaDataCollator, LisaTrainer
from lisa_hf.data.mixture import MixtureDataset
from lisa_hf.data.streaming import StreamingMixtureDataset
from lisa_hf.errors import report_user_errors
from lisa_hf.export import gather_trained_model
from lisa_hf.model.packing import resolve_packing
from lisa_hf.training.argument_changes import compare_with_checkpoint
from lisa_hf.training.arguments import DataArguments, LisaTrainingArguments, parse_arguments
from lisa_hf.training.build import build_config_and_processor, build_datasets, build_for_training
from lisa_hf.training.callbacks import PredictionSheet, SelfCheck, StopOnSignal
from lisa_hf.training.checkpointing import claim_output_dir, resolve_checkpoint
from lisa_hf.training.dry_run import dry_run
from lisa_hf.training.memory_estimate import report_memory
from lisa_hf.training.run_record import write_run_record
from lisa_hf.training.trainable import allow_unused_weights, trainable_summary
from lisa_hf.training.zero import gather_image_encoders


logger = logging.getLogger("train")


def main():
    # 1. Arguments: a YAML file, then the command line
    model_args, data_args, training_args = parse_arguments()
    logging.basicConfig(format="%(message)s", level=training_args.get_process_log_level())
    # These log once what was skipped, how large the feature cache is, which checkpoint is loaded, and the self-check.
    modules = ("data.feature_cache", "training.checkpointing", "training.callbacks", "training.trainer")
    for name in ("data_scripts", *(f"lisa_hf.{module}" for module in modules)):
        logging.getLogger(name).setLevel(logging.INFO if training_args.should_log else logging.WARNING)

    with report_user_errors(), claim_output_dir(training_args):
        checkpoint = resolve_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)

        # 2. Data: images with the questions that are asked about them
        train_rows, eval_rows = load_rows(data_args, training_args)
        train_dataset, eval_datasets = build_datasets(train_rows, eval_rows, data_args, training_args)
        if checkpoint:
            for change in compare_with_checkpoint(checkpoint, model_args, data_args, training_args, train_dataset):
                logger.log(logging.WARNING if training_args.should_log else logging.DEBUG, "Resuming: %s", change)

        # 3. Config, processor, model: what trains is chosen here
        config, processor = build_config_and_processor(model_args, train_rows)
        if training_args.should_log:
            print(report_memory(config, processor, model_args, data_args, training_args))
        transformers.set_seed(training_args.seed)  # exporting a LoRA run draws the same random weights again
        model = build_for_training(model_args, config, training_args)
        if training_args.should_log:
            print(trainable_summary(model, training_args))
        allow_unused_weights(model, processor, training_args)
        if train_dataset.feature_cache is not None:
            rows = choose_rows_to_cache(train_dataset, train_rows, training_args)
            with gather_image_encoders(model):
                train_dataset.feature_cache.build(model, processor, rows, training_args)

        # 4. Trainer
        packing = resolve_packing(model.config, data_args.packing)
        collator = LisaDataCollator(processor, data_args.max_length, data_args.on_bad_row, packing, compact=True)
        trainer = LisaTrainer(
            model=model,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_datasets if len(eval_datasets) > 1 else next(iter(eval_datasets.values()), None),
            data_collator=collator,
            processing_class=processor,
        )
        trainer.add_callback(SelfCheck(trainer))
        if eval_datasets:
            trainer.add_callback(PredictionSheet(trainer, next(iter(eval_datasets.values()))))
        if training_args.dry_run:
            report = dry_run(trainer)
            if trainer.is_world_process_zero():
                print(report)
            return

        # 5. Train, evaluate, save
        trainer.add_callback(stop := StopOnSignal(trainer))
        if trainer.is_world_process_zero():
            write_run_record(model_args, data_args, training_args, train_dataset, eval_datasets)
        trainer.train(resume_from_checkpoint=checkpoint)
        if stop.received:
            logger.warning("Stopped by %s. Resume with --resume_from_checkpoint auto.", stop.received.name)
        else:
            evaluate_and_save(trainer)


def load_rows(data_args: DataArguments, training_args: LisaTrainingArguments) -> tuple[dict, dict]:
    """Load the rows of the training and evaluation sources by name; one process prepares them for all."""
    with training_args.main_process_first(desc="data preparation"):
        options = {"on_bad_row": data_args.on_bad_row, "exclude_refer_val": data_args.exclude_refer_val}
        train_rows = load_sources(data_args.sources, data_args.data_dir, streaming=data_args.streaming, **options)
        return train_rows, load_sources(data_args.eval_sources, data_args.data_dir, data_args.max_eval_items)


def choose_rows_to_cache(
    dataset: MixtureDataset | StreamingMixtureDataset, train_rows: dict, training_args: LisaTrainingArguments
) -> dict:
    """Choose the rows whose images the feature cache gets: a short run needs those alone that it draws."""
    args = training_args
    num_items = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    # Sharded encoders need an entry for every image, including rows drawn in place of bad ones.
    if not isinstance(dataset, MixtureDataset) or args.shards_weights or args.train_sampling_strategy != "sequential":
        return train_rows
    return dataset.drawn_rows(num_items) if 0 < num_items < sum(map(len, train_rows.values())) else train_rows


def evaluate_and_save(trainer: LisaTrainer) -> None:
    """Evaluate the final model and save it with its processor and metrics, even if the evaluation fails."""
    trainer.save_state()
    if trainer.num_skipped_rows:
        logger.warning("%d rows could not be used and were skipped.", trainer.num_skipped_rows)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # without this it would end immediately
    can_save = True
    try:
        if trainer.eval_dataset is not None:
            metrics = trainer.evaluate()
            trainer.log_metrics("eval", metrics)
            trainer.save_metrics("eval", metrics)
    except Exception:
        # Only this process may have failed. The others would go on evaluating instead of gathering weights with it.
        is_gathered = trainer.args.shards_weights or getattr(trainer.model, "is_quantized", False)
        can_save = trainer.args.world_size == 1 or not is_gathered
        raise
    finally:
        if can_save:
            save_final_model(trainer)
    if trainer.is_world_process_zero():
        print(f"Done. Model, processor, metrics and predictions: {Path(trainer.args.output_dir).resolve()}")


def save_final_model(trainer: LisaTrainer) -> None:
    """Save the trained model and its processor; every process must call it."""
    model = gather_trained_model(trainer)
    if trainer.is_world_process_zero():
        model.save_pretrained(trainer.args.output_dir)
        trainer.processing_class.save_pretrained(trainer.args.output_dir)


if __name__ == "__main__":
    main()
