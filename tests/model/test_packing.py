"""Packed rows equal separate rows: the same loss, gradients, masks and evaluation, for every VLM."""

import copy
from unittest import mock

import pytest
import torch
from fixtures.packed_batches import QWEN_LIKE, VLMS, make_family, make_prompts
from fixtures.tiny_models import FAMILIES, conversation, image, sam_config
from fixtures.tiny_training import Items, assert_gradients_equal, build_model, make_trainer
from matrix_checks import check_generate, require_close
from matrix_models import Model, mask_labels
from tiny_vlms import IMAGE_TOKEN_ID, tiny_vlm_config
from transformers import AutoConfig

from lisa_hf import LisaConfig, LisaDataCollator
from lisa_hf.model import packing
from lisa_hf.model.packing import pack_rows, packing_unsupported_reason, resolve_packing, unpack_rows


PACKED = ["llava", "idefics3", "gemma3", *QWEN_LIKE, *VLMS]
OTHERS = sorted(set(packing.VLMS) - set(PACKED))


def loss_and_gradients(model, batch: dict):
    model = copy.deepcopy(model).train()
    output = model(**batch, output_masks=True)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_equals_separate(name, attention):
    model, batch, packed_batch = make_family(name, attention)
    assert packed_batch["input_ids"].shape[0] == 3 and packed_batch["image_indices"].tolist() == [0, 1, 2]
    assert packed_batch["attention_mask"].sum() < batch["attention_mask"].sum() - 3 * 4
    separate, gradients = loss_and_gradients(model, batch)
    packed, packed_gradients = loss_and_gradients(model, packed_batch)
    for part in ("loss", "ce_loss", "mask_bce_loss", "mask_dice_loss"):
        torch.testing.assert_close(packed[part], separate[part], rtol=1e-5, atol=1e-6, msg=part)
    for found, expected in zip(packed.pred_masks, separate.pred_masks, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=0, atol=1e-5 * max(1, separate.low_res_masks.abs().max().item())
        )
    assert packed_gradients.keys() == gradients.keys()
    overall = max(gradient.abs().max() for gradient in gradients.values())
    for parameter, gradient in gradients.items():
        scale = max(gradient.abs().max(), 0.01 * overall)
        assert (packed_gradients[parameter] - gradient).abs().max() <= 1e-5 * scale, parameter


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_vlms_pack_and_share_a_prefix(model_type):
    """States and gradients of packed rows are those of separate ones; answers are the VLM's own."""
    model = Model(model_type)
    batch = {**model.batch([1, 0, 2], [0, 1, 1]), "mask_labels": mask_labels(1, 2)}
    packed_batch = pack_rows(batch, IMAGE_TOKEN_ID, pad_token_id=0)
    separate, gradients = loss_and_gradients(model.lisa, copy.deepcopy(batch))
    packed, packed_gradients = loss_and_gradients(model.lisa, copy.deepcopy(packed_batch))
    require_close("losses", packed.loss, separate.loss, 1e-5)
    unpacked = unpack_rows({**packed_batch, "labels": packed.last_hidden_state})["labels"]
    real = batch["attention_mask"].bool()
    require_close("states", unpacked[real], separate.last_hidden_state[real], 1e-5)
    assert packed_gradients.keys() == gradients.keys()
    overall = max(gradient.abs().max() for gradient in gradients.values())
    for parameter, gradient in gradients.items():
        scale = max(gradient.abs().max(), 0.01 * overall)
        assert (packed_gradients[parameter] - gradient).abs().max() <= 1e-5 * scale, parameter
    check_generate(model)


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_vlms_answer_from_a_shared_prefix(model_type, monkeypatch):
    """With a window as wide as the prompts, so that sharing is possible."""

    def with_wide_window(model_type: str):
        config = tiny_vlm_config(model_type)
        if getattr(config.get_text_config(), "sliding_window", None):
            config.get_text_config().sliding_window = 128
        return config

    monkeypatch.setattr("matrix_models.tiny_vlm_config", with_wide_window)
    model = Model(model_type)
    lisa, prompts = model.lisa, make_prompts(model.batch([0, 2], [0, 0]))
    options = {"max_new_tokens": 5, "do_sample": False}
    shared = lisa.generate(**copy.deepcopy(prompts), **options).sequences
    with monkeypatch.context() as patch:
        patch.setattr(type(lisa), "_can_share_prefix", lambda *args: False)
        separate = lisa.generate(**copy.deepcopy(prompts), **options).sequences
    assert torch.equal(shared, separate)
    monkeypatch.setattr(type(lisa), "_read_prefix", mock.Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):  # it was read
        lisa.generate(**prompts, **options)


@pytest.mark.parametrize("name", ["llava", "idefics3", "gemma3", "qwen2_5_vl"])
def test_unpacking_gives_the_rows_back(name):
    _, batch, packed_batch = make_family(name)
    unpacked = unpack_rows(packed_batch)
    assert unpacked.keys() == batch.keys()
    real = batch["attention_mask"].bool()
    for key, value in batch.items():
        if key == "input_ids":
            assert torch.equal(unpacked[key][real], value[real]) and not unpacked[key][~real].any()
        elif key != "mask_labels":
            assert torch.equal(unpacked[key], value), key


def test_a_packed_row_grows_with_the_questions_alone():
    _, batch, packed_batch = make_family("llava")
    separate, packed = batch["attention_mask"], packed_batch["attention_mask"]
    prefix = (packed_batch["segment_ids"] == 0).sum(1)
    saved = torch.tensor([2, 0, 1]) * prefix  # one copy stays
    by_image = torch.zeros(3, dtype=torch.long).index_add(0, batch["image_indices"], separate.sum(1))
    assert torch.equal(packed.sum(1), by_image - saved) and prefix.min() > 16  # the image's tokens and more
    labels, segments = packed_batch["labels"], packed_batch["segment_ids"]
    assert not ((labels != -100) & (segments <= 0)).any()
    begins = segments[:, 1:] != segments[:, :-1]
    assert (labels[:, 1:][begins] == -100).all()
    assert (packed_batch["shift_labels"] != -100).sum() == (batch["labels"] != -100).sum()


def test_questions_that_differ_before_their_image_stay_apart():
    model, processor = FAMILIES["llava-sam"]()
    asked = [conversation("What is it?", "It is red."), conversation("Is it red?", "It is.")]
    asked.append([{"role": "user", "content": [*asked[1][0]["content"][::-1]]}, asked[1][1]])  # text before the image
    batch = processor.encode_conversations([image(40, 60)], asked, [0, 0, 0])
    packed = pack_rows(batch, processor.vlm_processor.image_token_id, processor.tokenizer.pad_token_id)
    assert packed["image_indices"].tolist() == [0, 0] and packed["segment_ids"].amax(1).tolist() == [2, 1]
    torch.testing.assert_close(model(**packed).loss, model(**batch).loss, rtol=1e-5, atol=0)


def test_what_would_mix_questions_up_is_refused(caplog):
    model, _, packed_batch = make_family("llava")
    assert resolve_packing(model.config, True) and not resolve_packing(model.config, False) and not caplog.records
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation.*got flash_attention_2.*`packing=False`"):
        model(**packed_batch)
    assert not resolve_packing(model.config, True)
    assert "stay in separate rows: packing needs an attn_implementation" in caplog.text
    model.config.get_text_config()._attn_implementation = "sdpa"
    model.config.get_text_config().model_type = "olmo"
    assert "got llava on olmo" in packing_unsupported_reason(model.config)


def test_layers_with_a_running_state_are_refused():
    """Qwen3.5's linear attention would carry a question into the next one."""
    config = LisaConfig(
        vlm_config=AutoConfig.for_model("qwen3_5"), mask_config=AutoConfig.for_model(**sam_config()), seg_token_id=50
    )
    assert "takes a mask, got linear_attention in qwen3_5_text" in packing_unsupported_reason(config)


def test_every_family_that_packs_is_tested():
    models = [make_family(name)[0] for name in PACKED]
    assert {model.config.vlm_config.model_type for model in models} == set(packing.VLMS) - set(OTHERS)
    tested = {model.config.get_text_config().model_type for model in models}
    tested |= {tiny_vlm_config(model_type).get_text_config().model_type for model_type in OTHERS}
    assert tested == set(packing.LANGUAGE_MODELS)


def test_text_that_sees_later_tokens_is_refused():
    config = make_family("gemma3")[0].config
    assert packing_unsupported_reason(config) is None
    config.get_text_config().use_bidirectional_attention = True
    assert "got bidirectional attention in gemma3_text" in packing_unsupported_reason(config)


def test_training_and_evaluation_do_not_depend_on_packing(tmp_path):
    """A step of 8 items in two accumulated batches, and both protocols of the evaluation."""
    results = []
    for is_packed in (False, True):
        model, processor = build_model()
        trainer = make_trainer(
            model,
            processor,
            tmp_path,
            Items(8),
            Items(8),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            eval_generate=True,
        )
        trainer.data_collator = LisaDataCollator(processor, packing=is_packed)
        assert ("segment_ids" in trainer.data_collator([Items(1)[0]])) == is_packed
        trainer.train()
        results.append((trainer.recorder.gradients[0], trainer.state.log_history[0], trainer.evaluate()))
    (gradients, log, metrics), (packed_gradients, packed_log, packed_metrics) = results
    assert_gradients_equal(packed_gradients, gradients)
    for part in ("loss", "ce_loss", "mask_bce_loss", "mask_dice_loss"):
        assert packed_log[part] == pytest.approx(log[part], rel=1e-5)
    assert metrics["eval_generated_giou"] is not None
    for key in metrics:
        if not key.endswith(("runtime", "per_second")):
            assert packed_metrics[key] == pytest.approx(metrics[key], rel=1e-4, nan_ok=True), key
