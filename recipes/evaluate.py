"""Evaluates a LISA model: gIoU and cIoU, teacher-forced as LISA validates and with generated answers.

    python recipes/evaluate.py outputs/quickstart --eval_sources "{shapes: {num_validation_scenes: 200}}"
    accelerate launch recipes/evaluate.py MODEL --data_dir dataset --eval_sources "{reason_seg: {split: val}}"

Prints the figures and writes them, with a sheet of predictions, to `--output_dir` (default: outputs/evaluate).
"""

import sys
from pathlib import Path


# This directory comes first on the path, where evaluate.py would hide the package of that name.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]


import json

from data_scripts import load_sources
from lisa_hf import LisaDataCollator, LisaTrainer
from lisa_hf.arguments import exit_with_one_line, parse_arguments
from lisa_hf.inference import draw_predictions
from lisa_hf.loading import load_lisa
from lisa_hf.mixture import EvaluationDataset
from lisa_hf.packing import use_packing


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    model_args, data_args, training_args = parse_arguments(
        ["--eval_generate", "true", "--report_to", "none", "--output_dir", "outputs/evaluate"]
        + ["--model", *sys.argv[1:]]
    )
    with exit_with_one_line():
        if not data_args.eval_sources:
            raise ValueError("eval_sources: expected at least one, e.g. --eval_sources '{reason_seg: {split: val}}'")
        kwargs = {"dtype": model_args.dtype} if model_args.dtype else {}
        model, processor = load_lisa(model_args.model, **kwargs)
        with training_args.main_process_first(desc="data preparation"):
            sources = load_sources(data_args.eval_sources, data_args.data_dir, data_args.max_eval_items)
        datasets = {name: EvaluationDataset(rows) for name, rows in sources.items()}
        trainer = LisaTrainer(
            model=model,
            args=training_args,
            data_collator=LisaDataCollator(processor, packing=use_packing(model.config, data_args.packing)),
            processing_class=processor,
        )
        metrics = trainer.evaluate(datasets)
        if not trainer.is_world_process_zero():
            return
        trainer.log_metrics("eval", metrics)
        output_dir = Path(training_args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "eval_results.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
        for name, dataset in datasets.items():
            sheet = draw_predictions(model, processor, dataset, training_args.generation_max_new_tokens)
            sheet.save(output_dir / f"predictions_{name}.png")
        print(f"Done. Figures and sheets of predictions: {output_dir.resolve()}")


if __name__ == "__main__":
    main()
