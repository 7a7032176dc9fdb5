"""LisaGenerationMixin: the VLM generates answers, whose `[SEG]` tokens are decoded to masks."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import Cache
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput

from .mask_backbone import count_images, encode_images
from .packing import TEXT_INPUTS, attention_types, packing_unsupported_reason
from .vlm_backbone import encode_vlm_images, record_states, split_vision_inputs


# Arguments of the VLM's `generate` that do not multiply or reorder the rows of its cache.
PLAIN_DECODING = {
    *("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "suppress_tokens"),
    *("logits_processor", "eos_token_id", "pad_token_id"),
}


@dataclass
class LisaGenerateOutput(ModelOutput):
    """Output of [`LisaForConditionalGeneration.generate`] for N rows with M `[SEG]` tokens in their answers.

    Args:
        sequences: Token ids of prompts and answers, `(N, L)` int64.
        low_res_masks: Mask logits of the decoder, row by row, in the order of the `[SEG]` tokens, `(M, h, w)`.
            [`LisaProcessor.post_process_masks`] brings them to the size of their images.
        seg_row_indices: The row of each mask, `(M,)` int64.
        iou_scores: The decoder's own estimate of each mask's IoU, `(M,)`.
        seg_embeddings: Prompts of the mask decoder, `(M, C)`.
        past_key_values: The VLM's cache of all tokens but the last, for a next turn of the conversation.
    """

    sequences: torch.Tensor | None = None
    low_res_masks: torch.Tensor | None = None
    seg_row_indices: torch.Tensor | None = None
    iou_scores: torch.Tensor | None = None
    seg_embeddings: torch.Tensor | None = None
    past_key_values: Cache | None = None


class SegTokens(NamedTuple):
    """Where M `[SEG]` tokens are, `(M,)` int64 each; the state at (row, position) is a prompt of the mask decoder.

    Args:
        rows, positions: Place of the state.
        images: Image that the mask is of.
        prompts: Row of `input_ids` that the token is in, or answers.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    images: torch.Tensor
    prompts: torch.Tensor

    def or_dummy(self) -> "SegTokens":
        """Return these tokens, or one dummy at the first position of row 0 and image 0 if there are none."""
        return self if len(self.rows) else SegTokens(*[self.rows.new_zeros(1)] * len(self))


class LisaGenerationMixin:
    """`generate` of [`LisaForConditionalGeneration`]."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_indices: torch.Tensor | None = None,
        vision_features: list[torch.Tensor | dict] | None = None,
        mask_pixel_values: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | list | None = None,
        original_sizes: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> LisaGenerateOutput:
        """Answer N prompts about B images and decode a mask for every `[SEG]` in the answers.

        What all questions about an image begin with, the image included, goes through the language model once where
        the VLM's family allows packing.

        Args:
            input_ids, attention_mask: Prompts as in [`forward`], padded on the left, `(N, L)` int64.
            pixel_values, image_indices, vision_features, mask_pixel_values, image_embeddings: As in [`forward`].
            original_sizes, reshaped_input_sizes: As in [`forward`]; read with `similarity_points` alone.
            past_key_values: Cache of an earlier call with the tokens that these N prompts begin with, the image among
                them: earlier turns of N conversations. It is changed in place.
            kwargs: Further inputs of the VLM and arguments of its own `generate` (`max_new_tokens`, `do_sample`,
                `num_beams`, ...).

        Returns:
            [`LisaGenerateOutput`].

        Raises:
            ValueError: Prompts are padded on the right, or the decoding strategy hides the states behind its answers.

        Example:

        ```python
        >>> from PIL import Image
        >>> from lisa_hf import LisaForConditionalGeneration, LisaProcessor

        >>> model = LisaForConditionalGeneration.from_pretrained("my-lisa")
        >>> processor = LisaProcessor.from_pretrained("my-lisa")

        >>> image = Image.open("photo.jpg")
        >>> question = {"type": "text", "text": "What is the red circle?"}
        >>> messages = [{"role": "user", "content": [{"type": "image"}, question]}]
        >>> prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        >>> inputs = processor(image, prompt)
        >>> output = model.generate(**inputs, max_new_tokens=8)
        >>> answer = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :])
        >>> sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        >>> (masks,) = processor.post_process_masks(output.low_res_masks, *sizes, output.seg_row_indices)
        >>> masks.shape == (answer.count("[SEG]"), image.height, image.width)
        True
        ```
        """
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError(
                "expected prompts padded on the left, because generation continues from the last column, got padding "
                'on the right. Use `processor(..., padding_side="left")`.'
            )
        if image_indices is None:
            image_indices = torch.arange(len(input_ids), device=input_ids.device)
        num_images = count_images(mask_pixel_values, image_embeddings)
        vision_inputs, generate_kwargs = split_vision_inputs(
            self.vlm, {"pixel_values": pixel_values, **kwargs}, input_ids, image_indices, num_images
        )
        generate_kwargs = self._complete_options(generate_kwargs)
        if self.config.similarity_points is not None:
            past_key_values = None  # the states of the image are read again

        # 1. Prompts: the prefix that rows share once, as a KV cache, or whole rows with the features of their images.
        prompts = {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": past_key_values}
        if past_key_values is None:
            prompts = self._prefill_shared_prefix(
                input_ids, attention_mask, image_indices, num_images, vision_inputs, vision_features, generate_kwargs
            )
            if prompts is not None:  # what describes the image is for the prefix alone
                generate_kwargs = {name: generate_kwargs[name] for name in PLAIN_DECODING & generate_kwargs.keys()}
        if prompts is None:
            features = encode_vlm_images(
                self.vlm, input_ids, image_indices, num_images, vision_inputs, vision_features
            )
            prompts = {"input_ids": input_ids, "attention_mask": attention_mask, "mm_encoder_outputs": features}

        # 2. Answers of the VLM, and the state that predicted each of their tokens.
        output, steps = self._run_vlm_generate(prompts, generate_kwargs)
        states = torch.stack([step[:, -1] for step in steps], dim=1)  # [rows, steps, hidden_size], a row per beam
        answers = output.sequences[:, input_ids.shape[1] :]  # [N * copies, steps]
        copies = len(answers) // len(input_ids)  # num_return_sequences

        # 3. [SEG] tokens of the answers.
        seg_rows, seg_tokens = self._find_generated_seg_tokens(
            answers, states, output.get("beam_indices"), image_indices
        )

        # 4. Masks.
        if image_embeddings is None:
            image_embeddings = encode_images(self.mask_model, mask_pixel_values.to(self.mask_model.dtype))
        seg_embeddings = self._seg_embeddings(states, seg_tokens)
        prompt_states = steps[0][:: len(steps[0]) // len(input_ids)]  # [N, L or 1, hidden_size], of the first beams
        points = self._similarity_points(
            states, seg_tokens, prompt_states, input_ids, original_sizes, reshaped_input_sizes
        )
        low_res_masks, iou_scores, _ = self._decode(seg_embeddings, seg_tokens, image_embeddings, points)

        return LisaGenerateOutput(
            sequences=torch.cat([input_ids.repeat_interleave(copies, dim=0), answers], dim=1),
            low_res_masks=low_res_masks,
            seg_row_indices=seg_rows,
            iou_scores=iou_scores,
            seg_embeddings=seg_embeddings[: len(low_res_masks)],
            past_key_values=output.past_key_values,
        )

    def _complete_options(self, generate_kwargs: dict) -> dict:
        """Return arguments of the VLM's `generate`, with what this model needs where the caller gave nothing else."""
        options = dict(generate_kwargs)
        if self.config.suppress_tokens:
            options.setdefault("suppress_tokens", self.config.suppress_tokens)
        own_ends = self.vlm.generation_config.eos_token_id
        if self.config.answer_end_token_id is not None:
            own_ends = [] if own_ends is None else own_ends if isinstance(own_ends, list) else [own_ends]
            options.setdefault("eos_token_id", sorted({*own_ends, self.config.answer_end_token_id}))
        pad = self.vlm.generation_config.pad_token_id
        if pad is not None and pad >= self.get_input_embeddings().num_embeddings:
            # As in SmolVLM's configuration. What fills answers that have ended goes through the VLM too.
            ends = options.get("eos_token_id", own_ends)
            options.setdefault("pad_token_id", ends[0] if isinstance(ends, list) else ends)
        return options

    def _run_vlm_generate(self, prompts: dict, generate_kwargs: dict) -> tuple[ModelOutput, list[torch.Tensor]]:
        """Run the VLM's own `generate`.

        Returns:
            Its output, and the states of each of its steps, `(rows, 1, hidden_size)` with a row per answer or beam;
            with `similarity_points`, the first ones are those of the whole prompts, `(rows, L, hidden_size)`.
        """
        backbone, cache = self.vlm.base_model, prompts.get("past_key_values")
        if hasattr(cache, "rope_deltas"):
            backbone.rope_deltas = cache.rope_deltas
        # Points need the states of all positions of the prompt, of which only the last one is projected.
        where = self.config.states_at if self.config.similarity_points is None else "after_norm"
        with record_states(self.vlm, where=where) as states:
            output = self.vlm.generate(**prompts, return_dict_in_generate=True, **generate_kwargs)
        if hasattr(backbone, "rope_deltas") and output.past_key_values is not None:
            # By how much M-RoPE shifts what follows the image. A VLM keeps it of its last call only, which may be
            # about another image when this cache is continued.
            output.past_key_values.rope_deltas = backbone.rope_deltas
        return output, [step.to(output.sequences.device) for step in states]  # the last layer may be elsewhere

    def _find_generated_seg_tokens(
        self, answers: torch.Tensor, states: torch.Tensor, beam_indices, image_indices: torch.Tensor
    ) -> tuple[torch.Tensor, SegTokens]:
        """Find the M `[SEG]` tokens of answers, row by row.

        Args:
            answers: Token ids, `(N * copies, steps)`.
            states: The state that predicted each token, `(rows, steps, hidden_size)`.
            beam_indices: Row of `states` in which each token was predicted, because beams change rows as they go;
                None without beams.
            image_indices: Image of each prompt, `(N,)`.

        Returns:
            The answer of each token, `(M,)`, and where its state is.
        """
        is_seg = answers == self.config.seg_token_id
        is_own = self.config.seg_state != "predicting"
        if is_own:
            is_seg[:, -1] = False  # the state of a token itself predicts the next one: an answer's last token has none
        seg_rows, seg_steps = is_seg.nonzero(as_tuple=True)  # [M] each
        state_rows, state_steps = seg_rows, seg_steps + is_own
        if beam_indices is not None:
            state_rows = beam_indices[seg_rows, state_steps]
        elif len(states) != len(answers):
            raise ValueError(
                f"expected one decoded row per answer, got {len(states)} rows for {len(answers)} answers. Use greedy "
                "search, sampling or beam search."
            )
        prompts = seg_rows // (len(answers) // len(image_indices))
        return seg_rows, SegTokens(state_rows, state_steps, image_indices[prompts], prompts)

    def _prefill_shared_prefix(
        self, input_ids, attention_mask, image_indices, num_images, vision_inputs, vision_features, generate_kwargs
    ) -> dict | None:
        """Run the prefix that rows about an image share through the language model once.

        Two rows with padding (-), prefix (p) and question (q) become rows with a masked gap (.), so that one cache of
        the prefix fits both:

            - - p p p p q q      p p p p . . q q
            - p p p p q q q  ->  p p p p . q q q

        Returns:
            `input_ids` and `attention_mask` as wide as before, prefix first, and `past_key_values` of the prefix for
            every row; None if no rows share one, or if sharing is not possible here.
        """
        first = (image_indices[:, None] == image_indices).long().argmax(1)  # [N], first row about the same image
        first_rows, row_to_prefix = first.unique(return_inverse=True)  # [B'], [N]
        shares_nothing = len(first_rows) == len(input_ids)
        if shares_nothing or not self._can_share_prefix(input_ids.shape[1], vision_inputs, generate_kwargs):
            return None

        # Find the longest prefix that every row has in common with the first row about its image.
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        length = input_ids.shape[1]
        column = torch.arange(length, device=input_ids.device).expand_as(input_ids)  # [N, L]
        padding = length - attention_mask.sum(1, keepdim=True)  # [N, 1]
        left_aligned = input_ids.gather(1, (column + padding).clamp(max=length - 1))
        # The last token of a row is never in the prefix: `generate` needs one token to read.
        is_common = (left_aligned == left_aligned[first]) & (column + padding < length - 1)
        num_common = int(is_common.long().cumprod(1).sum(1).min())
        is_image = left_aligned == self.image_token_id
        if num_common <= int((column * is_image).max()):  # the image must be inside
            return None

        # Fill the cache with one prefix per image and copy it to the image's rows.
        prefix = left_aligned[first_rows, :num_common]  # [B', P]
        text_inputs = {
            name: generate_kwargs[name].gather(1, (column + padding).clamp(max=length - 1))[first_rows, :num_common]
            for name in set(TEXT_INPUTS) & generate_kwargs.keys()
        }
        cache = self._read_prefix(
            prefix, image_indices[first_rows], num_images, vision_inputs, vision_features, text_inputs
        )
        for layer in cache.layers:  # on several devices, if layers are; some share the keys of others
            if layer.keys is not None:
                layer.batch_select_indices(row_to_prefix.to(layer.keys.device))
        if hasattr(self.vlm.base_model, "rope_deltas"):  # by which M-RoPE continues the positions of each row
            self.vlm.base_model.rope_deltas = self.vlm.base_model.rope_deltas[row_to_prefix]

        # Put the prefix first. The gap between it and the question, as wide as the padding was, is masked.
        is_read = (column < num_common) | (column >= padding + num_common)
        rearranged = torch.cat([prefix[row_to_prefix], input_ids[:, num_common:]], dim=1)
        rearranged = torch.where(is_read, rearranged, input_ids[:, -1:])
        return {"input_ids": rearranged, "attention_mask": is_read.long(), "past_key_values": cache}

    def _can_share_prefix(self, length: int, vision_inputs: dict, generate_kwargs: dict) -> bool:
        """Return whether the VLM can continue from the cache of a prefix, for prompts of `length` tokens."""
        # `generate` must not rearrange the rows of the cache. Where weights are sharded, every process must make as
        # many passes as the others, but not all of them have rows that share.
        options = set(generate_kwargs) - set(TEXT_INPUTS) - set(vision_inputs)
        is_plain = options <= PLAIN_DECODING and (self.vlm.generation_config.num_beams or 1) == 1
        is_sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self.vlm)
        if not is_plain or is_sharded or packing_unsupported_reason(self.config):
            return False
        if self.config.similarity_points is not None:  # states of the prefix are not recorded
            return False
        text_config = self.config.get_text_config()
        if "sliding_attention" not in attention_types(text_config):
            return True
        # A masked gap counts toward the window, so all tokens must be inside it.
        max_new_tokens = generate_kwargs.get("max_new_tokens") or self.vlm.generation_config.max_new_tokens
        return max_new_tokens is not None and length + max_new_tokens <= text_config.sliding_window

    def _read_prefix(self, prefix, image_indices, num_images, vision_inputs, vision_features, text_inputs) -> Cache:
        """Run prefixes `(B', P)`, whose images are `image_indices` `(B',)`, through the VLM and return its cache."""
        _, sizes = split_vision_inputs(self.vlm, vision_inputs, prefix, image_indices, num_images)
        features = encode_vlm_images(self.vlm, prefix, image_indices, num_images, vision_inputs, vision_features)
        inputs = {"input_ids": prefix, "mm_encoder_outputs": features, **text_inputs, **sizes}
        return self.vlm.base_model(**inputs, use_cache=True).past_key_values
