"""Protocols: who answers, which texts are asked, and what is correct if no mask is due.

Published numbers mix protocols that differ by several points, so each has a name here, and tables show it with the
numbers.
"""

from dataclasses import dataclass

from .metrics import EmptyTarget


# Increase whenever the same predictions give different numbers.
PROTOCOL_VERSION = 1


@dataclass(frozen=True)
class Protocol:
    """Rules that turn answers into numbers.

    Args:
        source: Paper and code that the rules come from.
        texts: Which texts are asked, one of [`~lisa_hf.data.prompts.TEXTS`].
        teacher_forced: Whether masks are decoded from the `[SEG]` tokens of the true answer. Otherwise, the model
            answers by itself, and a missing mask counts as empty.
        ignores_pixels: Whether pixels annotated as ambiguous are not counted. Otherwise they are background.
        merges_masks: Whether all masks of an answer are merged and compared with the union of the expected ones.
            Otherwise they are compared one by one, in order.
        matches_masks: Whether the masks of an answer are matched to the expected ones to maximize the sum of IoUs,
            instead of in order. Missing and surplus masks count as wrong.
        per_row: Whether to report R-RefCOCO's means over rows, see [`row_metrics`].
        empty_target: What is correct if no mask is due, see [`SegmentationMetric`].
    """

    source: str
    texts: str = "first"
    teacher_forced: bool = False
    ignores_pixels: bool = True
    merges_masks: bool = False
    matches_masks: bool = False
    per_row: bool = False
    empty_target: EmptyTarget = "empty_mask"


_LISA = "LISA, arXiv 2308.00692, `validate` in train_ds.py"
_VISION_REASONER = "arXiv 2505.12081, evaluation/calculate_iou_with_bbox_nonobj.py in JIA-Lab-research/VisionReasoner"
PROTOCOLS = {
    "lisa": Protocol(_LISA, teacher_forced=True),
    "generated": Protocol(f"{_LISA}, without the true answer"),
    "all_texts": Protocol(f"{_LISA}, with all texts of ReasonSeg", texts="all", teacher_forced=True),
    "generated_all_texts": Protocol(f"{_LISA}, without the true answer and with all texts", texts="all"),
    "one_per_object": Protocol(
        f"{_LISA}, without the true answer and with one expression per object", texts="one_per_object"
    ),
    "seg_zero": Protocol(
        "Seg-Zero, arXiv 2503.06520, evaluation/calculate_iou.py in JIA-Lab-research/VisionReasoner",
        texts="normalized",
        ignores_pixels=False,
        merges_masks=True,
        empty_target="always_wrong",
    ),
    "vision_reasoner": Protocol(
        f"VisionReasoner, {_VISION_REASONER}",
        texts="normalized",
        ignores_pixels=False,
        merges_masks=True,
        empty_target="no_mask",
    ),
    "gres": Protocol(
        "GRES, arXiv 2306.00968, gres_model/evaluation/refer_evaluation.py in henghuiding/ReLA",
        merges_masks=True,
        empty_target="no_mask",
    ),
    "sesame": Protocol("SESAME, arXiv 2312.08366, `run_eval` in eval_sesame.py of see-say-segment/sesame"),
    "ref_segformer": Protocol(
        "RefSegformer, arXiv 2209.09554, utils/validation.py in jianzongwu/robust-ref-seg", per_row=True
    ),
    "pixel_lm": Protocol(
        "PixelLM, arXiv 2312.02228, `ar_validate` in train_ds.py of MaverickRen/PixelLM, without GPT-3.5's judgment",
        matches_masks=True,
    ),
}
DEFAULT_PROTOCOLS = ("lisa", "generated", "all_texts", "generated_all_texts")
