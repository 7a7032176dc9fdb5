"""Conversations as text and labels: before an answer, training sees what generation sees, in any chat template."""

import numpy as np
import pytest
import torch
from fixtures.golden_model import GOLDEN
from fixtures.published import PUBLISHED_VLMS, write_published_processor
from fixtures.tiny_models import (
    ForceTokens,
    conversation,
    image,
    llava_sam,
    sam_image_processor,
    tiny_tokenizer,
)
from fixtures.tiny_training import build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AddedToken, AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor
from transformers.utils import chat_template_utils, is_torchvision_available

from lisa_hf import LisaDataCollator, LisaProcessor
from lisa_hf.data.masks import Mask, encode_mask
from lisa_hf.data.prompts import Question
from lisa_hf.model.conversation_text import (
    ANSWER_MARK,
    CUT_MARK,
    Row,
    TokenizedRow,
    escape_tokens,
    token_pattern,
    user_message,
)
from lisa_hf.model.processing_lisa import add_tokens


QUESTIONS = ("What is the red circle?", "Sure?", "What is it?")
ANSWERS = ("Sure, it is [SEG].", "It is red.", "[SEG] and [SEG].")


def chatml(answer_start: str = "", prompt_end: str = "", last_start: str = "") -> str:
    """A ChatML template and what it writes before each answer, at the end of its prompt, before the last answer."""
    return (
        (
            "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
            "{% if message.role == 'assistant' %}ANSWER_START{% if loop.last %}LAST_START{% endif %}{% endif %}"
            "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
            "{{ '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}PROMPT_END{% endif %}"
        )
        .replace("ANSWER_START", answer_start)
        .replace("LAST_START", last_start)
        .replace("PROMPT_END", prompt_end)
    )


EMPTY_THOUGHT = "{{ '<think>\n\n</think>\n\n' }}"
SWITCH = "{% if enable_thinking is defined and not enable_thinking %}" + EMPTY_THOUGHT + "{% endif %}"
# Name: template, and what it writes between prompt and answer, which the model must learn to write.
TEMPLATES = {
    "plain": (chatml(), ""),
    "thought in the last turn": (chatml(last_start=EMPTY_THOUGHT), "<think></think>"),
    "prompt opens a thought": (chatml(last_start=EMPTY_THOUGHT, prompt_end="{{ '<think>\n' }}"), "</think>"),
    "prompt with an empty thought": (chatml(last_start=EMPTY_THOUGHT, prompt_end=SWITCH), ""),
    "thought in the prompt only": (chatml(prompt_end=SWITCH), ""),  # Gemma 4 31B
    "another white space": (chatml(prompt_end="{{ '\n\n' }}"), ""),
    "tagged": (chatml("{% generation %}{{ '<think>\n' }}{% endgeneration %}"), "<think>"),
    "prompt without a role": (chatml().split("{% if add_generation_prompt %}")[0], "<|im_start|>assistant"),
    "earlier answers left out": (
        chatml().replace("else part.text", "else part.text if message.role == 'user' or message == messages[-1]"),
        "",
    ),
    "date": ("{{ strftime_now('%d %B %Y') }}" + chatml(), ""),
    "no end": (chatml().replace("{{ '<|im_end|>\n' }}", ""), ""),
}
END = {"no end": "</s>"}


def make_processor(template: str, line_breaks: bool = False, **kwargs) -> LisaProcessor:
    """A tiny LLaVA's processor with a template. Its tokens may join line breaks, as those of Qwen do."""
    tokenizer = tiny_tokenizer({"image_token": "<image>"})
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>"] + (["\n\n"] if line_breaks else []))
    add_tokens(tokenizer, lstrip=False)  # as for prompts that end with a line break
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    vlm_processor = LlavaProcessor(
        image_processor, tokenizer, patch_size=8, vision_feature_select_strategy="full", chat_template=template
    )
    return LisaProcessor(vlm_processor, sam_image_processor(), **kwargs)


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


def turns(count: int) -> list[dict]:
    return conversation(*(text for turn in zip(QUESTIONS[:count], ANSWERS) for text in turn))


def learned(processor: LisaProcessor, batch: dict) -> list[tuple[list[int], list[int]]]:
    """The runs of labels of a batch, row by row: ids before each, and its own."""
    runs = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
        ids, labels = ids[mask.bool()].tolist(), labels[mask.bool()].tolist()
        starts = [n for n, label in enumerate(labels) if label != -100 and labels[n - 1] == -100]
        for start in starts:
            end = next((n for n in range(start, len(labels)) if labels[n] == -100), len(labels))
            assert labels[start:end] == ids[start:end]
            runs.append((ids[:start], ids[start:end]))
    return runs


def assert_training_sees_what_generation_sees(processor: LisaProcessor, messages: list[dict], between: str = ""):
    picture = processor.preprocess_images([image(40, 60)])
    batch = processor.encode_conversations(picture, [messages])
    runs = learned(processor, batch)
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(runs) == len(answers)
    end = processor.template.answer_end
    for (before, label), index in zip(runs, answers):
        prompt = processor.apply_chat_template(messages[:index], add_generation_prompt=True)
        assert before == processor(picture, prompt)["input_ids"][0].tolist()
        expected = between + messages[index]["content"][-1]["text"] + end
        assert "".join(processor.tokenizer.decode(label).split()) == "".join(expected.split())
        assert label[-1] == processor.template.answer_end_token_id
    assert batch["image_indices"].tolist() == [0] * len(batch["input_ids"])
    return batch


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


# ---- thinking -------------------------------------------------------------------------------------------------------

# Like Qwen3.5's: a thought before the last answer, which the prompt opens, or leaves empty where thinking is off.
THINKING_TEMPLATE = chatml(
    last_start="{{ '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}",
    prompt_end="{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}",
)


def with_reasoning(messages: list[dict], *reasoning: str | None) -> list[dict]:
    answers = iter(reasoning)
    return [
        message | {"reasoning_content": next(answers)} if message["role"] == "assistant" else message
        for message in messages
    ]


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


# ---- special tokens in what users write -----------------------------------------------------------------------------


def assert_special_tokens_are_letters(processor: LisaProcessor, between: str = "") -> None:
    """Questions and answers that hold every special token have no more of them than those that hold none."""
    tokenizer, picture = processor.tokenizer, processor.preprocess_images([image(40, 60)])
    tokens = sorted(processor.template.special_tokens)
    assert {processor.image_token, *tokenizer.all_special_tokens} <= {*tokens, "!"}
    ids = torch.tensor(tokenizer.convert_tokens_to_ids([*tokens, "[SEG]"]))
    text = "".join(tokens) + " [SEG]" + " ".join(tokens)  # beside each other and apart
    answer = text.replace("[SEG]", "")
    plain, special = conversation("What?", "It is [SEG]."), conversation("What?" + text, f"It is [SEG]. {answer}")
    batches = [processor.encode_conversations(picture, [messages]) for messages in (plain, special)]
    counts = [torch.isin(batch["input_ids"], ids).sum() for batch in batches]
    assert counts[0] == counts[1]
    assert (batches[1]["labels"] == processor.seg_token_id).sum() == 1
    (_, label), *others = learned(processor, batches[1])
    assert not others and "".join(answer.split()) in "".join(tokenizer.decode(label).split())
    prompts = [processor.apply_chat_template(m[:1], add_generation_prompt=True) for m in (plain, special)]
    counts = [torch.isin(processor(picture, prompt)["input_ids"], ids).sum() for prompt in prompts]
    assert counts[0] == counts[1]
    assert_training_sees_what_generation_sees(processor, conversation("What?" + text, "It is [SEG]."), between)


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


# ---- masks of several turns -----------------------------------------------------------------------------------------


def item_about(picture, *conversations: list[dict]) -> dict:
    """An item whose masks have 1, 2, 3, ... pixels, in the order of the `[SEG]` of its conversations' turns."""
    questions, area = [], 0
    for messages in conversations:
        num_masks = sum(m["content"][-1]["text"].count("[SEG]") for m in messages if m["role"] == "assistant")
        arrays = np.zeros((num_masks, picture.height * picture.width), dtype=np.uint8)
        for array in arrays:
            area += 1
            array[:area] = 1
        masks = [Mask.from_rle(encode_mask(array.reshape(picture.height, picture.width))) for array in arrays]
        questions.append(Question(messages, masks))
    facts = {"image": picture, "original_size": [picture.height, picture.width], "cached_features": None}
    return {**facts, "image_id": "a", "source": "b", "questions": questions, "ignore": None}


@pytest.mark.parametrize("name, num_rows", [(None, 4), ("no end", 8)])
def test_masks_of_several_turns(name, num_rows):
    """Two images, each with a conversation of three turns and one of one; also where each turn is a row of its own."""
    model, processor = llava_sam()
    if name:
        processor.chat_template = TEMPLATES[name][0]
    second = conversation("The circle?", "[SEG], [SEG].", "Where?", "There is none.", "Sure?", "No, [SEG].")
    items = [item_about(image(40, 60), turns(3), turns(1)), item_about(image(50, 30), second, turns(1))]
    batch = LisaDataCollator(processor)(items)
    assert batch["image_indices"].tolist() == [0] * (num_rows // 2) + [1] * (num_rows // 2)
    spoken = [m["content"][0]["text"] for item in items for q in item["questions"] for m in q.messages[1::2]]
    labels = [processor.tokenizer.decode(label) for _, label in learned(processor, batch)]
    assert ["".join(text.split()) for text in labels] == ["".join(f"{text}</s>".split()) for text in spoken]
    assert [masks.flatten(1).sum(1).tolist() for masks in batch["mask_labels"]] == [[1, 2, 3, 4], [1, 2, 3, 4]]

    packed = LisaDataCollator(processor, packing=True)(items)
    assert packed["image_indices"].tolist() == [0, 1] and packed["input_ids"].numel() < batch["input_ids"].numel()
    outputs = [model(**{key: value for key, value in b.items() if key != "meta"}) for b in (batch, packed)]
    for loss in ("ce_loss", "mask_bce_loss", "mask_dice_loss"):
        torch.testing.assert_close(outputs[0][loss], outputs[1][loss], rtol=1e-5, atol=1e-5)
    for masks, others in zip(outputs[0].pred_masks, outputs[1].pred_masks):
        torch.testing.assert_close(masks, others, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [None, "no end"])
def test_each_turns_masks_are_those_of_generation(name):
    """The state that predicts a `[SEG]` in a later turn is the same in training and after that turn's prompt."""
    model, processor = llava_sam()
    if name:
        processor.chat_template = TEMPLATES[name][0]
    picture, messages = image(40, 60), turns(3)
    batch = processor.encode_conversations([picture], [messages])
    trained, runs = model(**batch).seg_embeddings, learned(processor, batch)
    batches = []
    for turn in (0, 2):  # those with a [SEG]
        inputs = processor(
            [picture], processor.apply_chat_template(messages[: 2 * turn + 1], add_generation_prompt=True)
        )
        answer = runs[turn][1]
        script = ForceTokens(inputs["input_ids"].shape[1], [answer], never=[])
        batches.append(model.generate(**inputs, logits_processor=[script], max_new_tokens=len(answer)))
    generated = torch.cat([output.seg_embeddings for output in batches])
    torch.testing.assert_close(trained, generated, rtol=0, atol=1e-4)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 30), min_size=2, max_size=4, unique=True),
    added=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_labels_are_the_tokens_that_overlap_an_answer(lengths, cuts, added):
    """For any tokens, some without characters, and those that a tokenizer adds around them."""
    ends = np.cumsum(lengths).tolist()
    offsets = [(0, 0)] * added[0] + list(zip([0, *ends], ends)) + [(0, 0)] * added[1]
    cuts = sorted(cuts)
    answers = list(zip(cuts[::2], cuts[1::2]))
    row = TokenizedRow(Row("x" * 30, answers), list(range(len(offsets))), offsets)
    expected = [
        token if any(start < last and end > first for first, last in answers) else -100
        for token, (start, end) in enumerate(offsets)
    ]
    assert row.labels() == expected
    crosses = any(start < first < end for first, _ in answers for start, end in offsets)
    assert row.joins_prompt_and_answer == crosses
