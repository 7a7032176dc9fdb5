"""A conversation answers like the model given all of it at once, and reads every part only once."""

import json
from contextlib import closing

import numpy as np
import PIL.Image
import pytest
import torch
from fixtures.tiny_models import FAMILIES, image

from lisa_hf.inference.annotation_files import record_masks, save_conversation
from lisa_hf.inference.conversation import Conversation
from lisa_hf.model.pipeline_lisa import answer_prompts


QUESTIONS = ("What is the red circle?", "Is it?", "What is it, and what is the circle?")


@pytest.fixture(params=["llava-sam", "idefics3-sam", "gemma3-sam"])
def family(request):
    return FAMILIES[request.param]()


def seg_every_third(model) -> dict:
    """Arguments of `generate` for answers of six tokens, two of which are `[SEG]`."""
    end = model.vlm.generation_config.eos_token_id
    never = torch.tensor([model.config.seg_token_id, *(end if isinstance(end, list) else [end])])

    def choose(input_ids, scores):
        is_third = input_ids.shape[1] % 3 == 0
        return scores.index_fill(1, never[:1] if is_third else never, 99 if is_third else -99)

    return {"logits_processor": [choose], "max_new_tokens": 6}


def ask(conversation, question) -> str:
    return "".join(conversation.ask(question, **seg_every_third(conversation.model)))


def test_turns_are_answered_as_the_whole_conversation_is(family):
    model, processor = family
    conversation = Conversation(model, processor, image(40, 60))
    lengths, num_encoded = [], []
    language_model = model.vlm.base_model.get_decoder()
    handles = [
        language_model.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        ),
        model.mask_model.vision_encoder.register_forward_pre_hook(lambda *_: num_encoded.append(1)),
    ]
    for question in QUESTIONS:
        messages = conversation.messages(question)
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        lengths.clear()
        text = ask(conversation, question)
        num_read = lengths[0]
        input_ids = processor(conversation.image, prompt)["input_ids"]
        num_prompt = input_ids.shape[1]
        num_image_tokens = int((input_ids == model.config.vlm_config.image_token_id).sum())
        num_masks_encoded = len(num_encoded)

        (expected,) = answer_prompts(model, processor, [conversation.image], [prompt], **seg_every_third(model))
        answer = conversation.turns[-1].answer
        assert text.split() == answer.text.split() and answer.text == expected.text
        assert answer.masks.shape == (2, 40, 60) and torch.equal(answer.masks, expected.masks)
        torch.testing.assert_close(answer.scores, expected.scores, rtol=0, atol=1e-5)
        assert num_masks_encoded == (question == QUESTIONS[0])
        # These random answers are retokenized differently, and a full window cannot forget its last token.
        if question == QUESTIONS[0] or model.config.vlm_config.model_type == "gemma3":
            assert num_read == num_prompt
        else:  # the image, the questions and the answers before are in the cache
            assert num_read < num_prompt - num_image_tokens
        num_encoded.clear()
    for handle in handles:
        handle.remove()
    assert [turn.question for turn in conversation.turns] == list(QUESTIONS)


def test_an_answer_can_be_stopped_and_the_next_one_is_right(family):
    model, processor = family
    conversation = Conversation(model, processor, image(40, 60))
    endless = seg_every_third(model) | {"max_new_tokens": 200}
    with closing(conversation.ask(QUESTIONS[0], **endless)) as pieces:
        next(pieces)
    (turn,) = conversation.turns
    assert 0 < len(processor.tokenizer(turn.answer.text)["input_ids"]) < 150
    messages = conversation.messages(QUESTIONS[1])
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ask(conversation, QUESTIONS[1])
    (expected,) = answer_prompts(model, processor, [conversation.image], [prompt], **seg_every_third(model))
    assert conversation.turns[1].answer.text == expected.text
    assert torch.equal(conversation.turns[1].answer.masks, expected.masks)


def test_an_answer_that_was_left_is_stopped_by_the_next_question():
    model, processor = FAMILIES["llava-sam"]()
    conversation = Conversation(model, processor, image(40, 60))
    left = conversation.ask(QUESTIONS[0], **seg_every_third(model) | {"max_new_tokens": 200})
    next(left)
    prompt = processor.apply_chat_template(
        conversation.messages(QUESTIONS[1]), add_generation_prompt=True, tokenize=False
    )
    ask(conversation, QUESTIONS[1])
    (expected,) = answer_prompts(model, processor, [conversation.image], [prompt], **seg_every_third(model))
    assert conversation.turns[0].answer.text == expected.text
    assert torch.equal(conversation.turns[0].answer.masks, expected.masks)
    left.close()
    assert len(processor.tokenizer(conversation.turns[1].answer.text)["input_ids"]) < 150


def test_an_error_while_answering_reaches_the_caller_and_leaves_no_turn():
    model, processor = FAMILIES["llava-sam"]()
    conversation = Conversation(model, processor, image(40, 60))
    with pytest.raises(ValueError, match="too hot"):
        list(conversation.ask("Is it?", do_sample=True, logits_processor=[lambda *_: raise_error()]))
    assert conversation.turns == []
    assert ask(conversation, "Is it?")


def raise_error():
    raise ValueError("too hot")


def test_a_saved_conversation_holds_its_masks(tmp_path):
    model, processor = FAMILIES["llava-sam"]()
    conversation = Conversation(model, processor, image(40, 60))
    ask(conversation, QUESTIONS[0])
    save_conversation(conversation, tmp_path / "saved")
    (record,) = json.loads((tmp_path / "saved" / "conversation.json").read_text("utf-8"))
    assert record["question"] == QUESTIONS[0] and record["text"].count("[SEG]") == 2
    assert (record_masks(record) == conversation.turns[0].answer.masks.numpy()).all()
    mask = np.asarray(PIL.Image.open(tmp_path / "saved" / "turn_0" / "mask_1.png"))
    assert (mask == conversation.turns[0].answer.masks[1].numpy()).all()
    with pytest.raises(ValueError, match="not empty"):
        save_conversation(conversation, tmp_path / "saved")
