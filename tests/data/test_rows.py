"""The RLE codec and the checks of the row format."""

import datasets
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from lisa_hf.data.masks import decode_mask, encode_mask, merge_masks
from lisa_hf.data.rows import FEATURES, make_row


def rle_of(height=4, width=5, **kwargs):
    return encode_mask(np.ones((height, width), dtype=bool)) | kwargs


def random_masks(num_masks):
    rng = np.random.default_rng(0)
    for _ in range(num_masks):
        height, width = rng.integers(1, 70, size=2)
        blocks = rng.random((height, width)) < rng.choice([0.0, 0.02, 0.5, 1.0])
        yield np.kron(blocks, np.ones(rng.integers(1, 9, size=2), dtype=bool))


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools with numpy 2
def test_masks_survive_the_codec():
    for mask in random_masks(200):
        rle = encode_mask(mask)
        decoded = decode_mask(rle)
        assert rle["size"] == list(mask.shape) and isinstance(rle["counts"], bytes)
        assert decoded.dtype == np.uint8 and decoded.flags.c_contiguous
        np.testing.assert_array_equal(decoded, mask)
        np.testing.assert_array_equal(decoded, coco_mask.decode(rle))


def test_merge_is_the_union():
    rng = np.random.default_rng(1)
    masks = rng.random((3, 20, 30)) < 0.2
    np.testing.assert_array_equal(decode_mask(merge_masks([encode_mask(mask) for mask in masks])), masks.any(axis=0))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((1, 4, 5), dtype=bool), r"\(1, 4, 5\)"),
        (np.zeros((4, 5), dtype=np.float32), "float32"),
        (np.full((4, 5), 255, dtype=np.uint8), "holds 255"),
    ],
)
def test_encode_refuses(mask, message):
    with pytest.raises(ValueError, match=message):
        encode_mask(mask)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        (rle_of(size=[4, 6]), "4 x 6 has 24 pixels, but its RLE counts describe 20"),
        (rle_of(size=[40, 50]), "2000 pixels, but its RLE counts describe 20"),
        (rle_of(counts=b""), "not the compressed counts"),
        (rle_of(counts=b"\xff\x01"), "not the compressed counts"),
        (rle_of(counts=b"o"), "cut off"),
        (rle_of(counts=[0, 20]), "counts of list.*frPyObjects"),
        (rle_of(size=[1, 4, 5]), r"size of \[1, 4, 5\]"),
    ],
)
def test_decode_refuses_damaged_masks(rle, message):
    with pytest.raises(ValueError, match=message):
        decode_mask(rle)


def test_merge_refuses_different_sizes_and_nothing():
    with pytest.raises(ValueError, match=r"\(4, 5\), \(5, 4\)"):
        merge_masks([rle_of(4, 5), rle_of(5, 4)])
    with pytest.raises(ValueError, match="at least one mask"):
        merge_masks([])


def test_rows_survive_arrow():
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    rows = [
        make_row("a.jpg", "a", "here", "semantic", targets=[{"phrases": ["dog", "the dog"], "rle": rle_of()}]),
        make_row(
            "b.jpg",
            "b",
            "here",
            "reasoning",
            targets=[{"phrases": ["Who barks?"], "rle": rle_of()}],
            ignore=rle_of(),
            is_sentence=True,
            explanation="Dogs bark.",
        ),
        make_row(b"png", "c", "here", "vqa", messages=messages),
    ]
    dataset = datasets.Dataset.from_list(rows, features=FEATURES)
    assert dataset.cast_column("image", datasets.Image(decode=False)).to_list() == rows
    assert rows[0]["image"] == {"path": "a.jpg", "bytes": None} and rows[2]["image"] == {"path": None, "bytes": b"png"}
    assert rows[0]["ignore"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "detection"}, "'detection'"),
        ({"task": "semantic"}, "0 targets"),
        ({"task": "vqa"}, "0 messages"),
        ({"task": "vqa", "targets": [{"phrases": ["dog"], "rle": rle_of()}]}, "1 targets"),
        ({"task": "semantic", "targets": [{"phrases": [], "rle": rle_of()}]}, r"target 0 .* found \[\]"),
        ({"task": "semantic", "targets": [{"phrases": "dog", "rle": rle_of()}]}, "found 'dog'"),
        ({"task": "semantic", "targets": [{"phrases": [" "], "rle": rle_of()}]}, "non-empty phrases"),
        (
            {"task": "semantic", "targets": [{"phrases": ["dog"], "rle": rle_of()}], "ignore": rle_of(5, 4)},
            r"\(4, 5\), \(5, 4\)",
        ),
        ({"task": "vqa", "messages": [{"role": "assistant", "content": "Hm."}]}, r"roles \['assistant'\]"),
        ({"task": "vqa", "messages": [{"role": "user", "content": "Hm?"}]}, r"roles \['user'\]"),
    ],
)
def test_make_row_refuses_and_names_the_row(arguments, message):
    with pytest.raises(ValueError, match=f"Row 'img7' of 'here'.*{message}"):
        make_row("a.jpg", "img7", "here", **arguments)
