"""Mask images as tools save them: which values are the object, which are ignored, and which are ambiguous."""

import json

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset

from data_scripts import load_source
from data_scripts.segmentation import read_mask
from lisa_hf.data.masks import decode_mask, encode_mask


HEIGHT, WIDTH = 40, 60
OBJECT = np.zeros((HEIGHT, WIDTH), np.uint8)
OBJECT[5:15, 5:25] = 1
RING = np.zeros((HEIGHT, WIDTH), np.uint8)
RING[4:16, 4:26] = 1
RING[5:15, 5:25] = 0


def save(path, pixels, mode=None, orientation=None, palette=None, **options):
    image = PIL.Image.fromarray(pixels)
    if palette:
        image = PIL.Image.fromarray(pixels, "L")
        image.putpalette(palette)
    if mode:
        image = image.convert(mode)
    if orientation:
        options["exif"] = PIL.Image.Exif()
        options["exif"][0x0112] = orientation
    image.save(path, **options)
    return str(path)


@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        (OBJECT, {}),
        (OBJECT * 255, {}),
        (OBJECT * 7, {}),
        (OBJECT > 0, {}),
        (OBJECT.astype(np.uint16) * 65535, {}),
        (OBJECT.astype(np.uint16) * 300, {}),
        (OBJECT * 255, {"mode": "RGB"}),
        (OBJECT * 255, {"mode": "RGBA"}),
        (OBJECT * 255, {"mode": "LA"}),
        (OBJECT * 15, {"palette": [0, 0, 0] * 256}),
        (OBJECT, {"palette": [0, 0, 0, 200, 0, 0]}),
    ],
)
def test_one_value_beside_0_is_the_object(tmp_path, pixels, options):
    mask, ignore = read_mask(save(tmp_path / "m.png", pixels, **options))
    np.testing.assert_array_equal(mask, OBJECT > 0)
    assert ignore is None


@pytest.mark.parametrize("value", [1, 15])
def test_255_beside_a_class_is_ignored(tmp_path, value):
    mask, ignore = read_mask(save(tmp_path / "m.png", OBJECT * np.uint8(value) + RING * np.uint8(255)))
    np.testing.assert_array_equal(mask, OBJECT > 0)
    np.testing.assert_array_equal(ignore, RING > 0)


@pytest.mark.parametrize("name", ["m.jpg", "m.webp"])
def test_lossy_black_and_white_is_cut_at_half(tmp_path, name):
    mask, ignore = read_mask(save(tmp_path / name, OBJECT * 255, quality=75))
    assert 190 <= mask.sum() <= 215 and ignore is None


SOFT = np.tile(np.arange(WIDTH, dtype=np.uint8), (HEIGHT, 1))


@pytest.mark.parametrize(
    ("name", "pixels", "options", "message"),
    [
        ("m.png", OBJECT + RING * np.uint8(2), {}, r"0 for the background and one other value.*\[1, 2\]"),
        ("m.png", OBJECT * 128 + RING * np.uint8(255), {}, r"\[128, 255\]"),
        ("m.png", OBJECT + RING.astype(np.uint16) * 300, {}, r"\[1, 300\]"),
        ("m.png", SOFT, {}, r"59 others, \[1, 2, 3, 4, 5\] and so on"),
        ("m.jpg", SOFT * 4, {}, "lossy"),
        ("m.jpg", OBJECT, {}, "every pixel is False"),
        ("m.png", OBJECT * 0, {}, "every pixel is 0"),
        ("m.png", OBJECT * 0 + 255, {}, "every pixel is 255"),
        ("m.png", np.stack([OBJECT * 255, OBJECT, OBJECT], -1), {}, "one channel, got the mode RGB"),
        ("m.png", np.stack([OBJECT * 0] * 3 + [OBJECT * 255], -1), {}, "the mode RGBA with colors or transparency"),
        ("m.png", OBJECT, {"palette": [255, 255, 255, 0, 0, 0]}, "the background, 0, in black"),
    ],
)
def test_what_nobody_can_tell_is_an_error_that_names_the_file(tmp_path, name, pixels, options, message):
    with pytest.raises(ValueError, match=message) as error:
        read_mask(save(tmp_path / name, pixels, **options))
    assert str(tmp_path / name) in str(error.value)


def test_the_orientation_of_the_mask_file_is_respected(tmp_path):
    mask, _ = read_mask(save(tmp_path / "m.png", OBJECT * 255, orientation=3))
    np.testing.assert_array_equal(mask, np.rot90(OBJECT, 2) > 0)


def test_void_reaches_the_row(tmp_path):
    PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    save(tmp_path / "m.png", OBJECT * 15 + RING * np.uint8(255))
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "a.png", "mask": "m.png", "phrase": "it"}))
    options = {"questions": "q.jsonl", "images": ".", "masks": ".", "cache_dir": str(tmp_path / "cache")}
    (row,) = load_source("mine", str(tmp_path), builder="image_folder", **options)
    assert row["targets"][0]["rle"] == encode_mask(OBJECT) and row["ignore"] == encode_mask(RING)


@pytest.mark.parametrize("form", ["bytes", "pixels", "polygons", "points"])
def test_masks_of_columns(tmp_path, form):
    PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    photo = {"path": None, "bytes": (tmp_path / "a.png").read_bytes()}
    corners = [[5, 5], [25, 5], [25, 15], [5, 15]]
    masks = {
        "bytes": encode_mask(OBJECT),
        "pixels": OBJECT.tolist(),
        "polygons": [[value for point in corners for value in point]],
        "points": corners,
    }
    Dataset.from_dict({"image": [photo], "mask": [masks[form]], "phrases": ["it"]}).to_parquet(tmp_path / "a.parquet")
    path, cache = str(tmp_path / "a.parquet"), str(tmp_path / "cache")
    (row,) = load_source("mine", builder="hub", path=path, cache_dir=cache)
    np.testing.assert_array_equal(decode_mask(row["targets"][0]["rle"]), OBJECT)
