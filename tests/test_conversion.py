"""The key tables: every tensor once, nothing left over, and the processor that belongs to the weights."""

import pytest
import torch
from golden_model import GOLDEN, converted_config, converted_model, load_json, original_state_dict
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaTokenizer, LlavaForConditionalGeneration

from lisa_hf.conversion import convert_state_dict
from lisa_hf.conversion.lisa import LISA_KEY_TABLE, convert_lisa_state_dict, lisa_processor
from lisa_hf.conversion.llava import LLAVA_KEY_TABLE, append_vocabulary_rows, llava_config


def test_every_tensor_is_converted_once():
    state_dict = original_state_dict()
    converted = convert_lisa_state_dict(state_dict)
    assert set(converted) == set(converted_model().state_dict())
    dropped = {key for key in state_dict if not convert_state_dict({key: None}, LISA_KEY_TABLE)}
    assert dropped == {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in (0, 1)}


def test_unknown_and_colliding_keys_are_listed():
    state_dict = original_state_dict()
    with pytest.raises(ValueError, match=r"model\.adapter\.weight.*model\.mm_projector\.weight"):
        convert_lisa_state_dict({**state_dict, "model.adapter.weight": 0, "model.mm_projector.0.weight": 1})


def test_llava_with_a_two_layer_projector():
    state_dict = {
        key: value
        for key, value in original_state_dict().items()
        if not key.startswith(("model.mm_projector.", "model.visual_model.", "model.text_hidden_fcs."))
    }
    original = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    state_dict |= {f"model.mm_projector.{key}": value for key, value in original.state_dict().items()}

    original_config = load_json("model_config")["lisa_config"]
    config = llava_config(original_config, state_dict, CLIPVisionConfig.from_pretrained(GOLDEN / "clip_tiny"))
    model = LlavaForConditionalGeneration(config)
    converted = convert_state_dict(state_dict, LLAVA_KEY_TABLE)
    append_vocabulary_rows(converted)
    model.load_state_dict(converted)
    features = torch.randn(5, 32)
    torch.testing.assert_close(model.model.multi_modal_projector(features), original(features))


def test_processor_refuses_another_tokenizer():
    tokenizer = LlamaTokenizer.from_pretrained(GOLDEN / "tokenizer")
    tokenizer.add_tokens(["<another>"])
    with pytest.raises(ValueError, match=r"\[SEG\].*ids \[641.*\[640"):
        lisa_processor(converted_config(), tokenizer, CLIPImageProcessorPil(), "")
