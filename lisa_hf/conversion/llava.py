"""Convert original LLaVA checkpoints (v1, v1.1, Llama 2, v1.5) to `LlavaForConditionalGeneration`."""

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
from .key_tables import Shapes, convert_state_dict
from .lazy_tensors import LazyTensor
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
    # One linear layer (v1, see `complete_projector`), or two with GELU between them (v1.5).
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

# Fields of the original configuration that keep their names in LlamaConfig.
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
# LLaVA's names for selecting CLIP's output tokens: without or with the class token.
FEATURE_SELECT_STRATEGIES = {"patch": "default", "cls_patch": "full"}
VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"


def convert_llava(
    tensors: dict[str, LazyTensor], directory: Path, vision_tower: str | None = None, chat_template: str | None = None
) -> ConvertedModel:
    """Convert an original LLaVA to `LlavaForConditionalGeneration` with its processor.

    Args:
        tensors: Tensors of the original, with or without its CLIP tower.
        directory: Directory with the original's `config.json` and tokenizer.
        vision_tower: Directory or Hub id of the CLIP tower; by default the one named in `config.json`.
        chat_template: Name of one of this package's templates, or a Jinja file; by default as LLaVA's code chooses,
            see [`choose_chat_template`].
    """
    # Read settings and tokenizer.
    original_config = read_original_config(directory)
    vision_tower = vision_tower or original_config.get("mm_vision_tower")
    vision_config, image_processor = load_vision_settings(vision_tower)
    if original_config.get("image_aspect_ratio") == "pad":  # v1.5 pads images to squares with the mean color.
        image_processor = LlavaImageProcessorPil(**image_processor.to_dict() | {"do_pad": True})
    shapes = Shapes.of(tensors)
    tokenizer = load_original_tokenizer(
        directory, llava_tokens(original_config), shapes["model.embed_tokens.weight"][0]
    )
    # Build the model without weights, then rename the original's tensors.
    config = llava_config(original_config, tensors, vision_config, tokenizer)
    model = build_without_weights(LlavaForConditionalGeneration, config)
    model.generation_config = generation_config(config, suppress_tokens=untrained_tokens(tensors, tokenizer))
    tensors = add_vision_tower(tensors, vision_tower)
    template = chat_template or choose_chat_template(original_config, directory, shapes)
    return ConvertedModel(
        model=model,
        tensors=convert_llava_tensors(tensors, len(tokenizer)),
        processor=llava_processor(config, tokenizer, image_processor, render_template(template, original_config)),
    )


def convert_llava_tensors(
    tensors: dict[str, LazyTensor], vocab_size: int, table: list = LLAVA_KEY_TABLE, prefix: str = ""
) -> dict[str, LazyTensor]:
    """Rename a LLaVA's tensors and add the missing ones.

    Args:
        tensors: Tensors in the original's names.
        vocab_size: Number of rows of the converted vocabulary.
        table: Key table that applies.
        prefix: Prefix of the new names of a LLaVA inside a larger model.
    """
    converted = convert_state_dict(tensors, table)
    complete_projector(converted, prefix)
    append_vocabulary_rows(converted, vocab_size, prefix)
    return converted


# ---- configuration --------------------------------------------------------------------------------------------------


def find_config(checkpoint: Path) -> Path:
    """Return the nearest directory with a configuration: the checkpoint, or one of the three above it.

    Raises:
        ValueError: None of them has one.
    """
    for directory in (checkpoint.resolve(), *checkpoint.resolve().parents[:3]):
        if (directory / "config.json").is_file():
            return directory
    raise ValueError(
        f"{checkpoint}: expected config.json and the tokenizer in it or above it, got neither. A training run has "
        "none: name the LLaVA that it started from as --base."
    )


def read_original_config(directory: Path) -> dict:
    """Return the content of the original's `config.json`.

    Raises:
        ValueError: It is missing, or not an original LLaVA's or LISA's.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"Expected the original model's configuration and tokenizer, got no {path}. Copy both there.")
    original_config = json.loads(path.read_text())
    if "mm_vision_select_layer" not in original_config:
        raise ValueError(
            f"{path}: expected the mm_vision_select_layer of an original LLaVA or LISA, got "
            f"{original_config.get('architectures')} without it. A model in transformers' format needs no conversion: "
            "use it as it is."
        )
    return original_config


def llava_config(original_config: dict, state_dict: dict, vision_config: CLIPVisionConfig, tokenizer) -> LlavaConfig:
    """Return the configuration of the converted model.

    Args:
        original_config: Content of the original's `config.json`.
        state_dict: Tensors of the original; only their names and shapes are read.
        vision_config: Configuration of the CLIP tower.
        tokenizer: Tokenizer from [`load_original_tokenizer`].
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
        # One linear layer equals two with the identity between them, the second being an identity too.
        projector_hidden_act="linear" if "model.mm_projector.weight" in shapes else "gelu",
        vision_feature_select_strategy=strategy,
        vision_feature_layer=original_config["mm_vision_select_layer"],
        tie_word_embeddings=False,
    )


def generation_config(config: LlavaConfig, suppress_tokens: list[int]) -> GenerationConfig:
    """Return generation settings with the language model's special tokens and the tokens that it never learned."""
    text = config.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        suppress_tokens=suppress_tokens,
    )


# ---- tokenizer and processor ----------------------------------------------------------------------------------------


def llava_tokens(original_config: dict) -> list[str]:
    """Return the tokens that LLaVA's loader adds to the tokenizer, in order."""
    tokens = ["<im_patch>"] if original_config.get("mm_use_im_patch_token", True) else []
    return tokens + (["<im_start>", "<im_end>"] if original_config.get("mm_use_im_start_end", False) else [])


def load_original_tokenizer(directory: Path, new_tokens: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Load the original's tokenizer and add the tokens that its code adds, then `<image>` and `<pad>`.

    The original represents `<image>` by the number -200 and pads with `<unk>`. Here both are tokens after its
    vocabulary, see [`append_vocabulary_rows`].

    Args:
        directory: Directory with `tokenizer.model`.
        new_tokens: Tokens to add, in order, while the model has rows for them.
        vocab_size: Number of rows of the original's embeddings.

    Raises:
        ValueError: The tokenizer is missing, or belongs to another model.
    """
    if not (directory / "tokenizer.model").is_file():
        raise ValueError(f"Expected the original's tokenizer, got no {directory / 'tokenizer.model'}. Copy it there.")
    tokenizer = LlamaTokenizer.from_pretrained(directory)
    for token in new_tokens:
        if len(tokenizer) < vocab_size:
            tokenizer.add_tokens([token])
    known = [token for token in new_tokens if token in tokenizer.get_vocab()]
    # In the original's slow tokenizer, tokens added as plain text strip the spaces around them.
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    add_tokens(tokenizer, {*added, *known})
    if len(tokenizer) < vocab_size or any(tokenizer.convert_tokens_to_ids(token) >= vocab_size for token in known):
        raise ValueError(
            f"Expected a tokenizer for {vocab_size} rows, got {len(tokenizer)} tokens in {directory}, with "
            f"{known or 'none'} of {new_tokens}. Name the tokenizer that this checkpoint was trained with."
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in (IMAGE_TOKEN, PAD_TOKEN)])
    # LlamaTokenizer does not save `legacy`, and reloaded without it splits text after a token differently.
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
    """Return the ids after the original's vocabulary, which it never learned and must not predict."""
    return list(range(Shapes.of(state_dict)["model.embed_tokens.weight"][0], len(tokenizer)))


def choose_chat_template(original_config: dict, directory: Path, shapes: Shapes) -> str:
    """Return a LLaVA's template like LLaVA's code: Llama 2's by the model's name, otherwise v1.5's or v1's."""
    name = "/".join([original_config.get("_name_or_path", ""), *directory.resolve().parts[-3:]]).lower()
    if re.search(r"llama-?_?2", name):
        return "llava_llama_2"
    return "llava_v1" if "model.mm_projector.weight" in shapes else "llava_1_5"


def render_template(name: str, original_config: dict) -> str:
    """Return a template's Jinja text, without `<im_start>` and `<im_end>` if the model was trained without them."""
    logger.info("Chat template: %s", name)
    template = load_chat_template(name)
    if original_config.get("mm_use_im_start_end", False):
        return template
    return template.replace("<im_start>", "").replace("<im_end>", "")


def llava_processor(config: LlavaConfig, tokenizer, image_processor, chat_template: str) -> LlavaProcessor:
    """Return the processor of the converted model; `chat_template` is Jinja text."""
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=chat_template,
    )


# ---- the CLIP tower -------------------------------------------------------------------------------------------------


def load_vision_settings(vision_tower: str | None) -> tuple[CLIPVisionConfig, CLIPImageProcessorPil]:
    """Load the configuration and image processor of the CLIP tower, a directory or Hub id.

    Raises:
        ValueError: It is None, or cannot be loaded.
    """
    if vision_tower is None:
        raise ValueError("Expected mm_vision_tower in config.json, got none. Name the CLIP tower as --vision_tower.")
    try:
        return CLIPVisionConfig.from_pretrained(vision_tower), CLIPImageProcessorPil.from_pretrained(vision_tower)
    except OSError as error:
        raise ValueError(
            f"Expected a CLIP tower, got '{vision_tower}', which cannot be loaded ({error}). Name a directory with "
            "its config.json, preprocessor_config.json and weights as --vision_tower."
        ) from error


def add_vision_tower(tensors: dict[str, LazyTensor], vision_tower: str) -> dict[str, LazyTensor]:
    """Add the CLIP tower's tensors if the original lacks them."""
    if any(name.startswith(VISION_PREFIX) for name in tensors):
        return tensors
    tower = CLIPVisionModel.from_pretrained(vision_tower)
    tower_tensors = {VISION_PREFIX + name: LazyTensor.from_tensor(value) for name, value in tower.state_dict().items()}
    return tensors | tower_tensors


# ---- tensors that the original lacks --------------------------------------------------------------------------------


def complete_projector(state_dict: dict[str, LazyTensor], prefix: str = "") -> None:
    """Add, in place, an identity as the second layer of a projector that has only one (LLaVA v1).

    Args:
        state_dict: Tensors with converted keys.
        prefix: Prefix of every key.
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
    """Append, in place, rows of zeros to the embeddings and `lm_head` for tokens that the original lacks.

    Neither row is ever read: image features replace `<image>`, and `<pad>` is masked. The configuration's
    `suppress_tokens` keeps the model from predicting them.

    Args:
        state_dict: Tensors with converted keys.
        vocab_size: Number of rows afterwards.
        prefix: Prefix of every key.
    """
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if prefix + name in state_dict:
            state_dict[prefix + name] = _with_rows(state_dict[prefix + name], vocab_size)


def _with_rows(weight: LazyTensor, num_rows: int) -> LazyTensor:
    def load() -> torch.Tensor:
        rows = weight.load()
        return torch.cat([rows, rows.new_zeros(num_rows - len(rows), rows.shape[1])])

    return LazyTensor(torch.Size((num_rows, weight.shape[1])), weight.dtype, load)
