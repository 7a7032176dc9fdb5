"""Tiny VLMs of any type in transformers, and mask models, with their own processors; nothing is downloaded.

A configuration is the default of its class with small sizes, set by field name. `tiny_vlms.yaml` has these sizes, and
what a family needs in addition.
"""

import copy
import functools
import inspect
import re
from pathlib import Path

import transformers
import yaml
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from lisa_hf.from_scratch.tokenizer import train_tokenizer
from lisa_hf.model.processing_lisa import add_tokens


# The vocabulary of `tiny_vlms.yaml`, whose last 16 tokens may be for something other than text (Gemma 3n's encoders).
VOCAB_SIZE, NUM_TEXT_TOKENS = 128, 112
IMAGE_TOKEN_ID, IMAGE_START_ID, IMAGE_END_ID, SEG_TOKEN_ID = 120, 122, 123, 50
TEXTS = ["What is the red circle? Sure, it is . The and of a USER: ASSISTANT: user assistant model", "It is red."] * 9
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start>' + message.role + '\n' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ 'IMAGE' }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<end>\n{% endfor %}{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)
# Tokens that processors look for by these names of attributes of their tokenizers.
TOKEN_NAMES = (
    *("image", "video", "audio", "boi", "eoi", "boa", "eoa", "vision_start", "vision_end", "vision_bos", "vision_eos"),
    *("audio_bos", "audio_eos", "image_start", "image_end", "start_image", "end_image", "context_image"),
    *("video_start", "video_end", "image_break", "slice_start", "slice_end", "image_id_start", "image_id_end"),
    *("image_wrapper", "image_boundary", "img_line_break", "grid_bos", "grid_eos", "eof", "row", "document"),
)
# Types that are parts of others, or whose image processor is not in transformers' mapping.
SAME_IMAGE_PROCESSOR = {
    "fast_vlm": "paligemma",
    "glm4v_moe": "glm4v",
    "glm_ocr": "glm4v",
    "qwen2_5_omni_thinker": "qwen2_vl",
    "qwen3_omni_moe_thinker": "qwen2_vl",
    "qwen3_vl_moe": "qwen3_vl",
}
SAME_PROCESSOR = {
    "cosmos3_omni": "qwen3_vl",
    "glm_ocr": "glm4v",
    "glmga": "glm46v",
    "qwen2_5_omni_thinker": "qwen2_5_omni",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe",
}
MASK_MODELS = ("sam", "sam_hq", "sam2", "sam3_tracker", "edgetam")
MAX_STAGES = 4  # of a hierarchical encoder, whose lists have one entry per stage
_NOT_SIZES = {"id2label", "label2id", "transformers_version", "architectures", "dtype", "per_layer_config"}
_VOCABULARY_FIELDS = {"vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "vocab_offset"}


@functools.cache
def _table() -> dict:
    return yaml.safe_load((Path(__file__).parent / "tiny_vlms.yaml").read_text())


def family_options(model_type: str) -> dict:
    """Return a copy of a family's entry in `tiny_vlms.yaml`."""
    return copy.deepcopy(_table()["families"].get(model_type, {}))


# ---- configurations -------------------------------------------------------------------------------------------------


def tiny_vlm_config(model_type: str, processor: ProcessorMixin | None = None) -> PreTrainedConfig:
    """Return a tiny configuration of a VLM type.

    Args:
        model_type: Type of transformers' image-text-to-text mapping.
        processor: Processor whose vocabulary and special tokens the VLM gets, see [`tiny_vlm_processor`]. Default: a
            vocabulary of `VOCAB_SIZE` tokens with the image token `IMAGE_TOKEN_ID`.
    """
    options = family_options(model_type)
    fields = _merge(shrink(AutoConfig.for_model(model_type).to_dict()), options.get("config", {}))
    if processor is not None:
        _use_tokens(fields, processor)
        _merge(fields, _token_ids(options.get("token_ids", {}), processor.tokenizer))
    fields.pop("model_type", None)
    return AutoConfig.for_model(model_type, **fields)


def shrink(fields: dict) -> dict:
    """Return the fields of a configuration with small sizes, no dropout, and at most two layers of different kinds."""
    sizes = _table()["sizes"]
    num_layers = fields.get("num_hidden_layers") or fields.get("depth")
    small = {}
    for name, value in fields.items():
        if name in _NOT_SIZES or (value is None and name != "text_config"):
            continue
        if isinstance(value, dict) and not name.startswith("rope_"):
            small[name] = shrink(value)
        elif isinstance(value, float) and re.search(r"drop(out|_path|$)|layerdrop", name):
            small[name] = 0.0
        elif name in sizes and isinstance(value, (list, tuple)) == isinstance(sizes[name], list):
            small[name] = copy.deepcopy(sizes[name])
        elif isinstance(value, (list, tuple)) and len(value) == num_layers and num_layers > MAX_STAGES:
            kinds = [kind for index, kind in enumerate(value) if kind not in value[:index]]
            small[name] = (kinds[-2:] * 2)[:2]
        else:
            small[name] = copy.deepcopy(value)
    return small


def _merge(fields: dict, others: dict) -> dict:
    """Update the fields of a configuration, at any depth, and return it."""
    for name, value in others.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict) and not name.startswith("rope_"):
            _merge(fields[name], value)
        else:
            fields[name] = value
    return fields


def _use_tokens(fields: dict, processor: ProcessorMixin) -> None:
    """Give a configuration the vocabulary of a processor, and the ids of its special tokens by their names."""
    tokenizer = processor.tokenizer
    for name, value in fields.items():
        token = re.fullmatch(r"_?(\w+_token)_(id|index)", str(name))
        if isinstance(value, dict) and name != "vocabulary_map":
            _use_tokens(value, processor)
        elif name in _VOCABULARY_FIELDS and value >= NUM_TEXT_TOKENS:
            fields[name] = value + len(tokenizer) - NUM_TEXT_TOKENS
        elif token:
            ids = (getattr(owner, f"{token[1]}_id", None) for owner in (processor, tokenizer))
            fields[name] = next((id for id in ids if isinstance(id, int)), value)


def _token_ids(tokens, tokenizer):
    """Return ids of the tokens in a nested dict of lists."""
    if isinstance(tokens, dict):
        return {name: _token_ids(value, tokenizer) for name, value in tokens.items()}
    return tokenizer.convert_tokens_to_ids(tokens)


def tiny_mask_config(model_type: str) -> PreTrainedConfig:
    """Return a tiny configuration of a mask model type, one of `MASK_MODELS`."""
    return AutoConfig.for_model(model_type, **copy.deepcopy(_table()["mask_models"][model_type]))


# ---- processors -----------------------------------------------------------------------------------------------------


def tiny_image_processor(model_type: str):
    """Return the image processor of a VLM type for small images."""
    names = IMAGE_PROCESSOR_MAPPING_NAMES[SAME_IMAGE_PROCESSOR.get(model_type, model_type)]
    name = names.get("torchvision") or names["pil"] if isinstance(names, dict) else names
    return getattr(transformers, name)(**family_options(model_type).get("image_processor", {}))


def tiny_vlm_processor(model_type: str) -> ProcessorMixin:
    """Return the processor of a VLM type for small images, with a chat template and a small tokenizer.

    The tokenizer knows `[SEG]` and the family's special tokens: those that the code of its processor names.

    Raises:
        KeyError: If transformers' mapping has no processor for this type.
    """
    processor_class = getattr(transformers, PROCESSOR_MAPPING_NAMES[SAME_PROCESSOR.get(model_type, model_type)])
    options = family_options(model_type)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(TEXTS, vocab_size=300).backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={f"{name}_token": f"<{name}>" for name in TOKEN_NAMES} | options.get("tokens", {}),
    )
    tokenizer.add_tokens([*_tokens_named_in(processor_class), "<start>", "<end>"], special_tokens=True)
    add_tokens(tokenizer, lstrip=False)  # the prompt ends with a line break, see `from_vlm_mask_model_pretrained`
    parts = {"tokenizer": tokenizer, "image_processor": tiny_image_processor(model_type)}
    parameters = inspect.signature(processor_class.__init__).parameters
    if "video_processor" in parameters:
        parts["video_processor"] = _other_processor(VIDEO_PROCESSOR_MAPPING_NAMES, model_type, "Qwen2VLVideoProcessor")
    if "feature_extractor" in parameters:  # of audio
        default = "Gemma3nAudioFeatureExtractor"
        parts["feature_extractor"] = _other_processor(FEATURE_EXTRACTOR_MAPPING_NAMES, model_type, default)
    if "qformer_tokenizer" in parameters:
        parts["qformer_tokenizer"] = tokenizer
    processor = processor_class(**parts, **options.get("processor", {}))
    image_text = options.get("image_text") or str(
        getattr(processor, "image_placeholder_token", None) or getattr(processor, "image_token", None)
    )
    processor.chat_template = TEMPLATE.replace("IMAGE", image_text)
    return processor


def tiny_mask_image_processor(model_type: str):
    """Return the image processor of a mask model type, for the image size of [`tiny_mask_config`]."""
    side = tiny_mask_config(model_type).prompt_encoder_config.image_size
    size = {"height": side, "width": side}
    if model_type in ("sam", "sam_hq"):
        return transformers.SamImageProcessor(size={"longest_edge": side}, pad_size=size)
    return (
        transformers.Sam3ImageProcessor(size=size)
        if model_type == "sam3_tracker"
        else transformers.Sam2ImageProcessor(size=size)
    )


def _tokens_named_in(processor_class: type) -> list[str]:
    """Return what looks like a special token in the module of a processor, and its constants that name tokens."""
    source = Path(inspect.getsourcefile(processor_class)).read_text()
    literals = set(re.findall(r"""["'](<[^"'\s{}]+>|\[[A-Z_]+\]|\|[A-Z]+\|)["']""", source))
    constants = {
        value
        for name, value in inspect.getmembers(processor_class)
        if name.endswith("_TOKEN") and isinstance(value, str)
    }
    rows_of_crops = {f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)}
    return sorted(literals | constants | ({"<global-img>"} | rows_of_crops if "<row_" in source else set()))


def _other_processor(names: dict, model_type: str, default: str):
    name = names.get(SAME_PROCESSOR.get(model_type, model_type)) or default
    name = next(iter(name.values())) if isinstance(name, dict) else name
    return getattr(transformers, name)()
