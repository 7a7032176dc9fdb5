"""LisaForConditionalGeneration is saved and loaded: weights, keys, vocabulary, generation config."""

import pytest
import torch
from fixtures.shared_images import make_batch
from fixtures.tiny_models import SIDE, gemma3_sam, llava_sam, llava_sam2, sam_config
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMaskGeneration, AutoProcessor

from lisa_hf import LisaConfig, LisaForConditionalGeneration, LisaProcessor


def assert_same_weights(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


def test_save_and_load(family, tmp_path):
    model, processor = family
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LisaForConditionalGeneration and type(loaded_processor) is LisaProcessor
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is LisaForConditionalGeneration
    assert_same_weights(loaded, model)
    assert loaded.config.seg_token_id == model.config.seg_token_id
    assert type(loaded.config.vlm_config) is type(model.config.vlm_config)

    batch = make_batch(processor)
    loaded_batch = make_batch(loaded_processor)
    assert batch.keys() == loaded_batch.keys()
    for name in batch.keys() - {"mask_labels"}:
        assert torch.equal(batch[name], loaded_batch[name]), name
    expected, output = model(**batch), loaded(**loaded_batch)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.low_res_masks, expected.low_res_masks)


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_checkpoint_keys_are_those_in_memory(tmp_path, tie_word_embeddings):
    """Trainer resumes with a plain `load_state_dict`: a renamed key would leave its tensor untrained, silently."""
    model, _ = llava_sam(tie_word_embeddings)
    model.save_pretrained(tmp_path)
    fresh, _ = llava_sam(tie_word_embeddings)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1)
    result = fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    tied = set(model.all_tied_weights_keys)
    assert not result.unexpected_keys and set(result.missing_keys) <= tied
    assert ("vlm.lm_head.weight" in tied) == tie_word_embeddings
    assert_same_weights(fresh, model)

    loaded = LisaForConditionalGeneration.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    is_tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert is_tied == tie_word_embeddings


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_resized_vocabulary_reloads(tmp_path, tie_word_embeddings):
    model, processor = llava_sam(tie_word_embeddings)
    size = len(processor.tokenizer) + 3
    model.resize_token_embeddings(size)
    assert model.config.get_text_config().vocab_size == model.config.vlm_config.text_config.vocab_size == size
    model.save_pretrained(tmp_path)
    loaded = LisaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight.shape == loaded.get_output_embeddings().weight.shape == (size, 32)
    assert_same_weights(loaded, model)
    assert model(**make_batch(processor), output_logits=True).logits.shape[-1] == size


def test_generation_config_is_kept(tmp_path):
    """Gemma's end of turn, for one, is an end token in `generation_config.json` and nowhere else."""
    model, _ = gemma3_sam()
    model.vlm.generation_config.eos_token_id = [2, 77]
    model.vlm.generation_config.update(do_sample=True, top_k=7)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.vlm.generation_config.eos_token_id == [2, 77] and loaded.vlm.generation_config.top_k == 7
    assert loaded.generation_config is loaded.vlm.generation_config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_joining_two_pretrained_models(tmp_path, dtype):
    original, processor = llava_sam()
    original.vlm.generation_config.max_new_tokens = 5
    original.vlm.to(getattr(torch, dtype)).save_pretrained(tmp_path / "vlm")
    original.mask_model.save_pretrained(tmp_path / "sam")
    processor.vlm_processor.save_pretrained(tmp_path / "vlm")
    processor.mask_image_processor.save_pretrained(tmp_path / "sam")

    joined_processor = LisaProcessor.from_vlm_mask_model_pretrained(tmp_path / "vlm", tmp_path / "sam")
    joined = LisaForConditionalGeneration.from_vlm_mask_model_pretrained(
        tmp_path / "vlm", tmp_path / "sam", seg_token_id=joined_processor.seg_token_id
    )
    assert {parameter.dtype for parameter in joined.parameters()} == {getattr(torch, dtype)}
    assert_same_weights(joined.vlm, AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm"))
    assert_same_weights(joined.vlm, original.vlm)
    sam = AutoModelForMaskGeneration.from_pretrained(tmp_path / "sam", dtype=dtype)
    assert_same_weights(joined.mask_model, sam)
    assert joined.generation_config.max_new_tokens == 5
    assert joined.config.seg_token_id == processor.seg_token_id
    assert not joined.training and not any(parameter.is_meta for parameter in joined.parameters())
    assert joined.seg_projector.linear_1.weight.std() > 0.01  # newly initialized, as by PyTorch

    joined.seg_projector.load_state_dict(original.seg_projector.state_dict())
    expected, output = original.float()(**make_batch(processor)), joined(**make_batch(joined_processor))
    torch.testing.assert_close(output.loss.float(), expected.loss, rtol=1e-6 if dtype == "float32" else 0.03, atol=0)
    output.loss.backward()
    assert joined.seg_projector.linear_1.weight.grad.any()

    joined.save_pretrained(tmp_path / "lisa")
    loaded = AutoModel.from_pretrained(tmp_path / "lisa")
    assert loaded.dtype == getattr(torch, dtype)
    assert_same_weights(loaded, joined)


def test_sam2_never_swaps_the_trained_mask():
    assert not llava_sam2()[0].mask_model.mask_decoder.dynamic_multimask_via_stability
    assert LisaConfig(mask_config=sam_config()).mask_config.prompt_encoder_config.image_size == SIDE
