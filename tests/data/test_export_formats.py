"""Exports of annotation tools, as the tools write them: each gives the masks that were drawn."""

import base64
import io
import json
import zlib

import datasets
import numpy as np
import PIL.Image
import pytest

from data_scripts import load_source, make_builder
from lisa_hf.data.masks import decode_mask
from lisa_hf.data.mixture import EvaluationDataset


HEIGHT, WIDTH = 40, 60
RUST, CRACK = (slice(5, 15), slice(5, 25)), (slice(20, 40), slice(30, 60))
POLYGONS = {"Rust_Patch": [[5, 5], [25, 5], [25, 15], [5, 15]], "crack": [[30, 20], [60, 20], [60, 40], [30, 40]]}
CLASSES = {"background": 0, "Rust_Patch": 1, "crack": 2}


def drawn(region):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[region] = True
    return mask


def index_mask(dtype=np.uint8, rust=1, crack=2):
    labels = np.zeros((HEIGHT, WIDTH), dtype)
    labels[RUST], labels[CRACK] = rust, crack
    return labels


def png(values, mode=None):
    file = io.BytesIO()
    PIL.Image.fromarray(values, mode).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def root(tmp_path):
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "photos" / "a.jpg")
    return tmp_path


@pytest.fixture
def load(root):
    def load(builder, **options):
        options |= {"builder": builder, "cache_dir": str(root / "cache")}
        rows = load_source("mine", str(root), **options).cast_column("image", datasets.Image(decode=False))
        load.remarks = make_builder("mine", str(root), **options).remarks()
        EvaluationDataset(rows)[0]  # its photo is found, and has the size of the masks
        assert list(load_source("mine", str(root), streaming=True, **options).decode(False)) == list(rows)
        return rows

    return load


def masks_of(row):
    found = {}
    for target in row["targets"]:
        mask = decode_mask(target["rle"]).astype(bool)
        found[target["phrases"][0]] = found.get(target["phrases"][0], False) | mask
    return found


def assert_drawn(row, phrases=("Rust Patch", "crack")):
    masks = masks_of(row)
    assert sorted(masks) == sorted(phrases)
    for phrase, region in zip(phrases, (RUST, CRACK)):
        np.testing.assert_array_equal(masks[phrase], drawn(region))


# YOLO


def yolo_lines():
    shares = [
        [f"{value / side:.6f}" for point in points for value, side in zip(point, (WIDTH, HEIGHT))]
        for points in POLYGONS.values()
    ]
    return "\n".join(f"{number} {' '.join(outline)}" for number, outline in enumerate(shares)) + "\n"


def write_yolo(root, description, images="yolo/images/train", labels="yolo/labels/train"):
    for folder in (images, labels):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / images / "a.jpg").write_bytes((root / "photos" / "a.jpg").read_bytes())
    (root / labels / "a.txt").write_text(yolo_lines())
    (root / "yolo" / "data.yaml").write_text(description)


@pytest.mark.parametrize(
    "description",
    [
        "path: .\ntrain: images/train\nnames: {0: Rust_Patch, 1: crack}",
        "path: /content/datasets/rust\ntrain: images/train\nnames: [Rust_Patch, crack]",  # where it was made
        "train: ../images/train\nnc: 2\nnames: [Rust_Patch, crack]",  # Roboflow
        "train: [images/train]\nnames: [Rust_Patch, crack]",
        "train: /content/rust-1/images/train\nnames: [Rust_Patch, crack]",  # Roboflow in a notebook
        "train: C:\\rust\\images\\train\nnames: [Rust_Patch, crack]",
        "train: train.txt\nnames: [Rust_Patch, crack]",  # CVAT
        "nc: 2\nnames: [Rust_Patch, crack]",  # supervision
    ],
)
def test_yolo(root, load, description):
    write_yolo(root, description)
    (root / "yolo" / "train.txt").write_text("data/images/train/a.jpg\n")
    assert_drawn(load("yolo", annotations="yolo/data.yaml")[0])
    assert load.remarks == []


def test_yolo_of_label_studio_has_its_photos_elsewhere(root, load):
    (root / "yolo" / "labels").mkdir(parents=True)
    (root / "yolo" / "classes.txt").write_text("Rust_Patch\ncrack\n")
    (root / "yolo" / "labels" / "0a1b2c3d-a.txt").write_text(yolo_lines())
    assert_drawn(load("yolo", annotations="yolo", images="photos")[0])


@pytest.mark.parametrize("folder", ["yolo", "yolo/train", "yolo/images", "yolo/images/train"])
def test_labels_of_yolo_may_lie_beside_the_images(root, load, folder):
    write_yolo(root, "names: [Rust_Patch, crack]", folder, folder)
    assert_drawn(load("yolo", annotations="yolo")[0])


def test_boxes_and_photos_without_labels_are_passed_over_and_said(root, load):
    write_yolo(root, "train: images/train\nnames: [Rust_Patch, crack]")
    (root / "yolo/images/train/b.jpg").write_bytes((root / "photos/a.jpg").read_bytes())
    with (root / "yolo/labels/train/a.txt").open("a") as file:
        file.write("1 0.5 0.5 0.1 0.1\n")
    assert_drawn(load("yolo", annotations="yolo/data.yaml")[0])
    assert load.remarks == [
        "skipped 1 images without a label file",
        "skipped 1 boxes in the split 'train'",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("7 0.1 0.1 0.5 0.1 0.5 0.5", "expected a class among"),
        ("0 0.1 0.1 0.5 0.1 0.5", "at least three points"),
        ("0.7 0.1 0.1 0.5 0.1 0.5 0.5", r"expected a class among .*, got 0\.7"),
        ("inf 0.1 0.1 0.5 0.1 0.5 0.5", "expected a class among .*, got inf"),
        ("0 10 10 50 10 50 50", r"from 0 to 1, got 10\.0\. Divide pixels"),
        ("0 nan 0.1 0.5 0.1 0.5 0.5", "from 0 to 1, got nan"),
        ("0 0.1 0.1 x 0.1 0.5 0.5", "could not convert .* Export it"),
        ("0,0.1,0.1,0.5,0.1,0.5,0.5", "separated by spaces"),
        ("crack 0.1 0.1 0.5 0.1 0.5 0.5", "expected a class number"),
    ],
)
def test_bad_lines_of_yolo_name_their_file(root, load, line, message):
    write_yolo(root, "train: images/train\nnames: [Rust_Patch, crack]")
    (root / "yolo/labels/train/a.txt").write_text(line)
    with pytest.raises(ValueError, match=rf"labels/train/a.txt': .*{message}|labels/train/a.txt: .*{message}"):
        load("yolo", annotations="yolo/data.yaml")


def test_label_files_of_no_image_are_said(root, load):
    write_yolo(root, "train: images/train\nnames: [Rust_Patch, crack]")
    for name in ("classes", "b"):
        (root / f"yolo/labels/train/{name}.txt").write_text(yolo_lines())
    (root / "yolo/images/train/b.heic").write_bytes(b"of no known format")
    assert_drawn(load("yolo", annotations="yolo/data.yaml")[0])
    label = str(root / "yolo/labels/train/b.txt")
    assert load.remarks == [f"skipped 1 label files without an image in a known format, such as {label!r}"]


def test_a_list_of_images_leaves_out_the_labels_of_others_without_a_word(root, load):
    write_yolo(root, "train: train.txt\nnames: [Rust_Patch, crack]")
    (root / "yolo/train.txt").write_text("images/train/a.jpg\n")
    (root / "yolo/images/train/b.jpg").write_bytes((root / "photos/a.jpg").read_bytes())
    (root / "yolo/labels/train/b.txt").write_text(yolo_lines())
    assert len(load("yolo", annotations="yolo/data.yaml")) == 1
    assert load.remarks == []


def test_validation_is_val_of_yolo(root, load):
    write_yolo(root, "train: images/other\nval: images/train\nnames: [Rust_Patch, crack]")
    assert_drawn(load("yolo", annotations="yolo/data.yaml", split="validation")[0])
    with pytest.raises(ValueError, match=r"the split 'test' in .*, got \['train', 'val'\]\. Set `split`"):
        load("yolo", annotations="yolo/data.yaml", split="test")


@pytest.mark.parametrize("name", ["yes", "null", "2020-01-01"])
def test_names_that_yaml_reads_otherwise_are_errors(root, load, name):
    write_yolo(root, f"train: images/train\nnames: [{name}, crack]")
    with pytest.raises(ValueError, match="expected strings as `names` of the classes .* Quote words"):
        load("yolo", annotations="yolo/data.yaml")
    write_yolo(root, f"train: images/train\nnames: ['{name}', crack]")
    assert_drawn(load("yolo", annotations="yolo/data.yaml")[0], (name, "crack"))


def test_yolo_lists_no_photos_outside(root, load):
    write_yolo(root, "train: ../../photos\nnames: [a]")
    with pytest.raises(FileNotFoundError, match="got nothing"):
        load("yolo", annotations="yolo/data.yaml")


# CVAT


def cvat(shapes, attributes='name="a.jpg" width="60" height="40"', before=""):
    image = f'<image id="0" {attributes}>{shapes}</image>'
    return f'<?xml version="1.0"?>{before}<annotations><version>1.1</version>{image}</annotations>'


def cvat_polygon(label):
    points = ";".join(f"{x}.00,{y}.00" for x, y in POLYGONS[label])
    return f'<polygon label="{label}" points="{points}" z_order="0"></polygon>'


def cvat_mask(label, left, top, patch):
    flat = patch.ravel()
    bounds = np.flatnonzero(np.diff(flat, prepend=not flat[0])).tolist() + [flat.size]
    runs = ([0] if flat[0] else []) + np.diff(bounds).tolist()
    height, width = patch.shape
    box = f'left="{left}" top="{top}" width="{width}" height="{height}"'
    return f'<mask label="{label}" rle="{", ".join(map(str, runs))}" {box}></mask>'


def test_cvat(root, load):
    patch = np.ones((10, 20), dtype=bool)
    shapes = cvat_mask("Rust_Patch", 5, 5, patch) + cvat_polygon("crack")
    (root / "a.xml").write_text(cvat(shapes + '<box label="x" xtl="1" ytl="1" xbr="9" ybr="9"/><tag label="y"/>'))
    assert_drawn(load("cvat", annotations="a.xml", images="photos")[0])
    assert load.remarks == ["skipped 1 shapes of the kind 'box' in the split 'train'"]


def test_masks_of_cvat_run_along_rows(root, load):
    patch = np.triu(np.ones((10, 20), dtype=bool))
    (root / "a.xml").write_text(cvat(cvat_mask("crack", 7, 3, patch)))
    expected = np.zeros((HEIGHT, WIDTH), dtype=bool)
    expected[3:13, 7:27] = patch
    np.testing.assert_array_equal(masks_of(load("cvat", annotations="a.xml", images="photos")[0])["crack"], expected)


def test_masks_of_cvat_may_be_a_pixel_too_large(root, load):
    """As in https://github.com/cvat-ai/cvat/issues/9316."""
    (root / "a.xml").write_text(cvat('<mask label="x" rle="0, 82" left="58" top="-1" width="2" height="41"/>'))
    mask = masks_of(load("cvat", annotations="a.xml", images="photos")[0])["x"]
    np.testing.assert_array_equal(mask, drawn((slice(None), slice(58, 60))))


def test_ellipses_turn_to_the_right(root, load):
    ellipse = '<ellipse label="crack" cx="30" cy="20" rx="15" ry="3" rotation="45"/>'
    (root / "a.xml").write_text(cvat(ellipse))
    mask = masks_of(load("cvat", annotations="a.xml", images="photos")[0])["crack"]
    assert mask[28, 38] and mask[12, 22] and not mask[12, 38] and not mask[28, 22]
    assert abs(mask.sum() - np.pi * 15 * 3) < 8


BILLION_LAUGHS = (
    '<!DOCTYPE x [<!ENTITY a "ha">'
    + "".join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(9))
    + "]>"
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (cvat(cvat_polygon("crack"))[:-20], "expected an XML file"),
        (cvat("").replace("annotations", "html"), "expected <annotations>"),
        ('<annotations><track label="x"/></annotations>', "CVAT for images 1.1"),
        (cvat('<mask label="x" rle="1, 5" left="0" top="0" width="2" height="2"/>'), "a mask of 2 x 2 pixels"),
        (cvat('<mask label="x" rle="4" left="60" top="0" width="2" height="2"/>'), "belongs to another image"),
        (cvat('<mask label="x" rle="1" left="0" top="0" width="99999" height="99999"/>'), "expected a mask inside"),
        (cvat(cvat_polygon("crack"), 'name="a.jpg" width="99999999" height="999999"'), "expected an image size"),
        (cvat('<polygon label="&i;" points="1,1;2,2;3,3"/>', before=BILLION_LAUGHS), "expected an XML file"),
        (
            cvat(
                '<polygon label="&e;" points="1,1;9,1;9,9"/>',
                before='<!DOCTYPE x [<!ENTITY e SYSTEM "/etc/hostname">]>',
            ),
            "expected an XML file",
        ),
    ],
)
def test_bad_files_of_cvat(root, load, content, message):
    (root / "a.xml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load("cvat", annotations="a.xml", images="photos")


# Label Studio


def region(kind, value, **changes):
    size = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    return {"id": "r", "type": kind, "from_name": "label", "to_name": "image", **size, "value": value} | changes


def polygon_region(label):
    points = [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in POLYGONS[label]]
    return region("polygonlabels", {"points": points, "closed": True, "polygonlabels": [label]})


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


def write_tasks(root, results, image="/data/upload/1/0a1b2c3d-a.jpg", **changes):
    made = {"id": 1, "result": results, "was_cancelled": False, "ground_truth": False, "created_at": "2026-01-02"}
    task = {"id": 7, "data": {"image": image}, "annotations": [made | changes]}
    (root / "tasks.json").write_text(json.dumps([task]))
    return task


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


# Supervisely


def write_supervisely(root, objects):
    for name in ("ann", "img"):
        (root / "project" / "train" / name).mkdir(parents=True, exist_ok=True)
    (root / "project/train/img/a.jpg").write_bytes((root / "photos/a.jpg").read_bytes())
    content = {"size": {"height": HEIGHT, "width": WIDTH}, "objects": objects, "tags": []}
    (root / "project/train/ann/a.jpg.json").write_text(json.dumps(content))


def bitmap(values, origin):
    data = base64.b64encode(zlib.compress(png(values))).decode()
    return {"classTitle": "Rust_Patch", "geometryType": "bitmap", "bitmap": {"data": data, "origin": origin}}


def polygon_object(label, holes=()):
    points = {"exterior": POLYGONS[label], "interior": list(holes)}
    return {"classTitle": label, "geometryType": "polygon", "points": points}


@pytest.mark.parametrize("directory", ["project", "project/train"])
def test_supervisely(root, load, directory):
    box = {"classTitle": "x", "geometryType": "rectangle", "points": {"exterior": [[1, 1], [5, 5]]}}
    write_supervisely(root, [bitmap(np.ones((10, 20), bool), [5, 5]), polygon_object("crack"), box])
    assert_drawn(load("supervisely", annotations=directory)[0])
    assert load.remarks == ["skipped 1 objects of the kind 'rectangle' in the split 'train'"]


def test_holes_are_cut_out(root, load):
    write_supervisely(root, [polygon_object("crack", [[[35, 25], [50, 25], [50, 35], [35, 35]]])])
    expected = drawn(CRACK)
    expected[25:35, 35:50] = False
    np.testing.assert_array_equal(masks_of(load("supervisely", annotations="project")[0])["crack"], expected)


def test_a_packed_bomb_is_an_error(root, load):
    bomb = base64.b64encode(zlib.compress(bytes(50_000_000))).decode()
    write_supervisely(root, [bitmap(np.ones((2, 2), bool), [0, 0]) | {"bitmap": {"data": bomb, "origin": [0, 0]}}])
    with pytest.raises(ValueError, match="a.jpg.json: expected a bitmap as compressed PNG"):
        load("supervisely", annotations="project")
    write_supervisely(root, [bitmap(np.ones((2000, 2000), bool), [0, 0])])
    with pytest.raises(ValueError, match="expected a bitmap in an image of 60 x 40 pixels"):
        load("supervisely", annotations="project")


# Masks of classes


def save_mask(root, content, name="masks/a.png"):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(content)


def palette_png(labels, palette):
    image = PIL.Image.fromarray(labels).convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette(palette)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


VOC_PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0] + [224, 224, 192] * 253
COLORS = {"background": [0, 0, 0], "Rust_Patch": [128, 0, 0], "crack": [0, 128, 0]}
OPTIONS = {"images": "photos", "masks": "masks"}


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


# COCO panoptic


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


# Names of classes


def test_names_and_templates_make_phrases(root, load):
    (root / "a.xml").write_text(cvat(cvat_polygon("Rust_Patch") + cvat_polygon("crack")))
    options = {"annotations": "a.xml", "images": "photos"}
    names = {"Rust_Patch": ["rust", "the corroded part"], "Crak": ["x"]}
    row = load("cvat", names=names, **options)[0]
    assert [target["phrases"] for target in row["targets"]] == [["rust", "the corroded part"], ["crack"]]
    assert not row["is_sentence"]
    assert load.remarks == ["no annotation has the labels 'Crak' of the option `names`"]
    row = load("cvat", names={"crack": ["What leaks?"]}, templates=["{name}"], **options)[0]
    assert [target["phrases"] for target in row["targets"]] == [["Rust Patch"], ["What leaks?"]] and row["is_sentence"]
    row = load("cvat", names={"Rust_Patch": []}, **options)[0]
    assert [target["phrases"] for target in row["targets"]] == [["crack"]]
    assert load.remarks == ["skipped 1 annotations of the label 'Rust_Patch' in the split 'train'"]
    row = load("cvat", templates=["Where is {name}?", "Find {name}."], **options)[0]
    assert row["targets"][1]["phrases"] == ["Where is crack?", "Find crack."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": {"crack": "the crack"}}, "expected a list of phrases for 'crack'"),
        ({"names": ["crack"]}, "expected lists of phrases by label"),
        ({"templates": ["Where?"]}, "questions that contain '{name}'"),
        ({"templates": "{name}"}, "questions that contain '{name}'"),
    ],
)
def test_wrong_names_and_templates_are_errors(load, options, message):
    with pytest.raises(ValueError, match=message):
        load("cvat", annotations="a.xml", images="photos", **options)


# Names of files


@pytest.mark.parametrize(
    "name", ["..\\photos\\a.jpg", "C:\\x\\a.jpg", "\\\\server\\share\\a.jpg", "./a.jpg", "A.JPG", "http://x/y/a.jpg"]
)
def test_images_are_found_by_names_of_other_systems(root, load, name):
    (root / "a.xml").write_text(cvat(cvat_polygon("crack"), f'name="{name}" width="60" height="40"'))
    assert load("cvat", annotations="a.xml", images="photos")[0]["image"]["path"] == str(root / "photos" / "a.jpg")


def test_a_name_of_several_images_is_an_error_that_lists_them(root, load):
    for folder in ("one", "two"):
        (root / "photos" / folder).mkdir()
        (root / "photos" / folder / "b.jpg").write_bytes((root / "photos" / "a.jpg").read_bytes())
    options = {"annotations": "a.xml", "images": "photos"}
    (root / "a.xml").write_text(cvat(cvat_polygon("crack"), 'name="/x/b.jpg" width="60" height="40"'))
    with pytest.raises(ValueError, match="expected one file for the image '/x/b.jpg', got 2"):
        load("cvat", **options)
    (root / "a.xml").write_text(cvat(cvat_polygon("crack"), 'name="D:\\x\\two\\b.jpg" width="60" height="40"'))
    assert load("cvat", **options)[0]["image"]["path"].endswith("two/b.jpg")


@pytest.mark.parametrize(("name", "is_there"), [("train/b.jpg", False), ("b.jpg", False), ("set1/b.jpg", True)])
def test_no_image_of_another_folder_takes_the_place_of_a_missing_one(root, load, name, is_there):
    for folder in ("train", "val"):
        (root / "photos" / folder).mkdir()
    (root / "photos" / "val" / "b.jpg").write_bytes((root / "photos" / "a.jpg").read_bytes())
    (root / "a.xml").write_text(cvat(cvat_polygon("crack"), f'name="{name}" width="60" height="40"'))
    if is_there:
        assert load("cvat", annotations="a.xml", images="photos")[0]["image"]["path"].endswith("val/b.jpg")
    else:
        with pytest.raises(ValueError, match="expected an image that can be read, got .*No such file"):
            load("cvat", annotations="a.xml", images="photos")


@pytest.mark.parametrize("name", ["/etc/hostname", "../../secret.png", "file:///etc/hostname", "C:\\boot.ini"])
def test_names_that_lead_out_are_refused(root, load, name):
    (root / "secret.png").write_bytes(png(index_mask()))
    (root / "a.xml").write_text(cvat(cvat_polygon("crack"), f'name="{name}" width="60" height="40"'))
    with pytest.raises(ValueError, match="is outside"):
        load("cvat", annotations="a.xml", images="photos")


# Photos with an EXIF orientation


def write_all(root):
    """Write the crack in every format; return the builders with their options."""
    (root / "a.xml").write_text(cvat(cvat_polygon("crack")))
    write_tasks(root, [polygon_region("crack")], "a.jpg")
    save_mask(root, png(index_mask() // 2 * np.uint8(2)))
    (root / "yolo").mkdir()
    (root / "yolo" / "classes.txt").write_text("Rust_Patch\ncrack\n")
    (root / "yolo" / "a.txt").write_text(yolo_lines().splitlines()[1])
    write_supervisely(root, [polygon_object("crack")])
    return {
        "cvat": {"annotations": "a.xml", "images": "photos"},
        "label_studio": {"annotations": "tasks.json", "images": "photos"},
        "yolo": {"annotations": "yolo", "images": "photos"},
        "class_masks": {"classes": CLASSES, **OPTIONS},
        "supervisely": {"annotations": "project"},
    }


@pytest.mark.parametrize("builder", ["cvat", "label_studio", "yolo", "class_masks", "supervisely"])
def test_masks_are_turned_with_their_photos(root, load, builder):
    photo = root / "photos" / "a.jpg"
    exif = PIL.Image.Exif()
    exif[0x0112] = 3
    PIL.Image.open(photo).save(photo, exif=exif)
    options = write_all(root)[builder]
    with pytest.raises(ValueError, match="Set `orientation: display`"):
        load(builder, **options)
    row = load(builder, orientation="display", **options)[0]
    np.testing.assert_array_equal(masks_of(row)["crack"], drawn(CRACK))
    row = load(builder, orientation="stored", **options)[0]
    np.testing.assert_array_equal(masks_of(row)["crack"], np.rot90(drawn(CRACK), 2))
