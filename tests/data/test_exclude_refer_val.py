"""`exclude_refer_val`: training without the photos of refer val and test splits."""

import logging
import re
import shutil

import pytest
from fixtures.sources import read_pickle, write_pickle

from data_scripts import load_sources


def hold_out(tree, **image_ids):
    """Writes refs whose val and test splits show these images, in place of those that are there."""
    for name, path in (("refcoco", "refs(unc).p"), ("refcoco+", "refs(unc).p"), ("refcocog", "refs(umd).p")):
        (tree / "refer_seg" / name / path).unlink()
    (tree / "refer_seg/grefcoco/grefs(unc).json").unlink()
    sentence = {"sent": "it", "sent_id": 0}
    refs = [
        {"ref_id": image_id, "image_id": image_id, "ann_id": {1: 11, 2: 21, 3: 31}[image_id], "split": split}
        | {"sentences": [sentence]}
        for split, ids in image_ids.items()
        for image_id in ids
    ]
    write_pickle(tree / "refer_seg/refcoco/refs(unc).p", refs)


@pytest.mark.parametrize(
    ("name", "kept", "count"),
    [
        ("cocostuff", ["000000000002"], "excluded 2 of 3"),
        ("paco_lvis", ["2"], "excluded 1 of 2"),
        ("llava_instruct", ["000000000002"], "excluded 2 of 3"),
        ("refcoco", ["2"], "excluded 1 of 2"),
        ("refclef", ["112", "113"], "excluded 0 of 2"),
    ],
)
def test_photos_of_refer_val_and_test_splits_can_be_left_out(load, tree, caplog, name, kept, count):
    hold_out(tree, train=[1, 2], val=[3], testA=[1])
    everything = load(name, tree)["image_id"]
    assert len(everything) > len(kept) or name == "refclef"
    caplog.set_level(logging.INFO)
    for _ in range(2):  # The second time from the cache: every training is told.
        caplog.clear()
        assert load(name, tree, exclude_refer_val=True)["image_id"] == kept
        assert f"{name}: {count}" in caplog.text and "split of refcoco shows" in caplog.text
    assert [row["image_id"] for row in load(name, tree, exclude_refer_val=True, streaming=True)] == kept
    # The refs decide the rows, too; evaluation keeps what training leaves out.
    refs = tree / "refer_seg/refcoco/refs(unc).p"
    write_pickle(refs, [ref | {"split": "train"} for ref in read_pickle(refs)])
    assert len(load(name, tree, exclude_refer_val=True)) >= len(everything)


def test_evaluation_splits_keep_the_photos_that_training_leaves_out(load, tree):
    hold_out(tree, train=[1, 2], val=[3], testA=[1])
    for split, expected in (("val", ["3"]), ("testA", ["1"])):
        assert load("refcoco", tree, split=split, exclude_refer_val=True)["image_id"] == expected


def test_a_recipe_leaves_them_out_of_all_its_sources(tree, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    hold_out(tree, train=[1, 2], val=[3], testA=[1])
    cache = {"cache_dir": str(tmp_path / "cache")}
    sources = {
        "cocostuff": {"weight": 9},
        "ade20k": {"weight": 9},
        "refcoco": {},
        "all_talk": {"builder": "llava_instruct", "exclude_refer_val": False},
    }
    sources = {name: options | cache for name, options in sources.items()}
    loaded = load_sources(sources, str(tree), exclude_refer_val=True)
    assert {name: len(rows) for name, rows in loaded.items()} == {
        "cocostuff": 1,
        "ade20k": 2,
        "refcoco": 1,
        "all_talk": 3,
    }
    assert "does not change these sources, which have no COCO photos: ade20k." in caplog.text
    assert re.findall(r"(\w+): excluded (\d) of (\d)", caplog.text) == [("cocostuff", "2", "3"), ("refcoco", "1", "2")]


def test_all_refer_sources_hold_photos_out(load, tree):
    with pytest.raises(ValueError, match="CocoStuff: expected records .*excluded 3 of 3 .*refcoco, .*, grefcoco"):
        load("cocostuff", tree, exclude_refer_val=True)
    shutil.rmtree(tree / "refer_seg")
    with pytest.raises(FileNotFoundError, match=r"exclude_refer_val: expected refcoco/refs\(unc\).p or "):
        load("cocostuff", tree, exclude_refer_val=True)
