"""Evaluate a LISA model, or masks from any program, on benchmarks by every protocol of lisa_hf.

    python recipes/eval.py outputs/mine --data_dir dataset --benchmarks reason_seg_val reason_seg_test refcoco_val
    accelerate launch recipes/eval.py MODEL --data_dir dataset --benchmarks grefcoco_val --protocols generated gres
    python recipes/eval.py outputs/quickstart --eval_sources "{shapes: {num_validation_scenes: 200}}"

For other models, without loading one: export the questions, answer them, score the answers.

    python recipes/eval.py --export_questions questions.jsonl --data_dir dataset --benchmarks reason_seg_val
    python recipes/eval.py --predictions answers.jsonl --data_dir dataset --benchmarks reason_seg_val

MODEL may be a checkpoint of a run with LoRA, FSDP or ZeRO. `--base_model VLM`, the one that a model was trained from,
reports how likely the VLM's own answers to questions without masks still are; `--base_model` alone uses the LoRA run
without its adapter.

`--eval_sources` evaluates on your own data. A table is printed, and `--output_dir` (outputs/evaluate/MODEL) gets:

    evaluation.json            {"model", "settings", "environments": [{"date", "git_commit", "versions", "device",
                               "num_processes", "seed", "protocol_version"}], "train_overlap": {name: {training source:
                               number of its images}}, "training_data": what else is known, "text": of `--base_model`,
                               "benchmarks": {name: {"builder", "split" and other options of the source, "num_items",
                               "protocols": {"lisa" | ...: {"giou": 0.53, ...}}}}}
    evaluation.md              the same as a table, in percent
    predictions_NAME.jsonl     answers and masks, see lisa_hf/evaluation/predictions.py
    predictions_NAME.png       the best, the median and the worst answers
    scores_NAME.jsonl          the pixels of every mask by protocol, which recipes/compare.py reads

To continue an interrupted evaluation, run the command again. A finished one is replaced only with `--overwrite`.

Of a model's arguments, `--dtype` and `--attn_implementation` can be given. All others are those of recipes/train.py:
`--eval_generate false` for the teacher-forced protocols only, `--generation_max_new_tokens`, `--max_eval_items`, ...
"""

import argparse
import logging
import sys
from collections.abc import Collection
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

from accelerate import PartialState
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from data_scripts import load_sources
from data_scripts.benchmarks import BENCHMARKS
from data_scripts.check import describe_other_counts
from lisa_hf import LisaDataCollator, LisaTrainer
from lisa_hf.conversion.fsdp_checkpoints import is_fsdp_checkpoint
from lisa_hf.conversion.saving import DTYPES
from lisa_hf.conversion.zero_checkpoints import is_zero_checkpoint
from lisa_hf.data.mixture import EvaluationDataset
from lisa_hf.errors import check_name, report_user_errors
from lisa_hf.evaluation.benchmarks import (
    begin_evaluation,
    markdown_table,
    open_evaluation,
    questions_to_draw,
    score_predictions,
    write_evaluation,
    write_scores,
)
from lisa_hf.evaluation.leakage import count_seen_images, describe_seen_images
from lisa_hf.evaluation.predict import draw_predictions
from lisa_hf.evaluation.predictions import (
    QuestionPrediction,
    export_questions,
    find_predictions,
    predict_benchmark,
    read_predictions,
)
from lisa_hf.evaluation.protocols import DEFAULT_PROTOCOLS, PROTOCOL_VERSION, PROTOCOLS
from lisa_hf.evaluation.text_perplexity import compare_with_base, compare_without_adapter
from lisa_hf.export import restore_adapter, restore_model
from lisa_hf.model.packing import resolve_packing
from lisa_hf.model.processing_lisa import LisaProcessor
from lisa_hf.training.arguments import DataArguments, LisaTrainingArguments, ModelArguments, parse_arguments
from lisa_hf.training.build import load_lisa, load_vlm, unwrap_vlm_processor
from lisa_hf.training.run_record import describe_hardware, describe_software, find_training_images


logger = logging.getLogger("eval")

FEW_IMAGES = 20  # intervals of 95% cover 91% of the time with 20 images, 79% with 5
NUM_TEXT_IMAGES = 4  # with `--base_model`
WITHOUT_ADAPTER = ""  # `--base_model` without a value
# What of a model's arguments and of the trainer's changes predictions. A model itself says the rest.
MODEL_ARGUMENTS = ("dtype", "attn_implementation")
PRECISIONS = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32")
DEFAULTS = {
    "eval_generate": "true",
    "per_device_eval_batch_size": "1",  # makes metrics bit-identical on any number of processes
    "report_to": "none",
}


def main():
    # 1. Arguments: this recipe's own, then those of recipes/train.py
    args, model_args, data_args, training_args = parse()
    logging.basicConfig(format="%(message)s", level=training_args.get_process_log_level())
    for name in (logger.name, "lisa_hf", "data_scripts"):
        logging.getLogger(name).setLevel(logging.INFO if training_args.should_log else logging.WARNING)
    with report_user_errors():
        # 2. Data, prepared by one process
        with training_args.main_process_first(desc="data preparation"):
            sources, datasets = load_datasets(args.benchmarks, data_args, args.protocols)
        if args.export_questions:
            num_questions = export_questions(Path(args.export_questions), datasets, args.overwrite)
            print(f"Done. {num_questions} questions: {Path(args.export_questions).resolve()}")
            return

        # 3. An output directory, which may hold a part of this evaluation
        output_dir, model = Path(training_args.output_dir), args.model or args.predictions
        settings, environment = settings_of(args, model_args, data_args, training_args), environment_of(training_args)
        evaluation = open_evaluation(output_dir, model, settings, environment, sources, args.overwrite)

        # 4. Model and trainer, or predictions. If they are unusable, no evaluation is left behind.
        is_main, trainer = PartialState().is_main_process, None
        if args.model:
            train_images, note = find_training_images(args.model)
            evaluation |= {"training_data": note} if note else {}
            if args.base_model is not None and is_main and "text" not in evaluation:
                evaluation["text"] = compare_texts(args, model_args, training_args, datasets)
            trainer = make_trainer(args.model, model_args, data_args, training_args)
        elif is_main:
            predictions = read_all_predictions(args, datasets)
        with training_args.main_process_first(desc="output directory"):
            if is_main:
                begin_evaluation(output_dir, evaluation, args.overwrite)

        # 5. Answer, score, and write results after each benchmark, because the next one may take hours
        for name, dataset in datasets.items():
            logger.info("%s: %d images", name, len(dataset))
            if len(dataset) < FEW_IMAGES:
                logger.warning("%s: fewer than %d images make intervals too narrow.", name, FEW_IMAGES)
            if trainer is not None:
                path = output_dir / f"predictions_{name}.jsonl"
                predict_benchmark(trainer, dataset, path)
                predictions = {name: read_predictions(path, dataset)} if is_main else {}
            if is_main:
                results = score(name, dataset, predictions[name], args.protocols, output_dir)
                evaluation["benchmarks"] |= {found: {**sources[name], **results[found]} for found in results}
                if trainer is not None:
                    seen = None if train_images is None else count_seen_images(train_images, dataset)
                    evaluation["train_overlap"][name] = seen
                    logger.warning(describe_seen_images(name, len(dataset), seen, note))
                write_evaluation(output_dir, evaluation)
        if is_main:
            print(markdown_table(evaluation["benchmarks"]))
            print(f"Done. Metrics, masks and sheets of them: {output_dir.resolve()}")


def parse() -> tuple[argparse.Namespace, ModelArguments, DataArguments, LisaTrainingArguments]:
    """Parse this recipe's arguments and those that it shares with recipes/train.py."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [MODEL] [arguments]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--benchmarks", nargs="+", default=[], metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument(
        "--protocols",
        nargs="+",
        default=DEFAULT_PROTOCOLS,
        choices=PROTOCOLS,
        metavar="NAME",
        help=f"{', '.join(PROTOCOLS)} (default: {' '.join(DEFAULT_PROTOCOLS)})",
    )
    parser.add_argument("--predictions", metavar="PATH", help="JSON Lines file or directory of masks to score")
    parser.add_argument(
        "--missing_as_empty", action="store_true", help="count questions without a prediction as having no mask"
    )
    parser.add_argument("--export_questions", metavar="FILE", help="JSON Lines file to write the questions to")
    parser.add_argument(
        "--base_model",
        nargs="?",
        const=WITHOUT_ADAPTER,
        metavar="NAME",
        help="VLM or LISA that the model was trained from; without NAME: the model without its LoRA adapter",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation, or the file")
    # The model comes first. An optional positional argument would take the value of any argument of recipes/train.py.
    model = sys.argv[1] if sys.argv[1:] and not sys.argv[1].startswith("-") else None
    args, others = parser.parse_known_args(sys.argv[2:] if model else None)
    args.model = model
    given = [args.model, args.predictions, args.export_questions]
    if args.base_model is not None and not args.model:
        parser.error("--base_model: expected a model to compare it with, got none")
    if sum(value is not None for value in given) != 1:
        parser.error("expected exactly one of a model, --predictions and --export_questions")
    named = {other.removeprefix("--").partition("=")[0].replace("-", "_") for other in others if other[:2] == "--"}
    unused = {field.name for field in fields(ModelArguments)} - set(MODEL_ARGUMENTS)
    for name in sorted(named & unused):
        parser.error(
            f"--{name}: expected of a model's arguments only {' and '.join(f'--{name}' for name in MODEL_ARGUMENTS)}: "
            "the model itself says the rest. Leave it out."
        )
    name = Path(args.model).name if args.model else f"scored_{Path(args.predictions or '').stem}"
    defaults = DEFAULTS | {"output_dir": f"outputs/evaluate/{name}"}
    defaults = [text for name, value in defaults.items() for text in (f"--{name}", value)]
    # The model arguments require one, which is loaded only if it is `args.model`.
    name = next(value for value in given if value is not None)
    return args, *parse_arguments([*defaults, "--model", name, *others])


def make_trainer(
    name: str, model_args: ModelArguments, data_args: DataArguments, training_args: LisaTrainingArguments
) -> LisaTrainer:
    """Load a model, or a checkpoint of a run with LoRA, FSDP or ZeRO, and create the trainer that evaluates it."""
    path = Path(name)
    if (path / ADAPTER_CONFIG).is_file() or is_fsdp_checkpoint(path) or is_zero_checkpoint(path):
        model, processor = restore_model(path)
        model = model.to(DTYPES[model_args.dtype or "auto"])
        if model_args.attn_implementation:
            model.set_attn_implementation(model_args.attn_implementation)
    else:
        options = {argument: getattr(model_args, argument) for argument in MODEL_ARGUMENTS}
        model, processor = load_lisa(name, **{argument: value for argument, value in options.items() if value})
    packing = resolve_packing(model.config, data_args.packing)
    return LisaTrainer(
        model=model,
        args=training_args,
        data_collator=LisaDataCollator(processor, packing=packing, compact=True),
        processing_class=processor,
    )


def read_all_predictions(
    args: argparse.Namespace, datasets: dict[str, EvaluationDataset]
) -> dict[str, dict[str, QuestionPrediction]]:
    """Return the predictions named by the arguments, by benchmark."""
    return {
        name: read_predictions(find_predictions(Path(args.predictions), name), dataset, args.missing_as_empty, name)
        for name, dataset in datasets.items()
    }


def score(
    name: str,
    dataset: EvaluationDataset,
    predictions: dict[str, QuestionPrediction],
    protocols: Collection[str],
    output_dir: Path,
) -> dict[str, dict]:
    """Return the results of a benchmark and its subsets by name, and write its scores and its sheet."""
    subsets, scores = score_predictions(dataset, predictions, protocols)
    write_scores(output_dir / f"scores_{name}.jsonl", scores)
    if "generated" in scores:
        titles = questions_to_draw(scores["generated"])
        draw_predictions(dataset, predictions, titles).save(output_dir / f"predictions_{name}.png")
    return {name + subset: result for subset, result in subsets.items()}


def settings_of(
    args: argparse.Namespace,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: LisaTrainingArguments,
) -> dict:
    """Return what predictions depend on besides their benchmark."""
    settings = {"protocols": list(args.protocols), "max_eval_items": data_args.max_eval_items}
    if args.predictions:
        return settings | {"predictions": args.predictions, "missing_as_empty": args.missing_as_empty}
    return settings | {
        "model": args.model,
        "weights": describe_weights(args.model),
        "dtype": str(model_args.dtype),
        "attn_implementation": model_args.attn_implementation,
        "precision": [name for name in PRECISIONS if getattr(training_args, name)],
        "eval_generate": training_args.eval_generate,
        "generation_max_new_tokens": training_args.generation_max_new_tokens,
        "per_device_eval_batch_size": training_args.per_device_eval_batch_size,
    }


def describe_weights(model: str) -> list | str | None:
    """Return what changes when a model of this name is trained again: sizes and times of its files, or its commit."""
    directory = Path(model)
    if not directory.is_dir():
        missing = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        return extract_commit_hash(cached_file(model, CONFIG_NAME, **missing), None)
    # The files of a run are next to its checkpoints, whose shards are in directories.
    files = directory.rglob("*") if directory.name.startswith("checkpoint-") else directory.glob("*")
    files = sorted(file for file in files if file.suffix in (".safetensors", ".bin", ".pt", ".distcp"))
    return [[str(file.relative_to(directory)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def compare_texts(
    args: argparse.Namespace,
    model_args: ModelArguments,
    training_args: LisaTrainingArguments,
    datasets: dict[str, EvaluationDataset],
) -> dict:
    """Measure how much training changed the language of the VLM, on the first images of the first benchmark."""
    dataset = next(iter(datasets.values()))
    images = [dataset[index]["image"] for index in range(min(NUM_TEXT_IMAGES, len(dataset)))]
    if args.base_model == WITHOUT_ADAPTER:
        checkpoint = Path(args.model)
        if not (checkpoint / ADAPTER_CONFIG).is_file():
            raise ValueError(
                f"--base_model: expected the name of a VLM, or a checkpoint of a LoRA run as model, got {checkpoint}. "
                "Name the VLM that it was trained from."
            )
        model = restore_adapter(checkpoint).to(training_args.device, DTYPES[model_args.dtype or "auto"]).eval()
        processor = unwrap_vlm_processor(LisaProcessor.from_pretrained(checkpoint))
        return compare_without_adapter(model, processor, args.model, images)

    def load(name: str) -> tuple:
        vlm, processor = load_vlm(name, **({"dtype": model_args.dtype} if model_args.dtype else {}))
        return vlm.to(training_args.device).eval(), processor

    return compare_with_base(load, args.model, args.base_model, images)


def environment_of(training_args: LisaTrainingArguments) -> dict:
    """Return what else results were made with; only the last item should change them beyond rounding."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        **describe_software(),
        **describe_hardware(training_args),
        "seed": training_args.seed,
        "protocol_version": PROTOCOL_VERSION,
    }


def load_datasets(
    benchmarks: list[str], data_args: DataArguments, protocols: Collection[str]
) -> tuple[dict[str, dict], dict[str, EvaluationDataset]]:
    """Return the sources to evaluate on, with their options, and their datasets, both by name."""
    sources = {}
    for name in benchmarks:
        check_name("--benchmarks", name, BENCHMARKS)
        builder, options = BENCHMARKS[name]
        sources[name.replace("/", "--")] = {"builder": builder, **options}  # it becomes part of file names
    published = set(sources)
    sources |= data_args.eval_sources
    if not sources:
        raise ValueError("expected --benchmarks or --eval_sources '{reason_seg: {split: val}}', got neither")
    rows = load_sources(sources, data_args.data_dir, data_args.max_eval_items)
    texts = {PROTOCOLS[name].texts for name in protocols}
    datasets = {
        # Published benchmarks ask about each object separately, even if several have the same name.
        name: EvaluationDataset(rows[name], merge_instances=name not in published, texts=texts)
        for name in sources
    }
    for name, options in sources.items():
        sources[name] = {"builder": name, **options, "merge_instances": datasets[name].merge_instances}
        if name in published and data_args.max_eval_items is None:
            if warning := describe_other_counts(name, options.get("builder", name), options, rows[name]):
                logger.warning(warning)
    return sources, datasets


if __name__ == "__main__":
    main()
