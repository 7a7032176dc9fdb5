"""Figures of a model on benchmarks, by protocol: what [`LisaTrainer`] counts per image becomes tables.

Published figures mix protocols, so all are given side by side. A protocol is who answers, and which texts are asked:

- `lisa`: the answer is given and its `[SEG]` decoded, as LISA validates; the first text of each target is asked, and
  every referring expression.
- `generated`: the same texts, and the model answers by itself; a mask that is due and not given counts as empty.
- `all_texts`, `generated_all_texts`: the same two with all texts of each target; left out where no target has several.

Pixels that are annotated as ambiguous count in none of them, as in LISA.
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


SHEET_RANKS = 4  # questions on a sheet of the best, of those in the middle, and of the worst


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Figures of [`SegmentationMetric`] from the gathered lines of [`LisaTrainer.prediction_step`]."""
    lines = prediction.predictions
    metrics = _figures(_columns(lines), is_generated=False)
    if "num_seg_tokens" in lines:
        generated = _figures(_columns(lines, GENERATED), is_generated=True)
        metrics |= {GENERATED + key: value for key, value in generated.items() if not key.startswith("num_")}
    return metrics


def evaluate_benchmark(trainer: Trainer, dataset: EvaluationDataset) -> tuple[dict[str, dict], dict]:
    """Evaluates a [`LisaTrainer`]'s model on one data set.

    Args:
        dataset: with `all_texts` for the protocols that ask them.

    Returns:
        The results, on every process the same: `{"num_items": int, "protocols": {name: figures}}`, under the key "",
        and under "_short" and "_long" those of the reasoning questions that are phrases and whole sentences, if there
        are both; figures as [`SegmentationMetric`] names them. And which questions to draw, best to worst by the
        model's own answers, `{(image, question): title}`; none if it gave none (`args.eval_generate`).
    """
    lines = trainer.predict(dataset).predictions
    rows = list(dataset.rows.remove_columns("image"))
    is_first = np.array([question.is_first_text for row in rows for question in dataset.questions(row)])
    is_long = np.array([row["is_sentence"] for row in rows])
    is_reasoning = np.array([row["task"] == "reasoning" for row in rows])
    subsets = {"": np.ones(len(rows), dtype=bool)}
    short, long = is_reasoning & ~is_long, is_reasoning & is_long
    if short.any() and long.any():
        subsets |= {"_short": short, "_long": long}

    results = {name: {"num_items": int(subset.sum()), "protocols": {}} for name, subset in subsets.items()}
    prefixes = {"": "lisa", GENERATED: "generated"} if "num_seg_tokens" in lines else {"": "lisa"}
    for prefix, protocol in prefixes.items():
        columns = _columns(lines, prefix)
        for name, subset in subsets.items():
            protocols = results[name]["protocols"]
            asked = subset[columns["images"]]
            protocols[protocol] = _figures(_select(columns, asked & is_first), bool(prefix))
            if not is_first[asked].all():
                protocols[f"{prefix}all_texts"] = _figures(_select(columns, asked), bool(prefix))
    questions = _questions_to_draw(_columns(lines, GENERATED)) if GENERATED in prefixes else {}
    return results, questions


def write_results(output_dir: Path, model: str, results: dict[str, dict]) -> None:
    """Writes results of benchmarks by name, as `evaluation.json` and, in percent, as the table `evaluation.md`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"model": model, "benchmarks": results}, indent=2) + "\n"
    for name, text in (("evaluation.json", content), ("evaluation.md", markdown_table(results))):
        with atomic_file(output_dir / name) as path:
            path.write_text(text, encoding="utf-8")


def markdown_table(results: dict[str, dict]) -> str:
    """Results of benchmarks by name as a table in Markdown: one row per protocol, figures in percent."""
    precisions = [f"p@{threshold}" for threshold in PRECISION_THRESHOLDS]
    names = ["benchmark", "protocol", "questions", "gIoU (95 %)", "cIoU (95 %)", *map(str.upper, precisions)]
    table = [[*names, "N-acc", "T-acc", "[SEG]"], ["---"] * 2 + ["---:"] * (len(names) + 1)]
    for benchmark, result in results.items():
        for protocol, figures in result["protocols"].items():
            cells = [
                "{:.1f} ({:.1f} to {:.1f})".format(*(100 * figures[name + end] for end in ("", "_low", "_high")))
                for name in ("giou", "ciou")
            ]
            for name in (*precisions, "n_acc", "t_acc", "seg_rate"):
                cells.append(f"{100 * figures[name]:.1f}" if name in figures else "")
            table.append([benchmark, protocol, str(figures["num_questions"]), *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def _columns(lines: dict[str, np.ndarray], prefix: str = "") -> dict[str, list]:
    """The columns of [`SegmentationMetric`], one entry per question, from lines of one image each."""
    masks_due = [line[line != PADDING] for line in lines["masks_due"]]
    columns = {
        name: [
            part.tolist()
            for line, due in zip(lines[key], masks_due)
            for part in np.split(line[: due.sum()], np.cumsum(due)[:-1])
        ]
        for name, key in (
            ("intersections", f"{prefix}intersections"),
            ("unions", f"{prefix}unions"),
            ("targets", "targets"),
        )
    }
    seg_tokens = lines["num_seg_tokens"] if prefix else lines["masks_due"]
    columns["num_seg_tokens"] = seg_tokens[seg_tokens != PADDING].tolist()
    columns["images"] = [image for image, due in enumerate(masks_due) for _ in due]
    return columns


def _select(columns: dict[str, list], questions: np.ndarray) -> dict[str, list]:
    return {name: list(compress(column, questions)) for name, column in columns.items()}


def _figures(columns: dict[str, list], is_generated: bool) -> dict[str, float]:
    figures = SegmentationMetric(keep_in_memory=True).compute(**columns)
    if not is_generated:  # with the true answer given, the [SEG] rates say nothing
        figures = {key: value for key, value in figures.items() if "seg_rate" not in key}
    return figures


def _questions_to_draw(columns: dict[str, list]) -> dict[tuple[int, int], str]:
    """The best, median and worst questions by their masks' mean IoU: `{(image, question): title}`, best first."""
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
