"""Tiny random LISA models of several families, each with its processor, made in memory.

`FAMILIES[name](**kwargs)` gives `(model, processor)`; the model is in evaluation mode and seeded. All mask models see
64 x 64 pixels; VLM and mask model are trainable as they are, except for `UNTRAINED_DECODER_MODULES`.
"""

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    SamImageProcessorPil,
)

from lisa_hf import LisaConfig, LisaForConditionalGeneration, LisaProcessor
from lisa_hf.loading import load_chat_template
from lisa_hf.processing_lisa import add_tokens
from lisa_hf.scratch import build_from_scratch, train_tokenizer


SIDE = 64  # of the mask model's input, pixels
TEXTS = ["What is the red circle? Sure, it is . The and of a USER: ASSISTANT: user assistant model", "It is red."] * 9

IDEFICS3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content[0].type == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>' }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ part.text | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def tiny_tokenizer(special_tokens: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens and `[SEG]`; `special_tokens`: attribute name to token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(TEXTS, vocab_size=300).backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=special_tokens or {},
    )


def sam_config(model_type: str = "sam") -> dict:
    """Fields of a tiny `SamConfig` or `SamHQConfig`."""
    decoder = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    return {
        "model_type": model_type,
        "initializer_range": 0.2,
        "vision_config": {
            "hidden_size": 16,
            "output_channels": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
            "window_size": 4,
            "global_attn_indexes": [1],
            "num_pos_feats": 16,
            "scale": 1.0,
            "mlp_dim": 32,
        },
        "prompt_encoder_config": {"hidden_size": 32, "image_size": SIDE, "patch_size": 8},
        "mask_decoder_config": decoder | ({"vit_dim": 16} if model_type == "sam_hq" else {}),
    }


def sam2_config() -> dict:
    """Fields of a tiny `Sam2Config`."""
    return {
        "model_type": "sam2",
        "initializer_range": 0.2,
        "vision_config": {
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 8,
                "image_size": [SIDE, SIDE],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 2, 2],
                "window_size_per_stage": [4, 4, 4, 2],
                "global_attention_blocks": [3],
                "window_positional_embedding_background_size": [4, 4],
            },
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 32,
        },
        "prompt_encoder_config": {"hidden_size": 32, "image_size": SIDE, "patch_size": 16},
        "mask_decoder_config": {
            "hidden_size": 32,
            "mlp_dim": 32,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    }


def text_config(tokenizer, **kwargs) -> dict:
    """Fields of a tiny text configuration; the weights are large enough that answers differ."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **kwargs,
    }


def vision_config(model_type: str) -> dict:
    """Fields of a tiny vision configuration: 32 x 32 pixels, 16 patches."""
    return {
        "model_type": model_type,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "initializer_range": 0.2,
    }


def sam_image_processor() -> SamImageProcessorPil:
    return SamImageProcessorPil(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE})


def sam2_image_processor() -> CLIPImageProcessorPil:
    """Stretches to a square and normalises, as SAM 2's own image processor does, which needs torchvision."""
    return CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False)


def join(vlm_config: dict, mask_config: dict, vlm_processor, mask_image_processor, **kwargs):
    """A seeded LISA model and its processor; `kwargs` are fields of [`LisaConfig`]."""
    torch.manual_seed(0)
    processor = LisaProcessor(vlm_processor=vlm_processor, mask_image_processor=mask_image_processor)
    config = LisaConfig(
        vlm_config=AutoConfig.for_model(**vlm_config),
        mask_config=AutoConfig.for_model(**mask_config),
        seg_token_id=processor.seg_token_id,
        **kwargs,
    )
    return without_zeros(LisaForConditionalGeneration(config)), processor


@torch.no_grad()
def without_zeros(model: LisaForConditionalGeneration) -> LisaForConditionalGeneration:
    """Weights that start at zero, such as Gemma 3's image projection, would hide what goes through them."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.2)
    return model.eval()


def llava_sam(tie_word_embeddings: bool = False, **kwargs):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    vlm_config = {
        "vision_config": vision_config("clip_vision_model"),
        "text_config": text_config(tokenizer, model_type="llama", tie_word_embeddings=tie_word_embeddings),
        "tie_word_embeddings": tie_word_embeddings,
        "vision_feature_layer": -1,
    }
    model, processor = build_from_scratch(
        vlm_config, sam_config(), tokenizer, load_chat_template("llava_1_5"), **kwargs
    )
    return without_zeros(model), processor


def llava_sam_hq(**kwargs):
    model, processor = llava_sam()
    vlm_config = model.config.vlm_config.to_dict()
    return join(vlm_config, sam_config("sam_hq"), processor.vlm_processor, sam_image_processor(), **kwargs)


def llava_sam2(**kwargs):
    model, processor = llava_sam()
    vlm_config = model.config.vlm_config.to_dict()
    return join(vlm_config, sam2_config(), processor.vlm_processor, sam2_image_processor(), **kwargs)


def idefics3_sam(**kwargs):
    """Images are cut into tiles of 32 x 32 pixels, 4 tokens each, so that images differ in their number of tokens."""
    tokenizer = tiny_tokenizer()
    add_tokens(tokenizer)
    tokenizer.add_tokens(["<global-img>"] + [f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)])
    vlm_processor = Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer,
        image_seq_len=4,
        chat_template=IDEFICS3_TEMPLATE,
    )
    vlm_config = {
        "model_type": "idefics3",
        "image_token_id": vlm_processor.image_token_id,
        "scale_factor": 2,
        "pad_token_id": tokenizer.pad_token_id,
        "vision_config": vision_config("idefics3_vision"),
        "text_config": text_config(tokenizer, model_type="llama"),
    }
    return join(vlm_config, sam_config(), vlm_processor, sam_image_processor(), **kwargs)


def gemma3_sam(**kwargs):
    """One layer with a sliding window, one without; image tokens see each other both ways."""
    tokenizer = tiny_tokenizer(
        {
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "turn_token": "<start_of_turn>",
            "end_token": "<end_of_turn>",
        }
    )
    add_tokens(tokenizer, lstrip=False)
    vlm_processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer,
        chat_template=GEMMA3_TEMPLATE,
        image_seq_length=4,
    )
    vlm_config = {
        "model_type": "gemma3",
        "image_token_index": tokenizer.image_token_id,
        "boi_token_index": tokenizer.boi_token_id,
        "eoi_token_index": tokenizer.eoi_token_id,
        "mm_tokens_per_image": 4,
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
        "vision_config": vision_config("siglip_vision_model"),
        "text_config": text_config(
            tokenizer,
            model_type="gemma3_text",
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
    }
    return join(vlm_config, sam_config(), vlm_processor, sam_image_processor(), **kwargs)


FAMILIES = {
    "llava-sam": llava_sam,
    "llava-sam_hq": llava_sam_hq,
    "llava-sam2": llava_sam2,
    "idefics3-sam": idefics3_sam,
    "gemma3-sam": gemma3_sam,
}


def qwen2_5_vl_sam() -> LisaForConditionalGeneration:
    """The model alone, of 64 tokens: its processor needs torchvision."""
    vision = {"hidden_size": 16, "window_size": 16, "fullatt_block_indexes": [1]}
    return _qwen_sam("qwen2_5_vl", vision, {"mrope_section": [2, 3, 3]})


def qwen3_vl_sam() -> LisaForConditionalGeneration:
    """The model alone, as above; vision features also enter its first layer (deepstack)."""
    vision = {"hidden_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return _qwen_sam("qwen3_vl", vision, {"mrope_section": [4, 2, 2], "mrope_interleaved": True})


def _qwen_sam(model_type: str, vision: dict, rope: dict) -> LisaForConditionalGeneration:
    torch.manual_seed(0)
    vlm_config = {
        "image_token_id": 60,
        "video_token_id": 61,
        "vision_start_token_id": 62,
        "vision_end_token_id": 63,
        "vision_config": {
            "depth": 2,
            "intermediate_size": 16,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "out_hidden_size": 32,
            "initializer_range": 0.2,
            **vision,
        },
        "text_config": {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "initializer_range": 0.2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope},
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        },
    }
    config = LisaConfig(
        vlm_config=AutoConfig.for_model(model_type, **vlm_config),
        mask_config=AutoConfig.for_model(**sam_config()),
        seg_token_id=50,
    )
    return without_zeros(LisaForConditionalGeneration(config))


class ForceTokens(LogitsProcessor):
    """Makes `generate` say `answers`: one list of token ids per row, None where the model is free to say anything but
    `never`."""

    def __init__(self, prompt_length: int, answers: list[list[int | None]], never: list[int]):
        self.prompt_length = prompt_length
        self.answers = answers
        self.never = never

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        copies = len(scores) // len(self.answers)  # beams, or several answers to one prompt
        scores = scores.clone()
        for row, answer in enumerate(self.answers):
            rows = scores[row * copies : (row + 1) * copies]
            if answer[step] is None:
                rows[:, self.never] = -1e9
            else:
                kept = rows[:, answer[step]].clone()
                rows.fill_(-1e9)
                rows[:, answer[step]] = kept
        return scores


def image(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture of random blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def conversation(*turns: str) -> list[dict]:
    """Messages of alternating user and assistant turns; the first has the image before its text."""
    messages = []
    for index, text in enumerate(turns):
        content = [{"type": "image"}] if index == 0 else []
        content.append({"type": "text", "text": text})
        messages.append({"role": ("user", "assistant")[index % 2], "content": content})
    return messages
