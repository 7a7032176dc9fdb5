"""LisaGenerationMixin: answers in words and masks. Its VLM writes, [`LisaForConditionalGeneration`] draws."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput

from .mask_backbone import encode_images
from .vlm_backbone import encode_vlm_images, split_vision_inputs


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

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_indices: torch.Tensor | None = None,
        mask_pixel_values: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | list | None = None,
        original_sizes: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        **kwargs,
    ) -> LisaGenerateOutput:
        """Answers N prompts about B images and decodes a mask for every `[SEG]` in the answers.

        The arguments are those of [`forward`], with prompts padded on the left; all further ones go to the VLM's own
        `generate` (`max_new_tokens`, `do_sample`, `num_beams`, ...). The sizes are accepted, so that a processor's
        output can be passed whole; [`LisaProcessor.post_process_masks`] needs them.
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
        with self._record_predicting_states() as states:
            output = self.vlm.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                mm_encoder_outputs=encode_vlm_images(self.vlm, input_ids, image_indices, vision_inputs),
                return_dict_in_generate=True,
                **generate_kwargs,
            )
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
            sequences=output.sequences,
            low_res_masks=low_res_masks,
            seg_row_indices=seg_rows,
            iou_scores=iou_scores,
            seg_embeddings=seg_embeddings,
        )
