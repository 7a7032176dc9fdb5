"""Masks of several turns, and labels of answers."""

import numpy as np
import pytest
import torch
from fixtures.chat_templates import TEMPLATES, learned, turns
from fixtures.tiny_models import ForceTokens, conversation, image, llava_sam
from hypothesis import given, settings
from hypothesis import strategies as st

from lisa_hf import LisaDataCollator
from lisa_hf.data.masks import Mask, encode_mask
from lisa_hf.data.prompts import Question
from lisa_hf.model.conversation_text import Row, TokenizedRow


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
    """Two images, each with conversations of three turns and of one; also with templates that need a row per turn."""
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
