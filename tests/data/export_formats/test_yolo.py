"""Exports in YOLO's layout, as tools write them."""

import pytest
from fixtures.tool_exports import assert_drawn, yolo_lines


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
    (root / "yolo/images/train/b.raw").write_bytes(b"of no known format")
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
