"""Original LISA checkpoints become `LisaForConditionalGeneration`: LLaVA's keys, SAM's, and the projector between."""

from transformers import AddedToken, CLIPVisionConfig, LlavaProcessor, SamImageProcessorPil

from ..configuration_lisa import LisaConfig
from ..mask_backbone import padded_side
from ..processing_lisa import SEG_TOKEN, LisaProcessor, add_tokens
from . import convert_state_dict, nest
from .llava import LLAVA_KEY_TABLE, append_vocabulary_rows, complete_projector, llava_config
from .sam import SAM_KEY_TABLE, sam_config


SAM_PREFIX = "model.visual_model."

LISA_KEY_TABLE = [
    *nest(LLAVA_KEY_TABLE, "", "vlm."),
    *nest(SAM_KEY_TABLE, SAM_PREFIX, "mask_model."),
    (r"model\.text_hidden_fcs\.0\.0\.(weight|bias)", r"seg_projector.linear_1.\1"),
    (r"model\.text_hidden_fcs\.0\.2\.(weight|bias)", r"seg_projector.linear_2.\1"),
]

# Tokens that the original's training script adds, in this order, and those that only this project needs.
LISA_TOKENS = (SEG_TOKEN, "<im_start>", "<im_end>")
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"


def convert_lisa_state_dict(state_dict: dict) -> dict:
    """Tensors of [`LisaForConditionalGeneration`] from those of the original `LISAForCausalLM`, merged and whole."""
    converted = convert_state_dict(state_dict, LISA_KEY_TABLE)
    complete_projector(converted, prefix="vlm.")
    append_vocabulary_rows(converted, prefix="vlm.")
    return converted


def lisa_config(
    original_config: dict, state_dict: dict, vision_config: CLIPVisionConfig, seg_token_id: int
) -> LisaConfig:
    """Configuration of the converted model.

    Args:
        original_config: content of the original's `config.json`.
        state_dict: the original's tensors; only names and shapes are read.
        vision_config: of the CLIP tower that `original_config["mm_vision_tower"]` names.
        seg_token_id: id of `[SEG]` in the original's tokenizer.
    """
    vlm_config = llava_config(original_config, state_dict, vision_config)
    sam_state = {key[len(SAM_PREFIX) :]: value for key, value in state_dict.items() if key.startswith(SAM_PREFIX)}
    return LisaConfig(
        vlm_config=vlm_config,
        mask_config=sam_config(sam_state),
        seg_token_id=seg_token_id,
        # The original's softmax is over its own vocabulary: the two appended rows must not take part.
        suppress_tokens=[vlm_config.image_token_id, vlm_config.text_config.pad_token_id],
    )


def lisa_processor(config: LisaConfig, tokenizer, clip_image_processor, chat_template: str) -> LisaProcessor:
    """Processor of the converted model.

    Args:
        config: as [`lisa_config`] returns it.
        tokenizer: the original's LlamaTokenizer, with or without LISA's tokens; tokens are added in place.
        clip_image_processor: of the original's CLIP tower.
        chat_template: Jinja template of LISA's conversations (`llava_v1` or `llava_llama_2`).

    Raises:
        ValueError: the ids of the tokenizer and of the configuration differ.
    """
    add_tokens(tokenizer, LISA_TOKENS)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in (IMAGE_TOKEN, PAD_TOKEN)])
    tokenizer.pad_token = PAD_TOKEN
    expected = [config.seg_token_id, config.vlm_config.image_token_id, config.get_text_config().pad_token_id]
    found = tokenizer.convert_tokens_to_ids([SEG_TOKEN, IMAGE_TOKEN, PAD_TOKEN])
    if found != expected:
        raise ValueError(
            f"The tokenizer gives {SEG_TOKEN}, {IMAGE_TOKEN}, {PAD_TOKEN} the ids {found}, the model {expected}: "
            "the tokenizer is not the one that this checkpoint was trained with."
        )
    strategy = config.vlm_config.vision_feature_select_strategy
    vlm_processor = LlavaProcessor(
        clip_image_processor,
        tokenizer,
        patch_size=config.vlm_config.vision_config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=chat_template,
    )
    side = padded_side(config.mask_config)
    mask_image_processor = SamImageProcessorPil(size={"longest_edge": side}, pad_size={"height": side, "width": side})
    return LisaProcessor(vlm_processor=vlm_processor, mask_image_processor=mask_image_processor)
