"""One way to call any of transformers' SAM-family models: encode images, decode prompts, bring masks back to size.

Sam, SamHQ and Sam2 differ in what their image encoder returns (a tensor; a tensor and the encoder's intermediate
states; a pyramid of tensors), in what their decoder wants of it and in how their processor resizes images. Everything
that knows these differences is here.
"""

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .upstream_fixes import patched_sam_hq_decoder


# Sub-modules of the decoder that a single-mask, text-prompted LISA never takes a gradient through: the IoU head, the
# hypernetworks of the three unused masks and, in SAM 2, the object score and the two convolutions that belong to image
# encoding. They stay frozen, otherwise DDP waits for their gradients.
UNTRAINED_DECODER_MODULES = (
    "iou_prediction_head",
    "output_hypernetworks_mlps.1",
    "output_hypernetworks_mlps.2",
    "output_hypernetworks_mlps.3",
    "pred_obj_score_head",
    "conv_s0",
    "conv_s1",
)
SUPPORTED_MASK_MODELS = ("sam", "sam_hq", "sam2")
# Numbers of an attention bias that exist at a time. On CPUs 16 MB, which are used again for the next piece; more than
# 32 MB come from the system each time, page by page. On GPUs what keeps all of their cores at work.
BIAS_SIZE = {"cpu": 2**22, "cuda": 2**27}


def prompt_size(mask_config) -> int:
    """Width of one prompt embedding of the mask decoder."""
    return mask_config.prompt_encoder_config.hidden_size


def padded_side(mask_config) -> int | None:
    """Side, in pixels, of the square that Sam and SamHQ pad images to; None for SAM 2, which stretches them."""
    return None if mask_config.model_type == "sam2" else mask_config.prompt_encoder_config.image_size


def use_chunked_attention(mask_model: nn.Module) -> None:
    """Makes the global attention of Sam's and SamHQ's encoder compute its relative positions piece by piece.

    transformers makes a bias `(B, heads, H * W, H * W)` of them and a copy in another order: 2 x 1.1 GB per image
    in float32 with ViT-H at 1024 pixels, in each of four layers. The results are the same.
    """
    if mask_model.config.model_type == "sam2" or mask_model.config.vision_config._attn_implementation != "sdpa":
        return
    for layer in mask_model.vision_encoder.layers:
        if layer.window_size == 0 and layer.attn.use_rel_pos:
            layer.attn.forward = partial(_global_attention, layer.attn)


def _global_attention(attention: nn.Module, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, None]:
    """`SamVisionSdpaAttention.forward` for `(B, H, W, C)`: some heads, and some rows of the image, at a time."""
    batch_size, height, width, _ = hidden_states.shape
    num_positions, num_heads = height * width, attention.num_attention_heads
    qkv = attention.qkv(hidden_states).reshape(batch_size, num_positions, 3, num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2)  # (B * heads, H * W, C / heads) each
    query = query.unflatten(1, (height, width))
    relative_height = attention.get_rel_pos(height, height, attention.rel_pos_h)
    relative_width = attention.get_rel_pos(width, width, attention.rel_pos_w)
    bias_height = torch.einsum("bhwc,hkc->bhwk", query, relative_height)
    bias_width = torch.einsum("bhwc,wkc->bhwk", query, relative_width)

    size = BIAS_SIZE.get(hidden_states.device.type, BIAS_SIZE["cuda"])
    heads_at_once = max(1, size // num_positions**2)
    rows_at_once = max(1, size // (heads_at_once * width * num_positions))
    heads = []
    for q, k, v, h, w in zip(*(x.split(heads_at_once) for x in (query, key, value, bias_height, bias_width))):
        pieces = []
        for rows, by_height, by_width in zip(*(x.split(rows_at_once, dim=1) for x in (q, h, w))):
            bias = by_height.contiguous()[..., None] + by_width.contiguous()[..., None, :]
            bias = bias.view(len(k), 1, -1, num_positions)
            pieces.append(F.scaled_dot_product_attention(rows.flatten(1, 2)[:, None], k[:, None], v[:, None], bias))
        heads.append(torch.cat(pieces, dim=2))
    output = torch.cat(heads).view(batch_size, num_heads, height, width, -1)
    return attention.proj(output.permute(0, 2, 3, 1, 4).flatten(3)), None


def encode_images(mask_model: nn.Module, pixel_values: torch.Tensor):
    """Image embeddings as the mask model's own encoder gives them.

    Args:
        pixel_values: `(B, 3, S, S)` float, normalised by the mask model's image processor.

    Returns:
        Sam: `(B, C, h, w)`; SamHQ: `[(B, C, h, w), [(B, h, w, C'), ...]]`; Sam2: a list of three tensors, fine to
        coarse, the last of which is the embedding. Gradients flow only if the encoder has trainable weights.
    """
    model_type = mask_model.config.model_type
    trainable = any(parameter.requires_grad for parameter in mask_model.vision_encoder.parameters())
    # `get_image_embeddings` of transformers is always under no_grad, so a trainable encoder is called directly.
    with torch.set_grad_enabled(trainable and torch.is_grad_enabled()):
        if model_type == "sam":
            return mask_model.vision_encoder(pixel_values).last_hidden_state
        if model_type == "sam_hq":
            output = mask_model.vision_encoder(pixel_values)
            return [output.last_hidden_state, list(output.intermediate_embeddings)]
        features = list(mask_model.get_image_features(pixel_values, return_dict=True).fpn_hidden_states)
        features[-1] = features[-1] + mask_model.no_memory_embedding
        return [
            feature.permute(1, 2, 0).reshape(len(pixel_values), -1, *size)
            for feature, size in zip(features, mask_model.backbone_feature_sizes)
        ]


def select_images(image_embeddings, indices: torch.Tensor, dtype: torch.dtype):
    """Rows `indices` (M,) of image embeddings in any of the forms of [`encode_images`], as `dtype`."""
    if isinstance(image_embeddings, torch.Tensor):
        return image_embeddings[indices].to(dtype)
    return [select_images(part, indices, dtype) for part in image_embeddings]


def decode_prompts(mask_model: nn.Module, image_embeddings, prompts: torch.Tensor):
    """Decodes one mask per prompt, all in one call.

    Args:
        image_embeddings: of M images (see [`select_images`]), in a form of [`encode_images`].
        prompts: `(M, C)` float prompt embeddings, one per mask; M > 0.

    Returns:
        `low_res_masks` `(M, h, w)` logits and `iou_scores` `(M,)`, the decoder's own estimate of each mask's IoU.
    """
    model_type = mask_model.config.model_type
    decoder_kwargs = {}
    embeddings = image_embeddings
    if model_type == "sam_hq":
        embeddings, decoder_kwargs["intermediate_embeddings"] = image_embeddings
        decoder_kwargs["hq_token_only"] = False
    elif model_type == "sam2":
        *decoder_kwargs["high_resolution_features"], embeddings = image_embeddings
    dtype = mask_model.prompt_encoder.no_mask_embed.weight.dtype
    # Through the module, which under ZeRO-3 gathers the pieces of its weight first.
    no_mask = mask_model.prompt_encoder.no_mask_embed(torch.zeros(1, dtype=torch.long, device=prompts.device))
    dense = no_mask.reshape(1, -1, 1, 1).expand_as(embeddings)
    position = mask_model.get_image_wide_positional_embeddings().to(dtype).expand_as(embeddings)
    with patched_sam_hq_decoder(mask_model.mask_decoder) if model_type == "sam_hq" else nullcontext():
        masks, iou_scores, *_ = mask_model.mask_decoder(
            image_embeddings=embeddings.to(dtype),
            image_positional_embeddings=position,
            sparse_prompt_embeddings=prompts.to(dtype)[:, None, None],
            dense_prompt_embeddings=dense,
            multimask_output=False,
            **decoder_kwargs,
        )
    return masks[:, 0, 0], iou_scores[:, 0, 0]


def unpad_masks(low_res_masks: torch.Tensor, reshaped_size, side: int | None) -> torch.Tensor:
    """Mask logits of one image without what belongs to the padding.

    Args:
        low_res_masks: `(M, h, w)` logits of the decoder.
        reshaped_size: (H, W) of the image after the resize and before the padding.
        side: of the padded square, see [`padded_side`].

    Returns:
        `(M, H, W)` float32 logits, which cover the image; without padding, the masks at the decoder's size.
    """
    masks = low_res_masks.float()
    if side is None:
        return masks
    masks = F.interpolate(masks[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
    return masks[:, : int(reshaped_size[0]), : int(reshaped_size[1])]


def upscale_masks(low_res_masks: torch.Tensor, reshaped_size, original_size, side: int | None) -> torch.Tensor:
    """Brings mask logits of one image back to its original size, as the mask model's own processor does.

    Args:
        low_res_masks, reshaped_size, side: see [`unpad_masks`].
        original_size: (H, W) of the image.

    Returns:
        `(M, H, W)` float32 logits.
    """
    masks = unpad_masks(low_res_masks, reshaped_size, side)
    original_size = (int(original_size[0]), int(original_size[1]))
    return F.interpolate(masks[:, None], original_size, mode="bilinear", align_corners=False)[:, 0]
