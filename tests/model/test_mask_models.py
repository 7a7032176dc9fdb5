"""Mask models as published: SAM 2, SAM 3 and EdgeTAM are video models, of which LISA uses the image part."""

import json
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from fixtures.shrunken import published_keys
from fixtures.tiny_models import SIDE, conversation, image, llava_sam, sam2_config
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForMaskGeneration,
    EdgeTamVideoConfig,
    Sam2ImageProcessor,
    Sam2VideoConfig,
    Sam3ImageProcessor,
    Sam3TrackerVideoConfig,
    Sam3VideoConfig,
)

from lisa_hf import LisaConfig, LisaForConditionalGeneration, LisaProcessor
from lisa_hf.model.configuration_lisa import image_mask_config
from lisa_hf.model.mask_backbone import UNTRAINED_DECODER_MODULES


SIDES = {"sam3_video": 56, "sam3_tracker_video": 56}  # patches of 14 pixels
IMAGE_TYPES = {
    "sam2_video": "sam2",
    "sam3_video": "sam3_tracker",
    "sam3_tracker_video": "sam3_tracker",
    "edgetam_video": "edgetam",
}
HALF = {
    "prompt_encoder_config": sam2_config()["prompt_encoder_config"],
    "mask_decoder_config": sam2_config()["mask_decoder_config"],
    "initializer_range": 0.2,
}
SAM3_VISION = {
    "model_type": "sam3_vision_model",
    "backbone_config": {
        "model_type": "sam3_vit_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "pretrain_image_size": 56,
        "patch_size": 14,
        "window_size": 2,
        "global_attn_indexes": [1],
    },
    "fpn_hidden_size": 32,
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}
EDGETAM_VISION = {
    "model_type": "edgetam_vision_model",
    "backbone_config": {
        "model_type": "timm_wrapper",
        "architecture": "test_efficientnet",  # with BatchNorm, as EdgeTAM's RepViT
        "num_classes": 2,
        "label_names": ["a", "b"],
        "model_args": {"in_chans": 3, "features_only": True, "out_indices": [1, 2, 3, 4]},
    },
    "backbone_channel_list": [64, 48, 32, 24],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    "fpn_hidden_size": 32,
}


def video_config(model_type: str):
    if model_type == "sam2_video":
        return Sam2VideoConfig(vision_config=sam2_config()["vision_config"], **HALF)
    if model_type == "edgetam_video":
        pytest.importorskip("timm")
        return EdgeTamVideoConfig(vision_config=EDGETAM_VISION, **HALF)
    prompt = {**HALF["prompt_encoder_config"], "patch_size": 14}
    tracker = Sam3TrackerVideoConfig(
        vision_config=SAM3_VISION, **{**HALF, "prompt_encoder_config": prompt}, image_size=56
    )
    return tracker if model_type == "sam3_tracker_video" else Sam3VideoConfig(tracker_config=tracker.to_dict())


@pytest.fixture(params=IMAGE_TYPES)
def published(request, tmp_path):
    """The directory of a tiny mask model as it would be published, the image model inside, and the model type."""
    model_type, directory = request.param, tmp_path / "mask_model"
    config = video_config(model_type)
    torch.manual_seed(0)
    model = AutoModelForMaskGeneration.from_config(image_mask_config(config))
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.2)
    directory.mkdir()
    config.save_pretrained(directory)
    save_file(published_keys(model_type, model.state_dict()), directory / "model.safetensors", {"format": "pt"})
    side = SIDES.get(model_type, SIDE)
    processor_class = Sam3ImageProcessor if side == 56 else Sam2ImageProcessor
    processor_class(size={"height": side, "width": side}).save_pretrained(directory)
    return directory, model, model_type


def test_a_model_under_the_name_of_another_is_what_its_parts_are(tmp_path):
    """SAM 2 that calls itself SAM 3, whose configuration has no such parts."""
    torch.manual_seed(0)
    model = AutoModelForMaskGeneration.from_config(AutoConfig.for_model(**sam2_config()))
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": "sam3_video"}))
    config = image_mask_config(AutoConfig.from_pretrained(tmp_path))
    assert config.model_type == "sam2" and config.vision_config.to_dict() == model.config.vision_config.to_dict()
    found, info = AutoModelForMaskGeneration.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not any(info.values())
    for name, weight in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name


@pytest.fixture
def joined(published, tmp_path):
    directory, mask_model, model_type = published
    llava, llava_processor = llava_sam()
    llava.vlm.save_pretrained(tmp_path / "vlm")
    llava_processor.vlm_processor.save_pretrained(tmp_path / "vlm")
    processor = LisaProcessor.from_vlm_mask_model_pretrained(tmp_path / "vlm", directory)
    model = LisaForConditionalGeneration.from_vlm_mask_model_pretrained(
        tmp_path / "vlm", directory, seg_token_id=processor.seg_token_id
    )
    return model, processor, mask_model, model_type


def make_batch(processor) -> dict:
    images = [image(40, 60), image(64, 32, seed=1)]
    turns = [conversation("What is it?", "It is [SEG]."), conversation("The circle?", "It is [SEG], [SEG].")]
    batch = processor.encode_conversations(images, turns)
    batch["mask_labels"] = [torch.randint(0, 2, (n, *size)) for n, size in ((1, (40, 60)), (2, (64, 32)))]
    return batch


def test_published_mask_models_become_their_image_models(joined, tmp_path):
    model, processor, mask_model, model_type = joined
    for name, weight in mask_model.state_dict().items():
        torch.testing.assert_close(model.mask_model.state_dict()[name], weight, rtol=0, atol=0, msg=name)
    assert model.config.mask_config.model_type == IMAGE_TYPES[model_type]
    assert type(model.config.mask_config) is type(model.mask_model.config) is type(model.mask_model).config_class
    assert not model.mask_model.mask_decoder.dynamic_multimask_via_stability  # also in this very process
    assert type(processor.mask_image_processor) in (Sam2ImageProcessor, Sam3ImageProcessor)

    batch = make_batch(processor)
    output = model.train()(**batch, output_masks=True)
    output.loss.backward()
    for name, parameter in model.mask_model.mask_decoder.named_parameters():
        if not f".{name}".startswith(tuple(f".{module}." for module in UNTRAINED_DECODER_MODULES)):
            assert parameter.grad is not None and parameter.grad.any(), name  # or DDP would wait for it
    model.eval()
    expected = model(**batch)
    model.save_pretrained(tmp_path / "lisa")
    processor.save_pretrained(tmp_path / "lisa")
    loaded = LisaForConditionalGeneration.from_pretrained(tmp_path / "lisa")
    assert loaded.config.mask_config.model_type == IMAGE_TYPES[model_type]
    loaded_batch = make_batch(LisaProcessor.from_pretrained(tmp_path / "lisa"))
    assert torch.equal(loaded_batch["mask_pixel_values"], batch["mask_pixel_values"])
    found = loaded(**loaded_batch)
    torch.testing.assert_close(found.low_res_masks, expected.low_res_masks, rtol=0, atol=1e-6)
    assert not loaded.mask_model.mask_decoder.dynamic_multimask_via_stability


def test_masks_equal_the_models_own(joined):
    """The mask model's own forward gives the same masks if its prompt encoder returns LISA's prompts."""
    model, processor, *_ = joined
    batch = make_batch(processor)
    with torch.no_grad():
        output = model(**batch)
    mask_model = model.mask_model
    encode = mask_model.prompt_encoder.forward
    for number, image_index in enumerate([0, 1, 1]):
        prompt = output.seg_embeddings[number][None, None, None]
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(
                mock.patch.object(mask_model.prompt_encoder, "forward", lambda *a, **k: (prompt, encode(*a, **k)[1]))
            )
            own = mask_model(pixel_values=batch["mask_pixel_values"][[image_index]], multimask_output=False)
        torch.testing.assert_close(output.low_res_masks[number], own.pred_masks[0, 0, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(output.iou_scores[number], own.iou_scores[0, 0, 0], rtol=0, atol=1e-5)


def test_a_frozen_mask_encoder_does_not_change_in_training(joined):
    model, processor, *_ = joined
    encoder = model.mask_model.vision_encoder
    encoder.requires_grad_(False)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    model.train()(**make_batch(processor))
    assert model.training and not encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    encoder.requires_grad_(True)
    assert model.train().mask_model.vision_encoder.training


def test_unknown_mask_models_are_named():
    vlm_config = llava_sam()[0].config.vlm_config
    config = LisaConfig(vlm_config=vlm_config, mask_config=AutoConfig.for_model("sam3_lite_text"), seg_token_id=5)
    with pytest.raises(ValueError, match="expected one of sam, sam_hq, sam2, sam3_tracker, edgetam, got"):
        LisaForConditionalGeneration(config)
