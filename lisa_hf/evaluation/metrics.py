"""Segmentation metrics: gIoU, cIoU, precision and how reliably `[SEG]` is generated.

`intersection_and_union` reduces every mask to two integers, so masks never travel between processes;
[`SegmentationMetric`] turns these integers into metrics.
"""

from itertools import chain
from typing import Literal, get_args

import datasets
import evaluate
import numpy as np
import torch


CONFIDENCE = 0.95
PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)

# What is correct if no mask is due: an empty mask or none, an answer without a mask, or nothing at all.
EmptyTarget = Literal["empty_mask", "no_mask", "always_wrong"]


def intersection_and_union(
    prediction: torch.Tensor, target: torch.Tensor, ignore_index: int = 255
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the pixels of the foreground's intersection and union, without ignored pixels.

    Formula, for pixels x that are not ignored, predictions p(x) and targets t(x) in {0, 1}:

        intersection = sum_x(p(x) * t(x))
        union = sum_x(max(p(x), t(x)))

    Example:

    >>> prediction = torch.tensor([[True, True], [False, True]])
    >>> target = torch.tensor([[1, 255], [1, 0]])
    >>> intersection_and_union(prediction, target)
    (tensor(1), tensor(3))

    Args:
        prediction: Predicted masks, `(..., H, W)` bool, such as `logits > 0`.
        target: True masks, `(..., H, W)` integer: 1 foreground, 0 background.
        ignore_index: Value of target pixels that are not counted.

    Returns:
        Intersections and unions in pixels, two int64 tensors `(...)`.

    Raises:
        ValueError: If the shapes differ or `prediction` is not bool.
    """
    if prediction.shape != target.shape or prediction.dtype != torch.bool:
        raise ValueError(
            f"expected a bool prediction of the target's shape {tuple(target.shape)}, got {prediction.dtype} of shape "
            f"{tuple(prediction.shape)}. Resize the logits to the target and threshold them (`logits > 0`)."
        )
    prediction = prediction & (target != ignore_index)
    foreground = target == 1
    return (prediction & foreground).sum((-2, -1)), (prediction | foreground).sum((-2, -1))  # [...] each


def iou_per_mask(
    intersections: np.ndarray, unions: np.ndarray, has_prediction: np.ndarray, empty_target: EmptyTarget
) -> np.ndarray:
    """Divide intersections by unions, in pixels.

    Args:
        intersections, unions: Pixels of each mask, `(num_masks,)` int64.
        has_prediction: Whether a mask was predicted, `(num_masks,)` bool. This is wrong if the union is empty.
        empty_target: With "always_wrong", an empty union always counts as 0.
    """
    empty_iou = 0.0 if empty_target == "always_wrong" else ~has_prediction
    return np.where(unions > 0, intersections / np.maximum(unions, 1), empty_iou)


class SegmentationMetric(evaluate.Metric):
    """gIoU and cIoU with bootstrap intervals, precision, and `[SEG]` rates, from pixel counts per mask.

    Formula, for masks m with a target of T_m pixels, intersection I_m and union U_m:

        giou = mean_m(I_m / U_m), where an empty union (nothing due, nothing predicted) counts as 1
        ciou = sum_m(I_m) / sum_m(U_m)
        p@t = share of I_m / U_m >= t, over masks with T_m > 0
        n_acc = share of masks without a predicted pixel, over masks with T_m = 0
        t_acc = share of masks with a predicted pixel, over masks with T_m > 0
        see_acc = share of masks with a predicted pixel if and only if T_m > 0
        seg_rate = share of answers with a [SEG], over questions with a mask due
        false_seg_rate = share of answers with a [SEG], over questions without

    gIoU and cIoU are those of LISA (arXiv 2308.00692, section 4.1), N-acc and T-acc those of the gRefCOCO paper (arXiv
    2306.00968), see_acc is the "See" accuracy of SESAME (arXiv 2312.08366).

    These are the formulas for `empty_target="empty_mask"`. With "no_mask", nothing is predicted if the answer has no
    `[SEG]`, as in the code of the gRefCOCO paper. With "always_wrong", an empty union counts as 0, as in Seg-Zero's
    code, and there is no accuracy.

    Example:

    >>> metric = SegmentationMetric()
    >>> metric.add_batch(  # one entry per question
    ...     intersections=[[6, 3]], unions=[[8, 12]], targets=[[8, 5]], num_seg_tokens=[2], images=[0]
    ... )
    >>> result = metric.compute()
    >>> result["giou"], result["ciou"], result["p@0.7"], result["seg_rate"]
    (0.5, 0.45, 0.5, 1.0)

    With `num_process`, `process_id`, `experiment_id` and a shared `cache_dir`, each process adds its own questions.
    Process 0 computes the exact metrics of all, since integers are gathered and not means; the others get None.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="gIoU, cIoU, precision and [SEG] rates of a model that answers questions with masks.",
            citation="Lai et al., LISA: Reasoning Segmentation via Large Language Model, 2023. arXiv 2308.00692",
            inputs_description="""
Args, one entry per question (`add_batch`, or `compute` directly):
    intersections: Lists of int, pixels of intersection of each mask due; an empty list if none is due.
    unions: Lists of int, pixels of union of the same masks. A mask that was due but not predicted has intersection 0
        and the target's area as union.
    targets: Lists of int, pixels of the same masks in the truth; 0 where the question is about nothing.
    num_seg_tokens: Ints, number of [SEG] tokens in the answer.
    images: Ints, number of the question's image, the same for all questions about it.

Args of `compute`:
    empty_target: What is right where nothing is due: "empty_mask" (default), "no_mask" or "always_wrong".
    bootstrap: Number of resamples behind the intervals, default 1000.
    seed: Seed of the resampling, default 0.

Returns a dict, floats unless stated. Metrics without any mask or question are 0, not NaN:
    giou, ciou: See the formulas of the class.
    giou_low, giou_high, ciou_low, ciou_high: 95% percentile bootstrap intervals. Images are resampled, not masks,
        since the masks of one image are correlated.
    p@0.5, ..., p@0.9: Precision at these thresholds.
    n_acc, t_acc, see_acc: Present only if a question is about nothing.
    seg_rate, false_seg_rate: How reliably [SEG] is generated.
    num_masks, num_questions: Ints, number of masks and questions that the metrics are computed from.
""",
            features=datasets.Features(
                {
                    "intersections": datasets.List(datasets.Value("int64")),
                    "unions": datasets.List(datasets.Value("int64")),
                    "targets": datasets.List(datasets.Value("int64")),
                    "num_seg_tokens": datasets.Value("int64"),
                    "images": datasets.Value("int64"),
                }
            ),
        )

    def _finalize(self):
        # `evaluate` fails, or waits forever for the other processes, if a process has not added anything.
        if self.writer is None:
            self.add_batch(intersections=[], unions=[], targets=[], num_seg_tokens=[], images=[])
        super()._finalize()

    def _compute(
        self,
        intersections: list[list[int]],
        unions: list[list[int]],
        targets: list[list[int]],
        num_seg_tokens: list[int],
        images: list[int],
        empty_target: EmptyTarget = "empty_mask",
        bootstrap: int = 1000,
        seed: int = 0,
    ) -> dict[str, float | int]:
        if empty_target not in get_args(EmptyTarget):
            raise ValueError(f"empty_target: expected one of {get_args(EmptyTarget)}, got {empty_target!r}.")
        for index, counts in enumerate(zip(intersections, unions, targets)):
            if len({len(count) for count in counts}) > 1:
                raise ValueError(
                    f"question {index}: expected an intersection, a union and a target for every mask due, got "
                    f"{len(counts[0])} intersections, {len(counts[1])} unions and {len(counts[2])} targets. Give all "
                    "three."
                )
        # 1. Flatten the masks of all questions.
        masks_due = np.array([len(question) for question in unions], dtype=np.int64)  # [num_questions]
        intersection, union, target = (
            np.fromiter(chain.from_iterable(counts), dtype=np.int64) for counts in (intersections, unions, targets)
        )  # [num_masks] each
        due, emitted = masks_due > 0, np.array(num_seg_tokens, dtype=np.int64) > 0
        has_target, has_prediction = target > 0, union - target + intersection > 0  # [num_masks]
        if empty_target == "no_mask":
            has_prediction = np.repeat(emitted, masks_due)
        iou = iou_per_mask(intersection, union, has_prediction, empty_target)

        # 2. gIoU and cIoU are both sum(numerators) / sum(denominators), so images can be resampled by their sums.
        _, image_of_mask = np.unique(np.repeat(np.array(images, dtype=np.int64), masks_due), return_inverse=True)
        parts = {"giou": (iou, np.ones(len(iou))), "ciou": (intersection, union)}
        metrics = {}
        for name, (numerator, denominator) in parts.items():
            sums = [np.bincount(image_of_mask, weights=values) for values in (numerator, denominator)]  # [num_images]
            low, high = _bootstrap_interval(*sums, bootstrap, seed)
            metrics[name] = _ratio(numerator.sum(), denominator.sum())
            metrics |= {f"{name}_low": low, f"{name}_high": high}

        # 3. Precision, and accuracy if some questions are about nothing.
        for threshold in PRECISION_THRESHOLDS:
            metrics[f"p@{threshold}"] = _ratio((iou[has_target] >= threshold).sum(), has_target.sum())
        if not has_target.all() and empty_target != "always_wrong":
            metrics["n_acc"] = _ratio((~has_prediction)[~has_target].sum(), (~has_target).sum())
            metrics["t_acc"] = _ratio(has_prediction[has_target].sum(), has_target.sum())
            metrics["see_acc"] = _ratio((has_prediction == has_target).sum(), len(has_target))
        return metrics | {
            "seg_rate": _ratio(emitted[due].sum(), due.sum()),
            "false_seg_rate": _ratio(emitted[~due].sum(), (~due).sum()),
            "num_masks": len(iou),
            "num_questions": len(due),
        }


def _ratio(numerator, denominator) -> float:
    return float(numerator / denominator) if denominator else 0.0


def _bootstrap_interval(
    numerators: np.ndarray, denominators: np.ndarray, resamples: int, seed: int
) -> tuple[float, float]:
    """Return the percentile interval of sum(numerators) / sum(denominators) over resampled images.

    Args:
        numerators: Sums over the masks of each image, `(num_images,)`.
        denominators: The same, `(num_images,)`.
        resamples: Number of resamples.
        seed: Seed of the resampling.
    """
    if len(numerators) == 0:
        return 0.0, 0.0
    order = np.lexsort((denominators, numerators))  # makes the interval independent of how processes shared the images
    numerators, denominators = numerators[order], denominators[order]
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(numerators), size=len(numerators)) for _ in range(resamples))
    ratios = [_ratio(numerators[draw].sum(), denominators[draw].sum()) for draw in draws]
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
