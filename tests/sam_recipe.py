"""SAMs whose weights and input are drawn, not stored, and the originals' outputs for them (tests/golden/sam_sizes.*).

Recorded once with the originals' own code, on CPU in float32 (torch 2.13.0):

    pip install --no-deps --target ORIGINALS segment-anything==1.0 segment-anything-hq==0.3
    PYTHONPATH=tests:ORIGINALS python tests/sam_recipe.py
"""

import json
import math
import re
import sys
import zlib
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file


RECORDS = Path(__file__).parent / "golden" / "sam_sizes"
STRIDES = (8, 4)  # of the recorded channels, and of rows and columns
BASE = {
    **{"patch_size": 16, "window_size": 14, "depth": 2, "width": 48, "heads": 3, "global_blocks": [1], "mlp_ratio": 4},
    **{"decoder_width": 64, "decoder_depth": 2, "decoder_mlp": 96, "num_masks": 3},
    **{"iou_width": 32, "mask_channels": 16, "is_hq": False},
}
# The published ones in small, with as many heads and blocks to a window, and sizes that are nobody's.
SIZES = {
    "published image and decoder": BASE
    | {"image_size": 1024, "width": 64, "heads": 2, "decoder_width": 256, "decoder_mlp": 2048, "iou_width": 256},
    "vit_b": BASE | {"image_size": 256, "depth": 12, "width": 96, "heads": 12, "global_blocks": [2, 5, 8, 11]},
    "vit_l": BASE | {"image_size": 320, "depth": 12, "width": 64, "heads": 16, "global_blocks": [2, 5, 8, 11]},
    "vit_h": BASE | {"image_size": 512, "depth": 8, "width": 80, "heads": 16, "global_blocks": [1, 3, 5, 7]},
    "window is grid": BASE | {"image_size": 224, "depth": 3, "global_blocks": [0]},
    "window above grid": BASE | {"image_size": 64, "patch_size": 8, "global_blocks": []},
    "ragged": BASE
    | {"image_size": 120, "patch_size": 8, "window_size": 4, "depth": 4, "width": 54, "global_blocks": [0, 3]}
    | {"mlp_ratio": 3, "decoder_width": 96, "decoder_depth": 3, "decoder_mlp": 40}
    | {"num_masks": 2, "iou_width": 24, "mask_channels": 8},
    "hq": BASE | {"image_size": 256, "depth": 4, "global_blocks": [1, 3], "is_hq": True},
}


def draw_weight(key: str, shape, steep: bool = False) -> torch.Tensor:
    """A weight that depends on its name and shape alone; `steep` multiplies the scores of the decoder's attention."""
    values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape))
    last = key.split(".")[-1]
    if key.endswith("positional_encoding_gaussian_matrix"):
        scale, shift = 1.0, 0.0
    elif len(shape) == 1:
        scale, shift = 0.1, float(last == "weight")
    elif "pos" in last:
        scale, shift = 0.3, 0.0
    elif re.search(r"(?<!patch)_embed|_tokens?\.", key) or (steep and "token" in key):
        scale, shift = 0.5, 0.0
    else:
        scale, shift = 1.5 / math.sqrt(math.prod(shape[1:])), 0.0
    return torch.from_numpy((shift + scale * values).astype(np.float32))


def draw_image(side: int) -> Image.Image:
    """An image whose longer side is `side` pixels, so that nothing is resized."""
    y, x, channel = np.meshgrid(np.arange(side), np.arange(side * 3 // 4), np.arange(3), indexing="ij")
    return Image.fromarray((((x * 7 + y * 13 + channel * 29) ^ (x * y // 17)) % 256).astype(np.uint8))


def draw_prompts(width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(99).standard_normal((2, width)).astype(np.float32))


def stride(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor `(..., channels, rows, columns)` or `(..., rows, columns)` that is recorded."""
    channels, pixels = STRIDES
    tensor = tensor[..., ::pixels, ::pixels]
    return (tensor[:, ::channels] if tensor.ndim == 4 else tensor).contiguous()


def import_original(name: str) -> ModuleType:
    """A module of the originals alone: what their packages import first of all needs torchvision and timm."""
    *packages, _ = name.split(".")
    for depth in range(1, len(packages) + 1):
        package = ModuleType(".".join(packages[:depth]))
        package.__path__ = [str(Path(path, *packages[:depth])) for path in sys.path]
        sys.modules.setdefault(package.__name__, package)
    return import_module(name)


def build_original(sizes: dict) -> torch.nn.Module:
    modeling = "segment_anything_hq.modeling" if sizes["is_hq"] else "segment_anything.modeling"
    image_size, width, grid = sizes["image_size"], sizes["decoder_width"], sizes["image_size"] // sizes["patch_size"]
    if sizes["is_hq"]:
        decoder = import_original(f"{modeling}.mask_decoder_hq").MaskDecoderHQ
        decoder = partial(decoder, vit_dim=sizes["width"])
    else:
        decoder = import_original(f"{modeling}.mask_decoder").MaskDecoder
    return (
        import_original("segment_anything.modeling.sam")
        .Sam(
            import_original(f"{modeling}.image_encoder").ImageEncoderViT(
                img_size=image_size,
                patch_size=sizes["patch_size"],
                embed_dim=sizes["width"],
                depth=sizes["depth"],
                num_heads=sizes["heads"],
                mlp_ratio=sizes["mlp_ratio"],
                out_chans=width,
                norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
                use_rel_pos=True,
                window_size=sizes["window_size"],
                global_attn_indexes=sizes["global_blocks"],
            ),
            import_original(f"{modeling}.prompt_encoder").PromptEncoder(
                width, (grid, grid), (image_size, image_size), sizes["mask_channels"]
            ),
            decoder(
                transformer_dim=width,
                transformer=import_original(f"{modeling}.transformer").TwoWayTransformer(
                    depth=sizes["decoder_depth"],
                    embedding_dim=width,
                    num_heads=8,
                    mlp_dim=sizes["decoder_mlp"],
                ),
                num_multimask_outputs=sizes["num_masks"],
                iou_head_hidden_dim=sizes["iou_width"],
            ),
            pixel_mean=[123.675, 116.28, 103.53],
            pixel_std=[58.395, 57.12, 57.375],
        )
        .eval()
    )


@torch.no_grad()
def record(sizes: dict) -> tuple[dict, dict]:
    """Shapes of an original's weights, and its outputs."""
    model = build_original(sizes)
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    model.load_state_dict({key: draw_weight(key, shape) for key, shape in shapes.items()})
    pixels = torch.from_numpy(np.array(draw_image(sizes["image_size"]))).permute(2, 0, 1)
    embeddings = model.image_encoder(model.preprocess(pixels)[None])
    decoder_inputs = {}
    if sizes["is_hq"]:
        embeddings, decoder_inputs["interm_embeddings"] = embeddings
        decoder_inputs["hq_token_only"] = False
    prompts = draw_prompts(sizes["decoder_width"])
    low_res_masks, iou_scores = model.mask_decoder(
        image_embeddings=embeddings,
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=prompts[:, None],
        dense_prompt_embeddings=model.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand_as(embeddings),
        multimask_output=False,
        **decoder_inputs,
    )
    tensors = {"embeddings": stride(embeddings), "low_res_masks": stride(low_res_masks[:, 0])}
    return shapes, tensors | {"iou_scores": iou_scores[:, 0].contiguous()}


def main() -> None:
    tensors, shapes = {}, {}
    for name, sizes in SIZES.items():
        shapes[name], outputs = record(sizes)
        tensors |= {f"{name}.{output}": tensor for output, tensor in outputs.items()}
    RECORDS.with_suffix(".json").write_text(json.dumps(shapes) + "\n")
    save_file(tensors, RECORDS.with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
