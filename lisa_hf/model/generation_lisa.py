"""LisaGenerationMixin: answers in words and masks. Its VLM writes, [`LisaForConditionalGeneration`] draws."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput

from .mask_backbone import encode_images
from .packing import packing_unsupported_reason
from .vlm_backbone import encode_vlm_images, split_vision_inputs


# Arguments of `generate` that do not multiply or reorder the rows of its cache.
PLAIN_DECODING = {
    *("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "suppress_tokens"),
    *("logits_processor", "eos_token_id", "pad_token_id"),
}


@dataclass
class LisaGenerateOutput(ModelOutput):
    """Output of [`LisaForConditionalGeneration.generate`] for N rows in whose answers there are M `[SEG]` tokens.

    Args:
        sequences: `(N, L)` int64, prompt and answer.
        low_res_masks: `(M, h, w)` mask logits, row by row, in the order of the `[SEG]` tokens; see
            [`LisaProcessor.post_process_masks`].
        seg_row_indices: `(M,)` int64, the row that each mask belongs to.
        iou_scores: `(M,)`, the mask decoder's own estimate of each mask's IoU.
        seg_embeddings: `(M, C)`, the prompts of the mask decoder.
    """

    sequences: torch.Tensor | None = None
    low_res_masks: torch.Tensor | None = None
    seg_row_indices: torch.Tensor | None = None
    iou_scores: torch.Tensor | None = None
    seg_embeddings: torch.Tensor | None = None


class SegTokens(NamedTuple):
    """Where M `[SEG]` tokens are: `(M,)` int64 each. The state at `(row, position)` predicts the token."""

    rows: torch.Tensor
    positions: torch.Tensor
    images: torch.Tensor


class LisaGenerationMixin:
    """`generate` of [`LisaForConditionalGeneration`]."""

    @contextmanager
    def _record_predicting_states(self):
        """Collects, per generated token, the state `(N, hidden_size)` that predicted it: what enters the lm_head."""
        states = []

        def record(_, inputs):
            states.append(inputs[0][:, -1])

        handle = self.vlm.get_output_embeddings().register_forward_pre_hook(record)
        try:
            yield states
        finally:
            handle.remove()

    def _prefill_shared_prefix(
        self, input_ids, attention_mask, image_indices, vision_inputs, vision_features, generate_kwargs
    ) -> dict | None:
        """Runs what the rows about an image begin with through the language model once, and gives each its KV cache.

        Returns:
            `input_ids` and `attention_mask` as wide as before, prefix first, and the `past_key_values` of the prefix;
            None if rows share nothing, under settings for which `generate` would rearrange the cache, and where the
            weights are sharded: every process must then make as many passes, and only some have rows that share.
        """
        first = (image_indices[:, None] == image_indices).long().argmax(1)  # of the rows about the same image
        first_rows, row_to_prefix = first.unique(return_inverse=True)
        is_plain = set(generate_kwargs) <= PLAIN_DECODING and (self.vlm.generation_config.num_beams or 1) == 1
        is_sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self.vlm)
        if len(first_rows) == len(input_ids) or not is_plain or is_sharded or packing_unsupported_reason(self.config):
            return None
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        length = input_ids.shape[1]
        column = torch.arange(length, device=input_ids.device).expand_as(input_ids)
        padding = length - attention_mask.sum(1, keepdim=True)
        ids = input_ids.gather(1, (column + padding).clamp(max=length - 1))  # from the left
        is_common = (ids == ids[first]) & (column + padding < length - 1)  # one token at least remains to be read
        num_common = int(is_common.long().cumprod(1).sum(1).min())
        is_image = ids == self.config.vlm_config.image_token_id
        if num_common <= int((column * is_image).max()):
            return None
        prefix = ids[first_rows, :num_common]
        cache = self.vlm.base_model(
            input_ids=prefix,
            mm_encoder_outputs=encode_vlm_images(
                self.vlm, prefix, image_indices[first_rows], vision_inputs, vision_features
            ),
            use_cache=True,
        ).past_key_values
        cache.batch_select_indices(row_to_prefix)
        # Between prefix and question there is now what stood before the prefix, masked.
        is_read = (column < num_common) | (column >= padding + num_common)
        rearranged = torch.cat([prefix[row_to_prefix], input_ids[:, num_common:]], dim=1)
        rearranged = torch.where(is_read, rearranged, input_ids[:, -1:])
        return {"input_ids": rearranged, "attention_mask": is_read.long(), "past_key_values": cache}

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_indices: torch.Tensor | None = None,
        vision_features: list[torch.Tensor] | None = None,
        mask_pixel_values: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | list | None = None,
        original_sizes: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        **kwargs,
    ) -> LisaGenerateOutput:
        """Answers N prompts about B images and decodes a mask for every `[SEG]` in the answers.

        The arguments are those of [`forward`], with prompts padded on the left; all further ones go to the VLM's own
        `generate` (`max_new_tokens`, `do_sample`, `num_beams`, ...). The sizes are accepted, so that a processor's
        output can be passed whole; [`LisaProcessor.post_process_masks`] needs them. What all questions about an image
        begin with, the image included, goes through the language model once where the VLM's family allows packing.
        """
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError(
                "Prompts are padded on the right; generation continues from the last column. Pad on the left "
                '(`processor(..., padding_side="left")`).'
            )
        if image_indices is None:
            image_indices = torch.arange(len(input_ids), device=input_ids.device)
        vision_inputs, generate_kwargs = split_vision_inputs(
            self.vlm, {"pixel_values": pixel_values, **kwargs}, image_indices
        )
        if self.config.suppress_tokens:
            generate_kwargs.setdefault("suppress_tokens", self.config.suppress_tokens)
        prompts = self._prefill_shared_prefix(
            input_ids, attention_mask, image_indices, vision_inputs, vision_features, generate_kwargs
        )
        if prompts is None:
            features = encode_vlm_images(self.vlm, input_ids, image_indices, vision_inputs, vision_features)
            prompts = {"input_ids": input_ids, "attention_mask": attention_mask, "mm_encoder_outputs": features}
        with self._record_predicting_states() as states:
            output = self.vlm.generate(**prompts, return_dict_in_generate=True, **generate_kwargs)
        answers = output.sequences[:, input_ids.shape[1] :]
        copies = len(answers) // len(input_ids)  # num_return_sequences
        seg_rows, seg_steps = (answers == self.config.seg_token_id).nonzero(as_tuple=True)
        states = torch.stack(states, dim=1)
        state_rows = seg_rows
        if output.get("beam_indices") is not None:
            state_rows = output.beam_indices[seg_rows, seg_steps]
        elif len(states) != len(answers):
            raise ValueError(f"{len(states)} rows were decoded for {len(answers)} answers: an unsupported strategy.")
        if image_embeddings is None:
            image_embeddings = encode_images(self.mask_model, mask_pixel_values.to(self.mask_model.dtype))
        low_res_masks, iou_scores, seg_embeddings, _ = self._decode(
            states, SegTokens(state_rows, seg_steps, image_indices[seg_rows // copies]), image_embeddings
        )
        return LisaGenerateOutput(
            sequences=torch.cat([input_ids.repeat_interleave(copies, dim=0), answers], dim=1),
            low_res_masks=low_res_masks,
            seg_row_indices=seg_rows,
            iou_scores=iou_scores,
            seg_embeddings=seg_embeddings,
        )
