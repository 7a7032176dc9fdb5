"""Masks: what pycocotools and numpy make of the same pixels, and damaged encodings."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco_mask

from lisa_hf.data.masks import (
    Mask,
    compact_mask_labels,
    decode_mask,
    draw_mask_labels,
    draw_run_ends,
    encode_mask,
    merge_masks,
    stack_run_ends,
)


RLE = encode_mask(np.ones((4, 5), dtype=bool))


@st.composite
def pixels(draw, num_masks=(1, 1)):
    """Masks `(M, H, W)` of one size, in blocks, so that there are long runs too."""
    size = draw(array_shapes(min_dims=2, max_dims=2, max_side=8))
    masks = draw(arrays(bool, (draw(st.integers(*num_masks)), *size)))
    height, width = draw(array_shapes(min_dims=2, max_dims=2, max_side=40))
    return np.kron(masks, np.ones((1, height, width), dtype=bool))


def parse(masks):
    return [Mask.from_rle(encode_mask(mask)) for mask in masks]


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools with numpy 2
@given(pixels())
@settings(max_examples=200, deadline=None)
def test_masks_survive_the_codec(masks):
    (mask,) = masks
    rle = encode_mask(mask)
    decoded = decode_mask(rle)
    assert rle["size"] == list(mask.shape) and isinstance(rle["counts"], bytes)
    assert decoded.dtype == np.uint8 and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, mask)
    np.testing.assert_array_equal(decoded, coco_mask.decode(rle))
    assert Mask.from_rle(rle).to_rle() == rle


@given(pixels(num_masks=(1, 4)))
@settings(max_examples=200, deadline=None)
def test_merge_is_the_union(masks):
    merged = merge_masks(parse(masks))
    np.testing.assert_array_equal(merged.draw(), masks.any(axis=0))
    assert merged.to_rle() == encode_mask(masks.any(axis=0))
    assert merged.to_rle()["counts"] == coco_mask.merge([encode_mask(mask) for mask in masks])["counts"]


@given(pixels(num_masks=(0, 4)), st.booleans())
@settings(max_examples=200, deadline=None)
def test_drawn_labels_are_the_pixels(masks, has_ignored):
    ignored = masks.sum(axis=0) == 1 if has_ignored else np.zeros(masks.shape[1:], dtype=bool)
    run_ends = compact_mask_labels(parse(masks), parse([ignored])[0] if has_ignored else None)
    assert [ends.dtype for ends in run_ends] == [torch.int32] * 2
    labels = draw_mask_labels(*run_ends, masks.shape[1:])
    expected = np.where(masks, 1, np.where(ignored, 255, 0)).astype(np.uint8)
    assert labels.dtype == torch.uint8 and torch.equal(labels, torch.from_numpy(expected))


def test_more_runs_than_a_byte_counts():
    masks = np.random.default_rng(0).random((3, 40, 30)) < 0.5
    masks[0], masks[1, 0, 0], masks[2] = False, True, True
    assert torch.equal(draw_run_ends(stack_run_ends(parse(masks)), (40, 30)), torch.from_numpy(masks).byte())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((1, 4, 5), dtype=bool), r"\(1, 4, 5\)"),
        (np.zeros((4, 5), dtype=np.float32), "float32"),
        (np.full((4, 5), 255, dtype=np.uint8), "got 255"),
    ],
)
def test_encode_refuses(mask, message):
    with pytest.raises(ValueError, match=message):
        encode_mask(mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": [4, 6]}, "24 pixels for a mask of 4 x 6, got 20"),
        ({"size": [40, 50]}, "2000 pixels for a mask of 40 x 50, got 20"),
        ({"counts": b""}, "compressed counts"),
        ({"counts": b"\xff\x01"}, "compressed counts"),
        ({"counts": b"o"}, "truncated"),
        ({"counts": [0, 20]}, "counts of list.*frPyObjects"),
        ({"size": [1, 4, 5]}, r"size of \[1, 4, 5\]"),
    ],
)
def test_damaged_encodings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Mask.from_rle(RLE | changes)


def test_merge_refuses_different_sizes_and_nothing():
    with pytest.raises(ValueError, match=r"\(4, 5\), \(5, 4\)"):
        merge_masks(parse([np.ones((4, 5), dtype=bool), np.ones((5, 4), dtype=bool)]))
    with pytest.raises(ValueError, match="at least one mask"):
        merge_masks([])
