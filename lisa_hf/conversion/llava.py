"""Original LLaVA (v1, v1.1, Llama-2, v1.5) becomes `LlavaForConditionalGeneration`."""

import json
import logging
import re
from pathlib import Path

import torch
from transformers import (
    AddedToken,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from ..chat_templates import load_chat_template
from ..model.processing_lisa import add_tokens
from .checkpoints import LazyTensor
from .key_tables import Shapes, convert_state_dict
from .saving import ConvertedModel, build_without_weights


logger = logging.getLogger(__name__)

LLAVA_KEY_TABLE = [
    (r"lm_head\.weight", "lm_head.weight"),
    (r"model\.embed_tokens\.weight", "model.language_model.embed_tokens.weight"),
    (r"model\.norm\.weight", "model.language_model.norm.weight"),
    (
        r"model\.layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj|(?:input|post_attention)_layernorm)"
        r"\.weight",
        r"model.language_model.layers.\1.\2.weight",
    ),
    (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", None),  # computed from the configuration
    # One linear layer (v1), or two with GELU between them (v1.5). See `complete_projector` for the former.
    (r"model\.mm_projector\.(?:0\.)?(weight|bias)", r"model.multi_modal_projector.linear_1.\1"),
    (r"model\.mm_projector\.2\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1"),
    (
        r"model\.vision_tower\.vision_tower\.vision_model\.(embeddings\.class_embedding"
        r"|embeddings\.(?:patch|position)_embedding\.weight|(?:pre_layrnorm|post_layernorm)\.(?:weight|bias)"
        r"|encoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12]|layer_norm[12])\.(?:weight|bias))",
        r"model.vision_tower.\1",
    ),
    (r"model\.vision_tower\.vision_tower\.vision_model\.embeddings\.position_ids", None),  # 0, 1, 2, ...
]

# Fields of the original configuration that LlamaConfig has under the same name.
TEXT_CONFIG_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "bos_token_id",
    "eos_token_id",
)
# LLaVA's names for what is taken of CLIP's output: with or without the class token.
FEATURE_SELECT_STRATEGIES = {"patch": "default", "cls_patch": "full"}
VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"


def convert_llava(
    tensors: dict[str, LazyTensor], directory: Path, vision_tower: str | None = None, chat_template: str | None = None
) -> ConvertedModel:
    """`LlavaForConditionalGeneration` with its processor.

    Args:
        tensors: of the original, with or without its CLIP tower.
        directory: with the original's `config.json` and tokenizer.
        vision_tower: directory or Hub id of the CLIP tower; by default the one that `config.json` names.
        chat_template: name of one of this package's templates, or a Jinja file; see [`choose_chat_template`].
    """
    original_config = read_config(directory)
    vision_config, image_processor = load_vision_settings(original_config, vision_tower)
    if original_config.get("image_aspect_ratio") == "pad":  # v1.5 pads images to squares, in the mean colour
        image_processor = LlavaImageProcessorPil(**image_processor.to_dict() | {"do_pad": True})
    shapes = Shapes.of(tensors)
    tokenizer = load_tokenizer(directory, llava_tokens(original_config), shapes["model.embed_tokens.weight"][0])
    config = llava_config(original_config, tensors, vision_config, tokenizer)
    model = build_without_weights(LlavaForConditionalGeneration, config)
    model.generation_config = generation_config(config, suppress_tokens=untrained_tokens(tensors, tokenizer))
    template = chat_template or choose_chat_template(original_config, directory, shapes)
    return ConvertedModel(
        model=model,
        tensors=convert_llava_state_dict(add_vision_tower(tensors, original_config, vision_tower), len(tokenizer)),
        processor=llava_processor(config, tokenizer, image_processor, render_template(template, original_config)),
    )


def convert_llava_state_dict(state_dict: dict[str, LazyTensor], vocab_size: int) -> dict[str, LazyTensor]:
    """Tensors of [`LlavaForConditionalGeneration`], whose vocabulary has `vocab_size` rows."""
    converted = convert_state_dict(state_dict, LLAVA_KEY_TABLE)
    complete_projector(converted)
    append_vocabulary_rows(converted, vocab_size)
    return converted


# ---- configuration --------------------------------------------------------------------------------------------------


def read_config(directory: Path) -> dict:
    """The content of the original's `config.json`."""
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: expected the original model's configuration and tokenizer beside it.")
    original_config = json.loads(path.read_text())
    if "mm_vision_select_layer" not in original_config:
        raise ValueError(
            f"{path} has no mm_vision_select_layer: expected an original LLaVA or LISA, found "
            f"{original_config.get('architectures')}. What is in transformers' format needs no conversion."
        )
    return original_config


def llava_config(original_config: dict, state_dict: dict, vision_config: CLIPVisionConfig, tokenizer) -> LlavaConfig:
    """Configuration of the converted model.

    Args:
        original_config: content of the original's `config.json`.
        state_dict: the original's tensors; only names and shapes are read.
        vision_config: of the CLIP tower.
        tokenizer: as [`load_tokenizer`] returns it.
    """
    shapes = Shapes.of(state_dict)
    text_config = {field: original_config[field] for field in TEXT_CONFIG_FIELDS if field in original_config}
    num_patches = (vision_config.image_size // vision_config.patch_size) ** 2
    strategy = FEATURE_SELECT_STRATEGIES[original_config.get("mm_vision_select_feature", "patch")]
    return LlavaConfig(
        text_config=LlamaConfig(**text_config, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id),
        vision_config=vision_config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=num_patches + (strategy == "full"),
        # Two layers with the identity between them and an identity as the second are one linear layer.
        projector_hidden_act="linear" if "model.mm_projector.weight" in shapes else "gelu",
        vision_feature_select_strategy=strategy,
        vision_feature_layer=original_config["mm_vision_select_layer"],
        tie_word_embeddings=False,
    )


def generation_config(config: LlavaConfig, suppress_tokens: list[int]) -> GenerationConfig:
    """Begin, end and padding of the language model, and the tokens that it never learned."""
    text = config.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        suppress_tokens=suppress_tokens,
    )


# ---- tokenizer and processor ----------------------------------------------------------------------------------------


def llava_tokens(original_config: dict) -> list[str]:
    """Tokens that LLaVA's loader adds to the tokenizer, in its order."""
    tokens = ["<im_patch>"] if original_config.get("mm_use_im_patch_token", True) else []
    return tokens + (["<im_start>", "<im_end>"] if original_config.get("mm_use_im_start_end", False) else [])


def load_tokenizer(directory: Path, new_tokens: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """The original's tokenizer, with the tokens that its code adds and with two that only this project needs.

    The original knows `<image>` as the number -200 and pads with `<unk>`. Here both are tokens behind its vocabulary:
    see [`append_vocabulary_rows`].

    Args:
        new_tokens: added in this order, as long as the model has rows for them.
        vocab_size: rows of the original's embeddings.

    Raises:
        ValueError: the tokenizer is not the one of this model.
    """
    if not (directory / "tokenizer.model").is_file():
        raise ValueError(f"{directory / 'tokenizer.model'} is missing: expected the original's tokenizer.")
    tokenizer = LlamaTokenizer.from_pretrained(directory)
    for token in new_tokens:
        if len(tokenizer) < vocab_size:
            tokenizer.add_tokens([token])
    known = [token for token in new_tokens if token in tokenizer.get_vocab()]
    # The original's slow tokenizer lets every token that was added as plain text swallow the spaces around it.
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    add_tokens(tokenizer, {*added, *known})
    if len(tokenizer) < vocab_size or any(tokenizer.convert_tokens_to_ids(token) >= vocab_size for token in known):
        raise ValueError(
            f"The tokenizer in {directory} has {len(tokenizer)} tokens, with {known or 'none'} of {new_tokens}; the "
            f"model has {vocab_size} rows. Give the tokenizer that this checkpoint was trained with."
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in (IMAGE_TOKEN, PAD_TOKEN)])
    # LlamaTokenizer forgets `legacy` when it is saved and, loaded again, splits the text behind a token otherwise.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=PAD_TOKEN,
        padding_side=tokenizer.padding_side,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
    )


def untrained_tokens(state_dict: dict, tokenizer) -> list[int]:
    """Ids behind the original's vocabulary: its softmax did not know them, so they must not be predicted."""
    return list(range(Shapes.of(state_dict)["model.embed_tokens.weight"][0], len(tokenizer)))


def choose_chat_template(original_config: dict, directory: Path, shapes: Shapes) -> str:
    """The template of a LLaVA: Llama 2's by the model's name, as in LLaVA's code; otherwise v1.5's or v1's."""
    name = "/".join([original_config.get("_name_or_path", ""), *directory.resolve().parts[-3:]]).lower()
    if re.search(r"llama-?_?2", name):
        return "llava_llama_2"
    return "llava_v1" if "model.mm_projector.weight" in shapes else "llava_1_5"


def render_template(name: str, original_config: dict) -> str:
    """Jinja text of a template, without `<im_start>` and `<im_end>` if the model was trained without them."""
    logger.info("Chat template: %s", name)
    template = load_chat_template(name)
    if original_config.get("mm_use_im_start_end", False):
        return template
    return template.replace("<im_start>", "").replace("<im_end>", "")


def llava_processor(config: LlavaConfig, tokenizer, image_processor, chat_template: str) -> LlavaProcessor:
    """Processor of the converted model; `chat_template` is Jinja text."""
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=chat_template,
    )


# ---- the CLIP tower -------------------------------------------------------------------------------------------------


def load_vision_settings(
    original_config: dict, vision_tower: str | None
) -> tuple[CLIPVisionConfig, CLIPImageProcessorPil]:
    """Configuration and image processor of the CLIP tower."""
    name = _vision_tower_name(original_config, vision_tower)
    try:
        return CLIPVisionConfig.from_pretrained(name), CLIPImageProcessorPil.from_pretrained(name)
    except OSError as error:
        raise ValueError(
            f"The CLIP tower '{name}' cannot be loaded. Give a directory with its config.json, "
            f"preprocessor_config.json and weights as the vision tower. ({error})"
        ) from error


def add_vision_tower(
    tensors: dict[str, LazyTensor], original_config: dict, vision_tower: str | None
) -> dict[str, LazyTensor]:
    """The original's tensors, with those of the CLIP tower if it left them out."""
    if any(name.startswith(VISION_PREFIX) for name in tensors):
        return tensors
    tower = CLIPVisionModel.from_pretrained(_vision_tower_name(original_config, vision_tower))
    return tensors | {VISION_PREFIX + name: LazyTensor.of(tensor) for name, tensor in tower.state_dict().items()}


def _vision_tower_name(original_config: dict, vision_tower: str | None) -> str:
    name = vision_tower or original_config.get("mm_vision_tower")
    if name is None:
        raise ValueError("config.json names no CLIP tower (mm_vision_tower): give its directory or Hub id.")
    return name


# ---- tensors that the original lacks --------------------------------------------------------------------------------


def complete_projector(state_dict: dict[str, LazyTensor], prefix: str = "") -> None:
    """Adds, in place, an identity as the second layer of a projector that has only one (LLaVA v1).

    Args:
        state_dict: with converted keys, each of which begins with `prefix`.
    """
    name = f"{prefix}model.multi_modal_projector."
    if f"{name}linear_1.weight" in state_dict and f"{name}linear_2.weight" not in state_dict:
        weight = state_dict[f"{name}linear_1.weight"]
        width = weight.shape[0]
        state_dict[f"{name}linear_2.weight"] = LazyTensor(
            torch.Size((width, width)), weight.dtype, lambda: torch.eye(width)
        )
        state_dict[f"{name}linear_2.bias"] = LazyTensor(torch.Size((width,)), weight.dtype, lambda: torch.zeros(width))


def append_vocabulary_rows(state_dict: dict[str, LazyTensor], vocab_size: int, prefix: str = "") -> None:
    """Appends, in place, rows of zeros to the embeddings and to `lm_head`, for tokens that the original lacks.

    `<image>` is replaced by image features and `<pad>` is masked, so neither row is ever read; that the new tokens are
    never predicted is up to the configuration (`suppress_tokens`).

    Args:
        state_dict: with converted keys, each of which begins with `prefix`.
        vocab_size: rows afterwards.
    """
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if prefix + name in state_dict:
            state_dict[prefix + name] = _with_rows(state_dict[prefix + name], vocab_size)


def _with_rows(weight: LazyTensor, num_rows: int) -> LazyTensor:
    def load() -> torch.Tensor:
        rows = weight.load()
        return torch.cat([rows, rows.new_zeros(num_rows - len(rows), rows.shape[1])])

    return LazyTensor(torch.Size((num_rows, weight.shape[1])), weight.dtype, load)
