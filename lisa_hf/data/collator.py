"""Collate the items of a mixture into the inputs of [`LisaForConditionalGeneration.forward`]."""

import logging
from dataclasses import dataclass

import torch
from transformers import BatchFeature

from ..model.conversation_text import ConversationError
from ..model.packing import pack_rows
from ..model.processing_lisa import ImageInputs, LisaProcessor
from .feature_cache import join_entries
from .masks import compact_mask_labels, draw_mask_labels
from .prompts import Question
from .rows import OnBadRow, check_on_bad_row


logger = logging.getLogger(__name__)


@dataclass
class BatchMeta:
    """Facts about a batch of B images that are not inputs of the model.

    Args:
        sources: Names of the B images' sources.
        image_ids: Ids of the B images, unique within their source.
        num_skipped: Number of unusable rows, found here or by the dataset.
    """

    sources: list[str]
    image_ids: list[str]
    num_skipped: int


class LisaDataCollator:
    """Collate B items, each one image with its questions, into one batch of B images and N rows.

    A batch has the outputs of [`LisaProcessor.encode_conversations`] and `mask_labels`, a list of B uint8 tensors
    `(M_b, H_b, W_b)`. A compact batch has int32 tensors `(M_b, R_b)` instead, and a list of B `ignored_pixels`, see
    [`~masks.compact_mask_labels`]. If all items have cached features, they replace the pixels. Everything that is not
    an input of the model is under `meta`, a [`BatchMeta`]: pop it before calling the model, as [`LisaTrainer`] does.

    Args:
        processor: Processor of the model.
        max_length: Maximum length of a row in tokens, including image tokens. Longer rows are truncated, but never
            lose a `[SEG]`.
        on_bad_row: What to do with a question whose `[SEG]` lies beyond `max_length`, or that the chat template cannot
            render, see [`~rows.OnBadRow`]. An image with no questions left is dropped too. A batch never becomes
            empty: if no question is left, the last one raises an error.
        packing: Whether the questions about an image share one row, see [`pack_rows`] and [`resolve_packing`].
        compact: Whether pixels stay uint8 and masks run-length encoded. Loader workers then do less work and transfer
            a fraction of the bytes; [`expand_batch`], which [`LisaTrainer`] calls on its device, does the rest.
    """

    def __init__(
        self,
        processor: LisaProcessor,
        max_length: int | None = None,
        on_bad_row: OnBadRow = "raise",
        packing: bool = False,
        compact: bool = False,
    ):
        check_on_bad_row(on_bad_row)
        self.processor = processor
        self.max_length = max_length
        self.on_bad_row = on_bad_row
        self.packing = packing
        self.compact = compact

    def __call__(self, items: list[dict]) -> BatchFeature:
        # 1. Texts and images, without the questions that cannot be trained on.
        num_skipped = sum(item.get("num_skipped", 0) for item in items)
        questions = [item["questions"] for item in items]
        image_inputs = self._preprocess_images(items)
        try:
            batch = self._encode_questions(image_inputs, questions)
        except ConversationError:
            # Keep the questions that can be trained on, and the images that have one
            questions = [
                [question for question in item["questions"] if self._can_learn(question, image_inputs, index, item)]
                for index, item in enumerate(items)
            ]
            num_skipped += sum(len(item["questions"]) - len(kept) for item, kept in zip(items, questions))
            if not any(questions):
                raise
            items = [item for item, kept in zip(items, questions) if kept]
            if not all(questions):
                image_inputs = self._preprocess_images(items)
            questions = [kept for kept in questions if kept]
            batch = self._encode_questions(image_inputs, questions)
        # 2. Questions about an image in one row.
        if self.packing:
            tokenizer, image_token_id = self.processor.tokenizer, self.processor.image_token_id
            batch = BatchFeature(pack_rows(batch, image_token_id, tokenizer.pad_token_id))
        # 3. Masks, in the order of the `[SEG]` tokens.
        runs = [_compact_mask_labels(item, kept) for item, kept in zip(items, questions)]
        if self.compact:
            batch["mask_labels"], batch["ignored_pixels"] = map(list, zip(*runs))
        else:
            batch["mask_labels"] = [draw_mask_labels(*ends, item["original_size"]) for ends, item in zip(runs, items)]
        # 4. Everything that is not an input of the model.
        batch["meta"] = BatchMeta(
            sources=[item["source"] for item in items],
            image_ids=[item["image_id"] for item in items],
            num_skipped=num_skipped,
        )
        return batch

    def _preprocess_images(self, items: list[dict]) -> ImageInputs:
        # Cached features and pixels cannot be mixed: a batch has features of all images or of none.
        entries = [item["cached_features"] for item in items]
        return self.processor.preprocess_images(
            [item["image"] for item in items],
            [item["original_size"] for item in items],
            do_normalize=not self.compact,
            cached=None if None in entries else join_entries(entries),
        )

    def _encode_questions(self, image_inputs: ImageInputs, questions: list[list[Question]]) -> BatchFeature:
        """Encode the questions about each of B images, one row per question."""
        return self.processor.encode_conversations(
            image_inputs,
            conversations=[question.messages for kept in questions for question in kept],
            image_indices=[index for index, kept in enumerate(questions) for _ in kept],
            max_length=self.max_length,
        )

    def _can_learn(self, question: Question, image_inputs: ImageInputs, index: int, item: dict) -> bool:
        """Return whether a question about the image with this index can be trained on; if not, log it or raise."""
        try:
            self.processor.encode_conversations(image_inputs, [question.messages], [index], self.max_length)
        except ConversationError as error:
            where = f"a question about {item['image_id']} of {item['source']}"
            if self.on_bad_row == "raise":
                raise type(error)(f"{where}: {error}") from error
            logger.warning("Skipped %s: %s", where, error)
            return False
        return True


def expand_batch(batch: dict, processor: LisaProcessor) -> dict:
    """Expand a compact batch on its device: normalize uint8 pixels to float and draw run-length encoded masks.

    Args:
        batch: Batch from [`LisaDataCollator`]. A batch that is not compact is returned unchanged.
        processor: Processor of the collator.
    """
    if "ignored_pixels" not in batch:
        return batch
    batch = {**batch}
    processor.normalize_pixels(batch)
    runs = zip(batch["mask_labels"], batch.pop("ignored_pixels"), batch["original_sizes"].tolist())
    batch["mask_labels"] = [draw_mask_labels(*ends_and_size) for ends_and_size in runs]
    return batch


def _compact_mask_labels(item: dict, questions: list[Question]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [`compact_mask_labels`] of the questions about one image, after checking the sizes."""
    masks = [mask for question in questions for mask in question.masks]
    for mask in masks:
        if list(mask.size) != list(item["original_size"]):
            raise ValueError(
                f"{item['image_id']} of {item['source']}: expected masks of the image's size "
                f"{list(item['original_size'])} (height, width), got one of {list(mask.size)}. Restore the image that "
                "was annotated, or remove the annotation."
            )
    return compact_mask_labels(masks, item["ignore"])
