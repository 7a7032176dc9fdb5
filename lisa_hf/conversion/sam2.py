"""Convert the image part of an original SAM 2 to transformers' `Sam2Model`, without its memory of earlier frames."""

import torch
from transformers import Sam2Config, Sam2ImageProcessor
from transformers.image_utils import PILImageResampling

from .key_tables import Shapes
from .lazy_tensors import LazyTensor


SAM2_KEY_TABLE = [
    (r"no_mem_embed", "no_memory_embedding"),
    (r"image_encoder\.trunk\.(pos_embed(?:_window)?)", r"vision_encoder.backbone.\1"),
    (r"image_encoder\.trunk\.patch_embed\.proj\.(weight|bias)", r"vision_encoder.backbone.patch_embed.projection.\1"),
    (
        r"image_encoder\.trunk\.blocks\.(\d+)\.norm([12])\.(weight|bias)",
        r"vision_encoder.backbone.blocks.\1.layer_norm\2.\3",
    ),
    (
        r"image_encoder\.trunk\.blocks\.(\d+)\.(attn\.qkv|attn\.proj|proj)\.(weight|bias)",
        r"vision_encoder.backbone.blocks.\1.\2.\3",
    ),
    (
        r"image_encoder\.trunk\.blocks\.(\d+)\.mlp\.layers\.0\.(weight|bias)",
        r"vision_encoder.backbone.blocks.\1.mlp.proj_in.\2",
    ),
    (
        r"image_encoder\.trunk\.blocks\.(\d+)\.mlp\.layers\.1\.(weight|bias)",
        r"vision_encoder.backbone.blocks.\1.mlp.proj_out.\2",
    ),
    (r"image_encoder\.neck\.convs\.(\d+)\.conv\.(weight|bias)", r"vision_encoder.neck.convs.\1.\2"),
    (
        r"sam_prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix",
        ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding"),
    ),
    # Joined into one tensor by `join_point_embeddings`.
    (r"sam_prompt_encoder\.point_embeddings\.([0-3])\.weight", r"prompt_encoder.point_embed.\1.weight"),
    (r"sam_prompt_encoder\.(not_a_point_embed|no_mask_embed)\.weight", r"prompt_encoder.\1.weight"),
    (r"sam_prompt_encoder\.mask_downscaling\.0\.(weight|bias)", r"prompt_encoder.mask_embed.conv1.\1"),
    (r"sam_prompt_encoder\.mask_downscaling\.1\.(weight|bias)", r"prompt_encoder.mask_embed.layer_norm1.\1"),
    (r"sam_prompt_encoder\.mask_downscaling\.3\.(weight|bias)", r"prompt_encoder.mask_embed.conv2.\1"),
    (r"sam_prompt_encoder\.mask_downscaling\.4\.(weight|bias)", r"prompt_encoder.mask_embed.layer_norm2.\1"),
    (r"sam_prompt_encoder\.mask_downscaling\.6\.(weight|bias)", r"prompt_encoder.mask_embed.conv3.\1"),
    (r"sam_mask_decoder\.(iou_token|mask_tokens|obj_score_token)\.weight", r"mask_decoder.\1.weight"),
    (r"sam_mask_decoder\.(conv_s[01])\.(weight|bias)", r"mask_decoder.\1.\2"),
    (
        r"sam_mask_decoder\.transformer\.layers\.(\d+)\.norm([1-4])\.(weight|bias)",
        r"mask_decoder.transformer.layers.\1.layer_norm\2.\3",
    ),
    (
        r"sam_mask_decoder\.transformer\.(layers\.\d+\.(?:self_attn|cross_attn_token_to_image"
        r"|cross_attn_image_to_token)|final_attn_token_to_image)\.([qkv]_proj)\.(weight|bias)",
        r"mask_decoder.transformer.\1.\2.\3",
    ),
    (
        r"sam_mask_decoder\.transformer\.(layers\.\d+\.(?:self_attn|cross_attn_token_to_image"
        r"|cross_attn_image_to_token)|final_attn_token_to_image)\.out_proj\.(weight|bias)",
        r"mask_decoder.transformer.\1.o_proj.\2",
    ),
    (
        r"sam_mask_decoder\.transformer\.layers\.(\d+)\.mlp\.layers\.0\.(weight|bias)",
        r"mask_decoder.transformer.layers.\1.mlp.proj_in.\2",
    ),
    (
        r"sam_mask_decoder\.transformer\.layers\.(\d+)\.mlp\.layers\.1\.(weight|bias)",
        r"mask_decoder.transformer.layers.\1.mlp.proj_out.\2",
    ),
    (
        r"sam_mask_decoder\.transformer\.norm_final_attn\.(weight|bias)",
        r"mask_decoder.transformer.layer_norm_final_attn.\1",
    ),
    (r"sam_mask_decoder\.output_upscaling\.0\.(weight|bias)", r"mask_decoder.upscale_conv1.\1"),
    (r"sam_mask_decoder\.output_upscaling\.1\.(weight|bias)", r"mask_decoder.upscale_layer_norm.\1"),
    (r"sam_mask_decoder\.output_upscaling\.3\.(weight|bias)", r"mask_decoder.upscale_conv2.\1"),
    # The heads are MLPs of three layers: input, middle, output.
    (
        r"sam_mask_decoder\.(output_hypernetworks_mlps\.\d+|iou_prediction_head|pred_obj_score_head)\.layers\.0"
        r"\.(weight|bias)",
        r"mask_decoder.\1.proj_in.\2",
    ),
    (
        r"sam_mask_decoder\.(output_hypernetworks_mlps\.\d+|iou_prediction_head|pred_obj_score_head)\.layers\.1"
        r"\.(weight|bias)",
        r"mask_decoder.\1.layers.0.\2",
    ),
    (
        r"sam_mask_decoder\.(output_hypernetworks_mlps\.\d+|iou_prediction_head|pred_obj_score_head)\.layers\.2"
        r"\.(weight|bias)",
        r"mask_decoder.\1.proj_out.\2",
    ),
    # Memory of earlier frames, which images do not have.
    (r"(?:memory_attention|memory_encoder|obj_ptr_proj|obj_ptr_tpos_proj|mask_downsample)\..*", None),
    (r"maskmem_tpos_enc|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial", None),
]

# Numbers of the large SAM 2 that no tensor shape reveals.
HIERA_LARGE = {
    "num_attention_heads": 2,
    "num_attention_heads_per_stage": [2, 4, 8, 16],
    "blocks_per_stage": [2, 6, 36, 4],
    "global_attention_blocks": [23, 33, 43],
    "window_size_per_stage": [8, 4, 16, 8],
}


def sam2_config(state_dict: dict, image_size: int) -> Sam2Config:
    """Infer the configuration of a large SAM 2 from the shapes of its tensors.

    Args:
        state_dict: Tensors in the original's names.
        image_size: Side of the images that it was trained with, in pixels.

    Raises:
        ValueError: A tensor that defines the geometry is missing, or it is not the large SAM 2.
    """
    shapes = Shapes.of(state_dict)
    width = shapes["image_encoder.trunk.patch_embed.proj.weight"][0]
    num_blocks = len([name for name in shapes if name.startswith("image_encoder.trunk.blocks.") and "norm1.w" in name])
    if num_blocks != sum(HIERA_LARGE["blocks_per_stage"]):
        raise ValueError(
            f"Expected the large SAM 2, with {sum(HIERA_LARGE['blocks_per_stage'])} blocks in its image encoder, got "
            f"{num_blocks} blocks. Name a checkpoint with the large one."
        )
    widths = [width * 2**stage for stage in range(4)]
    hidden_size = shapes["sam_mask_decoder.mask_tokens.weight"][1]
    return Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": width,
                "embed_dim_per_stage": widths,
                "image_size": [image_size, image_size],
                "window_positional_embedding_background_size": list(shapes["image_encoder.trunk.pos_embed"][2:]),
                **HIERA_LARGE,
            },
            "backbone_channel_list": widths[::-1],
            "backbone_feature_sizes": [[image_size // stride] * 2 for stride in (4, 8, 16)],
            "fpn_hidden_size": shapes["image_encoder.neck.convs.0.conv.weight"][0],
        },
        prompt_encoder_config={
            "hidden_size": hidden_size,
            "image_size": image_size,
            "mask_input_channels": shapes["sam_prompt_encoder.mask_downscaling.3.weight"][0],
        },
        mask_decoder_config={
            "hidden_size": hidden_size,
            "mlp_dim": shapes["sam_mask_decoder.transformer.layers.0.mlp.layers.0.weight"][0],
            "attention_downsample_rate": hidden_size
            // shapes["sam_mask_decoder.transformer.final_attn_token_to_image.q_proj.weight"][0],
            "num_multimask_outputs": shapes["sam_mask_decoder.mask_tokens.weight"][0] - 1,
            "iou_head_hidden_dim": shapes["sam_mask_decoder.iou_prediction_head.layers.0.weight"][0],
        },
    )


def sam2_image_processor(side: int, resample: PILImageResampling) -> Sam2ImageProcessor:
    """Return SAM 2's image processor for images stretched to `side` x `side` pixels.

    `pad_size` pads nothing: [`LisaProcessor.post_process_masks`] reads in it that masks have this size in between, see
    `video_mask_decoding` of [`LisaConfig`].
    """
    square = {"height": side, "width": side}
    quarter = {"height": side // 4, "width": side // 4}
    return Sam2ImageProcessor(size=square, mask_size=quarter, pad_size=square, resample=resample)


def join_point_embeddings(tensors: dict[str, LazyTensor], prefix: str = "") -> None:
    """Join, in place, the embeddings of the four kinds of points, which are rows of one tensor in transformers.

    Args:
        tensors: Tensors with converted keys.
        prefix: Start of every key.
    """
    rows = [tensors.pop(f"{prefix}prompt_encoder.point_embed.{kind}.weight", None) for kind in range(4)]
    if None not in rows:  # missing ones are reported when the tensors are checked
        tensors[f"{prefix}prompt_encoder.point_embed.weight"] = LazyTensor(
            torch.Size((4, rows[0].shape[1])), rows[0].dtype, lambda: torch.cat([row.load() for row in rows])
        )
