"""The feature cache: a warm one gives the same step without encoders, a stale or damaged entry is never used."""

import io
import logging

import pytest
import torch
from datasets import Dataset
from tiny_models import FAMILIES, image

from lisa_hf import LisaDataCollator
from lisa_hf.arguments import LisaTrainingArguments
from lisa_hf.feature_cache import build_feature_cache
from lisa_hf.lora import prepare_for_training
from lisa_hf.mixture import EvaluationDataset
from lisa_hf.schema import FEATURES, encode_mask, make_row


SIZES = [(40, 60), (64, 32), (50, 50)]


def make_rows() -> Dataset:
    """Three images with a question each, and a row whose image is broken."""
    rows = []
    for index, (height, width) in enumerate(SIZES):
        file = io.BytesIO()
        image(height, width, seed=index).save(file, format="PNG")
        mask = torch.zeros(height, width, dtype=torch.uint8)
        mask[: height // 2, : width // 3] = 1
        targets = [{"phrases": ["circle"], "rle": encode_mask(mask.numpy())}]
        rows.append(make_row(file.getvalue(), f"image_{index}", "drawn", "semantic", targets=targets))
    rows.append({**rows[0], "image": {"bytes": b"broken", "path": None}})
    return Dataset.from_list(rows, features=FEATURES)


@pytest.fixture
def rows() -> Dataset:
    return make_rows()


def build(tmp_path, rows, model, processor, **kwargs):
    args = LisaTrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none")
    return build_feature_cache(str(tmp_path / "cache"), model, processor, {"drawn": rows}, args, **kwargs)


def make_model(name: str = "llava-sam", trainable=("seg_projector", "mask_decoder", "embeddings")):
    model, processor = FAMILIES[name]()
    return prepare_for_training(model, list(trainable), lora_r=0), processor


def count_encoder_runs(model) -> list[str]:
    runs = []
    backbone = model.vlm.base_model
    modules = {"mask": model.mask_model.vision_encoder, "vlm": backbone.get_encoder(modality="image")}
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: runs.append(name))
    return runs


@pytest.mark.parametrize("name", ["llava-sam", "llava-sam_hq", "llava-sam2", "idefics3-sam", "gemma3-sam"])
def test_warm_cache_gives_the_step_without_encoders(name, rows, tmp_path):
    model, processor = make_model(name)
    cache = build(tmp_path, rows, model, processor)
    assert len(list(cache.directory.glob("*/*.safetensors"))) == len(SIZES)  # and none for the broken image
    dataset = EvaluationDataset(rows)
    items = [dataset[index] for index in (2, 0)]
    plain = LisaDataCollator(processor)(items)
    cached = LisaDataCollator(processor, feature_cache=cache)(items)
    assert {"pixel_values", "mask_pixel_values"} <= plain.keys() and "pixel_values" not in cached
    assert "mask_pixel_values" not in cached
    expected = model(**plain)
    runs = count_encoder_runs(model)
    output = model(**cached)
    assert not runs
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.02, atol=0)  # bfloat16 has eight bits
    for masks, expected_masks in zip(output.pred_masks, expected.pred_masks, strict=True):
        assert masks.dtype == expected_masks.dtype
        torch.testing.assert_close(masks, expected_masks, rtol=0, atol=0.05 * expected_masks.abs().max().item())


def test_an_encoder_that_learns_is_not_cached(rows, tmp_path):
    model, processor = make_model(trainable=["seg_projector", "mask_decoder", "vision_tower"])
    batch = LisaDataCollator(processor, feature_cache=build(tmp_path, rows, model, processor))(
        [EvaluationDataset(rows)[0]]
    )
    assert "image_embeddings" in batch and "pixel_values" in batch and "vision_features" not in batch
    model, processor = make_model(trainable=["mask_encoder", "multi_modal_projector"])
    with pytest.raises(ValueError, match="expected a frozen encoder"):
        build(tmp_path, rows, model, processor)


def test_second_build_resumes_and_mends(rows, tmp_path):
    model, processor = make_model()
    cache = build(tmp_path, rows, model, processor)
    runs = count_encoder_runs(model)
    build(tmp_path, rows, model, processor)
    assert runs == ["mask", "vlm"]  # the example that tells an entry's size, and no image
    first = EvaluationDataset(rows)[0]
    path = cache.path(first["image"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    batch = LisaDataCollator(processor, feature_cache=cache)([first])
    assert "mask_pixel_values" in batch and "image_embeddings" not in batch
    build(tmp_path, rows, model, processor)
    assert path.read_bytes() == whole and len(runs) == 2 + 4


def test_other_weights_or_preprocessing_have_another_directory(rows, tmp_path):
    model, processor = make_model()
    first = build(tmp_path, rows, model, processor).directory
    with torch.no_grad():
        model.seg_projector.linear_1.weight.add_(1)  # not of an encoder
    assert build(tmp_path, rows, model, processor).directory == first
    with torch.no_grad():
        next(model.mask_model.vision_encoder.parameters()).view(-1)[0] += 1e-3
    second = build(tmp_path, rows, model, processor).directory
    processor.mask_image_processor.image_mean = [0.5, 0.5, 0.5]
    assert len({first, second, build(tmp_path, rows, model, processor).directory}) == 3


def test_limit_caches_what_fits(rows, tmp_path, caplog, monkeypatch):
    model, processor = make_model()
    with caplog.at_level(logging.INFO):
        entry = build(tmp_path / "all", rows, model, processor)
    assert "4 images of 0." in caplog.text and "GB are free" in caplog.text
    # An entry's file has a header beside its tensors, so 2.5 files hold two entries.
    size = next(entry.directory.glob("*/*.safetensors")).stat().st_size
    cache = build(tmp_path, rows, model, processor, limit_gb=2.5 * size / 1e9)
    assert "holds 2 of 4 images" in caplog.text and len(list(cache.directory.glob("*/*"))) == 2
    collator, dataset = LisaDataCollator(processor, feature_cache=cache), EvaluationDataset(rows)
    assert "image_embeddings" in collator([dataset[0], dataset[1]])
    assert "mask_pixel_values" in collator([dataset[1], dataset[2]])  # all of a batch, or none
    # Processes that share an encoder all run it, or none does; here the launcher alone says that they do.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="with sharded encoders either all images are cached or none"):
        build(tmp_path / "sharded", rows, model, processor, limit_gb=2.5 * size / 1e9)
