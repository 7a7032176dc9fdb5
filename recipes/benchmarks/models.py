"""Models with random weights and batches of random tokens and pixels, in several sizes; nothing is downloaded."""

from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import AutoConfig

from lisa_hf.model.configuration_lisa import LisaConfig
from lisa_hf.model.losses import IGNORE_INDEX
from lisa_hf.model.modeling_lisa import LisaForConditionalGeneration
from lisa_hf.training.trainable import prepare_for_training


IMAGE_TOKEN_ID, SEG_TOKEN_ID, PAD_TOKEN_ID = 3, 4, 0
FIRST_WORD = 5  # token ids from here on are words


@dataclass
class Size:
    """Size of a LISA of LLaVA and SAM, as fields of its sub-configurations, and of the batch of a step."""

    text: dict
    vision: dict
    mask_encoder: dict
    mask_decoder: dict
    num_images: int = 2
    image_size: tuple[int, int] = (480, 640)
    num_questions: int = 3
    system_length: int = 36  # in tokens, as the two below
    question_length: int = 16
    answer_length: int = 10

    @property
    def num_image_tokens(self) -> int:
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


def _text(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, vocab_size: int = 32000) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
    }


def _vit(hidden_size: int, num_layers: int, num_heads: int, image_size: int, patch_size: int, **kwargs) -> dict:
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "image_size": image_size,
        "patch_size": patch_size,
        **kwargs,
    }


_CLIP_L = _vit(1024, 24, 16, 224, 14, intermediate_size=4096)
_SAM_H = _vit(1280, 32, 16, 1024, 16, global_attn_indexes=[7, 15, 23, 31], mlp_dim=5120)
SIZES = {
    "tiny": Size(
        text=_text(64, 128, 2, 4, vocab_size=512),
        vision=_vit(32, 2, 2, 56, 14, intermediate_size=64),
        mask_encoder=_vit(32, 2, 2, 128, 16, global_attn_indexes=[1], mlp_dim=64, output_channels=32, window_size=4),
        mask_decoder={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
        image_size=(60, 80),
    ),
    "small": Size(
        text=_text(256, 688, 4, 4),
        vision=_vit(128, 3, 2, 224, 14, intermediate_size=512),
        mask_encoder=_vit(96, 4, 3, 512, 16, global_attn_indexes=[1, 3], mlp_dim=384),
        mask_decoder={},
    ),
    "mid": Size(
        text=_text(512, 1376, 8, 8),
        vision=_vit(256, 6, 4, 224, 14, intermediate_size=1024),
        mask_encoder=_vit(192, 6, 3, 1024, 16, global_attn_indexes=[2, 5], mlp_dim=768),
        mask_decoder={},
    ),
    "7b": Size(text=_text(4096, 11008, 32, 32), vision=_CLIP_L, mask_encoder=_SAM_H, mask_decoder={}),
    "13b": Size(text=_text(5120, 13824, 40, 40), vision=_CLIP_L, mask_encoder=_SAM_H, mask_decoder={}),
}


def build_model(size: Size, device: str, dtype: torch.dtype) -> PeftModel:
    """Build a model with random weights that trains what LISA trains: LoRA, embeddings, projector, decoder."""
    vision = {"output_channels": 256, **size.mask_encoder}
    sizes = {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    config = LisaConfig(
        vlm_config=AutoConfig.for_model(
            "llava",
            text_config=size.text,
            vision_config={"model_type": "clip_vision_model", **size.vision},
            image_token_index=IMAGE_TOKEN_ID,
            tie_word_embeddings=False,
        ),
        mask_config=AutoConfig.for_model(
            "sam",
            vision_config={**vision, "num_pos_feats": vision["output_channels"] // 2},
            prompt_encoder_config={**sizes, "hidden_size": vision["output_channels"]},
            mask_decoder_config=size.mask_decoder,
        ),
        seg_token_id=SEG_TOKEN_ID,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = LisaForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    # Without dropout, so that baseline and candidate can be compared exactly.
    return prepare_for_training(model, ["seg_projector", "mask_decoder", "embeddings"], lora_dropout=0.0).train()


def make_batch(size: Size, device: str, dtype: torch.dtype) -> dict:
    """Make a training batch of separate rows: K questions about each of B images, with `[SEG]` in each answer."""
    generator = torch.Generator().manual_seed(0)
    num_rows = size.num_images * size.num_questions

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(FIRST_WORD, size.text["vocab_size"], shape, generator=generator)

    system = words(1, size.system_length).expand(num_rows, -1)
    image = torch.full((num_rows, size.num_image_tokens), IMAGE_TOKEN_ID)
    question = words(num_rows, size.question_length)
    answer = words(num_rows, size.answer_length)
    answer[:, -2] = SEG_TOKEN_ID
    input_ids = torch.cat([system, image, question, answer], dim=1)
    labels = input_ids.clone()
    labels[:, : -size.answer_length] = IGNORE_INDEX
    height, width = size.image_size
    side = size.mask_encoder["image_size"]
    resized = [round(side * length / max(height, width)) for length in (height, width)]
    masks = torch.rand(size.num_images, size.num_questions, height, width, generator=generator) < 0.3

    def pixels(side: int) -> torch.Tensor:
        return torch.randn(size.num_images, 3, side, side, generator=generator).to(device, dtype)

    return {
        "input_ids": input_ids.to(device),
        "attention_mask": torch.ones_like(input_ids).to(device),
        "labels": labels.to(device),
        "image_indices": torch.arange(size.num_images).repeat_interleave(size.num_questions).to(device),
        "pixel_values": pixels(size.vision["image_size"]),
        "mask_pixel_values": pixels(side),
        "mask_labels": [image_masks.to(device, torch.uint8) for image_masks in masks],
        "original_sizes": torch.tensor([[height, width]] * size.num_images),
        "reshaped_input_sizes": torch.tensor([resized] * size.num_images),
    }
