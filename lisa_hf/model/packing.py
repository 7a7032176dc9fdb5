"""Shared-prefix packing: the questions about one image become one row, [prefix][question 1]..[question K].

System prompt and image are the same for all questions about an image, and a causal model computes the same states for
them each time. A packed row contains them once. Every question attends to them and to itself, at the positions it
would have in a separate row, so loss, gradients and masks equal those of separate rows (tests/model/test_packing.py).
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

# VLMs that pass positions and a mask to their language model unchanged, and language models that accept them. Tests
# verify for each that packed rows equal separate ones, and that answers from a shared prefix equal those without.
# PaliGemma and Molmo2 cannot be added: their image tokens attend to the question, so no two questions share the states
# of a prefix.
VLMS = (
    *("aria", "aya_vision", "chameleon", "cohere2_vision", "cohere_compass", "cosmos3_omni", "deepseek_ocr2"),
    *("deepseek_vl", "deepseek_vl_hybrid", "emu3", "gemma3", "gemma3n", "gemma4", "glm46v", "glm4v", "glm4v_moe"),
    *("glm_ocr", "glmga", "got_ocr2", "granite_docling", "hunyuan_vl", "idefics2", "idefics3", "internvl", "janus"),
    *("kimi_k25", "lfm3_vl", "lighton_ocr", "llava", "llava_next", "llava_next_video", "llava_onevision", "mistral3"),
    *("muse_glimmer", "muse_spark", "paddleocr_vl", "perception_lm", "qianfan_ocr", "qwen2_5_vl", "qwen2_vl"),
    *("qwen3_vl", "qwen3_vl_moe", "smolvlm", "video_llama_3", "video_llava", "vipllava"),
)
LANGUAGE_MODELS = (
    *("aria_text", "chameleon", "cohere2", "cohere_compass_text", "deepseek_ocr2_text", "deepseek_v3"),
    *("emu3_text_model", "gemma3_text", "gemma3n_text", "gemma4_text", "glm4v_moe_text", "glm4v_text", "glm_ocr_text"),
    *("granite_docling_text", "hunyuan_vl_text", "lfm3", "llama", "ministral3", "mistral", "muse_glimmer_text"),
    *("muse_spark_text", "paddleocr_vl_text", "qwen2", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3"),
    *("qwen3_vl_moe_text", "qwen3_vl_text"),
)
# Attention that respects a mask. Linear attention and convolutions carry states from one question to the next.
LAYER_TYPES = {"full_attention", "sliding_attention"}
# Implementations that accept a mask. With FlashAttention, packed questions would silently see each other.
ATTENTIONS = ("sdpa", "eager", "flex_attention")
PADDING_VALUES = {"labels": IGNORE_INDEX, "shift_labels": IGNORE_INDEX, "segment_ids": -1}  # others: 0
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # of the VLM, `(N, L)` each


def packing_unsupported_reason(config) -> str | None:
    """Return why a model of this [`LisaConfig`] cannot take packed rows, or None if it can."""
    vlm, text = config.vlm_config, config.get_text_config()
    if others := attention_types(text) - LAYER_TYPES:
        return (
            f"packing needs layers whose attention takes a mask, got {', '.join(sorted(others))} in "
            f"{text.model_type}, through which questions would see each other"
        )
    if vlm.model_type not in VLMS or text.model_type not in LANGUAGE_MODELS:
        return (
            "packing needs a VLM and a language model that it was tested with, got "
            f"{vlm.model_type} on {text.model_type}"
        )
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return f"packing needs tokens that see only earlier ones, got bidirectional attention in {text.model_type}"
    if text._attn_implementation not in ATTENTIONS:
        return (
            f"packing needs an attn_implementation that takes a mask, one of {', '.join(ATTENTIONS)}, got "
            f"{text._attn_implementation}"
        )
    return None


def attention_types(text_config) -> set[str]:
    """Return the kinds of attention in the layers of a language model."""
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types is not None:
        return set(layer_types)
    # Mistral has a window in every layer, or in none.
    return {"sliding_attention" if getattr(text_config, "sliding_window", None) else "full_attention"}


def resolve_packing(config, wanted: bool) -> bool:
    """Return whether to pack rows for a model of this [`LisaConfig`]; warn if packing is wanted but unsupported."""
    reason = packing_unsupported_reason(config) if wanted else None
    if reason:
        logger.warning("Questions about an image stay in separate rows: %s.", reason)
    return wanted and reason is None


# ---- rows, in the collator ------------------------------------------------------------------------------------------


def pack_rows(batch: dict, image_token_id: int, pad_token_id: int) -> dict:
    """Pack the rows of a training batch that are about the same image and share a prefix.

    Args:
        batch: A batch of separate rows: text inputs and `labels` `(N, L)`, and sorted `image_indices` `(N,)`.
        image_token_id: Id of the token that is expanded for an image.
        pad_token_id: Id that fills short rows.

    Returns:
        The batch with text inputs and `labels` `(N', L')`, one row per image unless its questions differ before its
        image, `image_indices` `(N',)`, and two new tensors `(N', L')`: `segment_ids` (0 prefix, 1..K question,
        -1 padding) and `shift_labels` (the label of each position's next token).
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
    """Pack K rows that share a prefix into one."""
    # The prefix ends at least one token before the first label of any row: the token that predicts a label belongs to
    # its question. Every question then begins with an unlabeled token, so none predicts a label of the next one.
    ends = [int((row["labels"] != IGNORE_INDEX).long().argmax()) or len(row["labels"]) for row in rows]
    length = min(ends) - 1
    # And it is common to all rows.
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
    """Undo [`pack_rows`]. The result differs from the original batch only in the padding, whose token ids are 0."""
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
    """Stack rows of unequal length into `(N, L)` tensors, padded on the right with `values` by name, or 0."""
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=values.get(name, 0))
        for name in rows[0]
    }


# ---- positions and attention, in the model --------------------------------------------------------------------------


def packed_inputs(vlm: nn.Module, input_ids, attention_mask, segment_ids, text_inputs: dict) -> dict:
    """Compute positions and attention mask of packed rows.

    Args:
        input_ids, attention_mask, segment_ids: Packed rows, `(N, L)` int64, see [`pack_rows`].
        text_inputs: The VLM's other inputs of these rows.

    Returns:
        Arguments of the VLM: `position_ids` `(N, L)`, or `(3, N, L)` with M-RoPE, and `attention_mask`, which is 4D, a
        `BlockMask`, or a dict of these by layer type, depending on the language model and its attention.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    # Where the segment of each token starts in the row.
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)  # [N, L]
    begins = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)  # [N, L] bool
    starts = index.masked_fill(~begins, 0).cummax(1).values  # [N, L]

    # A question's positions continue those of the prefix, as if the questions between them were not there.
    prefix_lengths = (segment_ids == 0).sum(1, keepdim=True)  # [N, 1]
    earlier_questions = (starts - prefix_lengths).masked_fill(segment_ids < 1, 0)  # [N, L], their length
    positions = index - earlier_questions  # [N, L]

    position_ids = positions
    if hasattr(vlm.base_model, "get_rope_index"):  # M-RoPE
        # The image is in the prefix, so every text token's three positions are off by the same length.
        rope_index, _ = vlm.base_model.get_rope_index(
            input_ids,
            mm_token_type_ids=text_inputs["mm_token_type_ids"],
            image_grid_thw=text_inputs["image_grid_thw"],
            attention_mask=attention_mask,
        )  # [3, N, L]
        position_ids = rope_index - earlier_questions
    return {
        "position_ids": position_ids,
        "attention_mask": _packed_mask(vlm, attention_mask, segment_ids, positions, text_inputs),
    }


def _packed_mask(vlm: nn.Module, attention_mask, segment_ids, positions, text_inputs: dict):
    """Build the causal mask in which a question sees the prefix and itself; arguments are `(N, L)`."""
    config = vlm.config.get_text_config()
    # transformers reads only shape, dtype and device of the embeddings.
    embeddings = attention_mask.new_empty((*attention_mask.shape, 0), dtype=vlm.dtype)
    make_mask = partial(create_causal_mask, config, embeddings, attention_mask, past_key_values=None)

    # transformers calls these with the indices of a row, a head, and a query and a key token of the row.
    def is_prefix_or_same_question(batch, head, query, key):
        return (segment_ids[batch, key] == 0) | (segment_ids[batch, key] == segment_ids[batch, query])

    def is_inside_window(batch, head, query, key):
        # By position: by index, the questions in between would count toward the window.
        return positions[batch, key] > positions[batch, query] - config.sliding_window

    masks = {}
    for layer_type in attention_types(config):
        is_sliding = layer_type == "sliding_attention"
        masks[layer_type] = make_mask(
            or_mask_function=_image_overlay(vlm.config, is_sliding, text_inputs),
            and_mask_function=and_masks(is_prefix_or_same_question, *[is_inside_window] * is_sliding),
        )
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _image_overlay(vlm_config, is_sliding: bool, text_inputs: dict):
    """Return the mask function that lets the tokens of an image see each other in both directions, if they do."""
    if vlm_config.model_type == "gemma3":
        is_image = text_inputs["token_type_ids"] == 1  # [N, L]
    elif getattr(vlm_config.get_text_config(), "use_bidirectional_attention", None) == "vision" and is_sliding:
        is_image = text_inputs["mm_token_type_ids"] == 1  # [N, L], Gemma 4, from 12B on
    else:
        return None
    begins = is_image & ~F.pad(is_image, (1, 0))[:, :-1]
    return blockwise_overlay(begins.cumsum(1).masked_fill(~is_image, -1))  # numbers of images, -1 for text
