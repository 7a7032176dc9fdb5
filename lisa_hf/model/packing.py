"""Shared-prefix packing: the questions about one image become one row, [prefix][question 1]..[question K].

System prompt and image are the same for all questions about an image, and a causal model computes the same states for
them each time. In a packed row they stand once; every question attends to them and to itself, at the positions it has
in a row of its own. So loss, gradients and masks are those of separate rows (tests/test_packing.py), for less work.
"""

import itertools
import logging
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import and_masks, blockwise_overlay, create_causal_mask

from .losses import IGNORE_INDEX


logger = logging.getLogger(__name__)

# VLMs whose mask and positions are proven, with the language model that was inside. PaliGemma can never be here: its
# image tokens attend to the question, so that no two questions have a prefix in common.
LANGUAGE_MODELS = {
    "llava": "llama",
    "idefics3": "llama",
    "gemma3": "gemma3_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
}
MROPE_MODELS = ("qwen2_5_vl", "qwen3_vl")
# FlashAttention takes no mask: packed questions would silently see each other.
ATTENTIONS = ("sdpa", "eager", "flex_attention")
PADDING_VALUES = {"labels": IGNORE_INDEX, "shift_labels": IGNORE_INDEX, "segment_ids": -1}  # others: 0
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # of the VLM, `(N, L)` each


def packing_unsupported_reason(config) -> str | None:
    """Why a model of this [`LisaConfig`] takes no packed rows; None if it does."""
    vlm, text = config.vlm_config, config.get_text_config()
    if LANGUAGE_MODELS.get(vlm.model_type) != text.model_type:
        return (
            f"packing is proven for {', '.join(f'{vlm} on {text}' for vlm, text in LANGUAGE_MODELS.items())}; this is "
            f"{vlm.model_type} on {text.model_type}"
        )
    if text._attn_implementation not in ATTENTIONS:
        return (
            f"attn_implementation '{text._attn_implementation}' cannot keep packed questions apart; expected one of "
            f"{', '.join(ATTENTIONS)}"
        )
    return None


def resolve_packing(config, wanted: bool) -> bool:
    """Whether to pack rows for a model of this [`LisaConfig`]; a warning says why not, where it is wanted."""
    obstacle = packing_unsupported_reason(config) if wanted else None
    if obstacle:
        logger.warning("Questions about an image stay separate rows: %s.", obstacle)
    return wanted and obstacle is None


# ---- rows -----------------------------------------------------------------------------------------------------------


def pack_rows(batch: dict, image_token_id: int, pad_token_id: int) -> dict:
    """Packs the rows of a training batch that are about one image and begin alike.

    Args:
        batch: with the row inputs `(N, L)` of separate rows, `labels` among them, and `image_indices` `(N,)`, sorted.

    Returns:
        The batch with `(N', L')` row inputs, one row per image unless its questions differ before its image,
        `image_indices` `(N',)`, and two new tensors `(N', L')`: `segment_ids` (0 prefix, 1..K question, -1 padding)
        and `shift_labels` (the label of each position's next token).
    """
    image_indices, real = batch["image_indices"].tolist(), batch["attention_mask"].bool()
    names = [name for name in (*TEXT_INPUTS, "labels") if name in batch]
    rows = [{name: batch[name][n][real[n]] for name in names} for n in range(len(real))]

    def image_and_its_prefix(n: int) -> tuple:
        ids = rows[n]["input_ids"]
        return image_indices[n], ids[: (ids == image_token_id).nonzero().max() + 1].tolist()

    packed, images = [], []
    for (image, _), group in itertools.groupby(range(len(rows)), key=image_and_its_prefix):
        packed.append(_pack_group([rows[n] for n in group]))
        images.append(image)
    padding = {**PADDING_VALUES, "input_ids": pad_token_id}
    return {**batch, **_pad_rows(packed, padding), "image_indices": torch.tensor(images)}


def _pack_group(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One packed row of K rows that begin alike."""
    # The position before a label predicts it and belongs to the question. So each question begins with an unlabelled
    # token, and no question's first label is asked of the one before it.
    ends = [int((row["labels"] != IGNORE_INDEX).long().argmax()) or len(row["labels"]) for row in rows]
    length = min(ends) - 1
    same = torch.stack([row["input_ids"][:length] == rows[0]["input_ids"][:length] for row in rows]).all(0)
    length = int(same.long().cumprod(0).sum())
    packed = {
        name: torch.cat([values[:length], *(row[name][length:] for row in rows)]) for name, values in rows[0].items()
    }
    lengths = torch.tensor([length, *(len(row["labels"]) - length for row in rows)])
    packed["segment_ids"] = torch.arange(len(lengths)).repeat_interleave(lengths)
    packed["shift_labels"] = F.pad(packed["labels"][1:], (0, 1), value=IGNORE_INDEX)
    return packed


def unpack_rows(batch: dict) -> dict:
    """The batch as it was before [`pack_rows`], but for its padding: 0 where a token id is not attended to."""
    segment_ids = batch["segment_ids"]
    rows, images = [], []
    for n, image in enumerate(batch["image_indices"].tolist()):
        for segment in range(1, int(segment_ids[n].max()) + 1):
            kept = (segment_ids[n] == 0) | (segment_ids[n] == segment)
            rows.append({name: batch[name][n][kept] for name in (*TEXT_INPUTS, "labels") if name in batch})
            images.append(image)
    separate = {name: value for name, value in batch.items() if name not in ("segment_ids", "shift_labels")}
    image_indices = batch["image_indices"].new_tensor(images)
    return {**separate, **_pad_rows(rows, PADDING_VALUES), "image_indices": image_indices}


def _pad_rows(rows: list[dict[str, torch.Tensor]], values: dict[str, int]) -> dict[str, torch.Tensor]:
    """Rows of unequal length to tensors, padded on the right."""
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=values.get(name, 0))
        for name in rows[0]
    }


# ---- what the model makes of them -----------------------------------------------------------------------------------


def packed_inputs(vlm: nn.Module, input_ids, attention_mask, segment_ids, text_inputs: dict) -> dict:
    """Positions and attention mask of packed rows, as arguments of the VLM.

    Args:
        input_ids, attention_mask, segment_ids: `(N, L)` int64, see [`pack_rows`].
        text_inputs: the VLM's other inputs of these rows.

    Returns:
        `position_ids` `(N, L)`, or `(3, N, L)` with M-RoPE, and `attention_mask`: 4D, a `BlockMask`, or a dict of
        these by layer type, as the language model and its attention want it.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    # In sequence, a question stands behind those before it by their length; all that is needed is to take that off.
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    begins = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    starts = index.masked_fill(~begins, 0).cummax(1).values
    earlier = (starts - (segment_ids == 0).sum(1, keepdim=True)).masked_fill(segment_ids < 1, 0)
    in_sequence = index
    if vlm.config.model_type in MROPE_MODELS:
        in_sequence, _ = vlm.base_model.get_rope_index(
            input_ids,
            mm_token_type_ids=text_inputs["mm_token_type_ids"],
            image_grid_thw=text_inputs["image_grid_thw"],
            attention_mask=attention_mask,
        )
    return {
        "position_ids": in_sequence - earlier,
        "attention_mask": _packed_mask(vlm, attention_mask, segment_ids, index - earlier, text_inputs),
    }


def _packed_mask(vlm: nn.Module, attention_mask, segment_ids, positions, text_inputs: dict):
    config = vlm.config.get_text_config()
    # Of the embeddings, transformers reads the shape, the type and the device.
    embeddings = attention_mask.new_empty((*attention_mask.shape, 0), dtype=vlm.dtype)
    make_mask = partial(create_causal_mask, config, embeddings, attention_mask, past_key_values=None)

    def is_prefix_or_same_question(batch, head, query, key):
        return (segment_ids[batch, key] == 0) | (segment_ids[batch, key] == segment_ids[batch, query])

    def is_inside_window(batch, head, query, key):
        return positions[batch, key] > positions[batch, query] - config.sliding_window

    if vlm.config.model_type != "gemma3":
        return make_mask(and_mask_function=is_prefix_or_same_question)
    # The tokens of an image see each other both ways, and most layers look back over a window only.
    is_image = text_inputs["token_type_ids"] == 1
    begins = is_image & ~F.pad(is_image, (1, 0))[:, :-1]
    overlay = blockwise_overlay(begins.cumsum(1).masked_fill(~is_image, -1))
    in_window = and_masks(is_prefix_or_same_question, is_inside_window)
    return {
        "full_attention": make_mask(or_mask_function=overlay, and_mask_function=is_prefix_or_same_question),
        "sliding_attention": make_mask(or_mask_function=overlay, and_mask_function=in_window),
    }
