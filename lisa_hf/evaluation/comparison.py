"""Compare evaluations: which are comparable, and paired differences between two."""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..redaction import hide_local_paths
from .benchmarks import EVALUATION, QuestionScore, read_evaluation, read_scores
from .metrics import CONFIDENCE, iou_per_mask
from .protocols import PROTOCOLS, Protocol


# Settings of an evaluation that may differ between compared models.
OF_THE_MODEL = {"model", "weights", "predictions", "protocols", "per_device_eval_batch_size"}


@dataclass
class Comparison:
    """How another model's masks differ from the first model's, on the same questions.

    Args:
        giou, ciou: Differences in gIoU and cIoU, other minus first: value and 95% interval, from a bootstrap over
            images.
        num_better, num_worse, num_equal: Numbers of images on which the other model's mean IoU is higher, lower,
            equal.
        p_value: P-value of the two-sided sign test over images, without ties.
    """

    giou: tuple[float, float, float]
    ciou: tuple[float, float, float]
    num_better: int
    num_worse: int
    num_equal: int
    p_value: float


def compare_scores(
    first: list[QuestionScore], other: list[QuestionScore], protocol: Protocol, resamples: int = 1000, seed: int = 0
) -> Comparison:
    """Compare the scores of two models, image by image.

    Args:
        first, other: Scores by one protocol, see [`read_scores`].
        protocol: The protocol.
        resamples: Number of bootstrap resamples for the intervals.
        seed: Seed of the resampling.

    Raises:
        ValueError: If the scores are for different questions or a different truth.
    """
    other_by_id = {score.question_id: score for score in other}
    if other_by_id.keys() != {score.question_id for score in first}:
        raise ValueError(
            f"expected two evaluations of the same questions, got {len(first)} and {len(other)}, of which "
            f"{len(other_by_id.keys() & {score.question_id for score in first})} are the same. Use the same settings."
        )
    other = [other_by_id[score.question_id] for score in first]
    if protocol.matches_masks:  # it also counts surplus masks, whose targets are empty
        truth = [[list(filter(None, score.targets)) for score in scores] for scores in (first, other)]
    else:
        truth = [[score.targets for score in scores] for scores in (first, other)]
    if changed := [score.question_id for score, known, found in zip(first, *truth) if known != found]:
        raise ValueError(f"expected two evaluations with the same true masks, got others in {changed[0]}.")

    # Number of masks per image, and sums over them, [num_images] each.
    names = np.unique([score.image_id for score in first if score.targets])
    sums = []
    for scores in (first, other):
        images = np.searchsorted(names, [score.image_id for score in scores for _ in score.targets])
        columns = _mask_columns(scores, protocol)
        sums.append([np.bincount(images, values, len(names)) for values in (np.ones(len(images)), *columns)])
    (count, iou, intersection, union), (other_count, other_iou, other_intersection, other_union) = sums

    def differences(draw: np.ndarray) -> tuple[float, float]:
        giou = _ratio(other_iou[draw], other_count[draw]) - _ratio(iou[draw], count[draw])
        return giou, _ratio(other_intersection[draw], other_union[draw]) - _ratio(intersection[draw], union[draw])

    rng = np.random.default_rng(seed)
    everything = differences(np.arange(len(names)))
    resampled = [differences(rng.integers(len(names), size=len(names))) for _ in range(resamples)]
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    mean, other_mean = iou / count, other_iou / other_count  # equal values stay equal
    better, worse = int((other_mean > mean).sum()), int((other_mean < mean).sum())
    return Comparison(
        giou=(everything[0], low[0], high[0]),
        ciou=(everything[1], low[1], high[1]),
        num_better=better,
        num_worse=worse,
        num_equal=len(names) - better - worse,
        p_value=sign_test(better, worse),
    )


def sign_test(num_better: int, num_worse: int) -> float:
    """Return the two-sided p-value of the exact sign test: without a difference, both signs are equally likely."""
    number = num_better + num_worse
    tail = sum(math.comb(number, k) for k in range(min(num_better, num_worse) + 1))
    return min(1.0, 2 * tail / 2**number)


def compare_evaluations(directories: list[Path], title: str = "") -> dict[str, Any]:
    """Compare the evaluations of several models with that of the first.

    Args:
        directories: Output directories of recipes/eval.py, with different models.
        title: Title of the comparison. Defaults to the names.

    Returns:
        JSON values that [`~report.results_page`] shows: `title`, `evaluations`, the content of each `evaluation.json`
        by directory name, `changed`, what was evaluated differently from the first by name of the others (see
        [`changed_settings`]), and `differences`, dicts of `benchmark`, `protocol`, `model` and the fields of a
        [`Comparison`].

    Raises:
        ValueError: If a directory has no evaluation, the evaluations share no benchmark, or they were made with
            different protocol versions.
    """
    if len({path.resolve() for path in directories}) < len(directories):
        raise ValueError(f"expected different directories, got one twice among {', '.join(map(str, directories))}.")
    paths = {_name(path, directories): path for path in directories}
    evaluations = {name: _read(path) for name, path in paths.items()}
    versions = {name: environment(evaluation).get("protocol_version") for name, evaluation in evaluations.items()}
    if len(set(versions.values())) > 1:
        raise ValueError(
            f"expected evaluations with the same protocol version, got {versions}. Score the older predictions "
            "again: recipes/eval.py --predictions DIR"
        )
    shared = shared_results(evaluations)
    if not shared:
        raise ValueError(f"expected evaluations that share a benchmark and a protocol, got none among {[*paths]}.")
    differences = []
    for benchmark in dict.fromkeys(benchmark for benchmark, _ in shared):
        differences += _compare_benchmark(benchmark, [name for found, name in shared if found == benchmark], paths)
    first, *others = evaluations
    changed = {name: changed_settings(evaluations[first], evaluations[name]) for name in others}
    # A page of it, and the file, are there to be shared. Different paths may be the same afterwards.
    return {
        "title": title or ", ".join(paths),
        "evaluations": hide_local_paths(evaluations),
        "changed": changed,
        "differences": differences,
    }


def read_comparison(path: Path) -> dict[str, Any]:
    """Read what `recipes/compare.py --json` wrote."""
    try:
        comparison = json.loads(path.read_text("utf-8"))
        evaluations = comparison["evaluations"]
        if comparison.keys() >= {"title", "changed", "differences"} and evaluations.keys():
            return comparison
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path}: expected a file written by recipes/compare.py --json, got another one.")


def shared_results(evaluations: dict[str, dict]) -> list[tuple[str, str]]:
    """Return the benchmarks and protocols for which all evaluations have results."""
    first, *others = evaluations.values()
    return [
        (benchmark, protocol)
        for benchmark, result in first["benchmarks"].items()
        for protocol in result["protocols"]
        if all(protocol in other["benchmarks"].get(benchmark, {"protocols": {}})["protocols"] for other in others)
    ]


def _compare_benchmark(benchmark: str, protocols: list[str], directories: dict[str, Path]) -> list[dict[str, Any]]:
    paths = {name: directory / f"scores_{benchmark}.jsonl" for name, directory in directories.items()}
    if not all(path.exists() for path in paths.values()):
        return []  # a subset of another benchmark
    first, *others = scores = {name: read_scores(path) for name, path in paths.items()}
    for name, path in paths.items():
        if lacking := [protocol for protocol in protocols if protocol not in scores[name]]:
            raise ValueError(f"{path}: expected the scores of {EVALUATION}, got none by {lacking[0]}. Evaluate again.")
    if unknown := [protocol for protocol in protocols if protocol not in PROTOCOLS]:
        raise ValueError(
            f"{paths[first]}: expected protocols among {', '.join(PROTOCOLS)}, got {unknown[0]}. Evaluate again."
        )
    return [
        {"benchmark": benchmark, "protocol": protocol, "model": name}
        | asdict(compare_scores(scores[first][protocol], scores[name][protocol], PROTOCOLS[protocol]))
        for protocol in protocols
        for name in others
    ]


def changed_settings(first: dict, other: dict) -> list[str]:
    """Return how two evaluations differ apart from the model: settings, environment, options of benchmarks."""
    known, settings = first["settings"], other["settings"]
    changed = sorted(key for key in known.keys() & settings.keys() - OF_THE_MODEL if known[key] != settings[key])
    before, after = environment(first), environment(other)
    changed += [key for key in sorted((before.keys() | after.keys()) - {"date"}) if before.get(key) != after.get(key)]
    for benchmark, result in first["benchmarks"].items():
        found = other["benchmarks"].get(benchmark, result)
        keys = sorted(result.keys() - {"protocols"})
        changed += [f"{benchmark}.{key}" for key in keys if result[key] != found.get(key)]
    return changed


def environment(evaluation: dict) -> dict:
    """Return what an evaluation was made with, with packages as further keys."""
    found = dict(evaluation.get("environments", [{}])[-1])
    return found | found.pop("versions", {})


def _mask_columns(scores: list[QuestionScore], protocol: Protocol) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return IoU, intersection and union of all masks, `(num_masks,)` each."""
    intersection, union, target = (
        np.array([pixels for score in scores for pixels in getattr(score, name)], dtype=np.int64)
        for name in ("intersections", "unions", "targets")
    )
    has_prediction = union - target + intersection > 0
    if protocol.empty_target == "no_mask":
        has_prediction = np.array([score.num_seg_tokens > 0 for score in scores for _ in score.targets], dtype=bool)
    return iou_per_mask(intersection, union, has_prediction, protocol.empty_target), intersection, union


def _ratio(numerators: np.ndarray, denominators: np.ndarray) -> float:
    return numerators.sum() / max(denominators.sum(), 1)


def _name(path: Path, directories: list[Path]) -> str:
    """Return the name of a directory, with those of its parents that tell it from others of the same name."""
    same = [other.resolve() for other in directories if other.resolve().name == path.resolve().name]
    return path.resolve().relative_to(os.path.commonpath([other.parent for other in same])).as_posix()


def _read(directory: Path) -> dict:
    evaluation = read_evaluation(directory)
    if not evaluation["benchmarks"]:
        raise ValueError(f"{directory}: expected an evaluation with results, got none. Start recipes/eval.py again.")
    return evaluation
