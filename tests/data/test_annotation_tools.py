"""Annotations as exported by tools and merged by users: ids, boxes, and shapes of LabelMe and X-AnyLabeling."""

import base64
import io
import json
import pickle

import datasets
import numpy as np
import PIL.Image
import pytest

from data_scripts import load_source, make_builder
from lisa_hf.data.masks import decode_mask


HEIGHT, WIDTH = 40, 60
UPRIGHT = datasets.Image(decode=False)


@pytest.fixture
def root(tmp_path):
    for name in ("a.png", "b.png"):
        PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / name)
    return tmp_path


def image(number, name="a.png"):
    return {"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH}


def annotation(number, image_id, left, category=1, **changes):
    box = [left, 0, left + 20, 0, left + 20, 20, left, 20]
    return {"id": number, "image_id": image_id, "category_id": category, "segmentation": [box]} | changes


def open_coco(root, images, annotations, categories=((1, "handle"),), **options):
    """Return the masks and phrases by image, as (file name, [(phrase, left side)]), and the remarks."""
    categories = [{"id": number, "name": name} for number, name in categories]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "a.json").write_text(json.dumps(content))
    files = {"annotations": "a.json", "images": "."}
    options = {"builder": "coco_instances", **files, "cache_dir": str(root / "cache"), **options}
    rows = load_source("mine", str(root), **options).cast_column("image", UPRIGHT)
    found = [
        (
            row["image"]["path"][-5:],
            [
                (target["phrases"][0], int(decode_mask(target["rle"]).any(axis=0).argmax()))
                for target in row["targets"]
            ],
        )
        for row in rows
    ]
    return found, make_builder("mine", str(root), **options).remarks()


@pytest.mark.parametrize(
    ("images", "annotations", "categories"),
    [
        ([image(1)], [annotation(1, "1", 0)], [(1, "handle")]),
        ([image("1")], [annotation(1, 1, 0)], [(1, "handle")]),
        ([image(1)], [annotation(1, 1, 0, "1")], [(1, "handle")]),
        ([image(1)], [annotation(1, 1, 0)], [("1", "handle")]),
    ],
)
def test_ids_as_text_on_one_side_are_matched_and_said(root, images, annotations, categories):
    found, remarks = open_coco(root, images, annotations, categories)
    assert found == [("a.png", [("handle", 0)])]
    assert any("matched 1 annotations by ids that are strings" in remark for remark in remarks)


def test_ids_that_agree_are_not_remarked_on(root):
    assert open_coco(root, [image(17)], [annotation(5, 17, 0, 90)], [(90, "x")]) == ([("a.png", [("x", 0)])], [])


@pytest.mark.parametrize(
    ("images", "categories", "message"),
    [
        ([image(1), image(1, "b.png")], [(1, "handle")], "duplicate id 1 of 'a.png' and 'b.png'"),
        ([image(1), image("1", "b.png")], [(1, "handle")], "duplicate id '1' of 'a.png' and 'b.png'"),
        ([image(1)], [(1, "cat"), (1, "dog")], "duplicate id 1 of 'cat' and 'dog'"),
        ([image(None)], [(1, "cat")], "ids that are numbers or text, got None"),
    ],
)
def test_one_id_of_different_things_is_an_error_that_names_it(root, images, categories, message):
    with pytest.raises(ValueError, match=f"a.json.*{message}"):
        open_coco(root, images, [annotation(1, 1, 0), annotation(2, 1, 40)], categories)


def test_annotations_of_an_image_that_is_not_listed_are_errors(root):
    with pytest.raises(ValueError, match="image 7: expected an entry in `images`"):
        open_coco(root, [image(1)], [annotation(1, 1, 0), annotation(2, 7, 0)])


@pytest.mark.parametrize("labels", [("Door", "door"), ("t\u00fcr", "tu\u0308r")])
def test_labels_that_look_alike_are_said(root, labels):
    annotations = [annotation(1, 1, 0, 1), annotation(2, 1, 30, 2)]
    found, remarks = open_coco(root, [image(1)], annotations, list(enumerate(labels, 1)))
    assert found == [("a.png", [(labels[0], 0), (labels[1], 30)])]
    asked = " and ".join(map(repr, sorted(labels)))
    assert remarks == [f"asks for {asked} as different things; if they are one, give them the same `names`"]
    names = {label: ["the door"] for label in labels}
    assert open_coco(root, [image(1)], annotations, list(enumerate(labels, 1)), names=names)[1] == []


@pytest.mark.parametrize(
    ("builder", "option", "name", "message"),
    [
        ("coco_instances", "annotations", "a.json.gz", "to be unpacked, got the archive .* Unpack it"),
        ("coco_instances", "images", "a.zip", "to be unpacked, got the archive .* Unpack it"),
        ("coco_instances", "images", "a.png", "to be a directory, got the file"),
        ("coco_instances", "annotations", ".", "expected a file, got the directory"),
        ("cvat", "annotations", ".", "expected an XML file .* Name annotations.xml"),
        ("labelme", "annotations", "a.json", "to be a directory, got the file"),
        ("supervisely", "annotations", "a.json", "to be a directory, got the file"),
    ],
)
def test_archives_and_directories_for_files_are_errors(root, builder, option, name, message):
    for file in ("a.zip", "a.json.gz", "a.json"):
        (root / file).write_bytes(b"PK")
    images = {} if builder == "supervisely" else {"images": "."}
    options = {"builder": builder, "annotations": "a.json"} | images | {option: name}
    with pytest.raises(ValueError, match=message):
        load_source("mine", str(root), cache_dir=str(root / "cache"), **options)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_points_that_are_no_numbers_are_said(root, number):
    damaged = annotation(1, 1, 0) | {"segmentation": [[0, 0, 20, number, 20, 20]]}
    with pytest.raises(
        ValueError, match=rf"image 1: expected polygons .* with the point \[20\.0, {number}\]\. Draw it"
    ):
        open_coco(root, [image(1)], [damaged])


def test_an_image_that_is_listed_twice_is_one_row_with_all_annotations(root):
    expected = [("a.png", [("handle", 0), ("handle", 40)])]
    annotations = [annotation(1, 1, 0), annotation(2, 2, 40)]
    found, remarks = open_coco(root, [image(1), image(2)], annotations)
    assert found == expected and "joined 1 annotations" in remarks[0]
    same = [annotation(1, 1, 0), annotation(2, 1, 40)]
    assert open_coco(root, [image(1), image(1)], same, [(1, "handle"), (1, "handle")])[0] == expected


def test_photos_of_lvis_are_named_by_their_url(root):
    listed = {"id": 1, "coco_url": "http://images.cocodataset.org/train2017/a.png", "height": HEIGHT, "width": WIDTH}
    found, _ = open_coco(root, [listed], [annotation(1, 1, 0)])
    assert found == [("a.png", [("handle", 0)])]


def test_annotations_may_share_an_id(root):
    found, _ = open_coco(root, [image(1), image(2, "b.png")], [annotation(1, 1, 0), annotation(1, 2, 40)])
    assert found == [("a.png", [("handle", 0)]), ("b.png", [("handle", 40)])]


def test_annotations_without_a_mask_are_passed_over_and_counted(root):
    annotations = [
        annotation(1, 1, 0),
        annotation(2, 1, 0, segmentation=[]),
        annotation(3, 1, 0, segmentation=None, bbox=[1, 2, 3, 4]),
        annotation(4, 1, 0, segmentation=[[1, 1, 2, 2]]),
        annotation(5, 1, 0, segmentation=[[5, 5, 9, 5, 7, 5]]),
        annotation(6, 2, 0, segmentation=[]),
    ]
    found, remarks = open_coco(root, [image(1), image(2, "b.png")], annotations)
    assert found == [("a.png", [("handle", 0)])]
    assert remarks == [
        "skipped 2 annotations without a pixel in the split 'train'",
        "skipped 3 annotations without an outline in the split 'train'",
    ]


def test_refs_find_the_annotation_of_their_own_image(root):
    (root / "refer_seg" / "refcoco").mkdir(parents=True)
    (root / "refer_seg" / "images" / "mscoco" / "images" / "train2014").mkdir(parents=True)
    ref = {"ref_id": 1, "ann_id": 7, "image_id": 1, "split": "train", "sentences": [{"sent": "left"}]}
    (root / "refer_seg" / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([ref]))

    def load(*annotations):
        content = {"images": [image(1), image(2, "b.png")], "annotations": annotations, "categories": []}
        (root / "refer_seg" / "refcoco" / "instances.json").write_text(json.dumps(content))
        return load_source("refcoco", str(root), cache_dir=str(root / "cache"))

    for number in (7, "7"):
        (row,) = load(annotation(number, 1, 0), annotation(number, 2, 40)).cast_column("image", UPRIGHT)
        assert decode_mask(row["targets"][0]["rle"]).any(axis=0).argmax() == 0
    with pytest.raises(ValueError, match="one annotation with the id 7 in the image 1, got a duplicate id"):
        load(annotation(7, 1, 0), annotation(7, 1, 40))


def patch(height=10, width=20, value=255):
    buffer = io.BytesIO()
    content = np.zeros((height, width), np.uint8)
    content[:, : width // 2] = value
    PIL.Image.fromarray(content).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


POLYGON = {"label": "top left", "points": [[1, 1], [29, 1], [29, 19]], "shape_type": "polygon"}
CORNERS = [[10, 5], [29, 5], [29, 14], [10, 14]]


def open_labelme(root, *shapes):
    (root / "a.json").write_text(json.dumps({"imagePath": "a.png", "imageData": None, "shapes": [POLYGON, *shapes]}))
    options = {"builder": "labelme", "annotations": ".", "cache_dir": str(root / "cache")}
    (row,) = load_source("mine", str(root), **options).cast_column("image", UPRIGHT)
    return [decode_mask(target["rle"]) for target in row["targets"]], make_builder("mine", str(root), **options)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ({"shape_type": None, "points": CORNERS}, 19 * 9),
        ({"points": CORNERS}, 19 * 9),
        ({"shape_type": "rectangle", "points": [[10, 5], [29, 14]]}, 19 * 9),
        ({"shape_type": "rectangle", "points": CORNERS}, 19 * 9),
        ({"shape_type": "rotation", "points": CORNERS, "direction": 0.3}, 19 * 9),
        ({"shape_type": "circle", "points": [[30, 20], [40, 20]]}, np.pi * 100),
        ({"shape_type": "mask", "points": [[10, 5], [29, 14]], "mask": patch()}, 100),
        ({"shape_type": "mask", "points": [[10, 5], [29, 14]], "mask": patch(value=1)}, 100),
    ],
)
def test_shapes_with_an_area_are_drawn(root, shape, area):
    (_, mask), builder = open_labelme(root, {"label": "box", **shape})
    assert abs(int(mask.sum()) - area) < 0.03 * area and builder.remarks() == []
    if shape.get("shape_type") == "mask":
        assert mask[5:15, 10:20].all()


def test_settings_of_predictions_beside_labelme_files_are_passed_over(root):
    (root / "settings.json").write_text('{"model": "mine", "images": {}}')
    masks, builder = open_labelme(root)
    assert len(masks) == 1
    assert builder.remarks() == ["skipped 1 JSON files that are not LabelMe's in the split 'train'"]


@pytest.mark.parametrize("kind", ["point", "line", "linestrip", "points", "polygon"])
def test_shapes_without_an_area_are_passed_over_and_the_photo_is_kept(root, kind):
    masks, builder = open_labelme(root, {"label": "dot", "shape_type": kind, "points": [[1, 1], [20, 20]]})
    assert len(masks) == 1
    assert builder.remarks() == [f"skipped 1 shapes of the kind {kind!r} without an area in the split 'train'"]


@pytest.mark.parametrize(
    "shape",
    [
        {"shape_type": "circle", "points": [[30, 20], [1e300, 20]]},
        {"shape_type": "circle", "points": [[30, 20]]},
        {"shape_type": "rectangle", "points": [[0, 0], [1e9, 1e9]]},
        {"shape_type": "mask", "points": [[50, 35], [69, 44]], "mask": patch()},
        {"shape_type": "mask", "points": [[1e300, 0]], "mask": patch()},
        {"shape_type": "mask", "points": [[0, 0]], "mask": "no base64"},
        {"shape_type": "mask", "points": [[0, 0]], "mask": base64.b64encode(b"no image").decode()},
        {"shape_type": "mask", "points": [[0, 0]]},
    ],
)
def test_damaged_shapes_are_errors_that_name_the_file(root, shape):
    with pytest.raises(ValueError, match=r"a\.json: "):
        open_labelme(root, {"label": "box", **shape})
