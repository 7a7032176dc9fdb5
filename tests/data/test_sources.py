"""All sources alike: streams equal prepared rows, splits, formats of images, real annotations."""

import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import Image
from datasets.distributed import split_dataset_by_node
from fixtures.paths import REAL_SAMPLES, TREE
from fixtures.sources import FALSE_PREMISES, NAMES, keep_first, read_pickle, write_pickle
from torch.utils.data import DataLoader

from data_scripts import SOURCES, load_source
from lisa_hf.data.masks import decode_mask
from lisa_hf.data.mixture import EvaluationDataset
from lisa_hf.data.rows import FEATURES


REFER_SEG = TREE / "refer_seg"
EVERY_SOURCE = [(name, {}) for name in (*NAMES, "reason_seg", "pascal_part")]


EVERY_SOURCE += [("shapes", {"num_train_scenes": 20, "num_validation_scenes": 3})]


@pytest.mark.parametrize(("name", "options"), EVERY_SOURCE)
def test_streamed_rows_are_the_prepared_rows(load, name, options):
    prepared, streamed = load(name, TREE, **options), load(name, TREE, streaming=True, **options)
    rows = list(prepared)
    assert rows == list(streamed) and len(rows) > 0
    assert {row["source"] for row in rows} == {name}
    decoded = prepared.cast_column("image", Image())
    assert decoded.features == load_source(name, TREE, streaming=True, **options).features == FEATURES
    for row in decoded:
        assert all(target["rle"]["size"] == [row["image"].height, row["image"].width] for target in row["targets"])


@pytest.mark.parametrize(("name", "options"), EVERY_SOURCE)
def test_streams_divide_among_ranks_and_workers(load, name, options):
    stream = load(name, TREE, streaming=True, **options)
    expected = sorted(row["image_id"] for row in stream)
    parts = [split_dataset_by_node(stream, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(row["image_id"] for part in parts for row in part) == expected
    assert sorted(DataLoader(stream, batch_size=1, num_workers=2, collate_fn=keep_first)) == expected


def test_every_split_of_the_refs_is_there(load):
    refs = read_pickle(REFER_SEG / "refcoco" / "refs(unc).p")
    counts = {}
    for split in ("train", "val", "testA", "testB", "test"):
        rows = load("refcoco", TREE, split=split)
        counts[split] = sum(len(row["targets"]) for row in rows)
        labels = {"testA": ("testA", "testAB"), "testB": ("testAB",), "test": ("testA", "testAB")}.get(split, (split,))
        expressions = [s["sent"] for ref in refs if ref["split"] in labels for s in ref["sentences"]]
        assert sorted(p for row in rows for t in row["targets"] for p in t["phrases"]) == sorted(expressions)
    assert counts == {"train": 4, "val": 3, "testA": 2, "testB": 1, "test": 2}


def test_the_refs_of_another_split_may_be_named(load, tree):
    refs = read_pickle(tree / "refer_seg/refcocog/refs(umd).p")
    write_pickle(tree / "refer_seg/refcocog/refs(google).p", [ref | {"split": "val"} for ref in refs])
    found = {ref["image_id"] for ref in refs}
    assert {int(i) for i in load("refcocog", tree, split="val", split_by="google")["image_id"]} == found
    assert {int(i) for i in load("refcocog", tree, split="val")["image_id"]} < found
    with pytest.raises(FileNotFoundError, match=r"refs\(berkeley\).p"):
        load("refcocog", tree, split_by="berkeley")


def test_ade20k_has_a_validation_split(load, tree):
    with pytest.raises(ValueError, match="validation"):
        load("ade20k", tree, split="validation")
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        directory = tree / "ade20k" / kind / "validation"
        directory.mkdir()
        shutil.copy(tree / "ade20k" / kind / f"training/ADE_train_00000001.{suffix}", directory / f"v1.{suffix}")
    assert load("ade20k", tree, split="validation")["image_id"] == ["v1"]
    assert len(load("ade20k", tree)) == 2


def test_label_maps_may_have_a_palette(load, tree):
    path = tree / "mapillary/training/v2.0/labels/m0.png"
    expected = list(load("mapillary", tree))
    image = PIL.Image.open(path)
    image.load()
    image.putpalette([value for gray in range(256) for value in (255 - gray, gray, 0)])
    image.save(path)
    assert PIL.Image.open(path).mode == "P"
    assert list(load("mapillary", tree)) == expected


def test_a_gif_among_the_photos_is_read(load, tree):
    # As 19579.jpg of refCLEF.
    path = tree / "refer_seg/images/saiapr_tc-12/112.jpg"
    PIL.Image.open(path).save(path, format="GIF")
    item = EvaluationDataset(load("refclef", tree))[0]
    assert item["image"].mode == "RGB" and item["image"].size == (48, 36)


REAL_ROWS = [
    ("ade20k", {"train": 1}),
    ("cocostuff", {"train": 2}),
    ("mapillary", {"train": 3}),
    ("paco_lvis", {"train": 2}),
    ("pascal_part", {"train": 16}),
    ("refcoco", {"train": 2, "val": 1, "testA": 1, "test": 1}),
    ("refcoco+", {"train": 2, "val": 1, "testA": 1, "test": 1}),
    ("refcocog", {"train": 2, "val": 1, "test": 1}),
    ("refclef", {"train": 1}),
    ("grefcoco", {"train": 2, "val": 1}),
    ("llava_instruct", {"train": 3}),
    ("reason_seg", {"train": 1, "val": 4}),
]
NOT_THERE = ("the referee in yellow", "a bicycle")


@pytest.mark.skipif(not REAL_SAMPLES.is_dir(), reason="the real samples are not here (LISA_REAL_SAMPLES)")
@pytest.mark.parametrize(("name", "num_rows"), REAL_ROWS)
def test_real_samples_open_and_their_masks_decode(load, name, num_rows):
    for split, expected in num_rows.items():
        rows = load(name, REAL_SAMPLES, split=split)
        assert len(rows) == expected
        for row in rows:
            path = Path(row["image"]["path"])
            if path.name == "000000033471.jpg":
                continue  # A published conversation, whose photo is not here.
            size = np.asarray(PIL.Image.open(path)).shape[:2]
            assert row["ignore"] is None or decode_mask(row["ignore"]).shape == size
            for target in row["targets"]:
                mask = decode_mask(target["rle"])
                assert mask.shape == size
                assert mask.any() or (name == "grefcoco" and target["phrases"][0] in NOT_THERE)


def test_all_sources_are_tested():
    published = {name for name, builder in SOURCES.items() if builder.DOWNLOAD_PAGE}
    elsewhere = {*FALSE_PREMISES, "muse", "lisa_plus"}  # test_benchmark_sources.py, test_multi_target_sources.py
    assert {name for name, _ in REAL_ROWS} == published - elsewhere
