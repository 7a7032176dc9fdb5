"""Segmentation metrics: gIoU, cIoU and how reliably `[SEG]` is emitted.

The model side reduces every mask to two integers with `intersection_and_union`, so full masks never travel between
processes; `SegmentationMetric` turns the integers into figures:

    metric = SegmentationMetric()
    metric.add_batch(intersections=[[648, 30]], unions=[[648, 168]], num_seg_tokens=[2])  # one entry per question
    metric.compute()

gIoU and cIoU are those of the LISA paper (arXiv 2308.00692, section 4.1).
"""

from itertools import chain

import datasets
import evaluate
import numpy as np
import torch


CONFIDENCE = 0.95


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
    """gIoU with a bootstrap interval, cIoU, and the `[SEG]` rates, from per-mask pixel counts.

    With `num_process`, `process_id`, `experiment_id` and a shared `cache_dir`, each process adds its own questions and
    process 0 gets the figures of all of them, exactly (integers are gathered, not means); the others get None.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="gIoU, cIoU and [SEG] rates of a model that answers questions with masks.",
            citation="Lai et al., LISA: Reasoning Segmentation via Large Language Model, 2023. arXiv 2308.00692",
            inputs_description="""
Args, one entry per question (`add_batch`, or `compute` directly):
    intersections (list of list of int): pixels of intersection of each mask due; an empty list if none is due.
    unions (list of list of int): pixels of union of the same masks. A mask that was due but not predicted has
        intersection 0 and the target's area as union.
    num_seg_tokens (list of int): [SEG] tokens in the answer.

Args of `compute`:
    bootstrap (int): number of resamples behind `giou_low` and `giou_high`, default 1000.
    seed (int): seed of the resampling, default 0.

Returns a dict, floats unless stated:
    giou: mean of the masks' IoU; a mask with an empty union (nothing due, nothing predicted) counts 1.
    giou_low, giou_high: 95 % percentile bootstrap interval of giou. Questions are resampled, not masks, since the
        masks of one question are correlated.
    ciou: sum of intersections over sum of unions.
    seg_rate: share of the questions with a mask due whose answer has a [SEG].
    false_seg_rate: share of the questions without a mask due whose answer has a [SEG].
    num_masks, num_questions (int): what the figures rest on. Figures without any mask or question are 0, not NaN.
""",
            features=datasets.Features(
                {
                    "intersections": datasets.List(datasets.Value("int64")),
                    "unions": datasets.List(datasets.Value("int64")),
                    "num_seg_tokens": datasets.Value("int64"),
                }
            ),
        )

    def _finalize(self):
        # `evaluate` fails, or waits for the others in vain, when a process has added nothing.
        if self.writer is None:
            self.add_batch(intersections=[], unions=[], num_seg_tokens=[])
        super()._finalize()

    def _compute(
        self,
        intersections: list[list[int]],
        unions: list[list[int]],
        num_seg_tokens: list[int],
        bootstrap: int = 1000,
        seed: int = 0,
    ) -> dict[str, float | int]:
        masks_due = np.array([len(question) for question in unions], dtype=np.int64)
        for index, question in enumerate(intersections):
            if len(question) != masks_due[index]:
                raise ValueError(
                    f"Question {index} has {len(question)} intersections and {masks_due[index]} unions: "
                    "give both for every mask that was due."
                )
        intersection = np.fromiter(chain.from_iterable(intersections), dtype=np.int64)
        union = np.fromiter(chain.from_iterable(unions), dtype=np.int64)
        iou = np.where(union > 0, intersection / np.maximum(union, 1), 1.0)
        question_of_mask = np.repeat(np.arange(len(masks_due)), masks_due)
        iou_sums = np.bincount(question_of_mask, weights=iou, minlength=len(masks_due))
        due, emitted = masks_due > 0, np.array(num_seg_tokens, dtype=np.int64) > 0
        low, high = _bootstrap_interval(iou_sums[due], masks_due[due], bootstrap, seed)
        return {
            "giou": _ratio(iou.sum(), len(iou)),
            "giou_low": low,
            "giou_high": high,
            "ciou": _ratio(intersection.sum(), union.sum()),
            "seg_rate": _ratio(emitted[due].sum(), due.sum()),
            "false_seg_rate": _ratio(emitted[~due].sum(), (~due).sum()),
            "num_masks": len(iou),
            "num_questions": len(due),
        }


def _ratio(numerator, denominator) -> float:
    return float(numerator / denominator) if denominator else 0.0


def _bootstrap_interval(iou_sums: np.ndarray, masks_due: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """Percentile interval of sum(iou_sums) / sum(masks_due) over resampled questions; both arrays (num_questions,)."""
    if len(iou_sums) == 0:
        return 0.0, 0.0
    order = np.lexsort((masks_due, iou_sums))  # the same interval however processes shared the questions
    iou_sums, masks_due = iou_sums[order], masks_due[order]
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(iou_sums), size=len(iou_sums)) for _ in range(resamples))
    gious = [iou_sums[draw].sum() / masks_due[draw].sum() for draw in draws]
    low, high = np.quantile(gious, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
