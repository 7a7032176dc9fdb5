"""`check` finds what training would trip over: it decodes every image and compares it with its masks."""

import json
from collections.abc import Sequence

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset

from data_scripts.check import check_source, describe_other_counts


@pytest.fixture
def check(tmp_path):
    """Check photos with masks, the third of which is given as the content of a file, and more lines of questions."""

    def check(content: bytes | None = None, num_photos: int = 3, more: Sequence[str] = (), **options):
        lines = []
        for index in range(num_photos):
            PIL.Image.new("RGB", (60, 40)).save(tmp_path / f"{index}.png")
            mask = PIL.Image.new("L", (60, 40))
            mask.paste(1, (10, 10, 30, 30))
            mask.save(tmp_path / f"m{index}.png")
            lines.append(json.dumps({"image": f"{index}.png", "mask": f"m{index}.png", "phrase": "it"}))
        if content is not None:
            (tmp_path / "2.png").write_bytes(content)
        (tmp_path / "q.jsonl").write_text("\n".join([*lines, *more]))
        options = {"builder": "image_folder", "questions": "q.jsonl", "images": ".", "masks": "."} | options
        return check_source("mine", str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"), **options)

    return check


def test_counts_other_than_published_are_said():
    rows = Dataset.from_dict({"targets": [[{"phrases": ["a", "b"]}], [{"phrases": ["c"]}]]})
    said = describe_other_counts("refcoco_val", "refcoco", {"split": "val"}, rows)
    assert said.startswith("refcoco_val has 2 rows, where 1500 are published and 3 expressions, where 10834 are")
    assert describe_other_counts("R", "hub", {"split": "test", "path": "Ricky06662/ReasonSeg_val"}, rows)
    whole = Dataset.from_dict({"targets": [[]] * 200})
    assert describe_other_counts("r", "reason_seg", {"split": "val"}, whole) == ""
    assert describe_other_counts("muse_val", "muse", {"split": "val"}, rows) == ""  # nothing is known


def test_whole_images_are_ready(check):
    report = check()
    assert report.is_ready and not report.bad_images and not report.remarks


@pytest.mark.parametrize("on_bad_row", ["skip", "raise"])
def test_a_bad_record_is_not_ready_also_where_training_skips_it(check, on_bad_row):
    report = check(num_photos=10, more=['{"image": "0.png", "phrase": "it"}'], on_bad_row=on_bad_row)
    assert not report.is_ready
    assert len(report.errors) == 1 and "line 11: expected" in report.errors[0]
    assert report.num_rows == ({"train": 10} if on_bad_row == "skip" else {})


def test_a_cut_off_image_is_found(check, tmp_path):
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(tmp_path / "x.jpg")
    content = (tmp_path / "x.jpg").read_bytes()
    report = check(content[: len(content) // 2])
    assert not report.is_ready and len(report.bad_images) == 1 and "2.png" in report.bad_images[0]
    assert "mine: NOT READY" in str(report) and "truncated" in str(report)


def test_bit_depth_is_said(check, tmp_path):
    PIL.Image.fromarray(np.zeros((40, 60), np.uint16)).save(tmp_path / "x.png")
    report = check((tmp_path / "x.png").read_bytes())
    assert report.is_ready and "1 images have more than 8 bits" in str(report)


def test_images_that_changed_since_are_noticed(check, tmp_path):
    assert check().is_ready
    PIL.Image.new("RGB", (40, 60)).save(tmp_path / "x.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "x.png").read_bytes())
    options = {"builder": "image_folder", "questions": "q.jsonl", "images": ".", "masks": "."}
    report = check_source("mine", str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"), **options)
    assert not report.is_ready and "expected a mask of the image's size (60, 40)" in report.errors[0]
