"""Thinking: reasoning in chat templates, in training and in answers."""

import pytest
from fixtures.chat_templates import ANSWERS, TEMPLATES, chatml, learned, make_processor, turns, with_reasoning
from fixtures.tiny_models import image

from lisa_hf import LisaProcessor


# Like Qwen3.5's: a thought before the last answer, which the prompt opens, or leaves empty where thinking is off.
THINKING_TEMPLATE = chatml(
    last_start="{{ '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}",
    prompt_end="{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}",
)


def test_thinking_is_off_by_default_and_saved(tmp_path):
    processor = make_processor(THINKING_TEMPLATE)
    question = turns(1)[:1]
    off = processor.apply_chat_template(question, add_generation_prompt=True)
    assert off.endswith("<think>\n\n</think>\n\n")
    processor.thinking = True
    on = processor.apply_chat_template(question, add_generation_prompt=True)
    assert on.endswith("assistant\n<think>\n")
    processor.save_pretrained(tmp_path)
    loaded = LisaProcessor.from_pretrained(tmp_path)
    assert loaded.thinking and loaded.apply_chat_template(question, add_generation_prompt=True) == on
    assert loaded.apply_chat_template(question, add_generation_prompt=True, enable_thinking=False) == off


@pytest.mark.parametrize("line_breaks", [False, True])
def test_reasoning_is_learned(line_breaks):
    """Some rows have none; before a later turn, the template shows no thought."""
    processor = make_processor(THINKING_TEMPLATE, line_breaks, thinking=True)
    messages = with_reasoning(turns(3), "The circle is red.", None, "It is.")
    picture = image(40, 60)
    runs = learned(processor, processor.encode_conversations([picture], [messages]))
    for turn, (thought, (before, label)) in enumerate(zip(("The circle is red.", "", "It is."), runs, strict=True)):
        prompt = processor.apply_chat_template(messages[: 2 * turn + 1], add_generation_prompt=True)
        assert before == processor([picture], prompt)["input_ids"][0].tolist()
        expected = f"{thought}</think>{ANSWERS[turn]}<|im_end|>"
        assert "".join(processor.tokenizer.decode(label).split()) == "".join(expected.split())


@pytest.mark.parametrize("name", ["plain", "thought in the last turn", "prompt opens a thought", "no end"])
@pytest.mark.parametrize("is_special", [False, True])
def test_what_the_model_thinks_is_not_its_answer(name, is_special):
    processor = make_processor(TEMPLATES[name][0])
    if is_special:
        processor.tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    label = learned(processor, processor.encode_conversations([image(9, 9)], [turns(1)]))[0][1]
    assert processor.template.read_answer(label)[1] == processor.tokenizer.decode(
        processor.tokenizer(ANSWERS[0])["input_ids"]
    )


def test_thought_and_answer_are_told_apart():
    processor = make_processor(THINKING_TEMPLATE, thinking=True)
    batch = processor.encode_conversations([image(9, 9)], [with_reasoning(turns(1), "The circle is red.")])
    ((_, label),) = learned(processor, batch)
    thought, answer = processor.template.read_answer(label)
    assert thought == "The circle is red." and answer.startswith("Sure, it is")


def test_templates_that_cannot_be_used_are_named():
    with pytest.raises(ValueError, match="expected a chat template in Jinja, got .* in line 2. Correct it"):
        make_processor("{{ bos_token }}\n{% for %}").template
    processor = make_processor("{% for message in messages %}{{ 'USER: ' + message.content }}{% endfor %}")
    with pytest.raises(ValueError, match="takes messages with parts .*concatenate str.*Pass another"):
        processor.encode_conversations([image(9, 9)], [turns(1)])
    processor = make_processor(TEMPLATES["no end"][0])
    processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="a token that ends answers, got none.*Pass another"):
        processor.encode_conversations([image(9, 9)], [turns(1)])
    with pytest.raises(ValueError, match="got the error 'No!'. Pass another"):
        make_processor("{{ raise_exception('No!') }}").encode_conversations([image(9, 9)], [turns(1)])


def test_only_variables_of_a_template_are_set():
    """Gemma 4's template has the word in a comment; a message may have it as a field."""
    processor = make_processor("{# thinking #}" + chatml(answer_start="{{ message.thinking or '' }}"))
    assert processor.template.variables == {}
    assert make_processor("{{ thinking }}" + TEMPLATES["tagged"][0]).template.variables == {"thinking": False}


@pytest.mark.parametrize(
    "template, thinking, message",
    [
        (THINKING_TEMPLATE, False, "without reasoning_content while thinking is off, got 'Since.*`thinking: on`"),
        (chatml(), True, "an answer's reasoning_content verbatim, got .* for 'Since"),
    ],
)
def test_reasoning_that_cannot_be_learned_is_refused(template, thinking, message):
    processor = make_processor(template, thinking=thinking)
    with pytest.raises(ValueError, match=message):
        processor.encode_conversations([image(9, 9)], [with_reasoning(turns(1), "Since it is red.")])
