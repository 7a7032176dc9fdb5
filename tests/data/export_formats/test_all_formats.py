"""What all export formats share: phrases and templates, image names, EXIF orientation."""

import numpy as np
import PIL.Image
import pytest
from fixtures.tool_exports import (
    CLASSES,
    CRACK,
    OPTIONS,
    cvat,
    cvat_polygon,
    drawn,
    index_mask,
    masks_of,
    png,
    polygon_object,
    polygon_region,
    save_mask,
    write_supervisely,
    write_tasks,
    yolo_lines,
)


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
