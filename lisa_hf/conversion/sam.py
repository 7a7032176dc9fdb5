"""Convert the original segment_anything SAM to transformers' `SamModel`, and SAM-HQ to `SamHQModel`."""

from transformers import (
    SamConfig,
    SamHQConfig,
    SamHQModel,
    SamHQProcessor,
    SamImageProcessorPil,
    SamModel,
    SamProcessor,
)

from .key_tables import Shapes, convert_state_dict
from .lazy_tensors import LazyTensor
from .saving import ConvertedModel, build_without_weights


SAM_KEY_TABLE = [
    (r"pixel_(?:mean|std)", None),  # held by the image processor
    (r"image_encoder\.pos_embed", "vision_encoder.pos_embed"),
    (r"image_encoder\.patch_embed\.proj\.(weight|bias)", r"vision_encoder.patch_embed.projection.\1"),
    (r"image_encoder\.blocks\.(\d+)\.norm([12])\.(weight|bias)", r"vision_encoder.layers.\1.layer_norm\2.\3"),
    (
        r"image_encoder\.blocks\.(\d+)\.(attn\.rel_pos_[hw]|(?:attn\.qkv|attn\.proj|mlp\.lin[12])\.(?:weight|bias))",
        r"vision_encoder.layers.\1.\2",
    ),
    (r"image_encoder\.neck\.0\.weight", "vision_encoder.neck.conv1.weight"),
    (r"image_encoder\.neck\.1\.(weight|bias)", r"vision_encoder.neck.layer_norm1.\1"),
    (r"image_encoder\.neck\.2\.weight", "vision_encoder.neck.conv2.weight"),
    (r"image_encoder\.neck\.3\.(weight|bias)", r"vision_encoder.neck.layer_norm2.\1"),
    (
        r"prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix",
        ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding"),
    ),
    (r"prompt_encoder\.point_embeddings\.([0-3])\.weight", r"prompt_encoder.point_embed.\1.weight"),
    (r"prompt_encoder\.(not_a_point_embed|no_mask_embed)\.weight", r"prompt_encoder.\1.weight"),
    (r"prompt_encoder\.mask_downscaling\.0\.(weight|bias)", r"prompt_encoder.mask_embed.conv1.\1"),
    (r"prompt_encoder\.mask_downscaling\.1\.(weight|bias)", r"prompt_encoder.mask_embed.layer_norm1.\1"),
    (r"prompt_encoder\.mask_downscaling\.3\.(weight|bias)", r"prompt_encoder.mask_embed.conv2.\1"),
    (r"prompt_encoder\.mask_downscaling\.4\.(weight|bias)", r"prompt_encoder.mask_embed.layer_norm2.\1"),
    (r"prompt_encoder\.mask_downscaling\.6\.(weight|bias)", r"prompt_encoder.mask_embed.conv3.\1"),
    (r"mask_decoder\.(iou_token|mask_tokens)\.weight", r"mask_decoder.\1.weight"),
    (
        r"mask_decoder\.transformer\.layers\.(\d+)\.norm([1-4])\.(weight|bias)",
        r"mask_decoder.transformer.layers.\1.layer_norm\2.\3",
    ),
    (
        r"mask_decoder\.transformer\.(layers\.\d+\.(?:mlp\.lin[12]"
        r"|(?:self_attn|cross_attn_token_to_image|cross_attn_image_to_token)\.(?:[qkv]|out)_proj)"
        r"|final_attn_token_to_image\.(?:[qkv]|out)_proj)\.(weight|bias)",
        r"mask_decoder.transformer.\1.\2",
    ),
    (
        r"mask_decoder\.transformer\.norm_final_attn\.(weight|bias)",
        r"mask_decoder.transformer.layer_norm_final_attn.\1",
    ),
    (r"mask_decoder\.output_upscaling\.0\.(weight|bias)", r"mask_decoder.upscale_conv1.\1"),
    (r"mask_decoder\.output_upscaling\.1\.(weight|bias)", r"mask_decoder.upscale_layer_norm.\1"),
    (r"mask_decoder\.output_upscaling\.3\.(weight|bias)", r"mask_decoder.upscale_conv2.\1"),
    # The heads are MLPs of three layers: input, middle, output.
    (
        r"mask_decoder\.(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.0\.(weight|bias)",
        r"mask_decoder.\1.proj_in.\2",
    ),
    (
        r"mask_decoder\.(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.1\.(weight|bias)",
        r"mask_decoder.\1.layers.0.\2",
    ),
    (
        r"mask_decoder\.(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.2\.(weight|bias)",
        r"mask_decoder.\1.proj_out.\2",
    ),
]

# Rows that SAM-HQ adds for its mask decoder.
SAM_HQ_KEY_TABLE = [
    *SAM_KEY_TABLE,
    (r"mask_decoder\.hf_token\.weight", "mask_decoder.hq_token.weight"),
    (r"mask_decoder\.hf_mlp\.layers\.0\.(weight|bias)", r"mask_decoder.hq_mask_mlp.proj_in.\1"),
    (r"mask_decoder\.hf_mlp\.layers\.1\.(weight|bias)", r"mask_decoder.hq_mask_mlp.layers.0.\1"),
    (r"mask_decoder\.hf_mlp\.layers\.2\.(weight|bias)", r"mask_decoder.hq_mask_mlp.proj_out.\1"),
    (r"mask_decoder\.compress_vit_feat\.0\.(weight|bias)", r"mask_decoder.compress_vit_conv1.\1"),
    (r"mask_decoder\.compress_vit_feat\.1\.(weight|bias)", r"mask_decoder.compress_vit_norm.\1"),
    (r"mask_decoder\.compress_vit_feat\.3\.(weight|bias)", r"mask_decoder.compress_vit_conv2.\1"),
    (r"mask_decoder\.embedding_encoder\.0\.(weight|bias)", r"mask_decoder.encoder_conv1.\1"),
    (r"mask_decoder\.embedding_encoder\.1\.(weight|bias)", r"mask_decoder.encoder_norm.\1"),
    (r"mask_decoder\.embedding_encoder\.3\.(weight|bias)", r"mask_decoder.encoder_conv2.\1"),
    (r"mask_decoder\.embedding_maskfeature\.0\.(weight|bias)", r"mask_decoder.mask_conv1.\1"),
    (r"mask_decoder\.embedding_maskfeature\.1\.(weight|bias)", r"mask_decoder.mask_norm.\1"),
    (r"mask_decoder\.embedding_maskfeature\.3\.(weight|bias)", r"mask_decoder.mask_conv2.\1"),
]
HQ_TOKEN = "mask_decoder.hf_token.weight"

# Constant in segment_anything's code; no tensor shape reveals it.
NUM_DECODER_HEADS = 8


def convert_sam(tensors: dict[str, LazyTensor]) -> ConvertedModel:
    """Convert a published SAM or SAM-HQ to `SamModel` or `SamHQModel` with its processor.

    From these weights, transformers' `SamHQModel` (5.23) predicts different masks from SAM-HQ's code. A LISA model
    works around this: see `patched_sam_hq_decoder` in `upstream_fixes.py`.

    Args:
        tensors: Tensors of a `sam_vit_*.pth` or `sam_hq_vit_*.pth`.

    Raises:
        ValueError: Tensors that define the geometry are missing, or keys are unknown; all are listed.
    """
    is_hq = HQ_TOKEN in tensors
    converted = convert_state_dict(tensors, SAM_HQ_KEY_TABLE if is_hq else SAM_KEY_TABLE)
    config = sam_config(tensors)
    image_processor = sam_image_processor(config.vision_config.image_size)
    return ConvertedModel(
        model=build_without_weights(SamHQModel if is_hq else SamModel, config),
        tensors=converted,
        processor=(SamHQProcessor if is_hq else SamProcessor)(image_processor),
    )


def sam_image_processor(side: int) -> SamImageProcessorPil:
    """Return SAM's image processor for images with a longer side of `side` pixels and masks with a quarter of it."""
    return SamImageProcessorPil(
        size={"longest_edge": side},
        pad_size={"height": side, "width": side},
        mask_size={"longest_edge": side // 4},
        mask_pad_size={"height": side // 4, "width": side // 4},
    )


def _count_layers(state_dict: dict, prefix: str) -> int:
    """Return the number of different n among the keys `{prefix}n.*`."""
    return len({key[len(prefix) :].split(".")[0] for key in state_dict if key.startswith(prefix)})


def sam_config(state_dict: dict) -> SamConfig | SamHQConfig:
    """Infer the configuration of an original SAM or SAM-HQ from the shapes of its tensors.

    Args:
        state_dict: Tensors in the original's names (`image_encoder.*`, `prompt_encoder.*`, `mask_decoder.*`).

    Raises:
        ValueError: A tensor that defines the geometry is missing.
    """
    shapes = Shapes.of(state_dict)
    vision_config = _vision_config(shapes)
    # Mask decoder: the width of tokens, and of the narrower cross-attention.
    hidden_size = shapes["mask_decoder.mask_tokens.weight"][1]
    cross_attention_width = shapes["mask_decoder.transformer.final_attn_token_to_image.q_proj.weight"][0]
    is_hq = HQ_TOKEN in shapes
    return (SamHQConfig if is_hq else SamConfig)(
        vision_config=vision_config,
        prompt_encoder_config={
            "hidden_size": hidden_size,
            "image_size": vision_config["image_size"],
            "patch_size": vision_config["patch_size"],
            "mask_input_channels": shapes["prompt_encoder.mask_downscaling.3.weight"][0],
        },
        mask_decoder_config={
            **({"vit_dim": vision_config["hidden_size"]} if is_hq else {}),
            "hidden_size": hidden_size,
            "mlp_dim": shapes["mask_decoder.transformer.layers.0.mlp.lin1.weight"][0],
            "num_hidden_layers": _count_layers(shapes, "mask_decoder.transformer.layers."),
            "num_attention_heads": NUM_DECODER_HEADS,
            "attention_downsample_rate": hidden_size // cross_attention_width,
            "num_multimask_outputs": shapes["mask_decoder.mask_tokens.weight"][0] - 1,
            "iou_head_hidden_dim": shapes["mask_decoder.iou_prediction_head.layers.0.weight"][0],
            # The original decoder keeps PyTorch's default, unlike its encoder; transformers uses 1e-6 for both.
            "layer_norm_eps": 1e-5,
        },
    )


def _vision_config(shapes: Shapes) -> dict:
    """Infer the image encoder: a ViT over a square grid of patches, most of whose blocks attend within windows."""
    width, _, _, patch_size = shapes["image_encoder.patch_embed.proj.weight"]  # [D, 3, P, P]
    grid = shapes["image_encoder.pos_embed"][1]  # [1, grid, grid, D]
    depth = _count_layers(shapes, "image_encoder.blocks.")
    # Relative positions span 2 * side - 1 offsets of the area that a block attends to: a window, or the whole grid.
    rel_pos = [
        shapes[f"image_encoder.blocks.{layer}.attn.rel_pos_h"] for layer in range(depth)
    ]  # [2 side - 1, D / heads]
    sides = [(length + 1) // 2 for length, _ in rel_pos]
    windows = sorted(set(sides) - {grid})
    if len(windows) > 1:
        raise ValueError(
            f"Expected one window size in SAM's image encoder, got {windows} from its relative positions. Name a "
            "published SAM."
        )
    return {
        "hidden_size": width,
        "output_channels": shapes["image_encoder.neck.0.weight"][0],
        "num_hidden_layers": depth,
        "num_attention_heads": width // rel_pos[0][1],
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "window_size": windows[0] if windows else grid,
        "global_attn_indexes": [layer for layer, side in enumerate(sides) if side == grid],
        "num_pos_feats": shapes["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"][1],
        "mlp_dim": shapes["image_encoder.blocks.0.mlp.lin1.weight"][0],
    }
