"""Sources whose answers have several masks or none: LISA++, and gRefCOCO as conversations."""

import json

import numpy as np
import PIL.Image
import pytest
from fixtures.paths import TREE

from data_scripts import load_source
from data_scripts.lisa_plus import answer_by_names
from lisa_hf.data.masks import decode_mask


HEIGHT, WIDTH = 40, 60


def square(left):
    return [[left, 5, left + 10, 5, left + 10, 15, left, 15]]


def are_squares(row, *lefts):
    masks = [decode_mask(target["rle"]) for target in row["targets"]]
    expected = np.zeros((len(lefts), HEIGHT, WIDTH), dtype=bool)
    for mask, left in zip(expected, lefts):
        mask[5:15, left : left + 10] = True
    return len(masks) == len(lefts) and (np.array(masks) == expected).all()


@pytest.fixture
def load(tmp_path):
    """Loads a split of LISA++, of whose files it is given the contents by path."""
    (tmp_path / "coco/train2017").mkdir(parents=True)
    PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "coco/train2017/000000000009.jpg")

    def rows(split, files):
        for path, content in files.items():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(json.dumps(content))
        return load_source("lisa_plus", str(tmp_path), split, cache_dir=str(tmp_path / "cache"))

    return rows


def said(row):
    return [message["content"] for message in row["messages"]]


def test_lists_in_answers():
    assert [answer_by_names(["a", "b", "c"][:number]) for number in (1, 2, 3)] == [
        "The a is [SEG].",
        "The a is [SEG] and the b is [SEG].",
        "The a is [SEG], the b is [SEG] and the c is [SEG].",
    ]


def test_lisa_plus(load):
    info = {
        "380": {"polygon": [[5, 5], [15, 5], [15, 15], [5, 15]], "label name": "remote"},
        "348": {"points": square(30), "label name": "remote"},
        "7": {"polygon": []},
    }
    conversation = (
        "<person>: Where is the remote <380|remote>? <robot>: The remote《380|remote》is here, a tie [1:0]."
        "<person>: Others? <robot>: Yes, [<348| remote>, <380|remote>]. No cup 《7|cup》.<person>: And?"
    )
    files = {
        "lisa_plus/instance_seg.json": [
            {"English Question": "Segment each remote.", "img_path": "000000000009.jpg", "ID": [348, "380", "7"]}
            | {"points": info}
        ],
        "lisa_plus/cot.json": [
            {"English Question": "What changes channels?", "English Answer": "[remote <380>, remote <348>] do."}
            | {"image_path": "000000000009.jpg", "info": info}
        ],
        "lisa_plus/conversations.json": [{"img_pth": "000000000009.jpg", "output": conversation, "info": info}],
    }
    (row,) = load("instance_seg", files)
    assert said(row) == ["Segment each remote.", "The remote is [SEG] and the remote is [SEG]."]
    assert are_squares(row, 30, 5)
    (row,) = load("cot", {})
    assert said(row)[1] == "[SEG] and [SEG] do." and are_squares(row, 5, 30)
    (row,) = load("conversations", {})
    assert said(row) == [
        "Where is the remote?",
        "The remote [SEG] is here, a tie [1:0].",
        "Others?",
        "Yes, [SEG] and [SEG]. No cup.",
    ]
    assert are_squares(row, 5, 30, 5)


def test_lisa_plus_without_its_photo(load):
    record = {"English Question": "?", "img_path": "1.jpg", "ID": ["1"], "points": {}}
    with pytest.raises(ValueError, match="instance_seg.json', record 0: expected the photo .*1.jpg"):
        load("instance_seg", {"lisa_plus/instance_seg.json": [record]})


def test_expressions_of_grefcoco_as_conversations(tmp_path):
    def load(**options):
        return load_source("grefcoco", str(TREE), cache_dir=str(tmp_path), **options)

    plain, rows = load(), load(conversations=True)
    assert len(rows) == sum(len(target["phrases"]) for row in plain for target in row["targets"])
    told = {tuple(said(row))[1]: row for row in rows}
    assert {"Sure, [SEG].", "Sure, [SEG] and [SEG].", "There is nothing like that in this image."} <= told.keys()
    assert told["There is nothing like that in this image."]["targets"] == []
    masks = {phrase: target["rle"] for row in plain for target in row["targets"] for phrase in target["phrases"]}
    for row in rows:
        (rle,) = {rle["counts"]: rle for phrase, rle in masks.items() if phrase.lower() in said(row)[0]}.values()
        drawn = [decode_mask(target["rle"]) for target in row["targets"]] or [np.zeros(rle["size"])]
        assert (np.any(drawn, axis=0) == decode_mask(rle)).all()
