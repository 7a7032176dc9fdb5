"""Segmentation metrics: gIoU, cIoU and how reliably `[SEG]` is emitted.

The model side reduces every mask to two integers with `intersection_and_union`, so full masks never travel between
processes; `SegmentationMetric` turns the integers into figures:

    metric = SegmentationMetric()
    metric.add_batch(  # one entry per question
        intersections=[[648, 30]], unions=[[648, 168]], targets=[[648, 90]], num_seg_tokens=[2], images=[0]
    )
    metric.compute()

gIoU and cIoU are those of the LISA paper (arXiv 2308.00692, section 4.1). N-acc and T-acc are those of the paper on
gRefCOCO (arXiv 2306.00968): TP / (TP + FN) and TN / (TN + FP), where positive is a question about nothing. The code
published with it has TP / (TP + FN + 1) and TP / (TP + FP + 1) instead.
"""

from itertools import chain

import datasets
import evaluate
import numpy as np
import torch


CONFIDENCE = 0.95
PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


def intersection_and_union(
    prediction: torch.Tensor, target: torch.Tensor, ignore_index: int = 255
) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts the pixels of the foreground's intersection and union, ignored pixels left out.

    Args:
        prediction: (..., H, W) bool, e.g. `logits > 0`.
        target: (..., H, W) integer, 1 = foreground, 0 = background, `ignore_index` = counted nowhere.

    Returns:
        Intersections and unions, two int64 tensors of shape (...), in pixels.

    Raises:
        ValueError: The shapes differ, or `prediction` is not bool.
    """
    if prediction.shape != target.shape or prediction.dtype != torch.bool:
        raise ValueError(
            f"Expected a bool prediction of the target's shape {tuple(target.shape)}, found {prediction.dtype} of "
            f"shape {tuple(prediction.shape)}: resize the logits to the target and threshold them (`logits > 0`)."
        )
    prediction = prediction & (target != ignore_index)
    foreground = target == 1
    return (prediction & foreground).sum((-2, -1)), (prediction | foreground).sum((-2, -1))


class SegmentationMetric(evaluate.Metric):
    """gIoU and cIoU with bootstrap intervals, precision, and the `[SEG]` rates, from per-mask pixel counts.

    With `num_process`, `process_id`, `experiment_id` and a shared `cache_dir`, each process adds its own questions and
    process 0 gets the figures of all of them, exactly (integers are gathered, not means); the others get None.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="gIoU, cIoU, precision and [SEG] rates of a model that answers questions with masks.",
            citation="Lai et al., LISA: Reasoning Segmentation via Large Language Model, 2023. arXiv 2308.00692",
            inputs_description="""
Args, one entry per question (`add_batch`, or `compute` directly):
    intersections (list of list of int): pixels of intersection of each mask due; an empty list if none is due.
    unions (list of list of int): pixels of union of the same masks. A mask that was due but not predicted has
        intersection 0 and the target's area as union.
    targets (list of list of int): pixels of the same masks in the truth; 0 where the question is about nothing.
    num_seg_tokens (list of int): [SEG] tokens in the answer.
    images (list of int): number of the question's image, the same for all questions about it.

Args of `compute`:
    bootstrap (int): number of resamples behind the intervals, default 1000.
    seed (int): seed of the resampling, default 0.

Returns a dict, floats unless stated:
    giou: mean of the masks' IoU; a mask with an empty union (nothing due, nothing predicted) counts 1.
    ciou: sum of intersections over sum of unions.
    giou_low, giou_high, ciou_low, ciou_high: 95 % percentile bootstrap intervals. Images are resampled, not masks,
        since the masks of one image are correlated.
    p@0.5, ..., p@0.9: share of the masks with a target whose IoU is at least that.
    n_acc: share of the masks without a target for which no pixel was predicted. Like t_acc, there only if such masks
        are.
    t_acc: share of the masks with a target for which a pixel was predicted.
    seg_rate: share of the questions with a mask due whose answer has a [SEG].
    false_seg_rate: share of the questions without a mask due whose answer has a [SEG].
    num_masks, num_questions (int): what the figures rest on. Figures without any mask or question are 0, not NaN.
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
        # `evaluate` fails, or waits for the others in vain, when a process has added nothing.
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
        bootstrap: int = 1000,
        seed: int = 0,
    ) -> dict[str, float | int]:
        masks_due = np.array([len(question) for question in unions], dtype=np.int64)
        for index, counts in enumerate(zip(intersections, unions, targets)):
            if len({len(count) for count in counts}) > 1:
                raise ValueError(
                    f"Question {index} has {len(counts[0])} intersections, {len(counts[1])} unions and "
                    f"{len(counts[2])} targets: give all three for every mask that was due."
                )
        intersection, union, target = (
            np.fromiter(chain.from_iterable(counts), dtype=np.int64) for counts in (intersections, unions, targets)
        )
        iou = np.where(union > 0, intersection / np.maximum(union, 1), 1.0)
        has_target, has_prediction = target > 0, union - target + intersection > 0
        due, emitted = masks_due > 0, np.array(num_seg_tokens, dtype=np.int64) > 0

        _, image_of_mask = np.unique(np.repeat(np.array(images, dtype=np.int64), masks_due), return_inverse=True)
        parts = {"giou": (iou, np.ones(len(iou))), "ciou": (intersection, union)}
        figures = {}
        for name, (numerator, denominator) in parts.items():
            sums = [np.bincount(image_of_mask, weights=values) for values in (numerator, denominator)]
            low, high = _bootstrap_interval(*sums, bootstrap, seed)
            figures |= {
                name: _ratio(numerator.sum(), denominator.sum()),
                f"{name}_low": low,
                f"{name}_high": high,
            }
        for threshold in PRECISION_THRESHOLDS:
            figures[f"p@{threshold}"] = _ratio((iou[has_target] >= threshold).sum(), has_target.sum())
        if not has_target.all():
            figures["n_acc"] = _ratio((~has_prediction)[~has_target].sum(), (~has_target).sum())
            figures["t_acc"] = _ratio(has_prediction[has_target].sum(), has_target.sum())
        return figures | {
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
    """Percentile interval of sum(numerators) / sum(denominators) over resampled images; both arrays (num_images,)."""
    if len(numerators) == 0:
        return 0.0, 0.0
    order = np.lexsort((denominators, numerators))  # the same interval however processes shared the images
    numerators, denominators = numerators[order], denominators[order]
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(numerators), size=len(numerators)) for _ in range(resamples))
    ratios = [_ratio(numerators[draw].sum(), denominators[draw].sum()) for draw in draws]
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
