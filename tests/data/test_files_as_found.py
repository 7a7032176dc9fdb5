"""Files as systems, servers and users leave them: names, hidden copies, and columns of other forms."""

import base64
import io
import json

import datasets
import numpy as np
import PIL.Image
import pytest

from data_scripts import load_source, make_builder
from data_scripts.file_names import find_image
from lisa_hf.data.images import undecoded
from lisa_hf.data.masks import decode_mask


HEIGHT, WIDTH = 40, 60
MASK = np.zeros((HEIGHT, WIDTH), np.uint8)
MASK[:20, :30] = 1
CORNERS = [[0, 0], [30, 0], [30, 20], [0, 20]]
APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X"


def encoded(picture, image_format="PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format)
    return buffer.getvalue()


PHOTO = encoded(PIL.Image.new("RGB", (WIDTH, HEIGHT), "red"), "JPEG")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


@pytest.fixture
def load(tmp_path):
    def load(builder, **options):
        options |= {"builder": builder, "cache_dir": str(tmp_path / "cache")}
        rows = undecoded(load_source("mine", str(tmp_path), **options))
        load.remarks = make_builder("mine", str(tmp_path), **options).remarks()
        return list(rows)

    return load


def assert_drawn(row, num_targets=1):
    masks = [decode_mask(target["rle"]) for target in row["targets"]]
    assert len(masks) == num_targets and all(np.array_equal(mask, MASK) for mask in masks)


# Names of images


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("my%20photo.jpg", "my photo.jpg"),
        ("/data/upload/1/0a1b2c3d-%D0%BA%D0%BE%D1%82.jpg", "0a1b2c3d-кот.jpg"),
        ("/data/upload/1/0a1b2c3d-%D0%BA%D0%BE%D1%82.jpg", "кот.jpg"),
        ("file:///C:/x/my%20photo.jpg", "my photo.jpg"),
        ("a.jpg ", "a.jpg"),
        (" a.jpg\n", "a.jpg"),
        ("gs://bucket/x/my photo #1.jpg", "my photo #1.jpg"),
        ("s3://bucket/x/what?.jpg", "what?.jpg"),
        ("https://x/a.jpg?signature=b.jpg", "a.jpg"),
        ("caf\u00e9.jpg", "cafe\u0301.jpg"),
        ("folder/./b.jpg", "folder/b.jpg"),
    ],
)
def test_names_are_read_as_servers_and_spreadsheets_write_them(tmp_path, name, file):
    write(tmp_path / file, PHOTO)
    assert find_image(str(tmp_path), name)[0] == str(tmp_path / file)


def test_a_name_is_taken_as_it_is_before_it_is_unescaped(tmp_path):
    for file in ("x/100%20.jpg", "x/100 .jpg", "a.jpg", "a.jpg "):
        write(tmp_path / file, PHOTO)
    assert find_image(str(tmp_path), "/photos/100%20.jpg")[0] == str(tmp_path / "x" / "100%20.jpg")
    assert find_image(str(tmp_path), "a.jpg ") == (str(tmp_path / "a.jpg "), False)


@pytest.mark.parametrize("name", ["https://x/a%23b.jpg", "https://x/a%3Fb.jpg", "/data/local-files/?d=x/a%23b.jpg"])
def test_urls_are_unescaped_once(tmp_path, name):
    """Twice, a "#" would end the path: the photo a.jpg is another one."""
    write(tmp_path / "a.jpg", PHOTO)
    with pytest.raises(ValueError, match="no image in there is called 'a[#?]b.jpg'"):
        find_image(str(tmp_path), name)


@pytest.mark.parametrize("name", ["..%2fsecret.jpg", "%2e%2e/secret.jpg", "/x/..%2f..%2fsecret.jpg", " ../secret.jpg"])
def test_escaped_names_do_not_lead_out(tmp_path, name):
    write(tmp_path / "secret.jpg", PHOTO)
    write(tmp_path / "photos" / "a.jpg", PHOTO)
    try:
        assert find_image(str(tmp_path / "photos"), name)[0].startswith(str(tmp_path / "photos"))
    except ValueError as error:
        assert "outside" in str(error)


def write_labelme(path, **changes):
    shape = {"label": "corner", "points": CORNERS, "shape_type": "polygon"}
    size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
    content = {"imagePath": "a.jpg", "imageData": None, "shapes": [shape], **size, **changes}
    write(path, {key: value for key, value in content.items() if value != "left out"})


def test_copies_that_macos_and_jupyter_hide_are_no_data(tmp_path, load):
    mask = encoded(PIL.Image.fromarray(MASK))
    for folder, content in (("photos", PHOTO), ("masks", mask)):
        for name in ("a", ".ipynb_checkpoints/a-checkpoint"):
            write(tmp_path / folder / f"{name}.{'jpg' if folder == 'photos' else 'png'}", content)
        write(tmp_path / folder / "._a.png", APPLE_DOUBLE)
    write_labelme(tmp_path / "photos" / "a.json")
    write(tmp_path / "photos" / "._a.json", APPLE_DOUBLE)
    for builder, options in (
        ("class_masks", {"images": "photos", "masks": "masks", "classes": {"corner": 1}}),
        ("labelme", {"annotations": "photos"}),
    ):
        (row,) = load(builder, **options)
        assert_drawn(row)


# COCO


def coco(segmentations):
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"image_id": 1, "category_id": 1, "segmentation": s} for s in segmentations],
        "categories": [{"id": 1, "name": "corner"}],
    }


@pytest.mark.parametrize("form", [lambda points: sum(points, []), lambda points: [dict(zip("xy", p)) for p in points]])
def test_polygons_in_shares_are_refused(tmp_path, load, form):
    write(tmp_path / "a.jpg", PHOTO)
    shares = [[form([[0.0, 0.0], [0.5, 0.0], [0.5, 0.5], [0.0, 0.5]])]]
    write(tmp_path / "a.json", coco([*shares, {"size": [HEIGHT, WIDTH], "counts": [0, 80, 2320]}]))
    with pytest.raises(ValueError, match="a.json.*expected polygons in pixels, got coordinates .* between 0 and 1"):
        load("coco_instances", annotations="a.json", images=".")


def test_small_polygons_and_pixels_of_0_and_1_are_no_shares(tmp_path, load):
    write(tmp_path / "a.jpg", PHOTO)
    tiny = [[0.0, 0.0, 0.9, 0.0, 0.9, 0.9, 0.0, 0.9]]
    for segmentations in ([tiny, [sum(CORNERS, [])]], [MASK.tolist()]):
        write(tmp_path / "a.json", coco(segmentations))
        (row,) = load("coco_instances", annotations="a.json", images=".")
        assert np.array_equal(decode_mask(row["targets"][-1]["rle"]), MASK)


# LabelMe


@pytest.mark.parametrize("name", [None, "", "left out", "gone.jpg", "..\\photos\\gone.jpg"])
def test_an_image_that_only_labelme_has_is_taken_from_its_file(tmp_path, load, name):
    write_labelme(tmp_path / "a.json", imagePath=name, imageData=base64.b64encode(PHOTO).decode())
    (row,) = load("labelme", annotations=".")
    assert_drawn(row)
    assert row["image"]["bytes"] == PHOTO and row["image_id"] == "a"
    assert "read 1 images that are embedded in the JSON files in the split 'train'" in load.remarks


def test_the_file_of_an_image_is_preferred_to_its_copy(tmp_path, load):
    write(tmp_path / "a.jpg", PHOTO)
    write_labelme(tmp_path / "a.json", imageData=base64.b64encode(PHOTO).decode())
    assert load("labelme", annotations=".")[0]["image"]["path"] == str(tmp_path / "a.jpg")


def test_labelme_files_in_folders_have_their_images_beside_them(tmp_path, load):
    for folder in ("kitchen", "bath"):
        write(tmp_path / folder / "a.jpg", PHOTO)
        write_labelme(tmp_path / folder / "a.json")
    rows = load("labelme", annotations=".")
    assert [(row["image_id"], row["image"]["path"]) for row in rows] == [
        ("bath/a", str(tmp_path / "bath" / "a.jpg")),
        ("kitchen/a", str(tmp_path / "kitchen" / "a.jpg")),
    ]


def test_rectangles_that_labelme_turns_are_drawn(tmp_path, load):
    write(tmp_path / "a.jpg", PHOTO)
    write_labelme(
        tmp_path / "a.json",
        shapes=[{"label": "corner", "points": CORNERS, "shape_type": "oriented_rectangle"}],
    )
    assert_drawn(load("labelme", annotations=".")[0])


# Masks of columns


def parquet(tmp_path, **columns):
    row = {"image": {"bytes": PHOTO, "path": None}, "mask": encoded(PIL.Image.fromarray(MASK)), "phrases": "corner"}
    datasets.Dataset.from_list([row, row | columns]).to_parquet(tmp_path / "rows.parquet")


def test_a_mask_may_be_an_image_file_in_bytes(tmp_path, load):
    parquet(tmp_path)
    for row in load("hub", path="rows.parquet"):
        assert_drawn(row)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"mask": None}, "row 0-1 .*expected a mask in the column 'mask', got none"),
        ({"image": None}, "row 0-1 .*expected an image in the column 'image', got none"),
        ({"phrases": None}, r"row 0-1 .*expected a list of non-empty phrases for target 0, got \[None\]"),
    ],
)
def test_empty_columns_are_named(tmp_path, load, columns, message):
    parquet(tmp_path, **columns)
    with pytest.raises(ValueError, match=message):
        load("hub", path="rows.parquet")


def test_several_images_are_no_mask(tmp_path, load):
    file = {"bytes": encoded(PIL.Image.fromarray(MASK)), "path": None}
    row = {"image": {"bytes": PHOTO, "path": None}, "mask": [file, file], "phrases": "corner"}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="expected one mask, got a list of 2 images"):
        load("hub", path="rows.parquet")


def test_rows_may_be_in_csv(tmp_path, load):
    write(tmp_path / "rows" / "a.jpg", PHOTO)
    polygon = json.dumps([sum(CORNERS, [])])
    (tmp_path / "rows" / "rows.csv").write_text(f'image,mask,phrases\na.jpg,"{polygon}",corner\n')
    (row,) = load("hub", path="rows")
    assert_drawn(row)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([("user", "Where?"), ("assistant", "[SEG].")], "expected masks for the 1 .SEG. of its answers"),
        ([("user", "Where?"), ("assistant", " ")], "expected text as the `content` of every message, got ' '"),
        ([("user", "Where?"), ("Assistant", "There.")], "roles"),
        ([("system", "Be kind."), ("user", "Where?"), ("assistant", "There.")], "roles"),
    ],
)
def test_conversations_without_their_masks_or_texts_are_errors(tmp_path, load, messages, message):
    turns = [{"role": role, "content": text} for role, text in messages]
    row = {"image": {"bytes": PHOTO, "path": None}, "messages": turns}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=message):
        load("hub", path="rows.parquet", messages_column="messages")


def test_contents_in_parts_are_no_text(tmp_path, load):
    write(tmp_path / "a.jpg", PHOTO)
    turns = [{"role": role, "content": [{"type": "text", "text": "[SEG]"}]} for role in ("user", "assistant")]
    write(tmp_path / "q.jsonl", {"image": "a.jpg", "messages": turns, "masks": []})
    with pytest.raises(ValueError, match="line 1.*expected text as the `content` of every message, got .{'type'"):
        load("image_folder", questions="q.jsonl", images=".", masks=".")


# Class masks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": {False: 1}}, "names of `classes`, got False.* in quotes"),
        ({"classes": {None: 1}}, "names of `classes`, got None.* in quotes"),
        ({"classes": ["background", True]}, "names of `classes`, got True.* in quotes"),
        ({"classes": {" ": 1}}, "names of `classes`, got ' '"),
        ({"classes": {"corner": 1}, "names": {False: ["x"]}}, "names: expected labels as text, got False"),
        ({"classes": {"corner": 1}, "names": {12: ["x"]}}, "names: expected labels as text, got 12"),
    ],
)
def test_names_that_yaml_reads_otherwise_are_errors(tmp_path, load, options, message):
    write(tmp_path / "photos" / "a.jpg", PHOTO)
    write(tmp_path / "masks" / "a.png", encoded(PIL.Image.fromarray(MASK)))
    with pytest.raises(ValueError, match=message):
        load("class_masks", images="photos", masks="masks", **options)


@pytest.mark.parametrize("images", [".", "photos"])
def test_two_images_of_one_name_are_not_taken_for_each_other(tmp_path, load, images):
    """Also a photo and its mask in one directory."""
    write(tmp_path / images / "a.jpg", PHOTO)
    write(tmp_path / images / "a.png", encoded(PIL.Image.fromarray(MASK)))
    write(tmp_path / "masks" / "a.png", encoded(PIL.Image.fromarray(MASK)))
    masks = "." if images == "." else "masks"
    with pytest.raises(ValueError, match="expected one image of each name besides its extension, got .*a.jpg"):
        load("class_masks", images=images, masks=masks, classes={"corner": 1})
