"""Exports of Label Studio."""

import json

import numpy as np
import pytest
from fixtures.tool_exports import (
    CRACK,
    HEIGHT,
    WIDTH,
    assert_drawn,
    drawn,
    masks_of,
    polygon_region,
    region,
    write_tasks,
)


def pack_brush(mask, value_size=8, count_sizes=(3, 4, 8, 16), value=255):
    """Pack a mask as the front end of Label Studio does: runs and literal values by turns."""
    values = np.repeat(mask.ravel(), 4) * value
    text = f"{len(values):032b}{value_size - 1:05b}" + "".join(f"{size - 1:04b}" for size in count_sizes)
    bounds = [*np.flatnonzero(np.diff(values, prepend=-1)), len(values)]
    for start, end in zip(bounds, bounds[1:]):
        while start < end:
            count = min(end - start, 2 ** count_sizes[3])
            literal = count < 4
            index = next(i for i, size in enumerate(count_sizes) if count - 1 < 2**size)
            text += f"{0 if literal else 1}{index:02b}{count - 1:0{count_sizes[index]}b}"
            text += f"{int(values[start]):0{value_size}b}" * (count if literal else 1)
            start += count
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


@pytest.mark.parametrize(
    "image",
    [
        "/data/upload/1/0a1b2c3d-a.jpg",
        "/data/local-files/?d=set%20one/a.jpg",
        "https://example.org/files/a.jpg?token=1",
        "s3://bucket/a.jpg",
        "C:\\Users\\me\\a.jpg",
        "a.jpg",
    ],
)
def test_label_studio(root, load, image):
    brush = {"format": "rle", "rle": pack_brush(drawn(CRACK)), "brushlabels": ["crack"]}
    box = region("rectanglelabels", {"x": 1, "y": 1, "width": 5, "height": 5, "rectanglelabels": ["x"]})
    choice = {"id": "c", "type": "choices", "value": {"choices": ["good"]}}
    write_tasks(root, [polygon_region("Rust_Patch"), region("brushlabels", brush), box, choice], image)
    assert_drawn(load("label_studio", annotations="tasks.json", images="photos")[0])
    found = "found 1 images by the last part of their path or URL in the split 'train'"
    boxes = "skipped 1 regions of the type 'rectanglelabels' in the split 'train'"
    assert load.remarks == ([boxes] if image == "a.jpg" else [found, boxes])


@pytest.mark.parametrize(
    ("photo", "uploaded"),
    [
        ("My photo (1).jpg", "My_photo_1.jpg"),
        ("Stra\u00dfe, T\u00fcr.JPG", "Stra\u00dfe_T\u00fcr.JPG"),
        ("Tu\u0308r.jpg", "Tur.jpg"),  # as macOS writes it
        ("a&b+c.d.jpg", "abc.d.jpg"),
        (" a  b.jpg", "_a__b.jpg"),
        (f"{'long name ' * 9}.jpg", f"{'long_name_' * 9}"[:70] + "_zIeiGOQ.jpg"),  # of 100 characters with its path
        (f"{'x' * 80}.2024.12.jpg", "x" * 62 + "_zIeiGOQ.2024.12.jpg"),
    ],
)
def test_label_studio_renames_what_it_uploads(root, load, photo, uploaded):
    """The names are those of Django 5.2, to which Label Studio leaves its uploads."""
    (root / "photos/b.jpg").write_bytes((root / "photos/a.jpg").read_bytes())
    (root / "photos/a.jpg").rename(root / "photos" / photo)
    write_tasks(root, [polygon_region("Rust_Patch"), polygon_region("crack")], f"/data/upload/1/0a1b2c3d-{uploaded}")
    row = load("label_studio", annotations="tasks.json", images="photos")[0]
    assert_drawn(row)
    assert row["image"]["path"].endswith(photo)
    assert load.remarks == [
        "found 1 images by the last part of their path or URL in the split 'train'",
    ]


@pytest.mark.parametrize("photos", [("a b.jpg", "a_b.jpg"), ("a (b).jpg", "a b.jpg")])
def test_a_name_that_label_studio_may_have_made_of_two_photos_is_an_error(root, load, photos):
    for photo in photos:
        (root / "photos" / photo).write_bytes((root / "photos/a.jpg").read_bytes())
    write_tasks(root, [polygon_region("crack")], "/data/upload/1/0a1b2c3d-a_b.jpg")
    with pytest.raises(ValueError, match="expected one file for the image .*, got 2"):
        load("label_studio", annotations="tasks.json", images="photos")


def test_the_end_of_a_name_of_common_length_is_not_left_out(root, load):
    write_tasks(root, [polygon_region("crack")], "/data/upload/1/0a1b2c3d-a_kitchen.jpg")
    with pytest.raises(ValueError, match="no image in there is called '0a1b2c3d-a_kitchen.jpg'"):
        load("label_studio", annotations="tasks.json", images="photos")


def test_predictions_that_nobody_accepted_are_said(root, load):
    task = write_tasks(root, [polygon_region("Rust_Patch"), polygon_region("crack")], "a.jpg")
    predicted = task | {"id": 8, "annotations": [], "predictions": [{"result": [polygon_region("crack")]}]}
    (root / "tasks.json").write_text(json.dumps([task, predicted, task | {"id": 9, "annotations": []}]))
    assert_drawn(load("label_studio", annotations="tasks.json", images="photos")[0])
    assert load.remarks == ["skipped 1 tasks with predictions only, which nobody accepted"]


@pytest.mark.parametrize(
    ("data", "fits"),
    [
        ({"caption": "a wall", "photo": "/data/upload/1/0a1b2c3d-a.jpg"}, True),
        ({"image": "a.jpg", "mask": "other.png"}, True),
        ({"left": "a.jpg", "right": "b.jpg"}, False),
        ({"caption": "a wall"}, False),
    ],
)
def test_the_image_of_a_task_is_found_among_its_data(root, load, data, fits):
    task = write_tasks(root, [polygon_region("crack")])
    (root / "tasks.json").write_text(json.dumps([task | {"data": data}]))
    if fits:
        load("label_studio", annotations="tasks.json", images="photos")
    else:
        with pytest.raises(ValueError, match="expected the URL of one image"):
            load("label_studio", annotations="tasks.json", images="photos")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("value", [255, 1])  # the converter's users pack masks of 1 too
def test_brush_masks_of_every_shape(root, load, seed, value):
    mask = np.random.default_rng(seed).random((HEIGHT, WIDTH)) < (0.1, 0.5, 0.9, 0.02, 0.7)[seed]
    brush = {"format": "rle", "rle": pack_brush(mask, value=value), "brushlabels": ["crack"]}
    write_tasks(root, [region("brushlabels", brush)])
    row = load("label_studio", annotations="tasks.json", images="photos")[0]
    np.testing.assert_array_equal(masks_of(row)["crack"], mask)


@pytest.mark.parametrize(
    "change", [lambda rle: rle[:20], lambda rle: rle[:3], lambda rle: [0, 0, 0, 9, *rle[4:]], lambda _: [1.5]]
)
def test_damaged_brush_masks_are_errors(root, load, change):
    brush = {"format": "rle", "rle": change(pack_brush(drawn(CRACK))), "brushlabels": ["crack"]}
    write_tasks(root, [region("brushlabels", brush)])
    with pytest.raises(ValueError, match="task 7: expected a"):
        load("label_studio", annotations="tasks.json", images="photos")


def test_one_annotation_of_several_is_taken_and_said(root, load):
    task = write_tasks(root, [polygon_region("Rust_Patch")])
    (first,) = task["annotations"]
    later = first | {"result": [polygon_region("crack")], "created_at": "2026-03-01"}
    withdrawn = later | {"was_cancelled": True, "created_at": "2026-04-01"}
    options = {"annotations": "tasks.json", "images": "photos"}
    (root / "tasks.json").write_text(json.dumps([task | {"annotations": [later, first, withdrawn]}]))
    assert list(masks_of(load("label_studio", **options)[0])) == ["crack"]
    assert "dropped 1 annotations" in load.remarks[0]
    (root / "tasks.json").write_text(json.dumps([task | {"annotations": [later, first | {"ground_truth": True}]}]))
    assert list(masks_of(load("label_studio", **options)[0])) == ["Rust Patch"]


def test_regions_without_the_size_of_their_image_are_not_left_out(root, load):
    region = polygon_region("crack")
    del region["original_width"]
    write_tasks(root, [polygon_region("crack"), region], "a.jpg")
    with pytest.raises(ValueError, match="task 7: expected the key 'original_width'"):
        load("label_studio", annotations="tasks.json", images="photos")


def test_json_min_is_refused_with_the_remedy(root, load):
    (root / "tasks.json").write_text(json.dumps([{"image": "a.jpg", "label": []}]))
    with pytest.raises(ValueError, match="not JSON-MIN"):
        load("label_studio", annotations="tasks.json", images="photos")
