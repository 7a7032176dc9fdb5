"""Options that change how a loss is computed, not its value: precision, attention, compiling, checkpointing.

Those marked `gpu` compare with SDPA in float32 on the GPU.
"""

import dataclasses

import pytest
import torch
from fixtures.packed_batches import VLMS, make_family
from fixtures.recipes import TINY
from fixtures.tiny_training import Items, build_model, copy_state, make_trainer
from torch._dynamo.utils import counters
from transformers.utils import is_flash_attn_2_available

from lisa_hf.model.packing import resolve_packing
from lisa_hf.training import build
from lisa_hf.training.arguments import LisaTrainingArguments, ModelArguments
from lisa_hf.training.trainable import prepare_for_training


needs_flash_attention = pytest.mark.skipif(not is_flash_attn_2_available(), reason="FlashAttention is not installed")
EVERYTHING = ["seg_projector", "mask_decoder", "mask_encoder", "language_model"]


def train(output_dir, attention="sdpa", mask_attention="sdpa", packing=True, parts=EVERYTHING, **arguments):
    """The losses of three steps, and the weights after them."""
    model, processor = build_model()
    model.vlm.set_attn_implementation(attention)
    model.mask_model.set_attn_implementation(mask_attention)
    model = prepare_for_training(model, parts, lora_r=0)
    trainer = make_trainer(model, processor, output_dir, Items(), max_steps=3, **arguments)
    trainer.data_collator.packing = resolve_packing(model.config, packing)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], copy_state(model)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain"))


def assert_same_training(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()  # a compiled module keeps its names
    for name, weight in expected[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "switch",
    [
        {"attention": "eager"},
        {"attention": "eager", "packing": False},
        {"packing": False},
        {"mask_attention": "eager"},
        {"activation_checkpointing": True},
        {"gradient_checkpointing": True},  # its name until transformers 6
    ],
    ids=str,
)
def test_equal_losses_and_weights(switch, plain, tmp_path):
    assert_same_training(train(tmp_path, **switch), plain)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("switch", [{"parts": EVERYTHING[:2]}, {"activation_checkpointing": True}], ids=str)
def test_compiled_mask_encoder(switch, backend, tmp_path, monkeypatch):
    expected = train(tmp_path, **switch)
    compiled = []

    def compile_with(self, **kwargs):
        compiled.append(type(self).__name__)
        self._compiled_call_impl = torch.compile(self._call_impl, backend=backend, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_with)  # inductor is its own choice
    torch.compiler.reset()
    counters.clear()
    assert_same_training(train(tmp_path, compile_mask_encoder=True, **switch), expected)
    assert compiled == ["SamVisionEncoder"]
    # One graph, without breaks, for the whole training.
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "idefics3", "gemma3", *VLMS])  # Qwen's have no such attention
@torch.no_grad()  # on CPU it has no backward pass
def test_flex_attention(family):
    model, batch, packed_batch = make_family(family, "sdpa")
    expected = model(**batch).loss
    model.vlm.set_attn_implementation("flex_attention")
    for rows in (batch, packed_batch):
        torch.testing.assert_close(model(**rows).loss, expected, rtol=1e-5, atol=0)


def build_with_attention(name):
    names = {field.name for field in dataclasses.fields(ModelArguments)}
    model_args = ModelArguments(attn_implementation=name, **{key: TINY[key] for key in TINY.keys() & names})
    config, _ = build.build_config_and_processor(model_args)
    return build.build_model(model_args, config)


def test_attention_is_chosen_by_an_argument():
    config = build_with_attention("eager").config
    assert config.get_text_config()._attn_implementation == "eager"
    assert config.vlm_config.vision_config._attn_implementation == "eager"
    assert config.mask_config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name, reason", [("eagre", "not supported"), ("flash_attention_2", "installed")])
def test_attention_that_is_not_available(name, reason):
    if name == "flash_attention_2" and is_flash_attn_2_available():
        pytest.skip("FlashAttention is installed")
    with pytest.raises(ValueError, match=f"attn_implementation '{name}' is not available: .*{reason}"):
        build_with_attention(name)


def test_fp16_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="fp16: expected a GPU, got a CPU"):
        LisaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, fp16=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("switch", "tolerance"),
    [
        ({"compile_mask_encoder": True}, 1e-4),
        # CUDA's kernel takes no heads as narrow as those of this vision tower.
        ({"attention": {"text_config": "flex_attention"}}, 1e-4),
        ({"bf16": True}, 0.02),
        ({"fp16": True}, 0.02),
        pytest.param({"bf16": True, "attention": "flash_attention_2"}, 0.02, marks=needs_flash_attention),
    ],
    ids=str,
)
def test_equal_losses_on_a_gpu(switch, tolerance, tmp_path):
    expected, _ = train(tmp_path, use_cpu=False)
    found, _ = train(tmp_path, use_cpu=False, **switch)
    # In float16, steps are skipped until the loss scaler has found its scale: only the first weights are the same.
    number = 1 if "fp16" in switch else len(expected)
    assert found[:number] == pytest.approx(expected[:number], rel=tolerance)
