"""Weights in 8 and 4 bits: only the VLM's layers; the mask path and the vocabulary projection do not change.

Training beside them, going on with a checkpoint, and merging.
"""

import datasets
import pytest
import torch
import yaml
from fixtures.recipes import RUN
from fixtures.tiny_models import conversation, image, save_quantizable
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from workers import export_worker

from lisa_hf import LisaForConditionalGeneration


CONFIGS = {
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
    "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    return directory, *save_quantizable(directory)


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
        LisaForConditionalGeneration.from_pretrained(directory / "model", quantization_config=config)
    assert {"mask_model", "seg_projector", "lm_head"} <= set(decided["modules"])
    assert config.llm_int8_skip_modules is None  # the caller's stays the caller's
    with pytest.raises(Stop):
        own = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["vlm.model.vision_tower"])
        LisaForConditionalGeneration.from_pretrained(directory / "model", quantization_config=own)
    assert decided["modules"] == ["vlm.model.vision_tower"]


@pytest.mark.parametrize("bits", CONFIGS)
def test_quantized_model_keeps_mask_path_and_head(bits, saved):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    directory, model, processor = saved
    quantized = AutoModel.from_pretrained(directory / "model", quantization_config=CONFIGS[bits])
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    converted = {name for name, module in quantized.named_modules() if isinstance(module, kinds)}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert converted == {name for name in linear if name.startswith("vlm.model.")}
    for name, tensor in model.state_dict().items():
        if name.startswith(("mask_model.", "seg_projector.", "vlm.lm_head.")):
            torch.testing.assert_close(quantized.state_dict()[name], tensor, rtol=0, atol=0)
    text = processor.apply_chat_template(conversation("What is it?"), add_generation_prompt=True)
    inputs = processor(image(40, 60), text)
    with torch.no_grad():
        expected, found = model(**inputs), quantized(**inputs)
    # Rounding to 4 bits moves tiny layers far; that the path as a whole is intact shows in their likeness.
    similarity = torch.cosine_similarity(found.last_hidden_state.flatten(), expected.last_hidden_state.flatten(), 0)
    assert similarity > 0.9
    assert quantized.generate(**inputs, max_new_tokens=2).sequences.shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize(
    ("bits", "start", "use_dora"), [("4bit", "model", True), ("4bit", "halves", False), ("8bit", "halves", False)]
)
def test_training_beside_quantized_weights_resumes_and_merges(
    bits, start, use_dora, saved, tmp_path, monkeypatch, capsys
):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # On some CPUs it computes in bfloat16 outside training, and reorders weights so that DoRA misreads them.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    directory, model, _ = saved
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    bases = {"vlm": directory / "vlm", "mask_model": directory / "sam"}
    bases = {"model": directory / "model"} if start == "model" else bases
    recipe = RUN | {name: str(path) for name, path in bases.items()}
    recipe |= {f"load_in_{bits}": True, "bnb_4bit_compute_dtype": "float32", "use_dora": use_dora}
    recipe |= {"max_steps": 4, "part_learning_rates": {"lora": 2e-3, "mask_decoder": 5e-4}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ("--config", tmp_path / "recipe.yaml", "--output_dir")
    answers = tmp_path / "answers.safetensors"
    export_worker.train(answers, *arguments, tmp_path / "run")
    table = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert table["lora"].split()[-2:] == ["float32", "0.002"] and table["mask_decoder"].split()[-1] == "0.0005"
    assert (
        table["language_model"].split()[1] == "0"
        and {"8bit": "int8", "4bit": "4-bit"}[bits] in table["language_model"]
    )

    adapter = load_file(tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in adapter.items())
    assert any("lora_magnitude_vector" in name for name in adapter) == use_dora

    export_worker.train(
        tmp_path / "again.safetensors",
        *arguments,
        tmp_path / "again",
        "--resume_from_checkpoint",
        tmp_path / "run/checkpoint-2",
    )
    again = load_file(tmp_path / "again" / "checkpoint-4" / "adapter_model.safetensors")
    assert adapter.keys() == again.keys()
    assert [name for name, tensor in adapter.items() if not torch.equal(tensor, again[name])] == []

    merged = AutoModel.from_pretrained(tmp_path / "run")
    assert {weight.dtype for weight in merged.parameters()} == {torch.float32}
    assert not any(
        "quantization_config" in path.read_text()
        for path in (tmp_path / "run").glob("*.json")
        if path.name != "run.json"
    )
    if bits == "4bit":
        assert export_worker.largest_difference(merged, answers) < 1e-4
    else:  # activations are rounded too, which no merged model does
        tensors = load_file(answers)
        inputs = {name.removeprefix("inputs."): value for name, value in tensors.items() if "inputs." in name}
        with torch.no_grad():
            found = merged.eval()(**inputs).low_res_masks
        assert torch.cosine_similarity(found.flatten(), tensors["low_res_masks"].flatten(), 0) > 0.99
