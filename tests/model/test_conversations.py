"""Conversations in any chat template: training sees what generation sees."""

import pytest
import torch
from fixtures.chat_templates import (
    QUESTIONS,
    TEMPLATES,
    assert_special_tokens_are_letters,
    assert_training_sees_what_generation_sees,
    chatml,
    learned,
    make_processor,
    turns,
    with_reasoning,
)
from fixtures.published import PUBLISHED_VLMS, write_published_processor
from fixtures.tiny_models import conversation, image, sam_image_processor
from tokenizers import processors
from transformers.utils import chat_template_utils, is_torchvision_available

from lisa_hf import LisaProcessor
from lisa_hf.model.conversation_text import user_message


END = {"no end": "</s>"}


@pytest.fixture(scope="module", params=PUBLISHED_VLMS)
def published(request, tmp_path_factory) -> LisaProcessor:
    if not is_torchvision_available():
        pytest.skip("their video processors need torchvision")
    if "SmolVLM2" in request.param:
        pytest.importorskip("num2words")
    root = tmp_path_factory.mktemp("published")
    write_published_processor(request.param, root / "vlm")
    sam_image_processor().save_pretrained(root / "sam")
    return LisaProcessor.from_vlm_mask_model_pretrained(root / "vlm", root / "sam")


def test_published_template(published):
    for count in (1, 3):
        assert_training_sees_what_generation_sees(published, turns(count))


def test_special_tokens_of_a_published_vlm_are_letters(published):
    assert_special_tokens_are_letters(published)


def test_system_message_of_a_published_template(published):
    """Some templates leave strings out, some write a list as Python does; a user may pass either."""
    question, text = user_message("What?"), 'You see "circles".'
    for content in (text, [{"type": "text", "text": text}]):
        prompt = published.apply_chat_template([{"role": "system", "content": content}, question])
        assert prompt.count(text) == 1 and "'type'" not in prompt


def test_reasoning_in_a_published_template(published):
    """Qwen3.5 can be taught to think; others refuse reasoning instead of dropping it."""
    messages = with_reasoning(turns(2), "The circle is red.", "It is.")
    published.thinking = True
    try:
        if "</think>" in published.chat_template:
            batch = published.encode_conversations([image(40, 60)], [messages])
            answers = [" ".join(published.tokenizer.decode(label).split()) for _, label in learned(published, batch)]
            assert answers[1] == "It is. </think> It is red.<|im_end|>"
        else:
            with pytest.raises(ValueError, match="an answer's reasoning_content verbatim"):
                published.encode_conversations([image(40, 60)], [messages])
    finally:
        published.thinking = False


@pytest.mark.parametrize("line_breaks", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_template(name, line_breaks):
    template, between = TEMPLATES[name]
    processor = make_processor(template, line_breaks)
    assert processor.template.answer_end == END.get(name, "<|im_end|>")
    for count in (1, 3):
        assert_training_sees_what_generation_sees(processor, turns(count), between)


def test_a_template_that_repeats_its_answers_gives_one_row():
    """The row of the last turn teaches all of them: prompts are not trained again for each turn."""
    for name, num_rows in (("plain", 1), ("thought in the prompt only", 3), ("no end", 3)):
        processor = make_processor(TEMPLATES[name][0])
        batch = processor.encode_conversations([image(40, 60), image(40, 60)], [turns(3), turns(1)])
        assert batch["image_indices"].tolist() == [0] * num_rows + [1]
        assert (batch["labels"] == processor.seg_token_id).sum() == 4


@pytest.mark.parametrize("name", ["plain", "thought in the prompt only"])
def test_tokens_that_join_line_breaks_do_not_join_prompt_and_answer(name):
    """As in Qwen, a thought's line break and the prompt's would be one token, which generation cannot see."""
    processor = make_processor(TEMPLATES[name][0], line_breaks=True)
    messages = conversation("What is it?", "\nIt is red.", "Sure?", "\n[SEG].")
    batch = assert_training_sees_what_generation_sees(processor, messages)
    assert len(batch["input_ids"]) == 2


def test_offsets_without_their_space():
    """Llama 3 says that the token of " red" is at "red"; a prompt that ends with a space must keep it."""
    processor = make_processor(chatml(prompt_end="{{ 'A: ' }}"))
    processor.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = conversation("What is it?", "red")
    assert_training_sees_what_generation_sees(processor, messages)


def test_a_template_without_answers_is_refused():
    processor = make_processor(chatml().replace("else part.text", "else ''"))
    with pytest.raises(ValueError, match="writes what the assistant says, got one that drops or.*Pass another"):
        processor.encode_conversations([image(40, 60)], [turns(1)])


def test_a_template_that_changes_answers_is_refused():
    processor = make_processor(chatml().replace("else part.text", "else part.text | replace('red', 'blue')"))
    with pytest.raises(ValueError, match="writes an answer's content verbatim, got 'It is blue.*for 'It is red"):
        processor.encode_conversations([image(40, 60)], [conversation("What is it?", "It is red.")])


def test_content_may_be_a_string(tmp_path):
    """Templates that loop over the parts of a content would leave a string out, silently."""
    processor = make_processor(chatml())
    messages = turns(2)
    strings = [messages[0], *({**message, "content": message["content"][0]["text"]} for message in messages[1:])]
    for one, other in zip(*(processor.encode_conversations([image(9, 9)], [m]).values() for m in (messages, strings))):
        assert torch.equal(one, other)
    assert QUESTIONS[1] in processor.apply_chat_template(strings)


def test_today_is_always_the_same_day(monkeypatch):
    prompts = []
    for year in (2027, 2028):

        class Calendar(chat_template_utils.datetime):
            @classmethod
            def now(cls):
                return cls(year, 3, 4)

        monkeypatch.setattr(chat_template_utils, "datetime", Calendar)
        processor = make_processor(TEMPLATES["date"][0])
        prompts.append(processor.apply_chat_template([user_message("What?")]))
    assert prompts[0] == prompts[1] and "01 January 2025" in prompts[0]
