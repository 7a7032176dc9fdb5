"""Weights in 8 and 4 bits: the VLM's layers alone, the mask path and the vocabulary projection stay as they were."""

import pytest
import tiny_models
import torch
from tiny_models import conversation, image, llava_sam
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from lisa_hf import LisaForConditionalGeneration


CONFIGS = {
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
    "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    # On a CPU, bitsandbytes takes widths of whole blocks only.
    widths = {"hidden_size": 64, "intermediate_size": 64}
    vision, text = tiny_models.vision_config("clip_vision_model") | widths, tiny_models.text_config
    monkeypatch.setattr(tiny_models, "vision_config", lambda _: vision)
    monkeypatch.setattr(tiny_models, "text_config", lambda *args, **kwargs: text(*args, **kwargs) | widths)
    model, processor = llava_sam()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model, processor


def test_skipped_modules_are_those_that_transformers_is_told(saved, monkeypatch):
    """Needs no bitsandbytes: stops where transformers has decided what to convert."""
    directory, model, _ = saved
    decided = {}

    class Stop(Exception):
        pass

    def stop(quantizer, model, **kwargs):
        skipped = quantizer.quantization_config.llm_int8_skip_modules
        decided["modules"] = quantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
        raise Stop

    monkeypatch.setattr(Bnb4BitHfQuantizer, "validate_environment", lambda *args, **kwargs: None)
    monkeypatch.setattr(Bnb4BitHfQuantizer, "_process_model_before_weight_loading", stop)
    config = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(Stop):
        LisaForConditionalGeneration.from_pretrained(directory, quantization_config=config)
    assert {"mask_model", "seg_projector", "lm_head"} <= set(decided["modules"])
    assert config.llm_int8_skip_modules is None  # the caller's stays the caller's
    with pytest.raises(Stop):
        own = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["vlm.model.vision_tower"])
        LisaForConditionalGeneration.from_pretrained(directory, quantization_config=own)
    assert decided["modules"] == ["vlm.model.vision_tower"]


@pytest.mark.parametrize("bits", CONFIGS)
def test_quantised_model_keeps_mask_path_and_head(bits, saved):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    directory, model, processor = saved
    quantised = AutoModel.from_pretrained(directory, quantization_config=CONFIGS[bits])
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    converted = {name for name, module in quantised.named_modules() if isinstance(module, kinds)}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert converted == {name for name in linear if name.startswith("vlm.model.")}
    for name, tensor in model.state_dict().items():
        if name.startswith(("mask_model.", "seg_projector.", "vlm.lm_head.")):
            torch.testing.assert_close(quantised.state_dict()[name], tensor, rtol=0, atol=0)
    text = processor.apply_chat_template(conversation("What is it?"), add_generation_prompt=True)
    inputs = processor(image(40, 60), text)
    with torch.no_grad():
        expected, found = model(**inputs), quantised(**inputs)
    # Rounding to 4 bits moves tiny layers far; that the path as a whole is intact shows in their likeness.
    similarity = torch.cosine_similarity(found.last_hidden_state.flatten(), expected.last_hidden_state.flatten(), 0)
    assert similarity > 0.9
    assert quantised.generate(**inputs, max_new_tokens=2).sequences.shape[1] == inputs["input_ids"].shape[1] + 2
