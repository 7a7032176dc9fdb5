"""One way to call any of transformers' SAM-family models: encode images, decode prompts, resize masks.

Sam, SamHQ, and the models with a feature pyramid (Sam2, Sam3Tracker, EdgeTam) differ in what their image encoder
returns (a tensor; a tensor and intermediate states; several tensors), in what their decoder takes and in how their
processor resizes images. All code that depends on these differences is in this file.
"""

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_lisa import FEATURE_PYRAMID_MODELS
from .upstream_fixes import patched_sam_hq_decoder


# Sub-modules of the decoder that get no gradient from a single text-prompted mask: the IoU head, the hypernetworks of
# the three other masks and, with a feature pyramid, the object score and two convolutions that belong to image
# encoding. They stay frozen, because DDP would wait for their gradients.
UNTRAINED_DECODER_MODULES = (
    "iou_prediction_head",
    "output_hypernetworks_mlps.1",
    "output_hypernetworks_mlps.2",
    "output_hypernetworks_mlps.3",
    "pred_obj_score_head",
    "conv_s0",
    "conv_s1",
)
# With `video_mask_decoding`, one of the three others becomes the mask, and the first one never does.
UNTRAINED_VIDEO_DECODER_MODULES = (
    "output_hypernetworks_mlps.0",
    *(module for module in UNTRAINED_DECODER_MODULES if not module.startswith("output_hypernetworks_mlps.")),
)
# Elements of an attention bias that exist at the same time. On CPUs 16 MB: the allocator reuses blocks of up to 32 MB,
# and requests larger ones from the system each time, page by page. On GPUs enough to keep all cores busy.
BIAS_SIZE = {"cpu": 2**22, "cuda": 2**27}


def prompt_size(mask_config) -> int:
    """Return the width of a prompt embedding of the mask decoder."""
    return mask_config.prompt_encoder_config.hidden_size


def padded_side(mask_config, video_mask_decoding: bool = False) -> int | None:
    """Return the side, in pixels, of the square that Sam and SamHQ pad images to; None if images are stretched.

    Args:
        video_mask_decoding: See [`LisaConfig`]. Masks of stretched images then have this square's size in between.
    """
    is_stretched = mask_config.model_type in FEATURE_PYRAMID_MODELS
    return None if is_stretched and not video_mask_decoding else mask_config.prompt_encoder_config.image_size


def use_chunked_attention(mask_model: nn.Module) -> None:
    """Make the global attention of Sam's and SamHQ's encoder compute relative positions chunk by chunk.

    transformers turns them into a bias `(B, heads, H * W, H * W)`, plus a copy in another memory order: 2 x 1.1 GB per
    image in float32 with ViT-H at 1024 pixels, in each of four layers. The results are the same.
    """
    config = mask_model.config
    if config.model_type in FEATURE_PYRAMID_MODELS or config.vision_config._attn_implementation != "sdpa":
        return
    for layer in mask_model.vision_encoder.layers:
        if layer.window_size == 0 and layer.attn.use_rel_pos:
            layer.attn.forward = partial(_chunked_attention, layer.attn)


def _chunked_attention(attention: nn.Module, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, None]:
    """Compute `SamVisionSdpaAttention.forward` of `(B, H, W, C)` for some heads and some image rows at a time."""
    batch_size, height, width, _ = hidden_states.shape
    num_positions, num_heads = height * width, attention.num_attention_heads
    qkv = attention.qkv(hidden_states).reshape(batch_size, num_positions, 3, num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2)  # [B * heads, H * W, C / heads] each

    # A query's bias towards a key is the sum of one number for the key's row and one for its column.
    query = query.unflatten(1, (height, width))  # [B * heads, H, W, C / heads]
    relative_height = attention.get_rel_pos(height, height, attention.rel_pos_h)  # [H, H, C / heads]
    relative_width = attention.get_rel_pos(width, width, attention.rel_pos_w)  # [W, W, C / heads]
    bias_height = torch.einsum("bhwc,hkc->bhwk", query, relative_height)  # [B * heads, H, W, H]
    bias_width = torch.einsum("bhwc,wkc->bhwk", query, relative_width)  # [B * heads, H, W, W]

    # As many heads as fit, or as many image rows of one head as fit.
    size = BIAS_SIZE.get(hidden_states.device.type, BIAS_SIZE["cuda"])
    heads_at_once = max(1, size // num_positions**2)
    rows_at_once = max(1, size // (heads_at_once * width * num_positions))
    heads = []
    for q, k, v, h, w in zip(*(x.split(heads_at_once) for x in (query, key, value, bias_height, bias_width))):
        chunks = []
        for rows, by_height, by_width in zip(*(x.split(rows_at_once, dim=1) for x in (q, h, w))):
            bias = by_height.contiguous()[..., None] + by_width.contiguous()[..., None, :]  # [heads, rows, W, H, W]
            bias = bias.view(len(k), 1, -1, num_positions)  # [heads, 1, rows * W, H * W]
            chunks.append(F.scaled_dot_product_attention(rows.flatten(1, 2)[:, None], k[:, None], v[:, None], bias))
        heads.append(torch.cat(chunks, dim=2))  # [heads, 1, H * W, C / heads]
    output = torch.cat(heads).view(batch_size, num_heads, height, width, -1)
    return attention.proj(output.permute(0, 2, 3, 1, 4).flatten(3)), None  # [B, H, W, C]


def encode_images(mask_model: nn.Module, pixel_values: torch.Tensor):
    """Compute image embeddings with the mask model's own encoder.

    Args:
        pixel_values: Images normalized by the mask model's image processor, `(B, 3, S, S)` float.

    Returns:
        Sam: `(B, C, h, w)`; SamHQ: `[(B, C, h, w), [(B, h, w, C'), ...]]`; others: a list of three tensors, fine to
        coarse, the last of which is the embedding. Gradients flow only if the encoder has trainable weights.
    """
    model_type = mask_model.config.model_type
    trainable = any(parameter.requires_grad for parameter in mask_model.vision_encoder.parameters())
    # transformers' `get_image_embeddings` always uses no_grad, so the encoder is called directly.
    with torch.set_grad_enabled(trainable and torch.is_grad_enabled()):
        if model_type == "sam":
            return mask_model.vision_encoder(pixel_values).last_hidden_state
        if model_type == "sam_hq":
            output = mask_model.vision_encoder(pixel_values)
            return [output.last_hidden_state, list(output.intermediate_embeddings)]
        features = list(mask_model.get_image_features(pixel_values, return_dict=True).fpn_hidden_states)
        features[-1] = features[-1] + mask_model.no_memory_embedding
        # From [h * w, B, C] to [B, C, h, w] each.
        return [
            feature.permute(1, 2, 0).reshape(len(pixel_values), -1, *size)
            for feature, size in zip(features, mask_model.backbone_feature_sizes)
        ]


def count_images(pixel_values: torch.Tensor | None, image_embeddings) -> int:
    """Return the number of images in the mask model's input, or in embeddings in any form of [`encode_images`]."""
    first = pixel_values if image_embeddings is None else image_embeddings
    while not isinstance(first, torch.Tensor):
        first = first[0]
    return len(first)


def select_images(image_embeddings, indices: torch.Tensor, dtype: torch.dtype):
    """Return rows `indices` `(M,)` of image embeddings in any form of [`encode_images`], as `dtype`."""
    if isinstance(image_embeddings, torch.Tensor):
        return image_embeddings[indices.to(image_embeddings.device)].to(dtype)
    return [select_images(part, indices, dtype) for part in image_embeddings]


def decode_prompts(
    mask_model: nn.Module,
    image_embeddings,
    prompts: torch.Tensor,
    video_mask_decoding: bool = False,
    points: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode one mask per prompt, all in one call.

    Args:
        image_embeddings: Embeddings of M images in a form of [`encode_images`], see [`select_images`].
        prompts: Prompt embeddings, one per mask, `(M, C)` float; M > 0.
        video_mask_decoding: See [`LisaConfig`].
        points: Points that prompt each mask before its prompt embedding: x and y in pixels of the mask model's input,
            `(M, P, 2)` float, and labels `(M, P)` int64, see [`similarity_points`].

    Returns:
        Mask logits `(M, h, w)` and the decoder's own estimate of each mask's IoU `(M,)`, on the device of the prompts.

    Raises:
        ValueError: If the mask model is offloaded to the CPU or the disk.
    """
    if mask_model.shared_image_embedding.positional_embedding.is_meta and not prompts.is_meta:
        # transformers' decoders read weights of modules that they do not call, and only a call would load them.
        raise ValueError(
            "device_map: expected the whole mask model on a device, got it offloaded, which no SAM-family model of "
            'transformers supports. Pass a `device_map` with `"mask_model": 0`, or load the VLM in fewer bits.'
        )
    # 1. The embedding, and the other encoder outputs that the decoder needs.
    model_type = mask_model.config.model_type
    decoder_kwargs = {}
    embeddings = image_embeddings  # [M, C, h, w]
    if model_type == "sam_hq":
        embeddings, decoder_kwargs["intermediate_embeddings"] = image_embeddings
        decoder_kwargs["hq_token_only"] = False
    elif model_type in FEATURE_PYRAMID_MODELS:
        *decoder_kwargs["high_resolution_features"], embeddings = image_embeddings

    # 2. The dense prompt means that there is no mask prompt. The module is called, because under ZeRO-3 only a call
    #    gathers its sharded weight.
    dtype = mask_model.prompt_encoder.no_mask_embed.weight.dtype
    no_mask = mask_model.prompt_encoder.no_mask_embed(torch.zeros(1, dtype=torch.long, device=embeddings.device))
    dense = no_mask.reshape(1, -1, 1, 1).expand_as(embeddings)  # [M, C, h, w]
    position = mask_model.get_image_wide_positional_embeddings().to(dtype).expand_as(embeddings)  # [M, C, h, w]

    # 3. Decoder, which sees the M prompts as a batch of M images with one prompt of one token each.
    sparse = prompts.to(embeddings.device, dtype)[:, None, None]  # [M, 1, 1, C]
    if video_mask_decoding:
        # "No point", and the padding that SAM 2 appends to points.
        not_a_point = mask_model.prompt_encoder.not_a_point_embed(
            torch.zeros(2, dtype=torch.long, device=embeddings.device)
        )  # [2, C]
        sparse = torch.cat([not_a_point.expand(len(prompts), 1, -1, -1), sparse], dim=2)  # [M, 1, 3, C]
    elif points is not None:
        coordinates, labels = (part.to(embeddings.device) for part in points)
        embedded, _ = mask_model.prompt_encoder(coordinates[:, None], labels[:, None], None, None)  # [M, 1, P + 1, C]
        sparse = torch.cat([embedded.to(dtype), sparse], dim=2)
    with patched_sam_hq_decoder(mask_model.mask_decoder) if model_type == "sam_hq" else nullcontext():
        masks, iou_scores, *_ = mask_model.mask_decoder(
            image_embeddings=embeddings.to(dtype),
            image_positional_embeddings=position,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=video_mask_decoding,
            **decoder_kwargs,
        )
    masks, iou_scores = masks[:, 0], iou_scores[:, 0]  # [M, 1 or 3, h, w], [M, 1 or 3]
    rows, best = torch.arange(len(masks), device=masks.device), iou_scores.argmax(1)
    return masks[rows, best].to(prompts.device), iou_scores[rows, best].to(prompts.device)


def unpad_masks(low_res_masks: torch.Tensor, reshaped_size, side: int | None) -> torch.Tensor:
    """Remove the padding from the mask logits of one image.

    Args:
        low_res_masks: Logits of the decoder, `(M, h, w)`.
        reshaped_size: (H, W) of the image after the resize and before the padding.
        side: Side of the padded square, see [`padded_side`].

    Returns:
        `(M, H, W)` float32 logits that cover the image: at the size `reshaped_size`, or at the decoder's size if
        images are not padded.
    """
    masks = low_res_masks.float()
    if side is None:
        return masks
    masks = F.interpolate(masks[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
    return masks[:, : int(reshaped_size[0]), : int(reshaped_size[1])]


def upscale_masks(low_res_masks: torch.Tensor, reshaped_size, original_size, side: int | None) -> torch.Tensor:
    """Resize the mask logits of one image to its original size, like the mask model's own processor.

    Args:
        low_res_masks, reshaped_size, side: See [`unpad_masks`].
        original_size: (H, W) of the image.

    Returns:
        `(M, H, W)` float32 logits.
    """
    masks = unpad_masks(low_res_masks, reshaped_size, side)
    original_size = (int(original_size[0]), int(original_size[1]))
    return F.interpolate(masks[:, None], original_size, mode="bilinear", align_corners=False)[:, 0]
