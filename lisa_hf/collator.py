"""Items of a mixture become the inputs of [`LisaForConditionalGeneration.forward`]."""

import logging

import numpy as np
import torch
from transformers import BatchFeature

from .feature_cache import FeatureCache
from .losses import MASK_IGNORE_INDEX
from .packing import pack_rows
from .processing_lisa import LisaProcessor, TextTooLongError
from .prompts import Question
from .schema import decode_mask


logger = logging.getLogger(__name__)


class LisaDataCollator:
    """Collates B items, one image and its questions each, to one batch of B images and N rows.

    Args:
        processor: of the model.
        max_length: longest row in tokens, image tokens included. Longer rows lose their end, but never a `[SEG]`.
        on_bad_row: what becomes of a question whose `[SEG]` lies behind `max_length`: "raise" stops, "skip" drops it
            and counts it. An image that loses all of its questions is dropped too; a batch never gets empty.
        packing: whether the questions about an image share one row, see [`pack_rows`] and [`use_packing`].
        feature_cache: where features of frozen encoders are taken from, instead of pixels.

    The batch has what [`LisaProcessor.encode_conversations`] returns and `mask_labels`, a list of B uint8 tensors
    `(M_b, H_b, W_b)`. If rows were skipped, here or in the data set, it also has their number as `num_skipped`, which
    [`LisaTrainer`] takes out and logs.
    """

    def __init__(
        self,
        processor: LisaProcessor,
        max_length: int | None = None,
        on_bad_row: str = "raise",
        packing: bool = False,
        feature_cache: FeatureCache | None = None,
    ):
        if on_bad_row not in ("skip", "raise"):
            raise ValueError(f"on_bad_row must be 'skip' or 'raise', got '{on_bad_row}'.")
        self.processor = processor
        self.max_length = max_length
        self.on_bad_row = on_bad_row
        self.packing = packing
        self.feature_cache = feature_cache

    def __call__(self, items: list[dict]) -> BatchFeature:
        num_skipped = sum(item.get("num_skipped", 0) for item in items)
        questions = [item["questions"] for item in items]
        try:
            batch = self._encode(items, questions)
        except TextTooLongError:
            if self.on_bad_row == "raise":
                raise
            questions = [[q for q in item["questions"] if self._fits(item, q)] for item in items]
            num_skipped += sum(len(item["questions"]) - len(kept) for item, kept in zip(items, questions))
            if not any(questions):
                raise
            items = [item for item, kept in zip(items, questions) if kept]
            questions = [kept for kept in questions if kept]
            batch = self._encode(items, questions)
        if self.packing:
            tokenizer, image_token_id = self.processor.tokenizer, self.processor.vlm_processor.image_token_id
            batch = BatchFeature(pack_rows(batch, image_token_id, tokenizer.pad_token_id))
        if self.feature_cache is not None:
            self.feature_cache.put_into(batch, [item["image"] for item in items])
        batch["mask_labels"] = [mask_labels(item, kept) for item, kept in zip(items, questions)]
        if num_skipped:
            batch["num_skipped"] = num_skipped
        return batch

    def _encode(self, items: list[dict], questions: list[list[Question]]) -> BatchFeature:
        return self.processor.encode_conversations(
            images=[item["image"] for item in items],
            conversations=[question.messages for kept in questions for question in kept],
            image_indices=[index for index, kept in enumerate(questions) for _ in kept],
            max_length=self.max_length,
        )

    def _fits(self, item: dict, question: Question) -> bool:
        try:
            self._encode([item], [[question]])
        except TextTooLongError as error:
            logger.warning("Skipped a question about %s of %s: %s", item["image_id"], item["source"], error)
            return False
        return True


def mask_labels(item: dict, questions: list[Question]) -> torch.Tensor:
    """Decodes the masks of the questions about one image, `(M, H, W)` uint8: 1 object, 0 background, 255 ignore."""
    height, width = item["image"].height, item["image"].width
    rles = [rle for question in questions for rle in question.masks]
    masks = np.zeros((len(rles), height, width), dtype=np.uint8)
    for mask, rle in zip(masks, rles):
        if list(rle["size"]) != [height, width]:
            raise ValueError(
                f"{item['image_id']} of {item['source']}: a mask of {list(rle['size'])} for an image of "
                f"{[height, width]} (height, width)."
            )
        mask[:] = decode_mask(rle)
    if item["ignore"] is not None:
        # Where both are annotated, the target is the stronger statement.
        masks[(masks == 0) & (decode_mask(item["ignore"]) == 1)] = MASK_IGNORE_INDEX
    return torch.from_numpy(masks)
