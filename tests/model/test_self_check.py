"""The self-check passes if LISA computes the same as its VLM alone, and stops at errors that would be silent."""

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from fixtures.tiny_models import FAMILIES, llava_sam
from fixtures.vlms import vlm_sam_with_processor
from transformers.utils import is_torchvision_available

from lisa_hf import LisaForConditionalGeneration, LisaProcessor
from lisa_hf.model import modeling_lisa, vlm_backbone
from lisa_hf.model.self_check import check_against_vlm
from lisa_hf.training.trainable import prepare_for_training


needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="their processors need torchvision")


@pytest.mark.parametrize("name", FAMILIES)
def test_families_pass(name):
    check_against_vlm(*FAMILIES[name]())


@needs_torchvision
@pytest.mark.parametrize("family", ["paligemma", "minicpmv4_7", "hunyuan_vl", "emu3", "step3p7"])
def test_vlms_that_read_their_inputs_in_their_own_way_pass(family):
    check_against_vlm(*vlm_sam_with_processor(family))


@needs_torchvision
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fewer_bits_pass(dtype):
    model, processor = vlm_sam_with_processor("qwen3_vl")
    check_against_vlm(model.to(dtype), processor)


def test_nothing_changes():
    model, processor = llava_sam(suppress_tokens=[3])
    model = prepare_for_training(model, ["seg_projector", "embeddings"]).train()
    model.vlm.model.language_model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    check_against_vlm(model, processor)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def assert_stopped(model, processor, difference: str) -> None:
    with pytest.raises(ValueError, match=f"^Self-check: expected .*, got {difference}.* Choose ") as error:
        check_against_vlm(model, processor)
    assert "\n" not in str(error.value)


# ---- silent errors, put back ----------------------------------------------------------------------------------------


def change_training_rows(monkeypatch, function) -> None:
    """Let a function change what `encode_conversations` returns."""
    encode = LisaProcessor.encode_conversations

    def encode_conversations(self, *args, **kwargs):
        batch = encode(self, *args, **kwargs)
        function(batch)
        return batch

    monkeypatch.setattr(LisaProcessor, "encode_conversations", encode_conversations)


@needs_torchvision
def test_type_ids_that_let_answers_see_their_future(monkeypatch):
    """PaliGemma's type ids are 1 in answers. They were 1 on image tokens; all zeros are right before the answer."""
    model, processor = vlm_sam_with_processor("paligemma")
    image_token = processor.vlm_processor.image_token_id
    with monkeypatch.context() as patch:
        change_training_rows(patch, lambda batch: batch.update(token_type_ids=(batch["input_ids"] == image_token) * 1))
        assert_stopped(model, processor, "`token_type_ids` that differ by up to 1")
    change_training_rows(monkeypatch, lambda batch: batch["token_type_ids"].zero_())
    assert_stopped(model, processor, r"states that differ by \S+ of their norm between two rows")


@needs_torchvision
def test_positions_that_count_the_images_of_a_batch():
    model, processor = vlm_sam_with_processor("hunyuan_vl")
    del model.vlm.model.get_rope_index  # what `separate_batch_entries` put in its place
    assert_stopped(model, processor, r"states that differ by \S+ of their norm between two rows")


@needs_torchvision
def test_logits_without_the_vlms_own_cap(monkeypatch):
    model, processor = vlm_sam_with_processor("paligemma")
    run_vlm = LisaForConditionalGeneration._run_vlm

    def bare_logits(self, *args, kept, **kwargs):
        states, _ = run_vlm(self, *args, kept=kept, **kwargs)
        return states, self.get_output_embeddings()(states if kept is None else states[kept])

    monkeypatch.setattr(LisaForConditionalGeneration, "_run_vlm", bare_logits)
    assert_stopped(model, processor, "logits of the same question")


def test_states_from_before_a_scale(monkeypatch):
    """Inkling divides the states that enter its vocabulary projection, as a hook does it here."""
    model, processor = llava_sam()
    model.vlm.lm_head.register_forward_pre_hook(lambda _, inputs: inputs[0] / 24)
    check_against_vlm(model, processor)

    @contextmanager
    def record_last_hidden_state(vlm, kept=None, where="projection"):
        states = []
        handle = vlm.base_model.register_forward_hook(lambda *args: states.append(args[-1].last_hidden_state))
        with vlm_backbone.record_states(vlm, kept):
            yield states
        handle.remove()

    monkeypatch.setattr(modeling_lisa, "record_states", record_last_hidden_state)
    assert_stopped(model, processor, "states of the same question that differ by 23")


@needs_torchvision
def test_positions_without_the_sizes_of_images(monkeypatch):
    model, processor = vlm_sam_with_processor("minicpmv4_7")
    monkeypatch.setattr(vlm_backbone, "sizes_per_image", lambda *args: {})
    assert_stopped(model, processor, "states of the same question")


@needs_torchvision
def test_a_second_tensor_of_pixels_that_is_not_normalized(monkeypatch):
    model, processor = vlm_sam_with_processor("step3p7")
    normalize_pixels = LisaProcessor.normalize_pixels

    def normalize_the_first(self, batch):
        tiles = batch.pop("pixel_values_local")
        normalize_pixels(self, batch)
        batch["pixel_values_local"] = tiles

    monkeypatch.setattr(LisaProcessor, "normalize_pixels", normalize_the_first)
    assert_stopped(model, processor, "`pixel_values_local` that differ by up to 25")
