"""What training costs the texts of a VLM: the perplexity of its earlier answers."""

import copy
import math

import numpy as np
import PIL.Image
import pytest
import torch

from lisa_hf.evaluation.text_perplexity import (
    QUESTIONS,
    answer_questions_as_text,
    compare_with_base,
    compare_without_adapter,
    perplexity,
    raise_if_another_vlm,
)
from lisa_hf.model.conversation_text import user_message
from lisa_hf.training.trainable import merge_lora, prepare_for_training


@pytest.fixture
def base(tiny):
    """The VLM of a tiny LISA, its processor, and an image."""
    model, processor = tiny
    vlm_processor = processor.vlm_processor
    vlm_processor.chat_template = processor.chat_template
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return model.vlm.eval(), vlm_processor, PIL.Image.fromarray(pixels)


def test_perplexity_is_that_of_the_generated_tokens(base):
    vlm, processor, image = base
    rows = answer_questions_as_text(vlm, processor, [image], max_new_tokens=5)
    assert len(rows) == len(QUESTIONS)
    losses = []
    for question in QUESTIONS:
        text = processor.apply_chat_template([user_message(question)], add_generation_prompt=True, tokenize=False)
        prompt = processor(images=[image], text=[text], return_tensors="pt")
        output = vlm.generate(
            **prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        losses += [-logits.log_softmax(-1).max().item() for logits in output.logits]
    assert perplexity(vlm, rows) == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


def test_other_weights_find_the_answers_less_likely(base):
    vlm, processor, image = base
    rows = answer_questions_as_text(vlm, processor, [image], max_new_tokens=5)
    trained = copy.deepcopy(vlm)
    assert perplexity(trained, rows) == perplexity(vlm, rows)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in trained.get_output_embeddings().parameters():
            weight += torch.randn_like(weight)
    assert perplexity(trained, rows) > 2 * perplexity(vlm, rows)


def test_a_lora_run_is_compared_with_itself_without_its_adapter(tiny):
    lisa, processor = copy.deepcopy(tiny)
    processor.vlm_processor.chat_template = processor.chat_template
    image, base = PIL.Image.new("RGB", (60, 40), "red"), copy.deepcopy(lisa.vlm).eval()
    model = prepare_for_training(lisa, trainable=("embeddings",)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "lm_head.modules_to_save" in name:
                weight += torch.randn_like(weight)
    found = compare_without_adapter(model, processor.vlm_processor, "mine", [image])
    assert found["base_model"] == "mine without its adapter" and found["num_answers"] > 0
    assert found["perplexity"] > 2 * found["perplexity_of_base"]
    # As two models give it.
    vlms = {"mine": merge_lora(model).vlm.eval(), "base": base}
    two = compare_with_base(lambda name: (vlms[name], processor.vlm_processor), "mine", "base", [image])
    for key in ("num_answers", "perplexity_of_base", "perplexity"):
        assert found[key] == pytest.approx(two[key], rel=1e-4), key


def test_another_vlm_is_refused(base):
    vlm, processor, _ = base
    other = copy.deepcopy(processor)
    other.tokenizer.add_tokens(["[OTHER]"])
    raise_if_another_vlm(vlm.config, other, vlm.config, processor)  # training adds tokens
    with pytest.raises(ValueError, match=r"trained from, got other tokens, such as '\[OTHER\]'"):
        raise_if_another_vlm(vlm.config, processor, vlm.config, other)
    with pytest.raises(ValueError, match="expected the llava that the model was trained from, got a llama"):
        raise_if_another_vlm(vlm.config, processor, vlm.config.text_config, processor)
