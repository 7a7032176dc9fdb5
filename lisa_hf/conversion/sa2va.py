"""Convert Sa2VA (Qwen2.5-VL, Qwen3-VL or InternVL 2.5 and 3, with SAM 2) to `LisaForConditionalGeneration`."""

import copy
import json
from pathlib import Path

import torch
from transformers import (
    CONFIG_MAPPING,
    AddedToken,
    AutoTokenizer,
    GenerationConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedConfig,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
)
from transformers.image_utils import PILImageResampling

from ..chat_templates import load_chat_template
from ..model.configuration_lisa import LisaConfig
from ..model.image_processor_backends import load_vlm_processor
from ..model.modeling_lisa import LisaForConditionalGeneration
from ..model.processing_lisa import SEG_TOKEN, LisaProcessor
from ..model.self_check import check_against_vlm
from .key_tables import convert_state_dict, nest
from .lazy_tensors import LazyTensor
from .llava import TEXT_CONFIG_FIELDS
from .sam2 import SAM2_KEY_TABLE, join_point_embeddings, sam2_config, sam2_image_processor
from .saving import ConvertedModel, build_without_weights


IMAGE_SIZE = 1024  # of SAM 2's images, in pixels
SAM2_PREFIX = "grounding_encoder.sam2_model."

SHARED_KEY_TABLE = [
    *nest(SAM2_KEY_TABLE, SAM2_PREFIX, "mask_model."),
    (r"text_hidden_fcs\.0\.(weight|bias)", r"seg_projector.linear_1.\1"),
    (r"text_hidden_fcs\.2\.(weight|bias)", r"seg_projector.linear_2.\1"),
]
# Qwen2.5-VL and Qwen3-VL as in transformers, and Qwen2.5-VL as in transformers before 4.52.
QWEN_KEY_TABLE = [
    (r"model\.(model\.(?:language_model|visual)\..+|lm_head\.weight)", r"vlm.\1"),
    (r"model\.visual\.(.+)", r"vlm.model.visual.\1"),
    (r"model\.model\.((?:layers|embed_tokens|norm)\..+)", r"vlm.model.language_model.\1"),
    *SHARED_KEY_TABLE,
]
INTERNVL_KEY_TABLE = [
    (r"language_model\.lm_head\.weight", "vlm.lm_head.weight"),
    (r"language_model\.model\.(.+)", r"vlm.model.language_model.\1"),
    (r"vision_model\.embeddings\.class_embedding", "vlm.model.vision_tower.embeddings.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", "vlm.model.vision_tower.embeddings.position_embeddings"),
    (
        r"vision_model\.embeddings\.patch_embedding\.(weight|bias)",
        r"vlm.model.vision_tower.embeddings.patch_embeddings.projection.\1",
    ),
    (r"vision_model\.encoder\.layers\.(\d+)\.ls([12])", r"vlm.model.vision_tower.encoder.layer.\1.lambda_\2"),
    (
        r"vision_model\.encoder\.layers\.(\d+)\.norm1\.(weight|bias)",
        r"vlm.model.vision_tower.encoder.layer.\1.layernorm_before.\2",
    ),
    (
        r"vision_model\.encoder\.layers\.(\d+)\.norm2\.(weight|bias)",
        r"vlm.model.vision_tower.encoder.layer.\1.layernorm_after.\2",
    ),
    # Split into three tensors by `split_qkv`.
    (
        r"vision_model\.encoder\.layers\.(\d+)\.attn\.qkv\.(weight|bias)",
        r"vlm.model.vision_tower.encoder.layer.\1.attention.qkv.\2",
    ),
    (
        r"vision_model\.encoder\.layers\.(\d+)\.attn\.([qk]_norm)\.weight",
        r"vlm.model.vision_tower.encoder.layer.\1.attention.\2.weight",
    ),
    (
        r"vision_model\.encoder\.layers\.(\d+)\.attn\.proj\.(weight|bias)",
        r"vlm.model.vision_tower.encoder.layer.\1.attention.projection_layer.\2",
    ),
    (
        r"vision_model\.encoder\.layers\.(\d+)\.mlp\.(fc[12])\.(weight|bias)",
        r"vlm.model.vision_tower.encoder.layer.\1.mlp.\2.\3",
    ),
    (r"mlp1\.0\.(weight|bias)", r"vlm.model.multi_modal_projector.layer_norm.\1"),
    (r"mlp1\.1\.(weight|bias)", r"vlm.model.multi_modal_projector.linear_1.\1"),
    (r"mlp1\.3\.(weight|bias)", r"vlm.model.multi_modal_projector.linear_2.\1"),
    *SHARED_KEY_TABLE,
]

# The prompt protocol apart from the chat template: how Sa2VA's code prepares images, whatever its processor says.
QWEN_PIXELS = {"shortest_edge": 512 * 28 * 28, "longest_edge": 2048 * 28 * 28}
INTERNVL_TILES = {"min_patches": 1, "max_patches": 12, "crop_to_patches": True}
MASK_RESAMPLE = PILImageResampling.BICUBIC  # SAM 2's own is bilinear
CHAT_TEMPLATE = "sa2va_internvl"

QWEN_PROCESSORS = {"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}
# Language models of InternVL that exist in transformers.
TEXT_MODEL_TYPES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}
# Names of the special tokens that InternVL's processor asks its tokenizer for. It never sees a video.
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<vp>",
}


def convert_sa2va(tensors: dict[str, LazyTensor], directory: Path, chat_template: str | None = None) -> ConvertedModel:
    """Convert a published Sa2VA with its processor.

    Args:
        tensors: Tensors of `Sa2VAChatModel` or `Sa2VAChatModelQwen`, LoRA merged.
        directory: Directory with its `config.json`, tokenizer and, on Qwen-VL, processor.
        chat_template: Name of one of this package's templates, or a Jinja file; by default Sa2VA's own.

    Raises:
        ValueError: It is on a VLM that transformers does not have, or the self-check fails.
    """
    original_config = json.loads((directory / "config.json").read_text())
    if "vision_model.embeddings.class_embedding" in tensors:
        table, vlm_config = INTERNVL_KEY_TABLE, internvl_config(original_config)
        processor = internvl_processor(vlm_config, directory, load_chat_template(chat_template or CHAT_TEMPLATE))
        vlm_config.image_token_id = processor.image_token_id
    else:
        table, vlm_config = QWEN_KEY_TABLE, qwen_config(original_config)
        processor = qwen_processor(vlm_config, directory)
        processor.chat_template = load_chat_template(chat_template) or processor.chat_template
    # `[SEG]` is text, not a special token that decoding skips; it keeps the spaces around it, as in Sa2VA.
    processor.tokenizer.add_tokens([AddedToken(SEG_TOKEN, normalized=False)])
    sam2_state = {name[len(SAM2_PREFIX) :]: value for name, value in tensors.items() if name.startswith(SAM2_PREFIX)}
    config = LisaConfig(
        vlm_config=vlm_config,
        mask_config=sam2_config(sam2_state, IMAGE_SIZE),
        seg_token_id=processor.tokenizer.convert_tokens_to_ids(SEG_TOKEN),
        # transformers 4.57, with which it was trained, returns Qwen3-VL's states from before the last norm.
        seg_state="own_before_norm" if vlm_config.model_type == "qwen3_vl" else "own",
        video_mask_decoding=True,
    )
    model = build_without_weights(LisaForConditionalGeneration, config)
    eos, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos if pad is None else pad)
    processor = LisaProcessor(processor, sam2_image_processor(IMAGE_SIZE, MASK_RESAMPLE))
    config.answer_end_token_id = processor.template.answer_end_token_id
    check_against_vlm(_small_model(config), processor)
    converted = convert_state_dict(tensors, table)
    join_point_embeddings(converted, "mask_model.")
    split_qkv(converted)
    return ConvertedModel(model=model, tensors=converted, processor=processor)


def _small_model(config: LisaConfig) -> LisaForConditionalGeneration:
    """Return a random model that takes the same inputs, with few layers and two heads in each of its parts."""
    config = copy.deepcopy(config)
    text, vision = config.get_text_config(), config.vlm_config.vision_config
    # Heads keep their width, on which M-RoPE's sections depend.
    width = 2 * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    text.update({"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 3})
    text.update({"num_attention_heads": 2, "num_key_value_heads": 2})
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:3]
    heads = "num_heads" if hasattr(vision, "num_heads") else "num_attention_heads"
    vision.update({"hidden_size": 2 * vision.hidden_size // getattr(vision, heads), "intermediate_size": 64, heads: 2})
    vision.update({"num_hidden_layers": 3, "depth": 3, "out_hidden_size": width})
    vision.update({"deepstack_visual_indexes": [0, 1], "fullatt_block_indexes": [1]})
    config.mask_config.vision_config.backbone_config.update(
        {"blocks_per_stage": [1, 1, 2, 1], "global_attention_blocks": [3]}
    )
    with torch.random.fork_rng(devices=[]):
        return LisaForConditionalGeneration(config)


# ---- Qwen-VL --------------------------------------------------------------------------------------------------------


def qwen_config(original_config: dict) -> PreTrainedConfig:
    """Return the configuration of the Qwen-VL inside a Sa2VA, whose configuration is the VLM's under another name."""
    model_type = original_config.get("vision_config", {}).get("model_type", "qwen2_5_vl")
    if model_type not in QWEN_PROCESSORS:
        raise ValueError(
            f"config.json: expected a Sa2VA on InternVL or on one of {', '.join(QWEN_PROCESSORS)}, got {model_type}. "
            "Name a published Sa2VA."
        )
    own = ("model_type", "template", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype")
    values = {name: value for name, value in original_config.items() if name not in own}
    return CONFIG_MAPPING[model_type](**{"tie_word_embeddings": False, **values})


def qwen_processor(config: PreTrainedConfig, directory: Path) -> ProcessorMixin:
    """Load the processor of the Qwen-VL, for the image size in Sa2VA's code."""
    processor = load_vlm_processor(QWEN_PROCESSORS[config.model_type], directory)
    processor.image_processor.size = QWEN_PIXELS
    return processor


# ---- InternVL -------------------------------------------------------------------------------------------------------


def internvl_config(original_config: dict) -> InternVLConfig:
    """Return the configuration of the InternVL inside a Sa2VA, except for the image token's id.

    Raises:
        ValueError: transformers does not have its language model or its arrangement of features.
    """
    vision, text = original_config["vision_config"], original_config["llm_config"]
    architecture = text["architectures"][0]
    if architecture not in TEXT_MODEL_TYPES or original_config.get("ps_version") != "v2":
        raise ValueError(
            f"config.json: expected a Sa2VA on {', '.join(TEXT_MODEL_TYPES)} with ps_version v2, got {architecture} "
            f"with {original_config.get('ps_version')}, which transformers does not have. Name another size, such as "
            "Sa2VA-1B, Sa2VA-4B, or one on InternVL3."
        )
    side = original_config.get("force_image_size") or vision["image_size"]
    ratio = original_config["downsample_ratio"]
    fields = (*TEXT_CONFIG_FIELDS, "head_dim", "attention_bias", "sliding_window", "use_sliding_window")
    text = {name: text[name] for name in (*fields, "max_window_layers", "vocab_size") if text.get(name) is not None}
    return InternVLConfig(
        vision_config={
            "hidden_size": vision["hidden_size"],
            "intermediate_size": vision["intermediate_size"],
            "num_hidden_layers": vision["num_hidden_layers"],
            "num_attention_heads": vision["num_attention_heads"],
            "attention_bias": vision["qkv_bias"],
            "use_qk_norm": vision["qk_normalization"],
            "norm_type": vision["norm_type"],
            "layer_norm_eps": vision["layer_norm_eps"],
            "hidden_act": vision["hidden_act"],
            "image_size": [side, side],
            "patch_size": [vision["patch_size"]] * 2,
        },
        text_config=CONFIG_MAPPING[TEXT_MODEL_TYPES[architecture]](**text, tie_word_embeddings=False),
        image_seq_length=int((side // vision["patch_size"]) ** 2 * ratio**2),
        downsample_ratio=ratio,
        vision_feature_layer=original_config.get("select_layer", -1),
        tie_word_embeddings=False,
    )


def internvl_processor(config: InternVLConfig, directory: Path, chat_template: str) -> InternVLProcessor:
    """Return InternVL's processor, which splits images into tiles like Sa2VA's code.

    Args:
        config: Configuration of the VLM.
        directory: Directory with the tokenizer.
        chat_template: Jinja text.
    """
    side = config.vision_config.image_size[0]
    return InternVLProcessor(
        GotOcr2ImageProcessorPil(
            size={"height": side, "width": side},
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
            resample=PILImageResampling.BICUBIC,
            **INTERNVL_TILES,
        ),
        AutoTokenizer.from_pretrained(directory, extra_special_tokens=INTERNVL_TOKENS),
        InternVLVideoProcessor(),
        image_seq_length=config.image_seq_length,
        chat_template=chat_template,
    )


def split_qkv(tensors: dict[str, LazyTensor]) -> None:
    """Split, in place, the vision tower's fused projections into those of queries, keys and values."""
    for name in [name for name in tensors if ".vision_tower." in name and ".attention.qkv." in name]:
        joined = tensors.pop(name)
        shape = torch.Size((joined.shape[0] // 3, *joined.shape[1:]))
        for index, part in enumerate("qkv"):
            tensors[name.replace(".qkv.", f".{part}_proj.")] = LazyTensor(
                shape, joined.dtype, lambda joined=joined, index=index: joined.load().chunk(3)[index]
            )
