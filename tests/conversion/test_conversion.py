"""The key tables: every tensor once, nothing left over, and the processor that belongs to the weights."""

import pytest
import torch
from fixtures.golden_model import (
    GOLDEN,
    converted_config,
    converted_model,
    original_config,
    original_directory,
    original_state_dict,
)
from transformers import CLIPVisionConfig, LlavaForConditionalGeneration

from lisa_hf.conversion.key_tables import convert_state_dict
from lisa_hf.conversion.lazy_tensors import LazyTensor
from lisa_hf.conversion.lisa import LISA_KEY_TABLE, LISA_LAYOUTS
from lisa_hf.conversion.llava import convert_llava_tensors, llava_config, load_original_tokenizer


def lazy(state_dict: dict) -> dict[str, LazyTensor]:
    return {name: LazyTensor.from_tensor(tensor) for name, tensor in state_dict.items()}


def test_every_tensor_is_converted_once():
    state_dict = original_state_dict()
    vocab_size = converted_config().get_text_config().vocab_size
    converted = convert_llava_tensors(lazy(state_dict), vocab_size, LISA_KEY_TABLE, prefix="vlm.")
    assert set(converted) == set(converted_model().state_dict())
    dropped = {key for key in state_dict if not convert_state_dict({key: None}, LISA_KEY_TABLE)}
    assert dropped == {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in (0, 1)}


def test_unknown_and_colliding_keys_are_listed():
    state_dict = original_state_dict()
    with pytest.raises(ValueError, match=r"model\.adapter\.weight.*model\.mm_projector\.weight"):
        convert_state_dict({**state_dict, "model.adapter.weight": 0, "model.mm_projector.0.weight": 1}, LISA_KEY_TABLE)


def test_llava_with_a_two_layer_projector():
    state_dict = {
        key: value
        for key, value in original_state_dict().items()
        if not key.startswith(("model.mm_projector.", "model.visual_model.", "model.text_hidden_fcs."))
    }
    original = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    state_dict |= {f"model.mm_projector.{key}": value for key, value in original.state_dict().items()}

    tokenizer = load_original_tokenizer(original_directory(), list(LISA_LAYOUTS["lisa"].tokens), 643)
    vision_config = CLIPVisionConfig.from_pretrained(GOLDEN / "clip_tiny")
    model = LlavaForConditionalGeneration(llava_config(original_config(), state_dict, vision_config, tokenizer))
    converted = convert_llava_tensors(lazy(state_dict), len(tokenizer))
    model.load_state_dict({name: tensor.load() for name, tensor in converted.items()})
    features = torch.randn(5, 32)
    torch.testing.assert_close(model.model.multi_modal_projector(features), original(features))


@pytest.mark.parametrize("vocab_size, message", [(640, "640 rows, got 643 tokens"), (700, "700 rows, got 643 tokens")])
def test_tokenizer_of_another_model_is_refused(vocab_size, message):
    with pytest.raises(ValueError, match=message):
        load_original_tokenizer(original_directory(), list(LISA_LAYOUTS["lisa"].tokens), vocab_size)
