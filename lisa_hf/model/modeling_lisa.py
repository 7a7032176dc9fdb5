"""LISA: a vision-language model that answers with segmentation masks (arXiv 2308.00692, section 3).

The language model emits `[SEG]`; the hidden state that predicts it goes through a small MLP and becomes the prompt of
a SAM-family mask decoder. This file and what it imports travel to the Hub as remote code.
"""

import copy
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMaskGeneration,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import set_zero3_state
from transformers.utils import ModelOutput

from .configuration_lisa import SUPPORTED_MASK_MODELS, LisaConfig, image_mask_config
from .generation_lisa import LisaGenerationMixin, SegTokens
from .losses import IGNORE_INDEX, check_mask_counts, chunked_cross_entropy, mask_losses, sampled_mask_losses
from .mask_backbone import (
    count_images,
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
from .similarity_points import PointOptions, similarity_points
from .upstream_fixes import (
    UpstreamFixesMixin,
    drop_absent_no_split_modules,
    keep_loaded_tying,
    separate_batch_entries,
)
from .vlm_backbone import (
    encode_vlm_images,
    raise_if_not_vlm,
    record_states,
    split_vision_inputs,
    unsupported_reason,
    vision_tower,
    vocabulary_projection,
)


# Maximum number of mask-label pixels for which all masks of an image exist at full size at once: about 100 MB with
# what the losses keep for the backward pass.
MASK_PIXELS = 2**22
# Modules that produce masks, and the vocabulary projection, which selects [SEG].
UNQUANTIZED_MODULES = ["mask_model", "seg_projector", "lm_head"]


def raise_if_weights_differ(model: nn.Module, info: dict, path: str) -> None:
    """Raise a `ValueError` if a checkpoint has other weights than its configuration has.

    transformers draws those that are missing at random and warns.

    Args:
        model: Model that was loaded.
        info: What `from_pretrained` returns with `output_loading_info`.
        path: Directory or Hub id.
    """
    parameters = {name for name, _ in model.named_parameters()}
    missing = sorted(parameters.intersection(info["missing_keys"]))
    for problem, names in (("no", missing), ("also", sorted(info["unexpected_keys"]))):
        if names:
            raise ValueError(
                f"{path}: expected the weights of its config.json, got {problem} {', '.join(names[:3])} "
                f"({len(names)} such). Download it again, or restore the config.json that belongs to the weights."
            )


def _skip_modules(quantization_config):
    if isinstance(quantization_config, BitsAndBytesConfig) and quantization_config.llm_int8_skip_modules is None:
        quantization_config = copy.copy(quantization_config)
        quantization_config.llm_int8_skip_modules = UNQUANTIZED_MODULES
    return quantization_config


def keep_random_state():
    """Leave the generator as it is: a model that is loaded in shards draws numbers, one that is loaded whole does not.

    The projector, new tokens and LoRA thus start the same in both.
    """
    return torch.random.fork_rng(devices=[])


@dataclass
class LisaOutput(ModelOutput):
    """Output of [`LisaForConditionalGeneration`] for B images, N rows, and M_b masks of image b, M in all.

    Args:
        loss: Sum of the three weighted losses, scalar; None without labels.
        ce_loss, mask_bce_loss, mask_dice_loss: Losses, each already multiplied by its weight, as LISA logs them;
            scalars.
        logits: Scores of the next token, `(N, L, V)`; None if labels were given without `output_logits`.
        pred_masks: Mask logits at the original sizes, B tensors `(M_b, H_b, W_b)`; None without `output_masks`.
        low_res_masks: Mask logits of the decoder, image by image, in the order of the `[SEG]` tokens, `(M, h, w)`.
        iou_scores: The decoder's own estimate of each mask's IoU, which LISA does not train, `(M,)`.
        last_hidden_state: States that enter the VLM's vocabulary projection, or the norm before it if `seg_state` in
            the configuration says so, `(N, L, hidden_size)`.
        seg_embeddings: Prompts of the mask decoder, `(M, C)`.
        image_embeddings: Output of [`encode_images`]; None while training.
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
    image_embeddings: torch.Tensor | list | None = None


class LisaSegProjector(nn.Module):
    """The MLP between the language model and the mask decoder (LISA: `text_hidden_fcs`)."""

    def __init__(self, config: LisaConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.hidden_size, config.hidden_size)
        self.linear_2 = nn.Linear(config.hidden_size, prompt_size(config.mask_config))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.relu(self.linear_1(hidden_states)))  # [M, hidden_size] to [M, C]


class LisaForConditionalGeneration(LisaGenerationMixin, UpstreamFixesMixin, PreTrainedModel):
    """A vision-language model whose answers contain masks: any VLM of transformers with any SAM-family mask model.

    [`forward`] trains it and [`generate`] answers questions; both have an example.

    Args:
        config: Configuration of both models and of what connects them.
    """

    config_class = LisaConfig
    base_model_prefix = "lisa"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The loss is divided by the counts that LisaTrainer passes. Without this flag, Trainer would divide it once more.
    accepts_loss_kwargs = True

    def __init__(self, config: LisaConfig):
        super().__init__(config)
        if config.mask_config.model_type not in SUPPORTED_MASK_MODELS:
            raise ValueError(
                f"mask_config.model_type: expected one of {', '.join(SUPPORTED_MASK_MODELS)}, got "
                f"'{config.mask_config.model_type}'. Choose another mask model."
            )
        raise_if_not_vlm(config.vlm_config)
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config)
        if reason := unsupported_reason(self.vlm):
            raise ValueError(
                "expected a VLM that answers token by token about images that are encoded once for all their "
                f"questions, got {type(self.vlm).__name__}: {reason}. Choose another VLM, for example LLaVA, "
                "Gemma 3 or Qwen3-VL."
            )
        separate_batch_entries(self.vlm)
        self.mask_model = AutoModelForMaskGeneration.from_config(config.mask_config)
        use_chunked_attention(self.mask_model)
        self.seg_projector = LisaSegProjector(config)
        # The same objects, so that resizing the VLM's vocabulary also changes this configuration.
        config.vlm_config = self.vlm.config
        config.mask_config = self.mask_model.config
        self.generation_config = self.vlm.generation_config
        self.post_init()
        drop_absent_no_split_modules(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # PyTorch's default initialization, as in LISA: a standard deviation of 0.02 would start with prompts near
        # zero.
        if isinstance(module, LisaSegProjector):
            module.linear_1.reset_parameters()
            module.linear_2.reset_parameters()
        elif not any(module is child for child in (self.seg_projector.linear_1, self.seg_projector.linear_2)):
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args, quantization_config=None, **kwargs):
        """Load a saved model, like transformers' `from_pretrained`.

        Args:
            quantization_config: How to quantize weights. A `BitsAndBytesConfig` without `llm_int8_skip_modules`
                quantizes the VLM alone, see `UNQUANTIZED_MODULES`.

        Raises:
            ValueError: If the checkpoint lacks weights of its configuration or has others. Not with
                `output_loading_info`.
        """
        kwargs["quantization_config"] = _skip_modules(quantization_config)
        with keep_random_state():
            if kwargs.get("output_loading_info"):
                return super().from_pretrained(*args, **kwargs)
            model, info = super().from_pretrained(*args, **kwargs, output_loading_info=True)
        raise_if_weights_differ(model, info, args[0] if args else kwargs.get("pretrained_model_name_or_path"))
        return model

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
        """Connect a pretrained VLM and a pretrained mask model with a new projector.

        Args:
            vlm, mask_model: Hub ids or directories in transformers' format.
            seg_token_id: Id of `[SEG]`. The caller resizes the vocabulary if it is too small.
            dtype: Data type of all weights; by default the VLM's own, for the mask model too.
            attn_implementation, quantization_config, device_map: Options of the VLM, as in `from_pretrained`. The
                mask model and the projector are put on the VLM's device.

        Returns:
            The model in evaluation mode.
        """
        raise_if_not_vlm(AutoConfig.from_pretrained(vlm))
        with keep_random_state():
            vlm_model, vlm_info = AutoModelForImageTextToText.from_pretrained(
                vlm,
                dtype=dtype,
                attn_implementation=attn_implementation,
                quantization_config=_skip_modules(quantization_config),
                device_map=device_map,
                output_loading_info=True,
            )
            keep_loaded_tying(vlm_model, vocabulary_projection(vlm_model))
            sam_model, sam_info = AutoModelForMaskGeneration.from_pretrained(
                mask_model,
                config=image_mask_config(AutoConfig.from_pretrained(mask_model)),
                dtype=vlm_model.dtype,
                output_loading_info=True,
            )
            sam_model = sam_model.to(vlm_model.device)
        # Some checkpoints have weights of a video model or of a head that is not used.
        raise_if_weights_differ(vlm_model, {**vlm_info, "unexpected_keys": ()}, vlm)
        raise_if_weights_differ(sam_model, {**sam_info, "unexpected_keys": ()}, mask_model)
        separate_batch_entries(vlm_model)
        use_chunked_attention(sam_model)
        config = LisaConfig(vlm_config=vlm_model.config, mask_config=sam_model.config, seg_token_id=seg_token_id)
        # Built without memory or random numbers, because both halves are replaced immediately. `set_zero3_state` keeps
        # transformers from sharding these placeholders.
        with set_zero3_state(), torch.device("meta"):
            model = cls(config)
        model.vlm, model.mask_model = vlm_model, sam_model
        model.config.vlm_config, model.config.mask_config = vlm_model.config, sam_model.config
        model.seg_projector = LisaSegProjector(config).to(vlm_model.device, vlm_model.dtype)
        model.generation_config = vlm_model.generation_config
        model.tie_weights()
        if quantization_config is not None:
            # PEFT, Trainer and `dequantize` look for the quantizer on the whole model, not on its VLM.
            quantizer = vlm_model.hf_quantizer
            quantizer.remove_quantization_config(vlm_model)
            model.hf_quantizer, model.is_quantized = quantizer, True
            model.quantization_method = quantizer.quantization_config.quant_method
            quantizer.postprocess_model(model)
        return model.eval()

    def train(self, mode: bool = True):
        """Set training mode, except for frozen encoders, where BatchNorm, as in EdgeTAM or FastVLM, would drift."""
        super().train(mode)
        for encoder in (self.mask_model.vision_encoder, vision_tower(self.vlm)):
            if encoder is not None:
                encoder.train(mode and any(parameter.requires_grad for parameter in encoder.parameters()))
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return vocabulary_projection(self.vlm)

    def set_output_embeddings(self, value: nn.Module):
        self.vlm.set_output_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        return self.vlm.resize_token_embeddings(*args, **kwargs)

    @classmethod
    def can_generate(cls) -> bool:
        # Makes transformers save and load `generation_config`, although only the VLM is a GenerationMixin.
        return True

    def adjust_generation_fn(self, *args, **kwargs):
        """Load `generation_config.json` into the VLM; `from_pretrained` calls this."""
        self.vlm.adjust_generation_fn(*args, **kwargs)
        self.generation_config = self.vlm.generation_config

    # ---- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_indices: torch.Tensor | None = None,
        vision_features: list[torch.Tensor | dict] | None = None,
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
        """Compute states, masks and losses for B images and N sequences of text, each about one image.

        Args:
            input_ids, attention_mask: Token ids with expanded image tokens, and which of them are real, `(N, L)`
                int64.
            pixel_values: The VLM's vision input, one entry per *image*, as its own processor makes it. Its other
                vision inputs (`image_grid_thw`, ...) and its text inputs (`token_type_ids`, ...) go into `kwargs`.
            image_indices: The image of each row, `(N,)` int64; by default row n is about image n.
            vision_features: Outputs of the VLM's `get_image_features` that replace its vision inputs, B in all: dicts
                of fields, see [`encode_images_apart`], or tensors `(tokens_b, hidden_size)`, or
                `(crops_b, tokens, hidden_size)` if it gives all images in one tensor.
            mask_pixel_values: The mask model's input, `(B, 3, S, S)` float.
            image_embeddings: Output of [`encode_images`] that replaces `mask_pixel_values`.
            labels: Token ids in the answers, -100 elsewhere, `(N, L)` int64.
            segment_ids: Segments of packed rows, `(N, L)` int64: 0 is the prefix, 1 to K are the questions that share
                it and do not see each other, see [`pack_rows`]. Attention mask and positions follow from it.
            shift_labels: The label of each position's next token, `(N, L)` int64; by default from `labels`.
            mask_labels: B tensors `(M_b, H_b, W_b)` of 0, 1 and 255 (ignored), in the order of the `[SEG]` tokens in
                the answers about image b.
            original_sizes, reshaped_input_sizes: (H, W) before and after the mask model's resize, `(B, 2)` int64.
            num_items_in_batch, num_masks_in_batch: Global counts of labels and of masks that the losses are divided
                by; by default this batch's own, as in LISA.
            output_logits: Whether to return all logits although labels are given.
            output_masks: Whether to return masks at the original sizes; by default outside training.
            kwargs: Further inputs of the VLM.

        Returns:
            [`LisaOutput`].

        Raises:
            ValueError: The number of `[SEG]` tokens of an image is not the number of its masks, or rows are packed
                for a VLM or an attention implementation that would mix their questions.

        Example:

        ```python
        >>> import torch
        >>> from PIL import Image
        >>> from lisa_hf import LisaForConditionalGeneration, LisaProcessor

        >>> model = LisaForConditionalGeneration.from_pretrained("my-lisa")
        >>> processor = LisaProcessor.from_pretrained("my-lisa")

        >>> image = Image.open("photo.jpg")
        >>> conversation = [
        ...     {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the red circle?"}]},
        ...     {"role": "assistant", "content": [{"type": "text", "text": "It is [SEG]."}]},
        ... ]
        >>> batch = processor.encode_conversations([image], [conversation])
        >>> mask = torch.zeros(1, image.height, image.width)  # one [SEG], one mask
        >>> output = model(**batch, mask_labels=[mask])
        >>> output.loss.backward()
        >>> (output.pred_masks[0] > 0).shape == mask.shape
        True
        ```
        """
        num_images = count_images(mask_pixel_values, image_embeddings)
        image_indices = self._image_indices(image_indices, input_ids, num_images)

        # What each position predicts. With labels, only [SEG] in answers count; without, all in the text.
        has_labels = labels is not None or shift_labels is not None
        targets = shift_labels
        if targets is None:
            targets = F.pad((labels if has_labels else input_ids)[:, 1:], (0, 1), value=IGNORE_INDEX)  # [N, L]
        # Rows and positions, [T] each: indexing with a mask would synchronize with the GPU each time
        supervised = (targets != IGNORE_INDEX).nonzero(as_tuple=True) if has_labels else None

        # 1. Language model. Each image is encoded once, however many rows are about it. Unless all logits are
        #    requested, only supervised positions go through the vocabulary projection.
        needs_all_logits = not has_labels or output_logits
        hidden_states, logits = self._run_vlm(
            *(input_ids, attention_mask, segment_ids, image_indices, num_images, vision_features),
            vlm_inputs={"pixel_values": pixel_values, **kwargs},
            kept=None if needs_all_logits else supervised,
        )  # [N, L, hidden_size], [N, L, V] or [T, V]

        # 2. [SEG] positions and prompts.
        seg_tokens = self._find_seg_tokens(targets, image_indices)
        num_masks = Counter(seg_tokens.images.tolist())
        masks_per_image = [num_masks[image] for image in range(num_images)]  # M_1..M_B, M in all
        if mask_labels is not None:
            check_mask_counts(mask_labels, masks_per_image, image_indices)
        seg_embeddings = self._seg_embeddings(hidden_states, seg_tokens)  # [max(M, 1), C]

        # 3. Mask decoder. Each image is encoded once, and all masks are decoded in one call.
        if image_embeddings is None:
            image_embeddings = encode_images(self.mask_model, mask_pixel_values.to(self.mask_model.dtype))
        points = self._similarity_points(
            hidden_states, seg_tokens, hidden_states, input_ids, original_sizes, reshaped_input_sizes
        )
        low_res_masks, iou_scores, zero_loss = self._decode(seg_embeddings, seg_tokens, image_embeddings, points)
        image_masks = low_res_masks.split(masks_per_image)  # B tensors [M_b, h, w]

        # 4. Losses.
        losses = {}
        output_masks = not self.training if output_masks is None else output_masks
        if mask_labels is not None or output_masks:
            # (H, W) before the padding and of the image, B x 2 pairs
            sizes = torch.stack([reshaped_input_sizes, original_sizes], dim=1).tolist()
        if has_labels:
            answers = logits[supervised] if needs_all_logits else logits  # [T, V]
            losses["ce_loss"] = self._ce_loss(answers, targets[supervised], num_items_in_batch)
        if mask_labels is not None:
            losses["mask_bce_loss"], losses["mask_dice_loss"] = self._mask_losses(
                image_masks, mask_labels, sizes, num_masks_in_batch, zero_loss
            )

        # 5. Masks at full size. Training has no use for them.
        pred_masks = None
        if output_masks:
            pred_masks = self._full_size_masks(image_masks, sizes)

        return LisaOutput(
            loss=sum(losses.values()) if losses else None,
            **losses,
            logits=logits if needs_all_logits else None,
            pred_masks=pred_masks,
            low_res_masks=low_res_masks,
            iou_scores=iou_scores,
            last_hidden_state=hidden_states,
            seg_embeddings=seg_embeddings[: len(low_res_masks)],
            image_embeddings=None if self.training else image_embeddings,
        )

    def _image_indices(self, image_indices, input_ids: torch.Tensor, num_images: int) -> torch.Tensor:
        if image_indices is not None:
            return image_indices
        if num_images != len(input_ids):
            raise ValueError(
                f"expected as many rows as images without `image_indices`, got {len(input_ids)} rows and {num_images} "
                "images. Pass `image_indices` (N,), the image of each row."
            )
        return torch.arange(num_images, device=input_ids.device)

    def _run_vlm(
        self, input_ids, attention_mask, segment_ids, image_indices, num_images, vision_features, vlm_inputs, kept
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the VLM, with its own logits.

        Args:
            vlm_inputs: Vision and text inputs of the VLM that are not named in [`forward`].
            kept: Rows and positions whose logits are computed, `(T,)` each; None means all.

        Returns:
            The last states, see [`record_states`], `(N, L, hidden_size)`, and their logits, `(T, V)` of the kept
            positions or `(N, L, V)`; both on the device of `input_ids`, wherever layers are.
        """
        vision_inputs, text_inputs = split_vision_inputs(self.vlm, vlm_inputs, input_ids, image_indices, num_images)
        if segment_ids is None:
            text_inputs["attention_mask"] = attention_mask
        elif reason := packing_unsupported_reason(self.config):
            raise ValueError(f"expected separate rows, got packed ones: {reason}. Collate them with `packing=False`.")
        else:
            packed = packed_inputs(self.vlm, input_ids, attention_mask, segment_ids, text_inputs)
            text_inputs = {**packed, **text_inputs}
        features = encode_vlm_images(self.vlm, input_ids, image_indices, num_images, vision_inputs, vision_features)
        with record_states(self.vlm, kept, self.config.states_at) as states:
            logits = self.vlm(input_ids=input_ids, mm_encoder_outputs=features, use_cache=False, **text_inputs).logits
        states, logits = states[-1].to(input_ids.device), logits.to(input_ids.device)
        if self.config.suppress_tokens:
            logits[..., self.config.suppress_tokens] = torch.finfo(logits.dtype).min
        return states, logits if kept is None else logits[0]

    def _find_seg_tokens(self, targets: torch.Tensor, image_indices: torch.Tensor) -> SegTokens:
        """Find the M positions whose states become prompts: image by image, row by row.

        Args:
            targets: The next token of each position, `(N, L)`.
        """
        rows, positions = (targets == self.config.seg_token_id).nonzero(as_tuple=True)  # [M] each, row by row
        positions = positions + (self.config.seg_state != "predicting")
        images = image_indices[rows]
        by_image = torch.argsort(images, stable=True)
        return SegTokens(rows[by_image], positions[by_image], images[by_image], rows[by_image])

    def _seg_embeddings(self, hidden_states: torch.Tensor, seg_tokens: SegTokens) -> torch.Tensor:
        """Project the states of `[SEG]` to prompts for the mask decoder.

        LISA prompts the decoder with the state that predicts `[SEG]`, Sa2VA with that of `[SEG]` itself. Without any
        `[SEG]`, a dummy is projected and decoded: a process that skips these modules is an error under DDP and a hang
        under ZeRO-3.

        Args:
            hidden_states: States of N rows, `(N, L, hidden_size)`.

        Returns:
            `(max(M, 1), C)`.
        """
        rows, positions, *_ = seg_tokens.or_dummy()
        return self.seg_projector(hidden_states[rows, positions]).to(hidden_states.device)

    @property
    def image_token_id(self) -> int:
        """Id of the token that represents each image feature in a row."""
        return self.config.vlm_config.image_token_id

    def _similarity_points(
        self, states, seg_tokens: SegTokens, prompt_states, input_ids, original_sizes, reshaped_input_sizes
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Choose the points that prompt M masks in addition to their `[SEG]`; None if the configuration has none.

        Args:
            states: States that the places of `seg_tokens` are in, `(rows, L, hidden_size)`.
            prompt_states: States of the rows of `input_ids`, with their images, `(N, L, hidden_size)`.
            original_sizes, reshaped_input_sizes: Sizes of the images, `(B, 2)`.

        Returns:
            x and y in pixels of the mask model's input, `(max(M, 1), P, 2)`, and labels `(max(M, 1), P)`.
        """
        if self.config.similarity_points is None:
            return None
        rows, positions, images, prompts = seg_tokens.or_dummy()
        original_sizes = original_sizes.to(images.device)[images]  # [M, 2]
        reshaped_input_sizes = reshaped_input_sizes.to(images.device)[images]  # [M, 2]

        options = PointOptions(**self.config.similarity_points)
        is_image = input_ids == self.image_token_id  # [N, L]
        image_states = [prompt_states[row][is_image[row]] for row in prompts.tolist()]  # of M images
        chosen = [
            similarity_points(*of_mask, options)
            for of_mask in zip(image_states, states[rows, positions], original_sizes.tolist())
        ]
        # From pixels of the image to those of the mask model's input
        scale = (reshaped_input_sizes / original_sizes).flip(1).to(states.device)  # [M, 2], x and y
        points = torch.stack([points for points, _ in chosen]) * scale[:, None]
        return points, torch.stack([labels for _, labels in chosen])

    def _decode(
        self, seg_embeddings: torch.Tensor, seg_tokens: SegTokens, image_embeddings, points=None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decode one mask per prompt, on the embeddings of the prompt's image.

        Args:
            seg_embeddings: Prompts, `(max(M, 1), C)`, see [`_seg_embeddings`].
            image_embeddings: Output of [`encode_images`] for B images.
            points: Points that prompt each mask first, see [`_similarity_points`].

        Returns:
            Masks `(M, h, w)` and their estimated IoU `(M,)`, both without the dummy's, and a scalar 0 whose graph
            reaches the dummy, so that adding it to a loss gives every weight a gradient of 0.
        """
        image_embeddings = select_images(image_embeddings, seg_tokens.or_dummy().images, self.mask_model.dtype)
        low_res_masks, iou_scores = decode_prompts(
            self.mask_model, image_embeddings, seg_embeddings, self.config.video_mask_decoding, points
        )
        num_masks = len(seg_tokens.rows)
        zero_loss = 0.0 * low_res_masks[num_masks:].float().sum()
        return low_res_masks[:num_masks], iou_scores[:num_masks], zero_loss

    def _ce_loss(self, logits, targets, num_items_in_batch) -> torch.Tensor:
        """Compute the weighted cross-entropy of T supervised positions from logits `(T, V)` and targets `(T,)`."""
        total = chunked_cross_entropy(logits, targets)
        num_items = len(targets) if num_items_in_batch is None else num_items_in_batch
        return self.config.ce_loss_weight * total / torch.as_tensor(num_items, device=total.device).clamp(min=1)

    def _mask_losses(
        self, image_masks, mask_labels, sizes, num_masks_in_batch, zero_loss
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the weighted binary cross-entropy and dice loss of all masks.

        Args:
            image_masks: B tensors `(M_b, h, w)`.
            mask_labels: B tensors `(M_b, H_b, W_b)`.
            sizes: B pairs of (H, W), before the padding and of the image.
            zero_loss: A scalar 0 that keeps projector and decoder in the graph, see [`_decode`].
        """
        bce, dice = zero_loss, zero_loss
        for masks, labels, (reshaped_size, original_size) in zip(image_masks, mask_labels, sizes):
            if len(masks):
                image_bce, image_dice = self._image_mask_losses(
                    masks, labels.to(masks.device), reshaped_size, original_size
                )
                bce, dice = bce + image_bce, dice + image_dice
        num_masks = sum(map(len, image_masks)) if num_masks_in_batch is None else num_masks_in_batch
        num_masks = torch.as_tensor(num_masks, device=bce.device).clamp(min=1)
        return (
            self.config.mask_bce_loss_weight * bce / num_masks,
            self.config.mask_dice_loss_weight * dice / num_masks,
        )

    def _image_mask_losses(
        self, masks: torch.Tensor, labels: torch.Tensor, reshaped_size, original_size
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute both losses of one image's masks, at its original size or at sampled points of it.

        Args:
            masks: Logits of the decoder, `(M, h, w)`.
            labels: `(M, H, W)`.

        Returns:
            Two scalars, each summed over the masks.
        """
        side = padded_side(self.config.mask_config, self.config.video_mask_decoding)
        if self.training and self.config.mask_loss_points:
            return sampled_mask_losses(unpad_masks(masks, reshaped_size, side), labels, self.config.mask_loss_points)

        def full_size_losses(masks, labels):
            return mask_losses(upscale_masks(masks, reshaped_size, original_size, side), labels)

        if labels.numel() <= MASK_PIXELS:
            return full_size_losses(masks, labels)
        # Masks of a large photo exist at full size only a few at a time, even in the backward pass, which recomputes
        # them.
        masks_at_once = max(1, MASK_PIXELS // labels[0].numel())
        chunks = zip(masks.split(masks_at_once), labels.split(masks_at_once))
        parts = [
            checkpoint(full_size_losses, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks
        ]
        return tuple(map(sum, zip(*parts)))

    def _full_size_masks(self, image_masks, sizes) -> list[torch.Tensor]:
        """Resize the decoder's masks, B tensors `(M_b, h, w)`, to their images: B tensors `(M_b, H_b, W_b)`."""
        side = padded_side(self.config.mask_config, self.config.video_mask_decoding)
        return [upscale_masks(masks, *size, side) for masks, size in zip(image_masks, sizes)]
