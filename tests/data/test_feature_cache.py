"""The feature cache: a warm one gives the same step without encoders, a stale or damaged entry is never used."""

import io
import logging
import resource
from unittest import mock

import PIL.Image
import PIL.ImageFile
import pytest
import torch
from datasets import Dataset
from fixtures.tiny_models import FAMILIES, image
from fixtures.tiny_training import collate
from fixtures.vlms import vlm_sam_with_processor
from transformers.utils import is_torchvision_available

from lisa_hf import LisaDataCollator, LisaProcessor
from lisa_hf.data.feature_cache import FeatureCache
from lisa_hf.data.images import load_row_image, read_file, undecoded
from lisa_hf.data.masks import encode_mask
from lisa_hf.data.mixture import EvaluationDataset, MixtureDataset
from lisa_hf.data.rows import FEATURES, make_row
from lisa_hf.training.arguments import LisaTrainingArguments
from lisa_hf.training.trainable import prepare_for_training


needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="their processors need it")
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


def build(tmp_path, rows, model, processor, limit_gb=None, min_decoded_edge=None, **kwargs):
    args = LisaTrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", **kwargs)
    cache = FeatureCache(tmp_path / "cache", limit_gb, min_decoded_edge)
    cache.build(model, processor, {"drawn": rows}, args)
    return cache


def make_items(rows, indices, cache=None) -> list[dict]:
    """Items as a mixture with this cache makes them, with questions that nothing is drawn for."""
    questions = EvaluationDataset(rows).questions
    return [
        {
            **load_row_image(row, cache),
            **{name: row[name] for name in ("image_id", "source", "ignore")},
            "questions": questions(row),
        }
        for row in (undecoded(rows)[index] for index in indices)
    ]


def find_entries(cache) -> list:
    return sorted(path.relative_to(cache.directory) for path in cache.directory.glob("*/*"))


def make_model(name: str = "llava-sam", trainable=("seg_projector", "mask_decoder", "embeddings")):
    model, processor = FAMILIES[name]()
    return prepare_for_training(model, list(trainable), lora_r=4), processor


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
    assert len(find_entries(cache)) == len(SIZES)  # and none for the broken image
    plain = collate(processor, make_items(rows, (2, 0)))
    with (
        mock.patch.object(PIL.ImageFile.ImageFile, "load", side_effect=AssertionError("decodes")),
        mock.patch.object(processor, "preprocess_for_vlm", side_effect=AssertionError("preprocesses")),
    ):
        cached = collate(processor, make_items(rows, (2, 0), cache))
    assert {"pixel_values", "mask_pixel_values"} <= plain.keys() and "pixel_values" not in cached
    assert "mask_pixel_values" not in cached
    for key in cached.keys() & plain.keys():
        torch.testing.assert_close(cached[key], plain[key])
    expected = model(**plain)
    runs = count_encoder_runs(model)
    output = model(**cached)
    assert not runs
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.02, atol=0)  # bfloat16 has eight bits
    for masks, expected_masks in zip(output.pred_masks, expected.pred_masks, strict=True):
        assert masks.dtype == expected_masks.dtype
        torch.testing.assert_close(masks, expected_masks, rtol=0, atol=0.05 * expected_masks.abs().max().item())


@needs_torchvision
def test_cache_holds_features_that_enter_layers(rows, tmp_path):
    """Qwen3-VL's: its features, those of deeper layers, and each image's grid for the positions of its rows."""
    model, processor = vlm_sam_with_processor("qwen3_vl")
    model = prepare_for_training(model, ["seg_projector", "mask_decoder"], lora_r=4)
    cache = build(tmp_path, rows, model, processor)
    plain = collate(processor, make_items(rows, (2, 0)))
    cached = collate(processor, make_items(rows, (2, 0), cache))
    assert "pixel_values" not in cached and "mask_pixel_values" not in cached
    assert torch.equal(cached["image_grid_thw"], plain["image_grid_thw"])
    expected = model(**plain)
    runs = count_encoder_runs(model)
    output = model(**cached)
    assert not runs
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.02, atol=0)
    for fields in cached["vision_features"]:
        fields["deepstack_features"] = [[torch.zeros_like(layer)] for (layer,) in fields["deepstack_features"]]
    without = model(**cached).last_hidden_state
    assert (without - output.last_hidden_state).abs().max() > 0.1


def test_mixture_takes_the_same_draws_from_a_cache(rows, tmp_path):
    model, processor = make_model()
    plain, cached = (
        MixtureDataset({"drawn": rows}, length=8, on_bad_row="skip", feature_cache=cache)
        for cache in (None, build(tmp_path, rows, model, processor))
    )
    for item, expected in zip(map(cached.__getitem__, range(8)), map(plain.__getitem__, range(8))):
        assert expected["cached_features"] is None and item["cached_features"] is not None
        for key in ("image_id", "original_size", "questions", "num_skipped"):
            assert item[key] == expected[key]
    assert any(plain[index]["num_skipped"] for index in range(8))  # the broken image, drawn again in both


def test_an_encoder_that_learns_is_not_cached(rows, tmp_path):
    model, processor = make_model(trainable=["seg_projector", "mask_decoder", "vision_tower"])
    cache = build(tmp_path, rows, model, processor)
    with mock.patch.object(processor, "mask_image_processor", side_effect=AssertionError("preprocesses")):
        batch = LisaDataCollator(processor)(make_items(rows, [0], cache))
    assert "image_embeddings" in batch and "pixel_values" in batch and "vision_features" not in batch
    model, processor = make_model(trainable=["seg_projector", "mask_decoder", "mask_encoder"])
    batch = collate(processor, make_items(rows, [0], build(tmp_path, rows, model, processor)))
    assert "mask_pixel_values" in batch and "vision_features" in batch and "pixel_values" not in batch
    assert model(**batch).loss.isfinite()
    model, processor = make_model(trainable=["mask_encoder", "multi_modal_projector"])
    with pytest.raises(ValueError, match="expected a frozen encoder"):
        build(tmp_path, rows, model, processor)


def test_second_build_resumes_and_mends(rows, tmp_path):
    model, processor = make_model()
    cache = build(tmp_path, rows, model, processor)
    runs = count_encoder_runs(model)
    build(tmp_path, rows, model, processor)
    # Two examples that tell whether features can be cached, one that tells an entry's size, and no image.
    assert runs == ["vlm", "vlm", "mask", "vlm"]
    path = cache.path(read_file(undecoded(rows)[0]))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    batch = LisaDataCollator(processor)(make_items(rows, [0], cache))
    assert "mask_pixel_values" in batch and "image_embeddings" not in batch
    build(tmp_path, rows, model, processor)
    assert path.stat().st_size == len(whole) and len(runs) == 4 + 6
    assert "image_embeddings" in LisaDataCollator(processor)(make_items(rows, [0], cache))


def test_a_later_build_reads_no_image_unless_entries_are_missing(rows, tmp_path):
    model, processor = make_model()
    cache = build(tmp_path, rows, model, processor)
    with mock.patch("lisa_hf.data.feature_cache.read_file", side_effect=AssertionError("reads")):
        build(tmp_path, rows, model, processor)
        with pytest.raises(AssertionError, match="reads"):  # whether sharded encoders run must be certain
            with mock.patch.object(LisaTrainingArguments, "shards_weights", True):
                build(tmp_path, rows, model, processor)
        with pytest.raises(AssertionError, match="reads"):
            build(tmp_path, rows.select([0, 1]), model, processor)
        entry = cache.path(read_file(undecoded(rows)[0]))
        entry.unlink()
        with pytest.raises(AssertionError, match="reads"):
            build(tmp_path, rows, model, processor)
    build(tmp_path, rows, model, processor)
    assert entry.exists()


def test_processes_skip_a_build_together(rows, tmp_path):
    """Where each machine has its own disk, one may have a mark that another lacks."""
    model, processor = make_model()
    build(tmp_path, rows, model, processor)
    others = []
    with (
        mock.patch.object(LisaTrainingArguments, "world_size", 2),
        mock.patch("torch.distributed.barrier"),
        mock.patch("torch.distributed.all_reduce", lambda value, op: value.mul_(others[0])),
        mock.patch("lisa_hf.data.feature_cache.read_file", side_effect=AssertionError("reads")),
    ):
        others[:] = [1]
        build(tmp_path, rows, model, processor)
        others[:] = [0]
        with pytest.raises(AssertionError, match="reads"):
            build(tmp_path, rows, model, processor)


def test_a_limit_below_one_entry_is_no_error(rows, tmp_path):
    assert find_entries(build(tmp_path, rows, *make_model(), limit_gb=1e-9)) == []


def test_interrupted_build_goes_on(rows, tmp_path):
    model, processor = make_model()
    runs = count_encoder_runs(model)

    def interrupt(*_):
        if len(runs) > 6:
            raise KeyboardInterrupt

    handle = model.vlm.base_model.get_encoder(modality="image").register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, rows, model, processor, per_device_train_batch_size=1)
    handle.remove()
    (left,) = (tmp_path / "cache").glob("*/*/*")  # one whole entry and nothing else
    stamp = left.stat().st_mtime_ns
    cache = build(tmp_path, rows, model, processor, per_device_train_batch_size=1)
    assert len(find_entries(cache)) == len(SIZES) and left.stat().st_mtime_ns == stamp


def test_full_disk_stops_and_leaves_nothing_half_written(rows, tmp_path):
    model, processor = make_model()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))  # bytes that a file may have
        with pytest.raises(ValueError, match="feature_cache: expected free space .*Free some space and start"):
            build(tmp_path, rows, model, processor)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "cache").glob("*/*/*"))
    assert len(find_entries(build(tmp_path, rows, model, processor))) == len(SIZES)


@pytest.mark.parametrize("streaming", [False, True])
def test_processes_and_workers_share_the_images(streaming, rows, tmp_path):
    """Two processes in turn, each with a loader worker: their shares are different images, and all of them."""
    model, processor = make_model()
    rows = rows.to_iterable_dataset(num_shards=2) if streaming else rows
    counts = []
    for rank in range(2):
        runs = count_encoder_runs(model)
        with (
            mock.patch.object(LisaTrainingArguments, "process_index", rank),
            mock.patch.object(LisaTrainingArguments, "world_size", 2),
            mock.patch("torch.distributed.barrier"),
            mock.patch("torch.distributed.all_reduce"),
        ):
            cache = build(*(tmp_path, rows, model, processor), per_device_train_batch_size=1, dataloader_num_workers=1)
        counts.append((runs.count("mask") - 1, len(find_entries(cache))))
    assert counts in ([(2, 2), (1, 3)], [(1, 1), (2, 3)])
    batch = LisaDataCollator(processor)(make_items(make_rows(), (0, 1, 2), cache))
    assert "image_embeddings" in batch and len(batch["vision_features"]) == 3


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
    third = build(tmp_path, rows, model, processor).directory
    model.get_base_model().config.vlm_config.vision_feature_layer = -2
    assert len({first, second, third, build(tmp_path, rows, model, processor).directory}) == 4


def test_parameters_of_the_backbone_itself_count(rows, tmp_path):
    """LLaVA-NeXT's `image_newline` is in the features of an image, though in none of the modules that make them."""
    model, processor = make_model()
    backbone = model.get_base_model().vlm.model
    backbone.image_newline = torch.nn.Parameter(torch.zeros(32), requires_grad=False)
    first = build(tmp_path, rows, model, processor)
    assert first.is_complete
    with torch.no_grad():
        backbone.image_newline.add_(1)
    assert build(tmp_path, rows, model, processor).directory != first.directory
    backbone.image_newline.requires_grad_(True)
    assert build(tmp_path, rows, model, processor).feature_names == ["image_embeddings"]


@needs_torchvision
def test_images_that_become_tokens_of_the_language_model_are_not_cached(rows, tmp_path):
    """Emu3's features are embeddings of the language model, which train."""
    model, processor = vlm_sam_with_processor("emu3")
    cache = build(tmp_path, rows, prepare_for_training(model, ["seg_projector", "embeddings"], lora_r=4), processor)
    assert cache.feature_names == ["image_embeddings"] and len(find_entries(cache)) == len(SIZES)


@pytest.mark.parametrize("weight_trains, reason", [(True, "weights that are trained"), (False, "`image_mean`")])
def test_features_that_cannot_stand_for_an_image_are_not_cached(weight_trains, reason, rows, tmp_path, caplog):
    model, processor = make_model()
    backbone = model.get_base_model().vlm.model
    get_image_features, embeddings = backbone.get_image_features, backbone.get_input_embeddings()

    def with_more(pixel_values, **kwargs):
        output = get_image_features(pixel_values, **kwargs)
        if weight_trains:
            output.pooler_output = [features + embeddings.weight[0] for features in output.pooler_output]
        else:
            output.image_mean = pixel_values.mean()
        return output

    backbone.get_image_features = with_more
    with caplog.at_level(logging.WARNING, logger="lisa_hf.data.feature_cache"):
        cache = build(tmp_path, rows, model, processor)
    assert cache.feature_names == ["image_embeddings"] and reason in caplog.text


def test_inputs_that_are_no_tensors_stay_lists(rows, tmp_path, monkeypatch):
    """Unlimited-OCR's number of crops."""
    model, processor = make_model()
    preprocess = LisaProcessor.preprocess_for_vlm

    def with_a_list(self, images, *args, **kwargs):
        inputs, *others = preprocess(self, images, *args, **kwargs)
        return {**inputs, "num_crops": [1] * len(images)}, *others

    monkeypatch.setattr(LisaProcessor, "preprocess_for_vlm", with_a_list)
    assert len(find_entries(build(tmp_path, rows, model, processor))) == len(SIZES)


def test_photos_of_reduced_scale_have_entries_of_their_own(tmp_path):
    file = io.BytesIO()
    PIL.Image.effect_noise((256, 192), 200).save(file, format="JPEG")
    targets = [{"phrases": ["circle"], "rle": encode_mask(torch.ones(192, 256).byte().numpy())}]
    row = make_row(file.getvalue(), "photo", "drawn", "semantic", targets=targets)
    rows = Dataset.from_list([row], features=FEATURES)
    model, processor = make_model()
    collator = LisaDataCollator(processor)
    batches = []
    for edge in (None, 32):
        cache = build(tmp_path, rows, model, processor, min_decoded_edge=edge)
        plain, cached = (
            MixtureDataset({"drawn": rows}, length=1, min_decoded_edge=edge, feature_cache=cache)[0]
            for cache in (None, cache)
        )
        pixels = collator([plain])["pixel_values"]
        batches.append(collator([cached]))
        with torch.no_grad():
            (features,) = model.vlm.base_model.get_image_features(pixels, return_dict=True).pooler_output
        torch.testing.assert_close(batches[-1]["vision_features"][0], features.bfloat16())
    full, reduced = batches
    assert not torch.equal(full["vision_features"][0], reduced["vision_features"][0])
    assert full["original_sizes"].tolist() == reduced["original_sizes"].tolist() == [[192, 256]]


def test_limit_caches_what_fits(rows, tmp_path, caplog, monkeypatch):
    model, processor = make_model()
    with caplog.at_level(logging.INFO):
        entry = build(tmp_path / "all", rows, model, processor)
    assert "4 images of 0." in caplog.text and "GB are free" in caplog.text
    # An entry's file has a header in addition to its tensors, so 2.5 files hold two entries.
    size = next(entry.directory.glob("*/*.safetensors")).stat().st_size
    cache = build(tmp_path, rows, model, processor, limit_gb=2.5 * size / 1e9)
    assert "holds 2 images" in caplog.text and len(find_entries(cache)) == 2
    collator = LisaDataCollator(processor)
    assert "image_embeddings" in collator(make_items(rows, (0, 1), cache))
    mixed, plain = collator(make_items(rows, (1, 2), cache)), collator(make_items(rows, (1, 2)))
    assert mixed.keys() == plain.keys()  # features for all of a batch, or for none
    torch.testing.assert_close(mixed["mask_pixel_values"], plain["mask_pixel_values"])
    stream = rows.to_iterable_dataset()
    with caplog.at_level(logging.INFO):
        limited = build(tmp_path / "stream", stream, model, processor, 1.5 * size / 1e9, per_device_train_batch_size=1)
    assert "images of streams of 0." in caplog.text and len(find_entries(limited)) == 1
