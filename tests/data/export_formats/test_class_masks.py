"""Masks of classes and instances, and COCO panoptic."""

import io
import json

import numpy as np
import PIL.Image
import pytest
from fixtures.tool_exports import (
    CLASSES,
    CRACK,
    HEIGHT,
    OPTIONS,
    RUST,
    WIDTH,
    assert_drawn,
    drawn,
    index_mask,
    masks_of,
    png,
    save_mask,
)

from lisa_hf.data.masks import decode_mask


def palette_png(labels, palette):
    image = PIL.Image.fromarray(labels).convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette(palette)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


VOC_PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0] + [224, 224, 192] * 253
COLORS = {"background": [0, 0, 0], "Rust_Patch": [128, 0, 0], "crack": [0, 128, 0]}


def color_mask():
    return np.array(VOC_PALETTE, np.uint8).reshape(-1, 3)[index_mask()]


@pytest.mark.parametrize(
    ("content", "classes"),
    [
        (png(index_mask()), {"Rust_Patch": 1, "crack": 2}),
        (png(index_mask()), ["background", "Rust_Patch", "crack"]),
        (png(index_mask(np.uint16, 300, 70)), {"Rust_Patch": 300, "crack": 70}),
        (png(np.repeat(index_mask()[..., None], 3, axis=2)), CLASSES),  # gray, saved in color
        (palette_png(index_mask(), VOC_PALETTE), CLASSES),
        (palette_png(index_mask(), VOC_PALETTE), COLORS),
        (png(color_mask()), COLORS),
        (png(color_mask()), "labelmap.txt"),
        (png(color_mask()), "labelmap_of_datumaro.txt"),
        (png(index_mask()), "names.txt"),
    ],
)
def test_masks_of_classes_are_one_target_per_class(root, load, content, classes):
    lines = [f"{name}:{','.join(map(str, color))}::" for name, color in COLORS.items()]
    (root / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *lines]))
    (root / "labelmap_of_datumaro.txt").write_text("\n".join(f"{name}:::" for name in COLORS))
    (root / "names.txt").write_text("_background_\nRust_Patch\ncrack\n")
    save_mask(root, content)
    row = load("class_masks", classes=classes, **OPTIONS)[0]
    assert_drawn(row)
    assert row["ignore"] is None and len(row["targets"]) == 2


@pytest.mark.parametrize("by_color", [False, True])
def test_void_is_ignored(root, load, by_color):
    labels = index_mask()
    labels[0, :] = 255
    save_mask(root, palette_png(labels, VOC_PALETTE))
    row = load("class_masks", classes=COLORS if by_color else CLASSES, **OPTIONS)[0]
    assert_drawn(row)
    np.testing.assert_array_equal(decode_mask(row["ignore"]), np.arange(HEIGHT)[:, None] * np.ones(WIDTH) == 0)


def test_a_class_may_be_called_void(root, load):
    save_mask(root, png(index_mask()))
    row = load("class_masks", classes={"Rust_Patch": 1, "void": 2}, **OPTIONS)[0]
    assert list(masks_of(row)) == ["Rust Patch"]
    np.testing.assert_array_equal(decode_mask(row["ignore"]), drawn(CRACK))


def test_instances_are_targets_of_their_own(root, load):
    labels = index_mask(rust=2)
    save_mask(root, png(labels))
    save_mask(root, png(index_mask(rust=5, crack=9)), "instances/a.png")
    row = load("class_masks", classes=CLASSES, instances="instances", **OPTIONS)[0]
    assert [target["phrases"] for target in row["targets"]] == [["crack"], ["crack"]]
    np.testing.assert_array_equal(masks_of(row)["crack"], drawn(RUST) | drawn(CRACK))
    assert [int(decode_mask(target["rle"]).sum()) for target in row["targets"]] in ([200, 600], [600, 200])


def test_instances_of_one_class_need_no_other_mask(root, load):
    save_mask(root, png(index_mask(np.uint16, 400, 401)), "instances/a.png")
    row = load("class_masks", images="photos", instances="instances", classes=["cell"])[0]
    assert [target["phrases"] for target in row["targets"]] == [["cell"], ["cell"]]


def test_classes_and_instances_in_one_value(root, load):
    save_mask(root, png(index_mask(np.uint16, 26001, 26000)))
    row = load("class_masks", classes={"car": 26}, label_divisor=1000, **OPTIONS)[0]
    assert [target["phrases"] for target in row["targets"]] == [["car"], ["car"]]


def test_the_exif_orientation_of_a_mask_is_respected(root, load):
    exif = PIL.Image.Exif()
    exif[0x0112] = 3
    file = io.BytesIO()
    PIL.Image.fromarray(np.rot90(index_mask(), 2).copy()).save(file, "PNG", exif=exif)
    save_mask(root, file.getvalue())
    assert_drawn(load("class_masks", classes=CLASSES, **OPTIONS)[0])


def jpeg(values):
    file = io.BytesIO()
    PIL.Image.fromarray(values).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "classes", "message"),
    [
        (png(index_mask(crack=7)), CLASSES, "got 1 others: 7"),
        (png(color_mask()), CLASSES, "expected one value per pixel"),
        (png(color_mask()), {"Rust_Patch": [1, 2, 3]}, "got 2 others: #008000, #800000"),
        (jpeg(index_mask()), CLASSES, "lossy format JPEG"),
        (png(index_mask()[:30]), CLASSES, "expected a mask of the image's size"),
        (png(index_mask())[:60], CLASSES, "cannot be read"),
        (png(index_mask()), {"a": 1, "b": 1}, "one class per value"),
        (png(index_mask()), {"a": 1, "b": [0, 0, 9]}, "either values or colors"),
        (png(index_mask()), None, "expected `classes`"),
    ],
)
def test_what_nobody_can_tell_is_an_error(root, load, content, classes, message):
    name = "a.jpg" if content[:2] == b"\xff\xd8" else "a.png"
    save_mask(root, content, f"masks/{name}")
    with pytest.raises(ValueError, match=message):
        load("class_masks", classes=classes, **OPTIONS)


def test_an_image_set_chooses_and_lone_masks_are_said(root, load):
    for name in ("a", "b", "c"):
        save_mask(root, png(index_mask()), f"masks/{name}.png")
    assert len(load("class_masks", classes=CLASSES, **OPTIONS)) == 1
    assert "found no pair for 2 of 3 masks, such as 'b'" in load.remarks
    (root / "set.txt").write_text("a\n")
    load("class_masks", classes=CLASSES, image_set="set.txt", **OPTIONS)
    assert load.remarks == []


def write_panoptic(root, segments):
    (root / "panoptic").mkdir(exist_ok=True)
    numbers = index_mask(np.int64, 70_000, 3)
    colors = np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], axis=2).astype(np.uint8)
    (root / "panoptic" / "a.png").write_bytes(png(colors))
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": 5, "name": "Rust_Patch"}, {"id": 6, "name": "crack"}],
    }
    (root / "panoptic.json").write_text(json.dumps(content))


def test_coco_panoptic(root, load):
    write_panoptic(root, [{"id": 70_000, "category_id": 5}, {"id": 3, "category_id": 6}])
    options = {"annotations": "panoptic.json", "images": "photos", "masks": "panoptic"}
    row = load("coco_panoptic", **options)[0]
    assert_drawn(row)
    np.testing.assert_array_equal(decode_mask(row["ignore"]) == 1, index_mask() == 0)
    write_panoptic(root, [{"id": 70_000, "category_id": 5}])
    with pytest.raises(ValueError, match=r"got others: \[3\]"):
        load("coco_panoptic", **options)
