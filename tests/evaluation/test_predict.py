"""Prompts extracted from training batches."""

import pytest
import torch
from fixtures.tiny_training import MASKS_DUE, build_model, collate, make_item

from lisa_hf.evaluation.predict import cut_prompts


@pytest.mark.parametrize("chat_template", ["llava_v1", "llava_llama_2", "llava_1_5"])
def test_cut_prompts_are_the_prompts_of_generation(chat_template):
    _, processor = build_model(chat_template=chat_template)
    items = [make_item(index, masks_due) for index, masks_due in enumerate(MASKS_DUE[:3])]
    two_turns = items[2]["questions"][0].messages
    two_turns.extend(
        [
            {"role": "user", "content": [{"type": "text", "text": "Why is that?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "It is."}]},
        ]
    )
    batch = collate(processor, items)
    cut = cut_prompts(batch, processor)
    conversations = [question.messages for item in items for question in item["questions"]]
    prompts = [
        processor.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        for messages in conversations
    ]
    expected = processor(
        images=[item["image"] for item in items], text=prompts, image_indices=batch["image_indices"].tolist()
    )
    assert cut.keys() == {"input_ids", "attention_mask"}
    for name in cut:
        assert torch.equal(cut[name], expected[name]), name
