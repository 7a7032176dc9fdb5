"""Segmentations as written by tools, and hostile ones, which must raise errors and never crash or hang the process."""

import json

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from data_scripts import load_source
from data_scripts.reason_seg import paint_polygons
from data_scripts.segmentation import NothingToDrawError, encode_segmentation, encode_visible
from lisa_hf.data.masks import Mask, decode_mask


HEIGHT, WIDTH = 40, 60
BOX = [10, 5, 30, 5, 30, 20, 10, 20]
POINTS = [BOX[i : i + 2] for i in range(0, 8, 2)]
PIXELS = np.zeros((HEIGHT, WIDTH), dtype=bool)
PIXELS[5:20, 10:30] = True
RLE = coco_mask.encode(np.asfortranarray(PIXELS, dtype=np.uint8))
COUNTS = [405, 15] + [25, 15] * 19 + [1220]
HUGE = [1e4, 1e6, 1e7, 1e8, 4e8, 5e8, 1e9, 1e10, 1e18, 1e300, 10**400, -1e9, float("inf"), float("nan")]

FORMS = {
    "polygons": [BOX],
    "polygons_of_points": [POINTS],
    "points": POINTS,
    "keys": [{"x": x, "y": y} for x, y in POINTS],
    "numbers": BOX,
    "and_degenerate_polygons": [BOX, [3, 3], [1, 1, 2, 2], []],
    "bytes": RLE,
    "text": RLE | {"counts": RLE["counts"].decode()},
    "counts": {"size": [HEIGHT, WIDTH], "counts": COUNTS},
    "whole_floats": {"size": [HEIGHT, WIDTH], "counts": [float(count) for count in COUNTS]},
    "rles": [RLE, {"size": [HEIGHT, WIDTH], "counts": COUNTS}],
    "booleans": PIXELS.tolist(),
    "zeros_and_ones": PIXELS.astype(int).tolist(),
    "array": PIXELS,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_mask_is_read(form):
    np.testing.assert_array_equal(decode_mask(encode_segmentation(FORMS[form], HEIGHT, WIDTH)), PIXELS)


@pytest.mark.parametrize("segmentation", [[], [[]], [[1, 1]], [[1, 1, 2, 2]], [1, 1, 2, 2]])
def test_without_three_points_nothing_is_drawn(segmentation):
    with pytest.raises(NothingToDrawError, match="three points"):
        encode_segmentation(segmentation, HEIGHT, WIDTH)
    assert encode_visible(segmentation, HEIGHT, WIDTH) is None


def test_a_mask_without_a_pixel_is_not_visible():
    flat = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    line = [[5, 5, 9, 5, 7, 5]]
    assert not decode_mask(encode_segmentation(line, HEIGHT, WIDTH)).any()
    assert encode_visible(line, HEIGHT, WIDTH) is None and encode_visible(flat, HEIGHT, WIDTH) is None
    assert encode_visible([BOX], HEIGHT, WIDTH) == encode_segmentation([BOX], HEIGHT, WIDTH)


@pytest.mark.parametrize("value", HUGE)
def test_a_point_far_outside_is_an_error_that_names_file_and_image(tmp_path, value):
    PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.jpg")
    content = {
        "images": [{"id": 31, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT}],
        "annotations": [{"id": 1, "image_id": 31, "category_id": 1, "segmentation": [[0, 0, value, 0, 30, 20]]}],
        "categories": [{"id": 1, "name": "handle"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    options = {"builder": "coco_instances", "annotations": "a.json", "images": ".", "cache_dir": str(tmp_path / "c")}
    with pytest.raises(ValueError, match=r"a\.json', image 31"):
        load_source("mine", str(tmp_path), **options)
    with pytest.raises((ValueError, OverflowError)):
        paint_polygons([{"label": "target", "points": [[0, 0], [value, 0], [30, 20]]}], HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[0, 0, 59, 39] * 100_000], "outlines are at most 4000000 pixels long"),
        ([[0, 0, "5", 0, 30, 20]], "polygon of numbers"),
        ([[0, 0, True, 0, 30, 20]], "polygon of numbers"),
        ([[1, 2, 3, 4, 5, 6, 7]], r"got \[7\] numbers"),
        ([[[1, 2, 3], [1, 2, 3], [1, 2, 3]]], "points of"),
        (["abcdef"], "list of numbers or points"),
        ({"size": [HEIGHT, WIDTH], "counts": [-5, 2405]}, "whole numbers"),
        ({"size": [HEIGHT, WIDTH], "counts": [2**63, 5]}, "whole numbers"),
        ({"size": [HEIGHT, WIDTH], "counts": [1.5, 2398.5]}, "whole numbers"),
        ({"size": [HEIGHT, WIDTH], "counts": [0, 8]}, "2400 pixels.*got 8"),
        ({"size": [WIDTH, HEIGHT], "counts": [2400]}, r"\[40, 60\].*\[60, 40\]"),
        ("abc", "got 'abc'"),
    ],
)
def test_damaged_segmentations_are_errors(segmentation, message):
    with pytest.raises(ValueError, match=message):
        encode_segmentation(segmentation, HEIGHT, WIDTH)


@pytest.mark.parametrize("size", [(1e9, 1e9), (0, 5), (-4, -5), (2.5, 4), (float("nan"), 4)])
def test_impossible_sizes_are_errors(size):
    with pytest.raises(ValueError, match="expected an image size"):
        encode_segmentation([BOX], *size)


def test_runs_whose_sum_overflows_are_an_error():
    def compress(run):  # as in COCO's compressed counts, of positive numbers
        text = b""
        while run > 15:
            text += bytes([48 + (run & 31 | 32)])
            run >>= 5
        return text + bytes([48 + run])

    # The first three runs are stored as they are, and each other one as the difference to the last but one.
    counts = b"".join(map(compress, [2**62, 2**62, 2**62, 0, 0])) + b""
    with pytest.raises(ValueError, match="expected RLE counts"):
        Mask.from_rle({"size": [HEIGHT, WIDTH], "counts": counts})


def test_many_polygons_are_as_fast_as_few():
    polygons = [[x, 0, x + 0.5, 0, x + 0.5, HEIGHT, x, HEIGHT] for x in np.linspace(0, WIDTH - 1, 5000)]
    assert decode_mask(encode_segmentation(polygons, HEIGHT, WIDTH)).sum() > HEIGHT * (WIDTH - 3)


VALUES = st.one_of(
    st.floats(),
    st.integers(-(10**12), 10**12),
    st.integers(-30, 120),
    st.none(),
    st.booleans(),
    st.text(max_size=3),
)
PARTS = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=9), max_leaves=40)
RLES = st.fixed_dictionaries({"size": st.just([HEIGHT, WIDTH]), "counts": st.one_of(st.binary(), st.text(), PARTS)})


@given(st.one_of(PARTS, st.lists(st.lists(VALUES, min_size=6, max_size=12), max_size=4), RLES, st.lists(RLES)))
@settings(max_examples=400, deadline=None)
def test_whatever_comes_gives_a_mask_of_the_image_or_an_error(segmentation):
    try:
        rle = encode_segmentation(segmentation, HEIGHT, WIDTH)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
        return  # those that builders turn into errors that name the record
    assert decode_mask(rle).shape == (HEIGHT, WIDTH)


@given(st.lists(st.lists(st.floats(-30, 90), min_size=6, max_size=6), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_polygons_are_drawn_as_pycocotools_does(polygons):
    try:
        rle = encode_segmentation(polygons, HEIGHT, WIDTH)
    except ValueError:
        return
    expected = coco_mask.merge(coco_mask.frPyObjects(polygons, HEIGHT, WIDTH))
    assert rle["counts"] == expected["counts"]
