"""Results of benchmarks: compare predictions with the truth by each protocol, and format the numbers as tables."""

import json
import logging
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx
import numpy as np

from ..data.masks import Mask, merge_masks
from ..data.mixture import EvaluationDataset
from ..data.prompts import Question
from ..files import atomic_file
from .counts import compute_protocol
from .metrics import PRECISION_THRESHOLDS
from .predictions import QuestionPrediction, iterate_questions
from .protocols import PROTOCOLS, Protocol


logger = logging.getLogger(__name__)

EVALUATION = "evaluation.json"
# Metrics of false premises, which tables show if they are computed.
FALSE_PREMISES = {"see_acc": "See", "miou": "mIoU", "oiou": "oIoU", "mrr": "mRR", "riou": "rIoU"}
SHEET_RANKS = 4  # questions on a sheet, for each of best, median and worst


@dataclass
class QuestionScore:
    """Pixel counts of the masks that a question asks for.

    Args:
        question_id: Id of the question, see `predictions`.
        image_id: Id of its image.
        intersections: Pixels in both the prediction and the truth, one int per mask.
        unions: Pixels in either, one int per mask.
        targets: Pixels in the truth, one int per mask.
        num_seg_tokens: Number of masks in the answer.
    """

    question_id: str
    image_id: str
    intersections: list[int]
    unions: list[int]
    targets: list[int]
    num_seg_tokens: int

    @property
    def row_id(self) -> str:
        """Id of the question's row, which differs from the image id if several rows share the image."""
        return self.question_id.rpartition("_")[0]


def score_predictions(
    dataset: EvaluationDataset, predictions: dict[str, QuestionPrediction], protocols: Collection[str]
) -> tuple[dict[str, dict], dict[str, list[QuestionScore]]]:
    """Compare predictions with the truth.

    Args:
        dataset: Dataset with the questions for the texts of all protocols.
        predictions: Predictions by question id, see [`read_predictions`].
        protocols: Names in `PROTOCOLS`. A protocol is omitted if the predictions have no masks of its kind, or if it
            asks all texts but no target has several.

    Returns:
        The results, `{"num_items": int, "protocols": {name: metrics}}`, under the key "". If the dataset has both
        reasoning questions that are phrases and others that are sentences, their results are under "_short" and
        "_long". And the scores of all questions by protocol.
    """
    # 1. Count pixels.
    scores = {name: [] for name in protocols}
    rows = {"": set(), "_short": set(), "_long": set()}  # there may be several about an image
    later_texts = set()  # questions that are not asked with a first text
    for row, row_id, questions in iterate_questions(dataset):
        rows[""].add(row_id)
        if row["task"] == "reasoning":
            rows["_long" if row["is_sentence"] else "_short"].add(row_id)
        ignored = None if row["ignore"] is None else Mask.from_rle(row["ignore"])
        for question_id, question in questions.items():
            if "first" not in question.texts:
                later_texts.add(question_id)
            for name in protocols:
                counts = _count_pixels(question, predictions[question_id], ignored, PROTOCOLS[name])
                if counts is not None:
                    scores[name].append(QuestionScore(question_id, row["image_id"], *counts))
    if not (rows["_short"] and rows["_long"]):
        rows = {"": rows[""]}

    # 2. Compute metrics.
    results = {subset: {"num_items": len(members), "protocols": {}} for subset, members in rows.items()}
    for subset, members in rows.items():
        for name in protocols:
            asked = [score for score in scores[name] if score.row_id in members]
            has_several_texts = any(score.question_id in later_texts for score in asked)
            if asked and (PROTOCOLS[name].texts != "all" or has_several_texts):
                results[subset]["protocols"][name] = _compute(asked, PROTOCOLS[name])
    return results, {name: asked for name, asked in scores.items() if name in results[""]["protocols"]}


def _count_pixels(
    question: Question, prediction: QuestionPrediction, ignored: Mask | None, protocol: Protocol
) -> tuple[list[int], list[int], list[int], int] | None:
    """Return intersections, unions, targets and number of masks, or None if the protocol does not ask it."""
    masks = prediction.teacher_forced_masks if protocol.teacher_forced else prediction.masks
    if masks is None or protocol.texts not in question.texts:
        return None
    due, given = question.masks, masks
    if protocol.matches_masks and due:
        due, given = _match_masks(due, given)
    if protocol.merges_masks:
        due, given = ([merge_masks(found)] if found else [] for found in (due, given))
    counts = []
    for number, target in enumerate(due):
        predicted = given[number] if number < len(given) else _empty(target)
        counts.append(intersection_and_union_of_runs(predicted, target, ignored if protocol.ignores_pixels else None))
    intersections, unions, targets = map(list, zip(*counts)) if counts else ([], [], [])
    return intersections, unions, targets, len(masks)


def _match_masks(due: list[Mask], given: list[Mask]) -> tuple[list[Mask], list[Mask]]:
    """Pair expected and given masks to maximize the sum of IoUs, and pair the rest with empty masks."""
    overlaps = networkx.Graph()
    for i, target in enumerate(due):
        for j, predicted in enumerate(given):
            intersection, union, _ = intersection_and_union_of_runs(predicted, target, None)
            if intersection:
                overlaps.add_edge(("due", i), ("given", j), weight=intersection / union)
    found = dict(sorted(edge, reverse=True) for edge in networkx.max_weight_matching(overlaps))  # given -> due
    partner = {i: j for (_, j), (_, i) in found.items()}
    rest = [j for j in range(len(given)) if ("given", j) not in found]
    # Masks that overlap nothing are paired too, as by the Hungarian algorithm.
    order = [partner[i] if i in partner else rest.pop(0) if rest else None for i in range(len(due))]
    beyond = [given[j] for j in rest if len(given[j].run_ends) > 1]
    matched = [_empty(target) if j is None else given[j] for target, j in zip(due, order)]
    return [*due, *map(_empty, beyond)], [*matched, *beyond]


def _empty(mask: Mask) -> Mask:
    return Mask(mask.size, mask.run_ends[-1:])


def intersection_and_union_of_runs(predicted: Mask, target: Mask, ignored: Mask | None) -> tuple[int, int, int]:
    """Count pixels like [`~metrics.intersection_and_union`], from the runs of the masks.

    Returns:
        Pixels of the intersection, of the union, and of the target.
    """
    # Between two run ends, every mask is constant.
    ends = [mask.run_ends for mask in (predicted, target, ignored) if mask is not None]
    starts = np.unique(np.concatenate([[0], *ends]))
    lengths, starts = np.diff(starts), starts[:-1]
    is_predicted, is_target = predicted.at(starts), target.at(starts)
    if ignored is not None:
        is_predicted &= is_target | ~ignored.at(starts)  # a pixel annotated as both is a target
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
    metrics = compute_protocol(columns, not protocol.teacher_forced, empty_target=protocol.empty_target)
    if protocol.matches_masks:  # surplus masks are not questions about nothing
        metrics = {name: value for name, value in metrics.items() if name not in ("n_acc", "t_acc", "see_acc")}
    return metrics | (row_metrics(scores) if protocol.per_row else {})


def row_metrics(scores: list[QuestionScore]) -> dict[str, float]:
    """Return the metrics of R-RefCOCO (arXiv 2209.09554), whose rows are refs with true and negative expressions.

    Formula, for refs r with true expressions P_r and negative ones N_r, intersections I and unions U in pixels:

        miou = mean_r(mean_{p in P_r}(I_p / U_p))
        oiou = sum_r(sum_{p in P_r}(I_p)) / sum_r(sum_{p in P_r}(U_p))
        mrr = mean_r(share of N_r without a predicted pixel), over refs with negative expressions
        riou = mean_r(sum_{p in P_r}(I_p) / sum_{q in P_r and N_r}(U_q))

    Returns:
        These metrics, or an empty dict unless there are both true and negative expressions.
    """
    rows = {}
    for score in scores:
        rows.setdefault(score.row_id, []).append((sum(score.intersections), sum(score.unions), sum(score.targets)))
    counts = [np.array(row) for row in rows.values()]  # num_rows x [num_questions, 3]
    true, negative = [row[row[:, 2] > 0] for row in counts], [row[row[:, 2] == 0] for row in counts]
    if not (any(map(len, true)) and any(map(len, negative))):
        return {}
    totals = np.concatenate(true).sum(0)
    return {
        "miou": float(np.mean([(row[:, 0] / row[:, 1]).mean() for row in true if len(row)])),
        "oiou": float(totals[0] / totals[1]),
        "mrr": float(np.mean([(row[:, 1] == 0).mean() for row in negative if len(row)])),
        "riou": float(np.mean([row[:, 0].sum() / row[:, 1].sum() for row, found in zip(counts, true) if len(found)])),
    }


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
    output_dir: Path,
    model: str,
    settings: dict[str, Any],
    environment: dict[str, Any],
    sources: dict[str, dict],
    overwrite: bool,
) -> dict[str, Any]:
    """Return a new evaluation, or an interrupted one to continue. Nothing is written, see [`begin_evaluation`].

    Args:
        output_dir: Directory of the evaluation.
        model: Name of the evaluated model.
        settings: What its predictions depend on, as JSON values.
        environment: Everything else about how results are made: date, software, hardware, `protocol_version`, ...
        sources: Benchmarks to evaluate on, with the options of their sources.
        overwrite: Whether the directory may hold another evaluation.

    Returns:
        The content of `evaluation.json`: `model`, `settings`, `environments`, `train_overlap` (see
        [`~leakage.count_seen_images`]) and results, `benchmarks`, both by the benchmark's name.

    Raises:
        ValueError: If the directory holds another evaluation, or this one and it is complete.
    """
    path = output_dir / EVALUATION
    if overwrite or not path.exists():
        content = {"model": model, "settings": settings, "environments": [environment]}
        return content | {"train_overlap": {}, "benchmarks": {}}
    try:
        found = json.loads(path.read_text("utf-8"))
        known, results, last = found["settings"], found["benchmarks"], found["environments"][-1]
        changed = [name for name in settings if known.get(name) != settings[name]]
        changed += [name for name in sources if name in results and not sources[name].items() <= results[name].items()]
        changed += ["protocol_version"] if last["protocol_version"] != environment["protocol_version"] else []
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):  # from another version, or damaged
        results, changed = {}, list(settings)
    if changed or results.keys() >= sources.keys():
        what = f"one with other settings ({', '.join(changed)})" if changed else "a complete one"
        raise ValueError(
            f"--output_dir: expected a directory without an earlier evaluation, got {output_dir} with {what}. Name "
            "another, or replace it with --overwrite."
        )
    if {**last, "date": None} != {**environment, "date": None}:
        logger.warning("The evaluation continues with other software or hardware than before. Both are recorded.")
        found["environments"].append(environment)
    return found


def begin_evaluation(output_dir: Path, evaluation: dict[str, Any], overwrite: bool) -> None:
    """Write an evaluation from [`open_evaluation`] once its model or predictions are readable, on one process.

    Args:
        output_dir: Directory of the evaluation.
        evaluation: Content of `evaluation.json`.
        overwrite: Whether to remove another evaluation.
    """
    if overwrite and (output_dir / EVALUATION).exists():
        for pattern in ("predictions_*", "scores_*.jsonl", "evaluation.*"):
            for found in output_dir.glob(pattern):
                shutil.rmtree(found) if found.is_dir() else found.unlink()
    write_evaluation(output_dir, evaluation)


def write_evaluation(output_dir: Path, evaluation: dict[str, Any]) -> None:
    """Write an evaluation, see [`open_evaluation`], and its results in percent as a table in `evaluation.md`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    table = markdown_table(evaluation["benchmarks"])
    for name, text in ((EVALUATION, json.dumps(evaluation, indent=2) + "\n"), ("evaluation.md", table)):
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
        for number, line in enumerate(file, start=1):
            try:
                score = json.loads(line)
                scores.setdefault(score.pop("protocol"), []).append(QuestionScore(**score))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a score that recipes/eval.py writes, got {line.strip()[:80]}. "
                    "Evaluate again."
                ) from error
    return scores


def read_evaluation(directory: Path) -> dict[str, Any]:
    """Read the `evaluation.json` of a directory, see [`open_evaluation`].

    Raises:
        ValueError: If there is none, or if it is damaged.
    """
    path = directory / EVALUATION
    if not path.is_file():
        raise ValueError(f"{directory}: expected the {EVALUATION} that recipes/eval.py writes, got none. Run it.")
    try:
        evaluation = json.loads(path.read_text("utf-8"))
        if all(isinstance(evaluation[key], kind) for key, kind in (("model", str), ("benchmarks", dict))):
            return {"settings": {}, "environments": [{}]} | evaluation
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path}: expected an evaluation that recipes/eval.py wrote, got other content. Run it again.")


def metric_columns(results: Iterable[dict[str, float]]) -> dict[str, str]:
    """Return the metrics that a table of results shows besides gIoU and cIoU, and their titles."""
    columns = {f"p@{threshold}": f"P@{threshold}" for threshold in PRECISION_THRESHOLDS}
    columns |= {"n_acc": "N-acc", "t_acc": "T-acc", "seg_rate": "[SEG]"}
    shown = set().union(*results)
    return columns | {name: title for name, title in FALSE_PREMISES.items() if name in shown}


def markdown_table(results: dict[str, dict]) -> str:
    """Format results of benchmarks by name as a Markdown table: one row per protocol, metrics in percent."""
    columns = metric_columns(metrics for result in results.values() for metrics in result["protocols"].values())
    names = ["benchmark", "protocol", "questions", "gIoU (95%)", "cIoU (95%)", *columns.values()]
    table = [names, ["---"] * 2 + ["---:"] * (len(names) - 2)]
    for benchmark, result in results.items():
        for protocol, metrics in result["protocols"].items():
            cells = [
                "{:.1f} ({:.1f} to {:.1f})".format(*(100 * metrics[name + end] for end in ("", "_low", "_high")))
                for name in ("giou", "ciou")
            ]
            for name in columns:
                cells.append(f"{100 * metrics[name]:.1f}" if name in metrics else "")
            table.append([benchmark, protocol, str(metrics["num_questions"]), *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)
