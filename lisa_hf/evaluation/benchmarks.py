"""Results of benchmarks: predictions are compared with the truth by each protocol, and the numbers become tables."""

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.masks import Mask, merge_masks
from ..data.mixture import EvaluationDataset
from ..data.prompts import Question
from ..files import atomic_file
from .counts import compute_protocol
from .metrics import PRECISION_THRESHOLDS
from .predictions import QuestionPrediction, iterate_questions
from .protocols import PROTOCOLS, Protocol


EVALUATION = "evaluation.json"
SHEET_RANKS = 4  # questions that a sheet shows of the best, the median and the worst each


@dataclass
class QuestionScore:
    """Pixels of the masks that a question asks for.

    Args:
        question_id: Id of the question, see `predictions`.
        image_id: Id of its image.
        intersections: Pixels of the prediction and the truth together, an int per mask.
        unions: Pixels of either, an int per mask.
        targets: Pixels of the truth, an int per mask.
        num_seg_tokens: Number of masks in the answer.
    """

    question_id: str
    image_id: str
    intersections: list[int]
    unions: list[int]
    targets: list[int]
    num_seg_tokens: int


def score_predictions(
    dataset: EvaluationDataset, predictions: dict[str, QuestionPrediction], protocols: Collection[str]
) -> tuple[dict[str, dict], dict[str, list[QuestionScore]]]:
    """Compare predictions with the truth.

    Args:
        dataset: The dataset, which asks for the texts of all protocols.
        predictions: What was predicted for each question, see [`read_predictions`].
        protocols: Names in `PROTOCOLS`. A protocol is left out if the predictions have no masks of its kind, or if it
            asks all texts and no target has several.

    Returns:
        The results, `{"num_items": int, "protocols": {name: metrics}}`, under the key "". If the dataset has reasoning
        questions that are phrases and others that are sentences, "_short" and "_long" hold their results. And the
        scores of all questions by protocol.
    """
    # 1. Count pixels.
    scores = {name: [] for name in protocols}
    images = {"": set(), "_short": set(), "_long": set()}
    later_texts = set()  # questions that are not asked with a first text
    for row, image_id, questions in iterate_questions(dataset):
        images[""].add(image_id)
        if row["task"] == "reasoning":
            images["_long" if row["is_sentence"] else "_short"].add(image_id)
        ignored = None if row["ignore"] is None else Mask.from_rle(row["ignore"])
        for question_id, question in questions.items():
            if "first" not in question.texts:
                later_texts.add(question_id)
            for name in protocols:
                counts = _count_pixels(question, predictions[question_id], ignored, PROTOCOLS[name])
                if counts is not None:
                    scores[name].append(QuestionScore(question_id, image_id, *counts))
    if not (images["_short"] and images["_long"]):
        images = {"": images[""]}

    # 2. Compute metrics.
    results = {subset: {"num_items": len(members), "protocols": {}} for subset, members in images.items()}
    for subset, members in images.items():
        for name in protocols:
            asked = [score for score in scores[name] if score.image_id in members]
            has_several_texts = any(score.question_id in later_texts for score in asked)
            if asked and (PROTOCOLS[name].texts != "all" or has_several_texts):
                results[subset]["protocols"][name] = _compute(asked, PROTOCOLS[name])
    return results, {name: asked for name, asked in scores.items() if name in results[""]["protocols"]}


def _count_pixels(
    question: Question, prediction: QuestionPrediction, ignored: Mask | None, protocol: Protocol
) -> tuple[list[int], list[int], list[int], int] | None:
    """Return intersections, unions, targets and number of masks, or None if the protocol does not ask this."""
    masks = prediction.teacher_forced_masks if protocol.teacher_forced else prediction.masks
    if masks is None or protocol.texts not in question.texts:
        return None
    due, given = question.masks, masks
    if protocol.merges_masks:
        due, given = ([merge_masks(found)] if found else [] for found in (due, given))
    counts = []
    for number, target in enumerate(due):
        predicted = given[number] if number < len(given) else Mask(target.size, target.run_ends[-1:])  # empty
        counts.append(intersection_and_union_of_runs(predicted, target, ignored if protocol.ignores_pixels else None))
    intersections, unions, targets = map(list, zip(*counts)) if counts else ([], [], [])
    return intersections, unions, targets, len(masks)


def intersection_and_union_of_runs(predicted: Mask, target: Mask, ignored: Mask | None) -> tuple[int, int, int]:
    """Count pixels as [`~metrics.intersection_and_union`] does, from the runs of the masks.

    Returns:
        Pixels of the intersection, of the union, and of the target.
    """
    # Between two ends of runs, every mask has one value.
    ends = [mask.run_ends for mask in (predicted, target, ignored) if mask is not None]
    starts = np.unique(np.concatenate([[0], *ends]))
    lengths, starts = np.diff(starts), starts[:-1]
    is_predicted, is_target = predicted.at(starts), target.at(starts)
    if ignored is not None:
        is_predicted &= is_target | ~ignored.at(starts)  # where a pixel is annotated as both, it is a target
    return tuple(
        int(lengths[where].sum()) for where in (is_predicted & is_target, is_predicted | is_target, is_target)
    )


def _compute(scores: list[QuestionScore], protocol: Protocol) -> dict[str, float]:
    numbers = {image_id: number for number, image_id in enumerate(dict.fromkeys(s.image_id for s in scores))}
    columns = {
        name: [getattr(score, name) for score in scores]
        for name in ("intersections", "unions", "targets", "num_seg_tokens")
    }
    columns["images"] = [numbers[score.image_id] for score in scores]
    return compute_protocol(columns, not protocol.teacher_forced, empty_target=protocol.empty_target)


def questions_to_draw(scores: list[QuestionScore]) -> dict[str, str]:
    """Choose the best, median and worst questions by mean IoU: `{question_id: title}`, best first."""
    ranked = []
    for score in scores:
        if score.unions:
            pairs = zip(score.intersections, score.unions)
            ranked.append((np.mean([i / u if u else 1.0 for i, u in pairs]), score.question_id))
    ranked.sort(key=lambda question: -question[0])
    rest = max(len(ranked) - SHEET_RANKS, 0)
    ranks = {start + offset for start in (0, rest // 2, rest) for offset in range(min(SHEET_RANKS, len(ranked)))}
    return {ranked[rank][1]: f"rank {rank + 1} of {len(ranked)}, IoU {ranked[rank][0]:.2f}" for rank in sorted(ranks)}


def open_evaluation(
    output_dir: Path, model: str, settings: dict[str, Any], sources: dict[str, dict], overwrite: bool
) -> dict[str, dict]:
    """Return the results of an evaluation that goes on, none for a new one.

    Args:
        output_dir: Directory of the evaluation.
        model: What is evaluated.
        settings: What its predictions depend on, as JSON can hold it.
        sources: Benchmarks to evaluate on, with the options of their sources.
        overwrite: Whether to remove another evaluation.

    Raises:
        ValueError: If the directory holds another evaluation, or this one and it is complete.
    """
    path = output_dir / EVALUATION
    if overwrite and path.exists():
        for pattern in ("predictions_*", "scores_*.jsonl", "evaluation.*"):
            for found in output_dir.glob(pattern):
                shutil.rmtree(found) if found.is_dir() else found.unlink()
    if not path.exists():
        write_evaluation(output_dir, model, settings, {})
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        known, results = found["settings"], found["benchmarks"]
    except (ValueError, KeyError, TypeError):
        known, results = {}, {}
    changed = [name for name in settings if known.get(name) != settings[name]]
    changed += [name for name in sources if name in results and not sources[name].items() <= results[name].items()]
    if changed or results.keys() >= sources.keys():
        what = f"one with other settings ({', '.join(changed)})" if changed else "a complete one"
        raise ValueError(
            f"--output_dir: expected a directory without an earlier evaluation, got {output_dir} with {what}. Name "
            "another, or replace it with --overwrite."
        )
    return results


def write_evaluation(output_dir: Path, model: str, settings: dict[str, Any], results: dict[str, dict]) -> None:
    """Write results of benchmarks by name as `evaluation.json` and, in percent, as the table `evaluation.md`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"model": model, "settings": settings, "benchmarks": results}, indent=2) + "\n"
    for name, text in ((EVALUATION, content), ("evaluation.md", markdown_table(results))):
        with atomic_file(output_dir / name) as path:
            path.write_text(text, encoding="utf-8")


def write_scores(path: Path, scores: dict[str, list[QuestionScore]]) -> None:
    """Write the scores of questions by protocol as JSON Lines."""
    with atomic_file(path) as incomplete, open(incomplete, "w", encoding="utf-8") as file:
        for protocol, asked in scores.items():
            file.writelines(json.dumps({"protocol": protocol, **vars(score)}) + "\n" for score in asked)


def read_scores(path: Path) -> dict[str, list[QuestionScore]]:
    """Read what [`write_scores`] wrote."""
    scores = {}
    with open(path, encoding="utf-8") as file:
        for line in map(json.loads, file):
            scores.setdefault(line.pop("protocol"), []).append(QuestionScore(**line))
    return scores


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
