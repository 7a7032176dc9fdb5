"""Special tokens in what users write are letters."""

import pytest
from fixtures.chat_templates import TEMPLATES, assert_special_tokens_are_letters, chatml, learned, make_processor
from fixtures.golden_model import GOLDEN
from fixtures.tiny_models import conversation, image, sam_image_processor
from fixtures.tiny_training import build_model
from transformers import AddedToken, AutoTokenizer, LlavaProcessor

from lisa_hf import LisaProcessor
from lisa_hf.model.conversation_text import ANSWER_MARK, CUT_MARK, escape_tokens, token_pattern, user_message
from lisa_hf.model.processing_lisa import add_tokens


@pytest.mark.parametrize("name", TEMPLATES)
def test_special_tokens_are_letters(name):
    template, between = TEMPLATES[name]
    processor = make_processor(template)
    for token in ("<think>", "</think>"):  # not special, but some templates write them
        assert (token in processor.template.special_tokens) == (token in template)
    assert_special_tokens_are_letters(processor, between)


def test_special_tokens_are_letters_for_sentencepiece_too(tmp_path):
    """A piece of a text gets no space before it."""
    _, processor = build_model()  # LLaVA 1's template
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    tokenizer.add_tokens([AddedToken("<image>", special=True), *("<im_start>", "<im_end>")])
    add_tokens(tokenizer)
    vlm_processor = LlavaProcessor(
        processor.vlm_processor.image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=processor.chat_template,
    )
    processor = LisaProcessor(vlm_processor, sam_image_processor())
    tokenizer.pad_token = tokenizer.unk_token
    (ids,) = processor.encode_conversations([image(9, 9)], [conversation("Is a</s>b [SEG] red?", "It is.")])[
        "input_ids"
    ]
    assert "USER:" in tokenizer.decode(ids) and "Is a</s>b [SEG] red?" in tokenizer.decode(ids)
    assert (ids == tokenizer.eos_token_id).sum() == 1 and (ids == processor.seg_token_id).sum() == 0
    assert (ids == tokenizer.bos_token_id).sum() == 1


def test_overlapping_tokens_are_escaped():
    pattern = token_pattern(["<a>", "><b", "!"])
    assert escape_tokens("x<a><b>!", pattern).replace(CUT_MARK, "|") == "x<|a>|<b>!"
    assert escape_tokens("nothing", token_pattern([])) == "nothing"


def test_marks_in_questions_are_left_out():
    """A text that has them must not look like the template's."""
    processor = make_processor(TEMPLATES["thought in the prompt only"][0])
    messages = conversation(f"What{ANSWER_MARK} is{CUT_MARK} it?", f"It{CUT_MARK} is{ANSWER_MARK} red.")
    ((before, label),) = learned(processor, processor.encode_conversations([image(9, 9)], [messages]))
    assert "What is it?" in processor.tokenizer.decode(before)
    assert processor.tokenizer.decode(label) == "It is red.<|im_end|>"


def test_surrogates_in_questions_are_replaced():
    processor = make_processor(chatml())
    prompt = processor.apply_chat_template([user_message("What \ud83d?")], add_generation_prompt=True)
    assert "What \ufffd?" in prompt and len(processor([image(9, 9)], prompt)["input_ids"]) == 1
