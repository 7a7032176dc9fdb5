"""LISA: a vision-language model that answers with segmentation masks (arXiv 2308.00692, section 3).

The language model emits `[SEG]`; the hidden state that predicts it goes through a small MLP and becomes the prompt of
a SAM-family mask decoder. This file and what it imports travel to the Hub as remote code.
"""

import copy
import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMaskGeneration,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from .configuration_lisa import LisaConfig
from .generation_lisa import LisaGenerationMixin, SegTokens
from .losses import IGNORE_INDEX, check_mask_counts, chunked_cross_entropy, full_size_mask_losses, sampled_mask_losses
from .mask_backbone import (
    SUPPORTED_MASK_MODELS,
    decode_prompts,
    encode_images,
    padded_side,
    prompt_size,
    select_images,
    unpad_masks,
    upscale_masks,
    use_chunked_attention,
)
from .packing import packed_inputs, packing_unsupported_reason
from .pipeline_lisa import ReasoningSegmentationPipeline  # noqa: F401  so that it is saved with this file
from .upstream_fixes import UpstreamFixesMixin, drop_absent_no_split_modules
from .vlm_backbone import encode_vlm_images, split_vision_inputs


# Not quantised: what makes the masks, and the vocabulary projection, through which [SEG] is chosen.
UNQUANTIZED_MODULES = ["mask_model", "seg_projector", "lm_head"]


def _skip_modules(quantization_config):
    if isinstance(quantization_config, BitsAndBytesConfig) and quantization_config.llm_int8_skip_modules is None:
        quantization_config = copy.copy(quantization_config)
        quantization_config.llm_int8_skip_modules = UNQUANTIZED_MODULES
    return quantization_config


@dataclass
class LisaOutput(ModelOutput):
    """Output of [`LisaForConditionalGeneration`] for B images, N rows and M_b masks of image b.

    Args:
        loss: scalar, the sum of the three weighted parts that follow.
        ce_loss, mask_bce_loss, mask_dice_loss: scalars, each already multiplied by its weight, as LISA logs them.
        logits: `(N, L, V)`; None if labels were given and `output_logits` was not.
        pred_masks: list of B tensors `(M_b, H_b, W_b)`, logits at the original sizes; None without `output_masks`.
        low_res_masks: `(M, h, w)` logits of all masks, image by image, in the order of the `[SEG]` tokens.
        iou_scores: `(M,)`, the mask decoder's own estimate of each mask's IoU (LISA does not train it).
        last_hidden_state: `(N, L, hidden_size)` of the language model, after its final norm.
        seg_embeddings: `(M, C)`, the prompts of the mask decoder.
    """

    loss: torch.Tensor | None = None
    ce_loss: torch.Tensor | None = None
    mask_bce_loss: torch.Tensor | None = None
    mask_dice_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    pred_masks: list[torch.Tensor] | None = None
    low_res_masks: torch.Tensor | None = None
    iou_scores: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    seg_embeddings: torch.Tensor | None = None


class LisaSegProjector(nn.Module):
    """The MLP between the language model and the mask decoder (LISA: `text_hidden_fcs`)."""

    def __init__(self, config: LisaConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.hidden_size, config.hidden_size)
        self.linear_2 = nn.Linear(config.hidden_size, prompt_size(config.mask_config))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(M, hidden_size)` to `(M, C)`."""
        return self.linear_2(F.relu(self.linear_1(hidden_states)))


class LisaForConditionalGeneration(LisaGenerationMixin, UpstreamFixesMixin, PreTrainedModel):
    """Any transformers VLM joined to any SAM-family mask model. See [`forward`] and [`generate`]."""

    config_class = LisaConfig
    base_model_prefix = "lisa"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The loss is normalised by the counts that LisaTrainer passes. Trainer must be told so, or it divides once more.
    accepts_loss_kwargs = True

    def __init__(self, config: LisaConfig):
        super().__init__(config)
        if config.mask_config.model_type not in SUPPORTED_MASK_MODELS:
            raise ValueError(
                f"mask_config.model_type must be one of {', '.join(SUPPORTED_MASK_MODELS)}; got "
                f"'{config.mask_config.model_type}'."
            )
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config)
        self.mask_model = AutoModelForMaskGeneration.from_config(config.mask_config)
        use_chunked_attention(self.mask_model)
        self.seg_projector = LisaSegProjector(config)
        if "mm_encoder_outputs" not in inspect.signature(self.vlm.forward).parameters:
            raise ValueError(
                f"{type(self.vlm).__name__} does not take precomputed vision features (`mm_encoder_outputs`), which "
                "LISA needs to encode an image once for all its questions. Choose a VLM that does, for example LLaVA, "
                "Idefics3, Gemma 3 or Qwen2.5-VL."
            )
        # One object each, so that resizing the vocabulary of the VLM is written into this configuration.
        config.vlm_config = self.vlm.config
        config.mask_config = self.mask_model.config
        self.generation_config = self.vlm.generation_config
        self.post_init()
        drop_absent_no_split_modules(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # PyTorch's own initialisation, as LISA: a projector of standard deviation 0.02 starts with prompts near zero.
        if isinstance(module, LisaSegProjector):
            module.linear_1.reset_parameters()
            module.linear_2.reset_parameters()
        elif not any(module is child for child in (self.seg_projector.linear_1, self.seg_projector.linear_2)):
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args, quantization_config=None, **kwargs):
        """As in transformers; a `BitsAndBytesConfig` quantises the VLM alone unless it names its own
        `llm_int8_skip_modules`, see `UNQUANTIZED_MODULES`."""
        return super().from_pretrained(*args, quantization_config=_skip_modules(quantization_config), **kwargs)

    @classmethod
    def from_vlm_mask_model_pretrained(
        cls,
        vlm: str,
        mask_model: str,
        *,
        seg_token_id: int,
        dtype="auto",
        attn_implementation: str | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        device_map: str | None = None,
    ):
        """Joins a pretrained VLM and a pretrained mask model, in evaluation mode; the projector between them is new.

        Args:
            vlm, mask_model: Hub ids or directories in transformers' format.
            seg_token_id: id of `[SEG]`; the vocabulary is the caller's to resize.
            dtype: of all weights; by default the VLM's own, which the mask model then takes too.
            attn_implementation, quantization_config, device_map: of the VLM, as in `from_pretrained`; the rest then
                comes to the VLM's device.
        """
        vlm_model = AutoModelForImageTextToText.from_pretrained(
            vlm,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization_config=_skip_modules(quantization_config),
            device_map=device_map,
        )
        sam_model = AutoModelForMaskGeneration.from_pretrained(mask_model, dtype=vlm_model.dtype).to(vlm_model.device)
        use_chunked_attention(sam_model)
        config = LisaConfig(vlm_config=vlm_model.config, mask_config=sam_model.config, seg_token_id=seg_token_id)
        # Only the projector needs memory and random numbers: the two halves are replaced at once.
        with torch.device("meta"):
            model = cls(config)
        model.vlm, model.mask_model = vlm_model, sam_model
        model.config.vlm_config, model.config.mask_config = vlm_model.config, sam_model.config
        model.seg_projector = LisaSegProjector(config).to(vlm_model.device, vlm_model.dtype)
        model.generation_config = vlm_model.generation_config
        model.tie_weights()
        if quantization_config is not None:
            # PEFT, Trainer, `dequantize` and whoever reads the configuration ask the whole model, not its half.
            quantizer = vlm_model.hf_quantizer
            quantizer.remove_quantization_config(vlm_model)
            model.hf_quantizer, model.is_quantized = quantizer, True
            model.quantization_method = quantizer.quantization_config.quant_method
            quantizer.postprocess_model(model)
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.vlm.set_output_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        return self.vlm.resize_token_embeddings(*args, **kwargs)

    @classmethod
    def can_generate(cls) -> bool:
        # This class is no GenerationMixin, its VLM is; so transformers saves and loads the generation_config.
        return True

    def adjust_generation_fn(self, *args, **kwargs):
        """Loads `generation_config.json`, the VLM's; `from_pretrained` calls this."""
        self.vlm.adjust_generation_fn(*args, **kwargs)
        self.generation_config = self.vlm.generation_config

    # ---- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_indices: torch.Tensor | None = None,
        vision_features: list[torch.Tensor] | None = None,
        mask_pixel_values: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | list | None = None,
        labels: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        mask_labels: list[torch.Tensor] | None = None,
        original_sizes: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_masks_in_batch: torch.Tensor | int | None = None,
        output_logits: bool = False,
        output_masks: bool | None = None,
        **kwargs,
    ) -> LisaOutput:
        """One pass over B images and N rows of text, each row about one image.

        Args:
            input_ids, attention_mask, labels: `(N, L)` int64; image tokens are expanded in `input_ids`; labels are
                -100 outside of the answers.
            pixel_values: the VLM's vision input, one entry per *image*, as its own processor makes it; its other
                vision inputs (`image_grid_thw`, ...) and its per-row text inputs (`token_type_ids`, ...) pass through.
            image_indices: `(N,)` int64, row to image; by default row n is about image n.
            vision_features: instead of the vision inputs, what the VLM's `get_image_features` made of them: B tensors
                `(tokens_b, hidden_size)`, or `(crops_b, tokens, hidden_size)` if it gives all images in one.
            mask_pixel_values: `(B, 3, S, S)` float, the mask model's input.
            image_embeddings: instead of `mask_pixel_values`, what the mask model's encoder made of them.
            segment_ids: `(N, L)` int64, of packed rows: 0 is the prefix, 1 to K are the questions that share it and do
                not see each other, see [`pack_rows`]. Attention mask and positions follow from it.
            shift_labels: `(N, L)` int64, the label of each position's next token; by default from `labels`.
            mask_labels: list of B tensors `(M_b, H_b, W_b)`, 0, 1 or 255 (ignore), in the order of the `[SEG]` tokens
                in the answers of image b's rows.
            original_sizes, reshaped_input_sizes: `(B, 2)` int64, (H, W) before and after the mask model's resize.
            num_items_in_batch, num_masks_in_batch: global counts of labels and masks to divide the loss parts by; by
                default this batch's own, as in LISA.
            output_logits: also return all logits when labels are given.
            output_masks: return masks at the original sizes; by default outside of training.

        Raises:
            ValueError: the number of `[SEG]` tokens of an image is not the number of its masks; or rows are packed
                for a VLM or an attention that would mix them up.
        """
        num_images = len(original_sizes) if original_sizes is not None else len(pixel_values)
        image_indices = self._image_indices(image_indices, input_ids, num_images)
        hidden_states = self._hidden_states(
            input_ids,
            attention_mask,
            segment_ids,
            image_indices,
            vision_features,
            {"pixel_values": pixel_values, **kwargs},
        )
        has_labels = labels is not None or shift_labels is not None
        targets = shift_labels
        if targets is None:
            targets = F.pad((labels if has_labels else input_ids)[:, 1:], (0, 1), value=IGNORE_INDEX)
        seg_tokens = self._find_seg_tokens(targets, image_indices)
        masks_per_image = torch.bincount(seg_tokens.images, minlength=num_images).tolist()
        if mask_labels is not None:
            check_mask_counts(mask_labels, masks_per_image, image_indices)

        if image_embeddings is None:
            image_embeddings = encode_images(self.mask_model, mask_pixel_values.to(self.mask_model.dtype))
        low_res_masks, iou_scores, seg_embeddings, zero_loss = self._decode(
            hidden_states, seg_tokens, image_embeddings
        )

        loss_parts = {}
        if has_labels:
            loss_parts["ce_loss"] = self._ce_loss(hidden_states, targets, num_items_in_batch)
        if output_masks is None:
            output_masks = not self.training
        pred_masks = None
        if mask_labels is not None or output_masks:
            sizes = list(zip(reshaped_input_sizes.tolist(), original_sizes.tolist()))
            image_masks = low_res_masks.split(masks_per_image)
            if output_masks:
                pred_masks = [self._upscale(masks, *size) for masks, size in zip(image_masks, sizes)]
            if mask_labels is not None:
                loss_parts |= self._mask_losses(image_masks, sizes, mask_labels, num_masks_in_batch, zero_loss)

        return LisaOutput(
            loss=sum(loss_parts.values()) if loss_parts else None,
            **loss_parts,
            logits=self._logits(hidden_states) if not has_labels or output_logits else None,
            pred_masks=pred_masks,
            low_res_masks=low_res_masks,
            iou_scores=iou_scores,
            last_hidden_state=hidden_states,
            seg_embeddings=seg_embeddings,
        )

    def _image_indices(self, image_indices, input_ids: torch.Tensor, num_images: int) -> torch.Tensor:
        if image_indices is None and num_images != len(input_ids):
            raise ValueError(
                f"{len(input_ids)} rows and {num_images} images: pass `image_indices` (N,), row to image."
            )
        return torch.arange(num_images, device=input_ids.device) if image_indices is None else image_indices

    def _hidden_states(
        self, input_ids, attention_mask, segment_ids, image_indices, vision_features, vlm_inputs: dict
    ) -> torch.Tensor:
        """The language model's last hidden states, `(N, L, hidden_size)`."""
        vision_inputs, text_inputs = split_vision_inputs(self.vlm, vlm_inputs, image_indices)
        if segment_ids is None:
            text_inputs["attention_mask"] = attention_mask
        elif obstacle := packing_unsupported_reason(self.config):
            raise ValueError(f"These rows are packed, but {obstacle}. Collate them with `packing=False`.")
        else:
            text_inputs = {
                **packed_inputs(self.vlm, input_ids, attention_mask, segment_ids, text_inputs),
                **text_inputs,
            }
        return self.vlm.base_model(
            input_ids=input_ids,
            mm_encoder_outputs=encode_vlm_images(self.vlm, input_ids, image_indices, vision_inputs, vision_features),
            use_cache=False,
            **text_inputs,
        ).last_hidden_state

    def _find_seg_tokens(self, targets: torch.Tensor, image_indices: torch.Tensor) -> SegTokens:
        """The positions whose next token, `targets` `(N, L)`, is `[SEG]`: image by image, row by row.

        LISA prompts the decoder with the state that predicts `[SEG]`, not with that of `[SEG]` itself.
        """
        rows, positions = (targets == self.config.seg_token_id).nonzero(as_tuple=True)
        images = image_indices[rows]
        by_image = torch.argsort(images, stable=True)
        return SegTokens(rows[by_image], positions[by_image], images[by_image])

    def _decode(self, hidden_states: torch.Tensor, seg_tokens: SegTokens, image_embeddings):
        """Projects the states that predict `[SEG]` to prompts and decodes them on their images' embeddings.

        Without a single prompt, projector and decoder still run once, on a dummy: a rank that skips them is an error
        under DDP and a hang under ZeRO-3. The dummy's masks are dropped; the last value returned is 0 and keeps its
        graph.
        """
        num_masks = len(seg_tokens.rows)
        rows, positions, images = seg_tokens
        if num_masks == 0:
            rows = positions = images = rows.new_zeros(1)
        seg_embeddings = self.seg_projector(hidden_states[rows, positions])
        low_res_masks, iou_scores = decode_prompts(
            self.mask_model, select_images(image_embeddings, images, self.mask_model.dtype), seg_embeddings
        )
        no_loss = low_res_masks.new_zeros((), dtype=torch.float32)
        zero_loss = no_loss if num_masks else 0.0 * low_res_masks.float().sum()
        return low_res_masks[:num_masks], iou_scores[:num_masks], seg_embeddings[:num_masks], zero_loss

    def _upscale(self, low_res_masks: torch.Tensor, reshaped_size, original_size) -> torch.Tensor:
        """Logits of one image's masks at its original size, `(M_b, H_b, W_b)` float32."""
        return upscale_masks(low_res_masks, reshaped_size, original_size, padded_side(self.config.mask_config))

    def _mask_losses(self, image_masks, sizes, mask_labels, num_masks_in_batch, zero_loss) -> dict[str, torch.Tensor]:
        """Both mask losses at the original sizes, on all pixels or on a sample of them.

        Args:
            image_masks: B tensors `(M_b, h, w)`.
            sizes: B pairs of sizes, resized and original.
            zero_loss: 0 that keeps the decoder in the graph, see [`_decode`].
        """
        bce, dice = zero_loss, zero_loss
        for masks, size, labels in zip(image_masks, sizes, mask_labels):
            if len(masks):
                image_bce, image_dice = self._image_mask_losses(masks, size, labels.to(masks.device))
                bce, dice = bce + image_bce, dice + image_dice
        num_masks = sum(map(len, image_masks)) if num_masks_in_batch is None else num_masks_in_batch
        num_masks = torch.as_tensor(num_masks, device=bce.device).clamp(min=1)
        return {
            "mask_bce_loss": self.config.mask_bce_loss_weight * bce / num_masks,
            "mask_dice_loss": self.config.mask_dice_loss_weight * dice / num_masks,
        }

    def _image_mask_losses(self, masks, size, labels) -> tuple[torch.Tensor, torch.Tensor]:
        """Both losses of one image's masks `(M, h, w)`, each summed over the masks."""
        if self.training and self.config.mask_loss_points:
            masks = unpad_masks(masks, size[0], padded_side(self.config.mask_config))
            return sampled_mask_losses(masks, labels, self.config.mask_loss_points)
        return full_size_mask_losses(masks, labels, lambda masks: self._upscale(masks, *size))

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = self.vlm.get_output_embeddings()(hidden_states)
        if self.config.suppress_tokens:
            logits[..., self.config.suppress_tokens] = torch.finfo(logits.dtype).min
        return logits

    def _ce_loss(self, hidden_states, targets, num_items_in_batch) -> torch.Tensor:
        """Cross-entropy of the next token; only the supervised positions go through the vocabulary projection."""
        supervised = targets != IGNORE_INDEX
        logits = self._logits(hidden_states[supervised])
        total = chunked_cross_entropy(logits, targets[supervised])
        num_items = supervised.sum() if num_items_in_batch is None else num_items_in_batch
        return self.config.ce_loss_weight * total / torch.as_tensor(num_items, device=total.device).clamp(min=1)
