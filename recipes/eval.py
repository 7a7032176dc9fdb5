"""Evaluate a LISA model on benchmarks, by every protocol of lisa_hf/evaluation/benchmarks.py.

    python recipes/eval.py outputs/mine --data_dir dataset --benchmarks reason_seg_val reason_seg_test refcoco_val
    accelerate launch recipes/eval.py MODEL --data_dir dataset --benchmarks grefcoco_val
    python recipes/eval.py outputs/quickstart --eval_sources "{shapes: {num_validation_scenes: 200}}"

`--eval_sources` evaluates on your own data. A table is printed, and `--output_dir` (outputs/evaluate/MODEL) gets:

    evaluation.json            {"model": ..., "benchmarks": {name: {"builder", "split" and other options of the
                               source, "num_items", "protocols": {"lisa" | "generated" ...: {"giou": 0.53, ...}}}}}
    evaluation.md              the same as a table, in percent
    predictions_NAME.png       the best, the median and the worst answers

An earlier evaluation there is replaced only with `--overwrite`.

All other arguments are those of recipes/train.py: `--dtype bfloat16`, `--eval_generate false` for the teacher-forced
protocols only, `--generation_max_new_tokens`, `--max_eval_items`, ...
"""

import argparse
import logging
from pathlib import Path

from data_scripts import load_sources
from lisa_hf import LisaDataCollator, LisaTrainer
from lisa_hf.data.mixture import EvaluationDataset
from lisa_hf.errors import nearest_name, report_user_errors
from lisa_hf.evaluation.benchmarks import evaluate_benchmark, markdown_table, write_results
from lisa_hf.evaluation.predict import draw_predictions
from lisa_hf.model.packing import resolve_packing
from lisa_hf.training.arguments import DataArguments, LisaTrainingArguments, ModelArguments, parse_arguments
from lisa_hf.training.build import load_lisa
from lisa_hf.training.model_card import EVALUATION


logger = logging.getLogger("evaluate")

SPLITS = {
    "reason_seg": ("val", "val_short", "val_long", "test", "test_short", "test_long"),
    "refcoco": ("val", "testA", "testB"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
    "refclef": ("val", "testA", "testB", "testC"),
    "grefcoco": ("val", "testA", "testB"),
}
# Name of a benchmark -> its source and the source's options.
BENCHMARKS = {f"{source}_{split}": (source, {"split": split}) for source, splits in SPLITS.items() for split in splits}
DEFAULTS = {
    "eval_generate": "true",
    "per_device_eval_batch_size": "1",  # makes metrics equal to the last bit on any number of processes
    "report_to": "none",
}


def main():
    # 1. Arguments: this recipe's own, then those of recipes/train.py
    args, model_args, data_args, training_args = parse()
    logging.basicConfig(format="%(message)s", level=training_args.get_process_log_level())
    with report_user_errors():
        output_dir = Path(training_args.output_dir)
        if (output_dir / EVALUATION).exists() and not args.overwrite:
            raise ValueError(
                f"--output_dir: expected a directory without an earlier evaluation, got {output_dir} with its "
                f"{EVALUATION}. Name another, or replace it with --overwrite."
            )
        # 2. Data, prepared by one process
        with training_args.main_process_first(desc="data preparation"):
            sources, datasets = load_datasets(args.benchmarks, data_args, not args.first_text_only)

        # 3. Model and trainer
        model, processor = load_lisa(args.model, **({"dtype": model_args.dtype} if model_args.dtype else {}))
        packing = resolve_packing(model.config, data_args.packing)
        trainer = LisaTrainer(
            model=model,
            args=training_args,
            data_collator=LisaDataCollator(processor, packing=packing, compact=True),
            processing_class=processor,
        )

        # 4. Evaluate, and write results after each benchmark, since the next one may take hours
        results = {}
        for name, dataset in datasets.items():
            logger.info("%s: %d images", name, len(dataset))
            subsets, questions = evaluate_benchmark(trainer, dataset)
            results |= {name + subset: {**sources[name], **result} for subset, result in subsets.items()}
            if trainer.is_world_process_zero():
                write_results(output_dir, args.model, results)
                if questions:
                    max_new_tokens = training_args.generation_max_new_tokens
                    sheet = draw_predictions(model, processor, dataset, max_new_tokens, titles=questions)
                    sheet.save(output_dir / f"predictions_{name}.png")
        if trainer.is_world_process_zero():
            print(f"{markdown_table(results)}\nDone. Metrics and sheets of predictions: {output_dir.resolve()}")


def parse() -> tuple[argparse.Namespace, ModelArguments, DataArguments, LisaTrainingArguments]:
    """Parse this recipe's arguments and those that it shares with recipes/train.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="LISA model: directory or Hub id")
    parser.add_argument("--benchmarks", nargs="+", default=[], metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--first_text_only", action="store_true", help="leave out the protocols with all texts")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation in --output_dir")
    args, others = parser.parse_known_args()
    defaults = DEFAULTS | {"output_dir": f"outputs/evaluate/{Path(args.model).name}"}
    defaults = [text for name, value in defaults.items() for text in (f"--{name}", value)]
    return args, *parse_arguments([*defaults, "--model", args.model, *others])


def load_datasets(
    benchmarks: list[str], data_args: DataArguments, all_texts: bool
) -> tuple[dict[str, dict], dict[str, EvaluationDataset]]:
    """Return the sources to evaluate on, with their options, and their datasets, both by name."""
    sources = {}
    for name in benchmarks:
        if name not in BENCHMARKS:
            raise ValueError(
                f"--benchmarks: expected names among {', '.join(BENCHMARKS)}, got `{name}`. Did you mean "
                f"`{nearest_name(name, BENCHMARKS)}`?"
            )
        builder, options = BENCHMARKS[name]
        sources[name] = {"builder": builder, **options}
    sources |= data_args.eval_sources
    if not sources:
        raise ValueError("expected --benchmarks or --eval_sources '{reason_seg: {split: val}}', got neither")
    rows = load_sources(sources, data_args.data_dir, data_args.max_eval_items)
    datasets = {
        # Published benchmarks ask about each of several objects of one name on its own.
        name: EvaluationDataset(rows[name], merge_instances=name not in benchmarks, all_texts=all_texts)
        for name in sources
    }
    return {name: {"builder": name, **options} for name, options in sources.items()}, datasets


if __name__ == "__main__":
    main()
