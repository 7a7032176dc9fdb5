"""Reduce a batch and its predicted masks to pixel counts per image.

All metrics follow from three integers per mask, so processes exchange counts instead of masks. There is one line of
counts per image: a gather that pads and truncates lines keeps the masks of an image together.
"""

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction

from ..model.pipeline_lisa import Answer
from .metrics import SegmentationMetric, intersection_and_union


PADDING = -100  # pads lines to the longest one, as in Trainer's gather
GENERATED = "generated_"  # prefix of counts on the model's own answers


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute the metrics of [`SegmentationMetric`] from the gathered counts of [`LisaTrainer.prediction_step`]."""
    lines = prediction.predictions
    metrics = compute_protocol(_columns(lines), is_generated=False)
    if "num_seg_tokens" in lines:
        generated = compute_protocol(_columns(lines, GENERATED), is_generated=True)
        metrics |= {GENERATED + key: value for key, value in generated.items() if not key.startswith("num_")}
    return metrics


def metric_names(has_generated: bool) -> list[str]:
    """Return the names of what [`compute_metrics`] computes, with or without generated answers."""
    # A mask that is due, and a question about nothing
    columns = {name: [[1], [0]] for name in ("intersections", "unions", "targets")}
    columns |= {"num_seg_tokens": [1, 0], "images": [0, 1]}
    names = list(compute_protocol(columns, is_generated=False, bootstrap=1))
    if has_generated:
        generated = compute_protocol(columns, is_generated=True, bootstrap=1)
        names += [GENERATED + name for name in generated if not name.startswith("num_")]
    return names


def compute_protocol(columns: dict[str, list], is_generated: bool, **options) -> dict[str, float]:
    """Compute the metrics of [`SegmentationMetric`] from its columns, without the meaningless ones.

    Args:
        columns: Counts, one entry per question.
        is_generated: Whether the model answered by itself. `[SEG]` rates of given answers are meaningless.
        options: Arguments of [`SegmentationMetric.compute`].
    """
    metrics = SegmentationMetric(keep_in_memory=True).compute(**columns, **options)
    return {key: value for key, value in metrics.items() if is_generated or "seg_rate" not in key}


def count_masks_due(batch: dict, seg_token_id: int) -> torch.Tensor:
    """Return the number of masks that each question asks for, `(N,)` int64: the `[SEG]` tokens of its true answer."""
    return (batch["labels"] == seg_token_id).sum(1)


def count_teacher_forced(batch: dict, masks: list[torch.Tensor], seg_token_id: int) -> dict[str, torch.Tensor]:
    """Count the pixels of masks decoded from the `[SEG]` tokens of the true answers.

    Args:
        batch: Inputs of B images with one question per row (N rows), including `mask_labels`.
        masks: B bool tensors `(M_b, H_b, W_b)`, in the order of `mask_labels`.
        seg_token_id: Id of `[SEG]`.

    Returns:
        int64 tensors `(B, ...)` padded with -100: `masks_due` per question; `targets`, `intersections` and `unions`
        per mask, in pixels.
    """
    targets = [(labels == 1).sum((-2, -1)) for labels in batch["mask_labels"]]  # B x [M_b]
    return {
        "masks_due": _by_image(count_masks_due(batch, seg_token_id), batch),
        "targets": _pad(targets),
        **_count_pixels("", masks, batch["mask_labels"]),
    }


def count_generated(batch: dict, answers: list[Answer], seg_token_id: int) -> dict[str, torch.Tensor]:
    """Count the pixels of masks in the model's own answers.

    An expected mask that was not generated counts as empty; surplus masks are not counted.

    Args:
        batch: As in [`count_teacher_forced`].
        answers: The model's answer to each of N rows.
        seg_token_id: Id of `[SEG]`.

    Returns:
        int64 tensors `(B, ...)` padded with -100: `num_seg_tokens` per question; `generated_intersections` and
        `generated_unions` per mask, in pixels.
    """
    masks_due = count_masks_due(batch, seg_token_id).tolist()
    # Answers are in row order; labels are stacked per image.
    masks_by_image = []
    for image in range(len(batch["mask_labels"])):
        rows = (batch["image_indices"] == image).nonzero().flatten().tolist()
        masks = torch.cat([_take(answers[row].masks, masks_due[row]) for row in rows])  # [M_b, H_b, W_b]
        masks_by_image.append(masks.to(batch["mask_labels"][image].device))
    return {
        **_count_pixels(GENERATED, masks_by_image, batch["mask_labels"]),
        "num_seg_tokens": _by_image(batch["labels"].new_tensor([len(answer.masks) for answer in answers]), batch),
    }


def _count_pixels(prefix: str, masks: list[torch.Tensor], mask_labels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    counts = [intersection_and_union(predicted, labels) for predicted, labels in zip(masks, mask_labels)]
    intersections, unions = zip(*counts)
    return {f"{prefix}intersections": _pad(intersections), f"{prefix}unions": _pad(unions)}


def _take(masks: torch.Tensor, number: int) -> torch.Tensor:
    """Return the first `number` masks of `(M, H, W)`, padded with empty ones."""
    missing = masks.new_zeros((max(number - len(masks), 0), *masks.shape[1:]))
    return torch.cat([masks[:number], missing])


def _by_image(values: torch.Tensor, batch: dict) -> torch.Tensor:
    """Regroup row values `(N,)` into one padded line per image `(B, ...)`."""
    return _pad([values[batch["image_indices"] == image] for image in range(len(batch["mask_labels"]))])


def _pad(lines: list[torch.Tensor]) -> torch.Tensor:
    lines = [*lines, lines[0].new_zeros(1)]  # keeps at least one column, without which a gather would fail
    return pad_sequence(lines, batch_first=True, padding_value=PADDING)[:-1].long()


def _columns(lines: dict[str, np.ndarray], prefix: str = "") -> dict[str, list]:
    """Regroup counts from one padded line per image into the columns of [`SegmentationMetric`], one entry per
    question.

    Args:
        lines: Counts `(num_images, ...)` from [`LisaTrainer.prediction_step`], padded with -100.
        prefix: `GENERATED` for the model's own answers.
    """
    # The number of masks due per question tells how to split an image's line of masks into questions.
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
