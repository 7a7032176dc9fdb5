"""The config and the processor of a randomly initialized LLaVA + SAM LISA of any size.

For the quick start, for tests, and to try a data mixture before the real weights are downloaded.
"""

from transformers import (
    AddedToken,
    AutoConfig,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    SamImageProcessorPil,
)

from ..model.configuration_lisa import LisaConfig
from ..model.processing_lisa import IMAGE_TOKENS, SEG_TOKEN, LisaProcessor, add_tokens


def tiny_config_and_processor(
    vlm_config: dict,
    mask_config: dict,
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str,
    language_model: str | None = None,
    **kwargs,
) -> tuple[LisaConfig, LisaProcessor]:
    """Build the config and the processor of a LLaVA + SAM LISA from a few sizes.

    Args:
        vlm_config: Fields of `LlavaConfig` with a CLIP-like `vision_config` and any `text_config`. The vocabulary size
            and the image token are taken from the tokenizer.
        mask_config: Fields of `SamConfig`. Its `vision_config` gives `image_size` and `patch_size` for all parts.
        tokenizer: Tokenizer that gets `<image>`, `[SEG]` and, if the template has them, `<im_start>` and `<im_end>`.
        chat_template: Jinja text.
        language_model: Hub id or directory of a causal language model whose config replaces `text_config`.
        kwargs: Further fields of [`LisaConfig`].
    """
    tokenizer.add_tokens([AddedToken("<image>", normalized=False, special=True)])
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", normalized=False, special=True)})
    add_tokens(tokenizer, [SEG_TOKEN, *(token for token in IMAGE_TOKENS if token in chat_template)])
    if language_model:
        vlm_config = {**vlm_config, "text_config": AutoConfig.from_pretrained(language_model).to_dict()}
    config = LisaConfig(
        vlm_config=_vlm_config(vlm_config, tokenizer),
        mask_config=_mask_config(mask_config),
        seg_token_id=tokenizer.convert_tokens_to_ids(SEG_TOKEN),
        **kwargs,
    )
    return config, _processor(config, tokenizer, chat_template)


def _vlm_config(fields: dict, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    text_config = {
        **fields["text_config"],
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    fields = {"model_type": "llava", **fields, "text_config": text_config, "image_token_index": image_token_id}
    return AutoConfig.for_model(**fields)


def _mask_config(fields: dict) -> PreTrainedConfig:
    """Give the prompt encoder and the mask decoder the sizes that follow from the image encoder."""
    vision = fields["vision_config"]
    sizes = {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    width = {"hidden_size": vision["output_channels"]}
    parts = {
        "vision_config": {"num_pos_feats": vision["output_channels"] // 2, **vision},
        "prompt_encoder_config": {**sizes, **width, **fields.get("prompt_encoder_config", {})},
        "mask_decoder_config": {**width, **fields.get("mask_decoder_config", {})},
    }
    return AutoConfig.for_model(**{"model_type": "sam", **fields, **parts})


def _processor(config: LisaConfig, tokenizer: PreTrainedTokenizerFast, chat_template: str) -> LisaProcessor:
    clip, side = config.vlm_config.vision_config, config.mask_config.vision_config.image_size
    vlm_processor = LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": clip.image_size}, crop_size={"height": clip.image_size, "width": clip.image_size}
        ),
        tokenizer,
        patch_size=clip.patch_size,
        vision_feature_select_strategy=config.vlm_config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token, which LLaVA drops
        chat_template=chat_template,
    )
    mask_image_processor = SamImageProcessorPil(size={"longest_edge": side}, pad_size={"height": side, "width": side})
    return LisaProcessor(vlm_processor=vlm_processor, mask_image_processor=mask_image_processor)
