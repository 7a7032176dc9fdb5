"""Models to start from: a VLM and a mask model, or a LISA model. For resuming, see test_trainer.py."""

import json

import pytest
import torch
from fixtures.tiny_models import llava_config, qwen3_vl_sam
from fixtures.tiny_training import (
    IMAGE_SIZE,
    LISA_PARTS,
    QUESTION,
    TEXT,
    VISION,
    Items,
    build_model,
    copy_state,
    make_trainer,
    training_logs,
)
from PIL import Image
from transformers import (
    AddedToken,
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from lisa_hf import LisaProcessor
from lisa_hf.chat_templates import load_chat_template
from lisa_hf.from_scratch.tokenizer import train_tokenizer
from lisa_hf.training import build
from lisa_hf.training.arguments import ModelArguments
from lisa_hf.training.trainable import merge_lora, prepare_for_training


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Directories of a VLM without LISA's tokens and of a mask model."""
    root = tmp_path_factory.mktemp("halves")
    tokenizer = train_tokenizer([QUESTION, "It is", "There is none. The answer is red."] * 10, vocab_size=400)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in ("<image>", "<pad>")])
    tokenizer.pad_token = "<pad>"
    torch.manual_seed(0)
    config = LlavaConfig(
        **llava_config(vision=VISION, text=TEXT | {"vocab_size": len(tokenizer)}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(root / "vlm")
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=dict(height=IMAGE_SIZE, width=IMAGE_SIZE)),
        tokenizer,
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=load_chat_template("llava_1_5"),
    ).save_pretrained(root / "vlm")
    model, processor = build_model()
    model.mask_model.save_pretrained(root / "sam")
    processor.mask_image_processor.save_pretrained(root / "sam")
    return {"vlm": str(root / "vlm"), "mask_model": str(root / "sam")}


def load(**arguments):
    model_args = ModelArguments(**arguments)
    config, processor = build.build_config_and_processor(model_args)
    return build.build_model(model_args, config), processor


def train(model, processor, output_dir):
    model = prepare_for_training(model, LISA_PARTS, lora_r=4)
    trainer = make_trainer(model, processor, output_dir, Items(), max_steps=2, learning_rate=1e-2)
    trainer.train()
    return trainer


@pytest.mark.parametrize("chat_template, tokens", [(None, 1), ("llava_v1", 3)])
def test_a_vlm_and_a_mask_model_become_a_lisa(halves, chat_template, tokens):
    model, processor = load(**halves, chat_template=chat_template, mask_dice_loss_weight=0.7, mask_loss_points=9)

    num_tokens = len(AutoTokenizer.from_pretrained(halves["vlm"]))
    assert len(processor.tokenizer) == model.get_input_embeddings().num_embeddings == num_tokens + tokens
    assert model.get_output_embeddings().out_features == num_tokens + tokens
    assert model.config.seg_token_id == processor.seg_token_id == num_tokens
    assert processor.chat_template == load_chat_template(chat_template or "llava_1_5")
    assert model.config.answer_end_token_id == processor.tokenizer.eos_token_id and not processor.thinking
    assert (model.config.mask_bce_loss_weight, model.config.mask_dice_loss_weight) == (2.0, 0.7)
    assert model.config.mask_loss_points == 9
    # The halves' weights are theirs; the vocabulary grew at its end.
    vlm = LlavaForConditionalGeneration.from_pretrained(halves["vlm"]).state_dict()
    found = model.vlm.state_dict()
    assert vlm.keys() == found.keys()
    assert [name for name in vlm if not torch.equal(found[name][: len(vlm[name])], vlm[name])] == []
    masks, expected = model.mask_model.state_dict(), build_model()[0].mask_model.state_dict()
    assert [name for name in expected if not torch.equal(masks[name], expected[name])] == []


@pytest.mark.parametrize("tied", [False, True])
def test_a_vlm_ties_its_embeddings_as_its_language_model_does(tied, tmp_path):
    """InternVL3's configuration does not say so for the whole model, and its weights are not tied."""
    text_config = {"model_type": "qwen2", **({"tie_word_embeddings": True} if tied else {})}  # not tied by default
    values = {"model_type": "internvl", "text_config": text_config}
    for given in ({}, {"tie_word_embeddings": not tied}):
        (tmp_path / "config.json").write_text(json.dumps(values | given))
        assert build._load_vlm_config(str(tmp_path)).tie_word_embeddings == given.get("tie_word_embeddings", tied)


def test_the_estimate_has_the_dtype_that_will_be_loaded(tmp_path):
    """Qwen3-VL's configuration has a dtype for its language model alone."""
    model = qwen3_vl_sam().to(torch.bfloat16)
    model.vlm.save_pretrained(tmp_path / "vlm")
    model.mask_model.save_pretrained(tmp_path / "sam")
    config = json.loads((tmp_path / "vlm" / "config.json").read_text())
    config["text_config"]["dtype"] = config.pop("dtype")
    (tmp_path / "vlm" / "config.json").write_text(json.dumps(config))
    model.config.vlm_config = AutoConfig.from_pretrained(tmp_path / "vlm")
    model_args = ModelArguments(vlm=str(tmp_path / "vlm"), mask_model=str(tmp_path / "sam"))
    for empty in (False, True):
        found = build.build_model(model_args, model.config, empty=empty)
        assert {weight.dtype for weight in found.parameters()} == {torch.bfloat16}


def test_options_of_the_image_processor_are_replaced_and_saved(halves, tmp_path):
    _, published = load(**halves)
    _, processor = load(**halves, image_processor_kwargs={"do_center_crop": False})
    processor.save_pretrained(tmp_path)
    for found in (processor, LisaProcessor.from_pretrained(tmp_path)):
        expected = published.vlm_processor.image_processor.to_dict()
        assert found.vlm_processor.image_processor.to_dict() == expected | {"do_center_crop": False}
        assert found.preprocess_images(Image.new("RGB", (64, 32))).inputs["pixel_values"].shape[2:] == (32, 64)
    model_args = ModelArguments(**halves, image_processor_kwargs={"max_pixel": 9})
    with pytest.raises(ValueError, match="options of CLIPImageProcessorPil, got `max_pixel`. Did you mean"):
        build.build_config_and_processor(model_args)


def test_a_run_that_was_stopped_is_no_model_yet(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="got one without its final model. Finish it with `--resume_from_checkpoint"):
        build.load_lisa(str(tmp_path))


def test_a_lisa_model_is_continued_with_all_that_it_learned(halves, tmp_path):
    options = {"chat_template": "llava_v1", "thinking": "on", "ce_loss_weight": 0.5, "mask_dice_loss_weight": 0.7}
    model, processor = load(**halves, **options)
    before = copy_state(model)
    trainer = train(model, processor, tmp_path / "first")
    trained = merge_lora(trainer.model)
    trained.save_pretrained(tmp_path / "lisa")
    processor.save_pretrained(tmp_path / "lisa")
    expected = copy_state(trained)
    for part in ("seg_projector", "mask_model.mask_decoder", "embed_tokens", "lm_head", "q_proj"):
        assert any(part in name and not torch.equal(expected[name], before[name]) for name in expected), part

    continued, again = load(model=str(tmp_path / "lisa"))
    state = copy_state(continued)
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []
    weights = ("ce_loss_weight", "mask_bce_loss_weight", "mask_dice_loss_weight")
    assert [getattr(continued.config, name) for name in weights] == [0.5, 2.0, 0.7]
    assert again.chat_template == processor.chat_template and again.seg_token_id == processor.seg_token_id
    assert again.thinking and continued.config.answer_end_token_id == model.config.answer_end_token_id
    # It trains on, from there: a third and a fourth step, not two first ones.
    first, third = training_logs(trainer)[0], training_logs(train(continued, again, tmp_path / "second"))[0]
    assert third["loss"] < first["loss"]

    options = {"mask_dice_loss_weight": 0.2, "chat_template": "llava_1_5", "thinking": "off"}
    changed, processor = load(model=str(tmp_path / "lisa"), **options)
    assert [getattr(changed.config, name) for name in weights] == [0.5, 2.0, 0.2]
    assert processor.chat_template == load_chat_template("llava_1_5") and not processor.thinking
