"""A LISA model from nothing: LLaVA and SAM of any size with random weights, and a tokenizer made from texts.

For the quick start, for tests and for trying a mixture before the real weights are there.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    SamImageProcessorPil,
)

from ..data.prompts import ANSWERS, EXPLANATORY_QUESTIONS, LONG_QUESTIONS, SHORT_QUESTIONS
from ..model.configuration_lisa import LisaConfig
from ..model.modeling_lisa import LisaForConditionalGeneration
from ..model.processing_lisa import IMAGE_TOKENS, SEG_TOKEN, LisaProcessor, add_tokens


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose frequent words are one token each and that spells all others."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def add_template_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Makes one token each of what LISA's templates put before and after a phrase, and before `[SEG]`.

    A small model attends evenly at first, and a phrase of two words would be lost among the twenty of a template.
    """
    questions = [text.split("{phrase}") for text in (*SHORT_QUESTIONS, *LONG_QUESTIONS, *EXPLANATORY_QUESTIONS)]
    texts = {text for before, after in questions for text in (before.rstrip(), after)}
    texts |= {text.split(SEG_TOKEN)[0].strip() for text in ANSWERS}
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in sorted(texts - {""})])


def build_from_scratch(
    vlm_config: dict, mask_config: dict, tokenizer, chat_template: str, language_model: str | None = None, **kwargs
) -> tuple[LisaForConditionalGeneration, LisaProcessor]:
    """Builds a LLaVA + SAM LISA with random weights and its processor.

    Args:
        language_model: directory of a causal language model whose weights the VLM's language model starts from.
        others: see [`build_config_and_processor`].
    """
    config, processor = build_config_and_processor(
        vlm_config, mask_config, tokenizer, chat_template, language_model, **kwargs
    )
    return build_model(config, language_model), processor


def build_model(config: LisaConfig, language_model: str | None = None) -> LisaForConditionalGeneration:
    """A model with random weights, or with those of a causal language model in its language model."""
    model = LisaForConditionalGeneration(config)
    if language_model is not None:
        causal_lm = AutoModelForCausalLM.from_pretrained(language_model)
        causal_lm.resize_token_embeddings(config.get_text_config().vocab_size)
        model.vlm.base_model.language_model.load_state_dict(causal_lm.base_model.state_dict())
        model.get_output_embeddings().load_state_dict(causal_lm.get_output_embeddings().state_dict())
        model.tie_weights()
    return model


def build_config_and_processor(
    vlm_config: dict, mask_config: dict, tokenizer, chat_template: str, language_model: str | None = None, **kwargs
) -> tuple[LisaConfig, LisaProcessor]:
    """The configuration of a LLaVA + SAM LISA and its processor.

    Args:
        vlm_config: fields of `LlavaConfig`, with CLIP-like `vision_config` and any `text_config`; the vocabulary and
            image token follow from the tokenizer.
        mask_config: fields of `SamConfig`; one `image_size` and `patch_size` for its parts is enough, in
            `vision_config`.
        tokenizer: gets `<image>`, `[SEG]` and, for the templates that use them, `<im_start>` and `<im_end>`.
        chat_template: Jinja text.
        language_model: directory of a causal language model whose configuration `text_config` then is.
        kwargs: further fields of [`LisaConfig`].
    """
    tokenizer.add_tokens([AddedToken("<image>", normalized=False, special=True)])
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", normalized=False, special=True)})
    add_tokens(tokenizer, [SEG_TOKEN, *(token for token in IMAGE_TOKENS if token in chat_template)])
    if language_model:
        text_config = AutoConfig.from_pretrained(language_model).to_dict()
    else:
        text_config = vlm_config["text_config"]
    config = LisaConfig(
        vlm_config=_vlm_config({**vlm_config, "text_config": text_config}, tokenizer),
        mask_config=_mask_config(mask_config),
        seg_token_id=tokenizer.convert_tokens_to_ids(SEG_TOKEN),
        **kwargs,
    )
    return config, _processor(config, tokenizer, chat_template)


def _vlm_config(fields: dict, tokenizer) -> PreTrainedConfig:
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
    """Gives the prompt encoder and the decoder the sizes that follow from the image encoder's."""
    vision = fields["vision_config"]
    sizes = {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    width = {"hidden_size": vision["output_channels"]}
    parts = {
        "vision_config": {"num_pos_feats": vision["output_channels"] // 2, **vision},
        "prompt_encoder_config": {**sizes, **width, **fields.get("prompt_encoder_config", {})},
        "mask_decoder_config": {**width, **fields.get("mask_decoder_config", {})},
    }
    return AutoConfig.for_model(**{"model_type": "sam", **fields, **parts})


def _processor(config: LisaConfig, tokenizer, chat_template: str) -> LisaProcessor:
    clip, side = config.vlm_config.vision_config, config.mask_config.vision_config.image_size
    vlm_processor = LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": clip.image_size}, crop_size={"height": clip.image_size, "width": clip.image_size}
        ),
        tokenizer,
        patch_size=clip.patch_size,
        vision_feature_select_strategy=config.vlm_config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    mask_image_processor = SamImageProcessorPil(size={"longest_edge": side}, pad_size={"height": side, "width": side})
    return LisaProcessor(vlm_processor=vlm_processor, mask_image_processor=mask_image_processor)


def row_texts(rows) -> Iterable[str]:
    """All texts of rows: what [`train_tokenizer`] learns its words from."""
    # As often as they are used, roughly; a word that is seen once is not worth a token.
    yield from ["USER: ASSISTANT:"] * 100
    for row in rows.remove_columns("image"):
        yield from (phrase for target in row["targets"] for phrase in target["phrases"])
        yield from (message["content"] for message in row["messages"])
        if row["explanation"]:
            yield row["explanation"]
