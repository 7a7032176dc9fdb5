"""Converted LISA-like published models: the numbers of their own code, and every way to use a model."""

import json
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from unittest import mock

import numpy as np
import pytest
import torch
from fixtures.golden_model import GOLDEN, convert, golden_image, load_case, load_json
from fixtures.published_seg import (
    assert_as_recorded,
    assert_sa2va_as_recorded,
    write_glamm,
    write_lisa_v0,
    write_sa2va,
    write_sesame,
)
from fixtures.recipes import run_here
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, pipeline

from lisa_hf.training.arguments import ModelArguments
from lisa_hf.training.build import build_config_and_processor


CLIP = ("--vision_tower", GOLDEN / "clip_tiny")
ORIGINALS = {  # how it is written, the source that `auto` finds, options, how its numbers are compared
    "sesame": (write_sesame, "lisa", CLIP, assert_as_recorded),
    "read": (partial(write_sesame, architecture="READForCausalLM"), "lisa", CLIP, assert_as_recorded),
    "lisa_v0": (write_lisa_v0, "lisa-v0", CLIP, assert_as_recorded),
    "glamm": (write_glamm, "glamm", CLIP, assert_as_recorded),
    "sa2va_qwen2_5_vl": (partial(write_sa2va, name="sa2va_qwen2_5_vl"), "sa2va", (), assert_sa2va_as_recorded),
    "sa2va_qwen3_vl": (partial(write_sa2va, name="sa2va_qwen3_vl"), "sa2va", (), assert_sa2va_as_recorded),
    "sa2va_internvl": (partial(write_sa2va, name="sa2va_internvl"), "sa2va", (), assert_sa2va_as_recorded),
}


@pytest.fixture(scope="module", params=ORIGINALS)
def converted(request, tmp_path_factory):
    """The name of an original, and the directory of its conversion."""
    directory = tmp_path_factory.mktemp(request.param)
    write, source, options, _ = ORIGINALS[request.param]
    write(directory / "original")
    with mock.patch("lisa_hf.conversion.sa2va.IMAGE_SIZE", 224), redirect_stdout(StringIO()) as printed:
        convert("auto", "--checkpoint", directory / "original", *options, "--output", directory / "converted")
    assert f"Source: {source}," in printed.getvalue()
    return request.param, directory / "converted"


def test_numbers_of_the_originals_own_code(converted):
    name, directory = converted
    ORIGINALS[name][3](directory, name)


def test_what_is_known_of_their_training_data_is_kept(converted):
    name, directory = converted
    known = {"sesame": "SESAME's", "read": "READ's", "lisa_v0": "of v0 were trained on ReasonSeg train"}
    record = directory / "run.json"
    assert record.exists() == (name in known)
    assert name not in known or known[name] in json.loads(record.read_text())["training_data"]


def test_an_original_is_refused_with_its_command(converted):
    name, directory = converted
    original = directory.with_name("original")
    with pytest.raises(ValueError, match=f"convert_weights.py {ORIGINALS[name][1]} --checkpoint {original} "):
        build_config_and_processor(ModelArguments(model=str(original)))


@pytest.mark.parametrize("converted", ["sa2va_qwen2_5_vl", "sa2va_qwen3_vl", "sa2va_internvl"], indirect=True)
def test_sa2va_prepares_images_as_its_own_code(converted):
    """Tiles of InternVL exactly; SAM 2's pixels to two levels of color, which torchvision rounds otherwise."""
    name, directory = converted
    processor, photo = AutoProcessor.from_pretrained(directory), golden_image(0)
    inputs = processor.preprocess_images([photo]).inputs
    resized = torch.from_numpy(np.array(photo.resize((224, 224))).astype(np.float32)) / 255  # bicubic
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    difference = inputs["mask_pixel_values"][0].permute(1, 2, 0) * std + mean - resized
    assert difference.abs().max() <= 2.01 / 255
    if name == "sa2va_internvl":
        meta, tensors = load_case(name)
        tiles = inputs["pixel_values"]
        assert len(tiles) == meta["num_tiles"]
        torch.testing.assert_close(tiles[:, :, ::4, ::4], tensors["tiles"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "converted",
    [pytest.param(name, marks=[] if name == "lisa_v0" else pytest.mark.slow) for name in ORIGINALS],
    indirect=True,
)
def test_evaluated_trained_exported_and_asked(converted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, directory = converted
    sources = "{shapes: {num_train_scenes: 1, num_validation_scenes: 2, image_size: 64}}"
    options = ("--output_dir", tmp_path / "scores", "--generation_max_new_tokens", 2, "--use_cpu", "true")
    run_here("eval.py", directory, "--eval_sources", sources, *options)
    assert list((tmp_path / "scores").glob("*.json"))
    # A step of training, because an export is a run's.
    options = ("--max_steps", 1, "--per_device_train_batch_size", 1, "--save_strategy", "no", "--report_to", "none")
    options += ("--output_dir", tmp_path / "run", "--use_cpu", "true", "--eval_strategy", "no")
    run_here("train.py", "--model", directory, "--sources", sources, *options)
    run_here("export.py", tmp_path / "run", "--output", tmp_path / "exported")
    model = AutoModel.from_pretrained(tmp_path / "exported").eval()
    pipe = pipeline(
        "reasoning-segmentation", model=model, processor=AutoProcessor.from_pretrained(tmp_path / "exported")
    )
    seg = torch.tensor(model.config.seg_token_id)
    only_seg = {"logits_processor": [lambda _, scores: scores.index_fill(1, seg, 1e4)]}
    answer = pipe(golden_image(0), question="What is red?", max_new_tokens=3, generate_kwargs=only_seg)
    has_last = model.config.seg_state == "predicting"
    assert answer["masks"].shape == (2 + has_last, 93, 131)


def test_models_that_make_masks_in_another_way_are_refused_with_the_reason(tmp_path, fail):
    save_file({"seg_head.0.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    message = fail("auto", "--checkpoint", tmp_path)
    assert "got UniPixel, which makes two" in message and "Use its code." in message
    meta = load_json("sa2va_internvl")
    text = meta["config"]["llm_config"] | {"architectures": ["InternLM2ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(meta["config"] | {"llm_config": text}))
    names = ("vision_model.embeddings.class_embedding", "grounding_encoder.sam2_model.no_mem_embed")
    save_file({name: torch.ones(1) for name in names}, tmp_path / "model.safetensors")
    message = fail("auto", "--checkpoint", tmp_path)
    assert "got InternLM2ForCausalLM with v2, which transformers does not have" in message


@pytest.mark.slow
def test_unknown_and_missing_tensors_are_listed(tmp_path, fail):
    write_sa2va(tmp_path / "sa2va", "sa2va_internvl")
    tensors = load_file(tmp_path / "sa2va" / "model.safetensors")
    with mock.patch("lisa_hf.conversion.sa2va.IMAGE_SIZE", 224):
        save_file(tensors | {"mlp1.4.weight": torch.ones(1)}, tmp_path / "sa2va" / "model.safetensors")
        assert "'mlp1.4.weight'" in fail("sa2va", "--checkpoint", tmp_path / "sa2va")
        del tensors["grounding_encoder.sam2_model.sam_prompt_encoder.point_embeddings.2.weight"]
        del tensors["vision_model.encoder.layers.1.attn.qkv.bias"]
        save_file(tensors, tmp_path / "sa2va" / "model.safetensors")
        message = fail("sa2va", "--checkpoint", tmp_path / "sa2va")
    assert "4 tensors are missing" in message and "attention.k_proj.bias" in message
    assert "mask_model.prompt_encoder.point_embed.weight" in message
