"""Prepared rows are updated with their files, and can be removed."""

import errno
import json
import os

import datasets
import numpy as np
import PIL.Image
import pytest
from fixtures.recipes import prepare_data

from data_scripts import load_source
from data_scripts.cache import clean_cache
from data_scripts.source import SourceBuilder
from lisa_hf.data.masks import decode_mask


POLYGON = [1, 1, 9, 1, 9, 9, 1, 9]


@pytest.fixture
def root(tmp_path):
    """One photo, with an annotation in every layout."""
    write_photo(tmp_path / "a.png", 20, 30)
    write_mask(tmp_path / "mask.png", 5)
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "a.png", "mask": "mask.png", "phrase": "it"}))
    image = {"id": 1, "file_name": "a.png", "height": 20, "width": 30}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [POLYGON]}
    content = {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "it"}]}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    for name in ("labelme", "classes"):
        (tmp_path / name).mkdir()
    shape = {"label": "it", "points": np.reshape(POLYGON, (-1, 2)).tolist()}
    (tmp_path / "labelme" / "a.json").write_text(json.dumps({"imagePath": "a.png", "shapes": [shape]}))
    write_mask(tmp_path / "classes" / "a.png", 5)
    return tmp_path


def write_photo(path, height, width):
    PIL.Image.new("RGB", (width, height)).save(path)


def write_mask(path, side):
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[:side, :side] = 1
    PIL.Image.fromarray(mask).save(path)


OPTIONS = {
    "image_folder": {"questions": "q.jsonl", "images": ".", "masks": "."},
    "coco_instances": {"annotations": "coco.json", "images": "."},
    "labelme": {"annotations": "labelme", "images": "."},
    "class_masks": {"images": ".", "masks": "classes", "classes": {"it": 1}},
}


def load(root, builder, name="mine"):
    rows = load_source(name, str(root), builder=builder, cache_dir=str(root / "cache"), **OPTIONS[builder])
    return rows.cast_column("image", datasets.Image(decode=False))


@pytest.mark.parametrize("builder", OPTIONS)
def test_rows_of_unchanged_files_are_prepared_once(root, builder):
    assert load(root, builder).cache_files == load(root, builder).cache_files


@pytest.mark.parametrize(("builder", "path"), [("image_folder", "mask.png"), ("class_masks", "classes/a.png")])
def test_a_changed_mask_is_noticed(root, builder, path):
    assert decode_mask(load(root, builder)[0]["targets"][0]["rle"]).sum() == 25
    write_mask(root / path, 7)
    assert decode_mask(load(root, builder)[0]["targets"][0]["rle"]).sum() == 49


@pytest.mark.parametrize("builder", OPTIONS)
def test_a_changed_photo_is_noticed(root, builder):
    before = load(root, builder).cache_files
    os.utime(root / "a.png", (1, 1))
    assert load(root, builder).cache_files != before


@pytest.mark.parametrize(
    ("builder", "path"), [("image_folder", "q.jsonl"), ("coco_instances", "coco.json"), ("labelme", "labelme/a.json")]
)
def test_a_changed_annotation_is_noticed(root, builder, path):
    before = load(root, builder).cache_files
    (root / path).write_text((root / path).read_text().replace('"it"', '"that"'))
    rows = load(root, builder)
    assert rows.cache_files != before and rows[0]["targets"][0]["phrases"] == ["that"]


def test_where_rows_are_is_said(root, caplog):
    with caplog.at_level("INFO", logger="data_scripts"):
        rows = load(root, "labelme")
    (said,) = [record.getMessage() for record in caplog.records if "rows are kept in" in record.getMessage()]
    assert os.path.dirname(rows.cache_files[0]["filename"]) in said


def test_clean_removes_what_was_prepared_and_nothing_else(root):
    cache = root / "cache"
    load(root, "labelme", "one")
    load(root, "image_folder", "two")
    os.utime(root / "a.png", (1, 1))
    load(root, "labelme", "one")  # rows of the changed photo, in addition to the earlier ones
    for path in ("mine.txt", "own_data/mine/0.0.0/abc/data.arrow", "imdb/plain/0.0.0/abc/dataset_info.json"):
        (cache / path).parent.mkdir(parents=True, exist_ok=True)
        (cache / path).write_text("{}")

    removed = clean_cache(["one"], str(cache))
    assert removed.keys() == {"one"} and removed["one"] > 1000
    assert not list(cache.glob("*/one*")) and len(list(cache.glob("*/two*/*/*/*.arrow"))) == 1
    assert clean_cache(cache_dir=str(cache)).keys() == {"two"}
    left = sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())
    assert left == ["imdb/plain/0.0.0/abc/dataset_info.json", "mine.txt", "own_data/mine/0.0.0/abc/data.arrow"]
    assert clean_cache(cache_dir=str(cache)) == {}
    assert len(load(root, "labelme", "one")) == 1


def test_clean_from_the_command_line(root, monkeypatch, capsys):
    load(root, "labelme", "one")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
    status, out, _ = prepare_data(capsys, "clean")
    assert status == 0 and "one: removed 0." in out and not list((root / "cache").iterdir())


@pytest.mark.parametrize(("number", "is_told"), [(errno.ENOSPC, True), (errno.EACCES, True), (errno.EIO, False)])
def test_a_cache_that_cannot_be_written_is_named(root, tmp_path, monkeypatch, number, is_told):
    def fail(*args):
        raise OSError(number, os.strerror(number), str(tmp_path / "cache" / "rows"))

    monkeypatch.setattr(SourceBuilder, "write_records", fail)
    with pytest.raises(OSError, match=os.strerror(number)) as error:
        load(root, "labelme")
    assert ("or set HF_DATASETS_CACHE to another directory" in str(error.value)) == is_told
