"""Metrics of a model on benchmarks, by protocol: the pixel counts of [`LisaTrainer`] become tables.

Published numbers mix protocols, so all are computed. A protocol says who answers, and which texts are asked:

- `lisa`: the true answer is given and its `[SEG]` tokens are decoded, as LISA validates; the first text of each target
  is asked, and every referring expression.
- `generated`: the same texts, and the model answers by itself; a mask that is due and not given counts as empty.
- `all_texts`, `generated_all_texts`: the same two with all texts of each target; left out where no target has several.

Pixels that are annotated as ambiguous count in no protocol, as in LISA.
"""

import json
from itertools import compress
from pathlib import Path

import numpy as np
from transformers import EvalPrediction, Trainer

from ..data.mixture import EvaluationDataset
from ..files import atomic_file
from .counts import GENERATED, PADDING
from .metrics import PRECISION_THRESHOLDS, SegmentationMetric


SHEET_RANKS = 4  # questions that a sheet shows of the best, the median and the worst each


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute the metrics of [`SegmentationMetric`] from the gathered counts of [`LisaTrainer.prediction_step`]."""
    lines = prediction.predictions
    metrics = _compute(_columns(lines), is_generated=False)
    if "num_seg_tokens" in lines:
        generated = _compute(_columns(lines, GENERATED), is_generated=True)
        metrics |= {GENERATED + key: value for key, value in generated.items() if not key.startswith("num_")}
    return metrics


def evaluate_benchmark(trainer: Trainer, dataset: EvaluationDataset) -> tuple[dict[str, dict], dict]:
    """Evaluate the model of a [`LisaTrainer`] on one dataset; every process must call it.

    Args:
        trainer: The trainer; with `args.eval_generate` the model also answers by itself.
        dataset: The dataset; with `all_texts` for the protocols that ask all texts.

    Returns:
        The results, the same on every process: `{"num_items": int, "protocols": {name: metrics}}`, under the key "".
        If the dataset has reasoning questions that are phrases and others that are sentences, "_short" and "_long"
        hold their results. And the questions to draw, best to worst by the model's own answers,
        `{(image, question): title}`; none if it gave none.
    """
    # 1. Count the pixels of all questions, once.
    lines = trainer.predict(dataset).predictions
    rows = list(dataset.rows.remove_columns("image"))

    # 2. Select subsets of the images ...
    is_long = np.array([row["is_sentence"] for row in rows])
    is_reasoning = np.array([row["task"] == "reasoning" for row in rows])
    subsets = {"": np.ones(len(rows), dtype=bool)}  # [num_images] each
    short, long = is_reasoning & ~is_long, is_reasoning & is_long
    if short.any() and long.any():
        subsets |= {"_short": short, "_long": long}
    results = {name: {"num_items": int(subset.sum()), "protocols": {}} for name, subset in subsets.items()}

    # 3. ... and of their questions, one per protocol.
    is_first = np.array([question.is_first_text for row in rows for question in dataset.questions(row)])
    prefixes = {"": "lisa", GENERATED: "generated"} if "num_seg_tokens" in lines else {"": "lisa"}
    for prefix, protocol in prefixes.items():
        columns = _columns(lines, prefix)
        for name, subset in subsets.items():
            protocols = results[name]["protocols"]
            asked = subset[columns["images"]]  # [num_questions]
            protocols[protocol] = _compute(_select(columns, asked & is_first), bool(prefix))
            if not is_first[asked].all():
                protocols[f"{prefix}all_texts"] = _compute(_select(columns, asked), bool(prefix))
    questions = _questions_to_draw(_columns(lines, GENERATED)) if GENERATED in prefixes else {}
    return results, questions


def write_results(output_dir: Path, model: str, results: dict[str, dict]) -> None:
    """Write results of benchmarks by name as `evaluation.json` and, in percent, as the table `evaluation.md`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"model": model, "benchmarks": results}, indent=2) + "\n"
    for name, text in (("evaluation.json", content), ("evaluation.md", markdown_table(results))):
        with atomic_file(output_dir / name) as path:
            path.write_text(text, encoding="utf-8")


def markdown_table(results: dict[str, dict]) -> str:
    """Format results of benchmarks by name as a Markdown table: one row per protocol, metrics in percent."""
    precisions = [f"p@{threshold}" for threshold in PRECISION_THRESHOLDS]
    names = ["benchmark", "protocol", "questions", "gIoU (95%)", "cIoU (95%)", *map(str.upper, precisions)]
    table = [[*names, "N-acc", "T-acc", "[SEG]"], ["---"] * 2 + ["---:"] * (len(names) + 1)]
    for benchmark, result in results.items():
        for protocol, metrics in result["protocols"].items():
            cells = [
                "{:.1f} ({:.1f} to {:.1f})".format(*(100 * metrics[name + end] for end in ("", "_low", "_high")))
                for name in ("giou", "ciou")
            ]
            for name in (*precisions, "n_acc", "t_acc", "seg_rate"):
                cells.append(f"{100 * metrics[name]:.1f}" if name in metrics else "")
            table.append([benchmark, protocol, str(metrics["num_questions"]), *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def _columns(lines: dict[str, np.ndarray], prefix: str = "") -> dict[str, list]:
    """Regroup counts from one padded line per image to the columns of [`SegmentationMetric`], one entry per question.

    Args:
        lines: Counts `(num_images, ...)` of [`LisaTrainer.prediction_step`], padded with -100.
        prefix: `GENERATED` for the model's own answers.
    """
    # Each image has its number of masks due per question; that tells how to cut its line of masks into questions.
    masks_due = [line[line != PADDING] for line in lines["masks_due"]]  # num_images x [num_questions]
    keys = {"intersections": f"{prefix}intersections", "unions": f"{prefix}unions", "targets": "targets"}
    columns = {
        name: [
            part.tolist()
            for line, due in zip(lines[key], masks_due)
            for part in np.split(line[: due.sum()], np.cumsum(due)[:-1])
        ]
        for name, key in keys.items()
    }
    # A true answer has as many [SEG] tokens as masks are due.
    seg_tokens = lines["num_seg_tokens"] if prefix else lines["masks_due"]
    columns["num_seg_tokens"] = seg_tokens[seg_tokens != PADDING].tolist()
    columns["images"] = [image for image, due in enumerate(masks_due) for _ in due]
    return columns


def _select(columns: dict[str, list], questions: np.ndarray) -> dict[str, list]:
    return {name: list(compress(column, questions)) for name, column in columns.items()}


def _compute(columns: dict[str, list], is_generated: bool) -> dict[str, float]:
    metrics = SegmentationMetric(keep_in_memory=True).compute(**columns)
    if not is_generated:  # with the true answer given, [SEG] rates mean nothing
        metrics = {key: value for key, value in metrics.items() if "seg_rate" not in key}
    return metrics


def _questions_to_draw(columns: dict[str, list]) -> dict[tuple[int, int], str]:
    """Choose the best, median and worst questions by mean IoU: `{(image, question): title}`, best first."""
    ranked, number_in_image = [], {}
    for image, intersections, unions in zip(columns["images"], columns["intersections"], columns["unions"]):
        number_in_image[image] = number_in_image.get(image, -1) + 1
        if unions:
            iou = np.mean([i / u if u else 1.0 for i, u in zip(intersections, unions)])
            ranked.append((iou, image, number_in_image[image]))
    ranked.sort(key=lambda question: -question[0])
    rest = max(len(ranked) - SHEET_RANKS, 0)
    ranks = {start + offset for start in (0, rest // 2, rest) for offset in range(min(SHEET_RANKS, len(ranked)))}
    return {ranked[rank][1:]: f"rank {rank + 1} of {len(ranked)}, IoU {ranked[rank][0]:.2f}" for rank in sorted(ranks)}
