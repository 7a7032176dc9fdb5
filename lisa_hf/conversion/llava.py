"""Original LLaVA (v1, v1.1, Llama-2, v1.5) becomes `LlavaForConditionalGeneration`."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig


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


def llava_config(original_config: dict, state_dict: dict, vision_config: CLIPVisionConfig) -> LlavaConfig:
    """Configuration of the converted model.

    The original knows `<image>` as the number -200 and pads with `<unk>`. Here both are tokens, which get the two rows
    after the original's vocabulary of V: `<image>` is V, `<pad>` is V + 1 (see [`append_vocabulary_rows`]).

    Args:
        original_config: content of the original's `config.json`.
        state_dict: the original's tensors; only names and shapes are read.
        vision_config: of the CLIP tower that `original_config["mm_vision_tower"]` names.
    """
    vocab_size = len(state_dict["model.embed_tokens.weight"])
    text_config = {field: original_config[field] for field in TEXT_CONFIG_FIELDS if field in original_config}
    num_patches = (vision_config.image_size // vision_config.patch_size) ** 2
    strategy = FEATURE_SELECT_STRATEGIES[original_config.get("mm_vision_select_feature", "patch")]
    return LlavaConfig(
        text_config=LlamaConfig(**text_config, vocab_size=vocab_size + 2, pad_token_id=vocab_size + 1),
        vision_config=vision_config,
        image_token_index=vocab_size,
        image_seq_length=num_patches + (strategy == "full"),
        # Two layers with the identity between them and an identity as the second are one linear layer.
        projector_hidden_act="linear" if "model.mm_projector.weight" in state_dict else "gelu",
        vision_feature_select_strategy=strategy,
        vision_feature_layer=original_config["mm_vision_select_layer"],
    )


def complete_projector(state_dict: dict, prefix: str = "") -> None:
    """Adds, in place, an identity as the second layer of a projector that has only one (LLaVA v1).

    Args:
        state_dict: with converted keys, each of which begins with `prefix`.
    """
    name = f"{prefix}model.multi_modal_projector."
    if f"{name}linear_2.weight" not in state_dict:
        weight = state_dict[f"{name}linear_1.weight"]
        state_dict[f"{name}linear_2.weight"] = torch.eye(len(weight), dtype=weight.dtype)
        state_dict[f"{name}linear_2.bias"] = torch.zeros(len(weight), dtype=weight.dtype)


def append_vocabulary_rows(state_dict: dict, num_rows: int = 2, prefix: str = "") -> None:
    """Appends, in place, rows of zeros to the embeddings and to `lm_head`, for tokens that the original lacks.

    `<image>` is replaced by image features and `<pad>` is masked, so neither row is ever read; that the new tokens are
    never predicted is up to the configuration (`suppress_tokens`).

    Args:
        state_dict: with converted keys, each of which begins with `prefix`.
    """
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        weight = state_dict[prefix + name]
        state_dict[prefix + name] = torch.cat([weight, weight.new_zeros(num_rows, weight.shape[1])])
