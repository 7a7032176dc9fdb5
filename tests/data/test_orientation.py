"""Photos with an EXIF orientation: masks are where they were drawn, or loading asks how they were drawn."""

import json

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from data_scripts import load_source
from data_scripts.check import check_source
from data_scripts.orientation import turn_mask
from data_scripts.parquet import write_parquet
from lisa_hf.data.images import load_row_image, undecoded
from lisa_hf.data.masks import decode_mask, encode_mask


RED = (220, 30, 30)
WIDE, SQUARE = (60, 40), (40, 40)


def photo(path, size, orientation):
    """Save a photo that shows red in the top left quarter of its stored pixels, or in that of the displayed ones."""
    width, height = size
    image = PIL.Image.new("RGB", size, (40, 60, 220))
    image.paste(RED, (0, 0, width // 2, height // 2))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, quality=95)


def is_red(row) -> bool:
    """Return whether a row's mask covers what the loaded image shows in red, and nothing else."""
    (target,) = row["targets"]
    pixels = np.asarray(load_row_image(row)["image"]).astype(int)
    red = np.abs(pixels - RED).sum(axis=2) < 200
    mask = decode_mask(target["rle"]).astype(bool)
    return (red & mask).sum() / (red | mask).sum() > 0.9


def corners(size, orientation, space):
    """Return the size of an annotation of the red quarter in a space, and the corners of the quarter there."""
    width, height = size
    mask = np.zeros((height, width), np.uint8)
    mask[: height // 2, : width // 2] = 255
    mask = PIL.Image.fromarray(mask)
    if space == "display":
        exif = mask.getexif()
        exif[0x0112] = orientation
        mask = PIL.ImageOps.exif_transpose(mask)
    return mask, mask.getbbox()


def write(folder, builder, photos, space):
    """Write a source of photos, tuples of size and orientation, annotated in a space. Return its options."""
    images, annotations, lines, rows = [], [], [], []
    for index, (size, orientation) in enumerate(photos):
        photo(folder / f"{index}.jpg", size, orientation)
        mask, (left, top, right, bottom) = corners(size, orientation, space)
        polygon = [left, top, right, top, right, bottom, left, bottom]
        facts = {"width": mask.width, "height": mask.height}
        images.append({"id": index, "file_name": f"{index}.jpg", **facts})
        annotations.append({"id": index, "image_id": index, "category_id": 1, "segmentation": [polygon]})
        shape = {"label": "it", "points": [[left, top], [right, bottom]], "shape_type": "rectangle"}
        labelme = {"imagePath": f"{index}.jpg", "imageHeight": mask.height, "imageWidth": mask.width}
        (folder / f"{index}.json").write_text(json.dumps(labelme | {"shapes": [shape]}))
        mask.save(folder / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.jpg", "mask": f"{index}.png", "phrase": "it"}))
        rle = encode_mask(np.asarray(mask) > 0)
        rows.append({"image": f"{index}.jpg", "mask": rle | {"counts": rle["counts"].decode()}, "phrases": "it"})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "it"}]}
    (folder / "coco").write_text(json.dumps(content))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return {
        "coco_instances": {"annotations": "coco", "images": "."},
        "labelme": {"annotations": "."},
        "image_folder": {"questions": "questions.jsonl", "images": ".", "masks": "."},
        "hub": {"path": "rows.parquet"},
    }[builder] | {"builder": builder, "cache_dir": str(folder / "cache")}


BUILDERS = ("coco_instances", "labelme", "image_folder", "hub")


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("space", ["stored", "display"])
def test_masks_lie_where_they_were_drawn(tmp_path, builder, space):
    photos = [(size, orientation) for size in (WIDE, SQUARE) for orientation in range(1, 9)]
    # A Parquet file is not read as a whole before its first row: the other photos cannot decide.
    option = {"orientation": space} if builder == "hub" else {}
    options = write(tmp_path, builder, photos, space)
    for streaming in (False, True):
        rows = load_source("mine", str(tmp_path), streaming=streaming, **options, **option)
        assert [is_red(row) for row in undecoded(rows)] == [True] * len(photos)


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize(("size", "orientation"), [(SQUARE, 6), (WIDE, 3)])
def test_undecided_orientations_are_asked_for(tmp_path, builder, size, orientation):
    options = write(tmp_path, builder, [(WIDE, 1), (size, orientation)], "stored")
    with pytest.raises(ValueError, match=r"EXIF orientation \d .*Set `orientation: display`"):
        load_source("mine", str(tmp_path), **options)
    assert "EXIF" in str(check_source("mine", str(tmp_path), split="train", **options))
    rows = load_source("mine", str(tmp_path), **options, orientation="stored")
    assert all(is_red(row) for row in undecoded(rows))
    rows = load_source("mine", str(tmp_path), **options, orientation="display")
    assert [is_red(row) for row in undecoded(rows)] == [True, False]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("space", ["stored", "display"])
def test_tiffs_are_turned_when_they_are_loaded(tmp_path, orientation, space):
    """Pillow says their size after the turn, that of other formats before it."""
    photo(tmp_path / "a.tif", WIDE, orientation)
    corners(WIDE, orientation, space)[0].save(tmp_path / "m.png")
    (tmp_path / "questions.jsonl").write_text(json.dumps({"image": "a.tif", "mask": "m.png", "phrase": "it"}))
    options = {"builder": "image_folder", "questions": "questions.jsonl", "images": ".", "masks": "."}
    rows = load_source("mine", str(tmp_path), orientation=space, cache_dir=str(tmp_path / "cache"), **options)
    assert [is_red(row) for row in undecoded(rows)] == [True]


def test_sizes_come_before_the_option(tmp_path):
    options = write(tmp_path, "coco_instances", [(WIDE, 6), (WIDE, 8)], "stored")
    rows = load_source("mine", str(tmp_path), **options, orientation="display")
    assert all(is_red(row) for row in undecoded(rows))


def test_photos_are_counted(tmp_path):
    options = write(tmp_path, "coco_instances", [(WIDE, 1), (WIDE, 6), (WIDE, 8), (WIDE, 3)], "stored")
    report = str(check_source("mine", str(tmp_path), split="train", **options))
    assert (
        "3 photos have an EXIF orientation: by their sizes, 2 are annotated as stored and 0 as displayed; 1" in report
    )
    assert "treated as 'stored' by the others" in report and "mine: ready" in report


def test_converted_rows_stay_upright(tmp_path):
    options = write(tmp_path, "image_folder", [(SQUARE, 6), (WIDE, 8)], "stored")
    write_parquet(load_source("mine", str(tmp_path), **options), tmp_path / "converted", "train")
    rows = load_source("again", builder="hub", path=str(tmp_path / "converted"), cache_dir=str(tmp_path / "cache"))
    assert all(is_red(row) for row in undecoded(rows))


def test_labelme_without_sizes_asks_too(tmp_path):
    options = write(tmp_path, "labelme", [(WIDE, 6)], "stored")
    annotation = json.loads((tmp_path / "0.json").read_text())
    (tmp_path / "0.json").write_text(json.dumps(annotation | {"imageHeight": None, "imageWidth": None}))
    with pytest.raises(ValueError, match="Set `orientation: display`"):
        load_source("mine", str(tmp_path), **options)
    (row,) = undecoded(load_source("mine", str(tmp_path), **options, orientation="stored"))
    assert is_red(row)


@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_masks_turn_as_photos_do(orientation, height, width, seed):
    mask = np.random.default_rng(seed).integers(0, 2, (height, width), dtype=np.uint8)
    image = PIL.Image.fromarray(mask)
    exif = image.getexif()
    exif[0x0112] = orientation
    expected = np.asarray(PIL.ImageOps.exif_transpose(image))
    assert np.array_equal(decode_mask(turn_mask(encode_mask(mask), orientation)), expected)
