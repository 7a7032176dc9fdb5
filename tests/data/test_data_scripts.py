"""The builders: parity with the original loaders, determinism, caching, sharding, and bad input."""

import hashlib
import inspect
import json
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import Image
from fixtures.paths import GOLDEN, ROOT, TREE
from fixtures.sources import edit_json, measure
from safetensors.numpy import load_file

import data_scripts
from data_scripts import load_source, source
from data_scripts.check import check_source
from data_scripts.pascal_part import PascalPart
from data_scripts.reason_seg import fill_polygon, paint_polygons
from data_scripts.shapes import Shapes
from lisa_hf.data.masks import decode_mask


REASON_SEG, PASCAL_PART = Path("reason_seg", "ReasonSeg"), Path("vlpart", "pascal_part")


@pytest.fixture
def load(tmp_path):
    """`load_source` with a separate cache."""

    def load(name, data_dir=None, **kwargs):
        return load_source(name, data_dir, cache_dir=str(tmp_path / "cache"), **kwargs)

    return load


# The original loaders


@pytest.mark.parametrize("split", ["train", "val"])
def test_reason_seg_masks_equal_the_original(load, split):
    metadata = json.loads((GOLDEN / "reasonseg_masks.json").read_text())
    masks = load_file(GOLDEN / "reasonseg_masks.safetensors")
    rows = load("reason_seg", TREE, split=split)
    expected = {key for key in metadata if f"/{split}/" in key}
    assert expected == {str(REASON_SEG / split / f"{row['image_id']}.json") for row in rows}
    for row in rows:
        key = str(REASON_SEG / split / f"{row['image_id']}.json")
        labels = decode_mask(row["targets"][0]["rle"])
        if row["ignore"] is not None:
            labels[decode_mask(row["ignore"]) == 1] = 255
        np.testing.assert_array_equal(labels, masks[key])
        assert row["targets"][0]["phrases"] == metadata[key]["text"]
        assert row["is_sentence"] == metadata[key]["is_sentence"]
        assert row["image"].size == labels.shape[::-1]


def test_reason_seg_training_rows_equal_the_original(load, golden):
    recorded = golden["reason_seg/ReasonSeg|train|explanatory=0.1"]["images"]
    rows = {str(REASON_SEG / "train" / f"{row['image_id']}.jpg"): row for row in load("reason_seg", TREE)}
    assert rows.keys() == recorded.keys()
    for path, row in rows.items():
        (target,) = row["targets"]
        assert sorted(target["phrases"]) == sorted(recorded[path]["phrases"])
        for instances in recorded[path]["phrases"].values():
            # Text-only answers have no mask, and were recorded as such.
            (mask,) = [instance for instance in instances if instance["area"] is not None]
            assert measure(decode_mask(target["rle"])).items() <= mask.items()
        explained = {answer for answer in recorded[path]["answers"] if "[SEG]" not in answer}
        assert explained == ({f"{row['explanation']}</s>"} if row["explanation"] else set())
        if row["ignore"] is not None:
            # Fixed: the original trains on ignored pixels as background. Here they are kept apart from the target.
            assert decode_mask(row["ignore"]).sum() > 0
            assert not (decode_mask(row["ignore"]) & decode_mask(target["rle"])).any()


def test_reason_seg_validation_rows_equal_the_original(load, golden):
    recorded = golden["val"]["ReasonSeg|val"]["items"]
    rows = {str(REASON_SEG / "val" / f"{row['image_id']}.jpg"): row for row in load("reason_seg", TREE, split="val")}
    assert rows.keys() == recorded.keys()
    for path, row in rows.items():
        (mask,) = recorded[path]["masks"]
        labels = decode_mask(row["targets"][0]["rle"]) + 255 * decode_mask(row["ignore"])
        assert hashlib.sha1(np.ascontiguousarray(labels, dtype=np.uint8)).hexdigest() == mask["sha1_raw_uint8"]
        assert [(labels == 1).sum(), (labels == 255).sum()] == [mask["n_target"], mask["n_ignore"]]
        assert row["targets"][0]["phrases"][0] in recorded[path]["conversations"][0]


def test_pascal_part_equals_the_original(load, golden):
    recorded = golden["sem_seg/pascal_part"]["images"]
    rows = load("pascal_part", TREE).cast_column("image", Image(decode=False))
    assert len(rows) == len(recorded) == 2
    for row in rows:
        phrases = recorded[str(Path(row["image"]["path"]).relative_to(TREE))]["phrases"]
        found = {phrase: target["rle"] for target in row["targets"] for phrase in target["phrases"]}
        assert found.keys() == phrases.keys()
        for phrase, rle in found.items():
            (mask,) = phrases[phrase]
            assert measure(decode_mask(rle)).items() <= mask.items()


def test_short_and_long_questions_are_splits_of_their_own(load, tree):
    everything = load("reason_seg", tree, split="val")
    for split, is_sentence in (("val_short", False), ("val_long", True)):
        expected = [row["image_id"] for row in everything if row["is_sentence"] == is_sentence]
        assert load("reason_seg", tree, split=split)["image_id"] == expected != []
    shutil.copytree(tree / REASON_SEG / "val", tree / REASON_SEG / "test")
    assert (
        load("reason_seg", tree, split="test_long")["image_id"]
        == load("reason_seg", tree, split="val_long")["image_id"]
    )
    # What cannot be told is in both, where it raises: neither evaluates a row less without a word.
    for path in (tree / REASON_SEG / "test").glob("*.json"):
        path.write_text("{")
    for split in ("test_short", "test_long"):
        with pytest.raises(ValueError, match="expected a JSON file"):
            list(load("reason_seg", tree, split=split, streaming=True))


def test_equal_areas_are_painted_the_later_one_first():
    square = [[2, 2], [6, 2], [6, 6], [2, 6]]
    shapes = [{"label": "target", "points": square}, {"label": "Ignore", "points": square}]
    assert (paint_polygons(shapes, 9, 9) == 1).sum() == 25
    assert (paint_polygons(shapes[::-1], 9, 9) == 255).sum() == 25


def test_polygons_are_filled_as_by_the_opencv_of_the_original():
    rng = np.random.default_rng(0)
    digest = hashlib.sha1()
    for _ in range(200):
        height, width = rng.integers(20, 80, size=2).tolist()
        points = rng.integers(
            [-width // 4, -height // 4], [width * 5 // 4, height * 5 // 4], size=(rng.integers(1, 9), 2)
        )
        digest.update(fill_polygon(points.astype(np.int32), height, width).tobytes())
    # Recorded from cv2.polylines and cv2.fillPoly of opencv-python-headless 4.8.0.76.
    assert digest.hexdigest() == "a0b5baa2d47a23e751347bf2f7bcadeacb7e8c3e"


def test_a_changed_file_is_read_anew(load, tree):
    assert len(load("pascal_part", tree)) == 2
    path = tree / PASCAL_PART / "train.json"
    content = json.loads(path.read_text())
    content["annotations"] = [annotation for annotation in content["annotations"] if annotation["image_id"] == 1]
    path.write_text(json.dumps(content))
    assert len(load("pascal_part", tree)) == 1

    assert load("reason_seg", tree)[0]["explanation"] == "The stove keeps the food warm."
    (tree / REASON_SEG / "explanatory" / "train.json").unlink()
    assert load("reason_seg", tree)["explanation"] == [None] * 3


def test_an_unchanged_directory_is_prepared_once(load, tree, monkeypatch):
    first = load("reason_seg", tree)
    monkeypatch.chdir(tree.parent)
    assert load("reason_seg", "dataset").cache_files == first.cache_files


def test_annotations_are_parsed_once_per_machine(tmp_path, monkeypatch):
    calls = []
    read_records = PascalPart.read_records
    monkeypatch.setattr(PascalPart, "read_records", lambda *args: calls.append(args) or read_records(*args))

    def stream(_):
        rows = load_source("pascal_part", str(TREE), streaming=True, cache_dir=str(tmp_path))
        return [row["image_id"] for row in rows.decode(False)]

    # As ranks do that start together.
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(stream, range(8))] == [["1", "2"]] * 8
    assert len(calls) == 1
    load_source("pascal_part", str(TREE), cache_dir=str(tmp_path))
    assert len(calls) == 1


def test_what_a_worker_gets_does_not_grow_with_the_annotations(tmp_path):
    def gen_kwargs(num_scenes):
        builder = Shapes(num_train_scenes=num_scenes, cache_dir=str(tmp_path))
        train, _ = builder._split_generators(None)
        return pickle.dumps([builder, train.gen_kwargs])

    small, large = len(gen_kwargs(160)), len(gen_kwargs(100_000))
    assert large < small + 100  # Bytes.


def test_what_prepared_rows_take_does_not_grow_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MAX_BATCHES", 3)
    for num_scenes, expected in ((100, [100]), (400, [134, 134, 132])):
        rows = load_source("shapes", num_train_scenes=num_scenes, image_size=32, cache_dir=str(tmp_path))
        assert [len(batch) for batch in rows.data.to_batches()] == expected


def test_photos_are_measured_as_they_are_shown(load, tree):
    path = tree / REASON_SEG / "train" / "a_utf8.jpg"
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # A quarter turn to the right, as phones write it.
    PIL.Image.new("RGB", (80, 60)).save(path, exif=exif)
    row = load("reason_seg", tree)[0]
    assert row["image"].size == (60, 80) and row["targets"][0]["rle"]["size"] == [80, 60]


# Bad input


def test_an_unknown_source_or_split_lists_the_known_ones(load):
    with pytest.raises(ValueError, match=r"pascal_part, .*reason_seg.*got 'shape'. Did you mean 'shapes'\?"):
        load("shape")
    with pytest.raises(ValueError, match="'train', 'val'"):
        load("reason_seg", TREE, split="testing")


@pytest.mark.parametrize("options", [{"split": ["train"]}, {"builder": 3}, {"builder": "labelme", "images": 3}])
def test_an_option_that_is_no_text_is_named(load, options):
    ((option, value),) = ((option, value) for option, value in options.items() if not isinstance(value, str))
    with pytest.raises(ValueError, match=rf"source 'mine': expected {option} as .*, got {re.escape(repr(value))}\."):
        load("mine", TREE, **options)


def edit_mask(path, segmentation):
    edit_json(path, annotations=lambda old: [old[0] | {"segmentation": segmentation}, *old[1:]])


def edit_file_name(path, name):
    edit_json(path, images=lambda old: [old[0] | {"file_name": name}])


PASCAL_JSON = PASCAL_PART / "train.json"
A_JSON, A_JPG = REASON_SEG / "train" / "a_utf8.json", REASON_SEG / "train" / "a_utf8.jpg"
EXPLANATIONS = REASON_SEG / "explanatory" / "train.json"
BAD_FILES = [
    (A_JSON, lambda path: path.write_text("{"), "expected a JSON file"),
    (A_JSON, lambda path: path.write_bytes(b'{"text": "\x81\x8d"}'), "UTF-8 or cp1252"),
    (A_JSON, lambda path: path.write_text('{"text": []}'), "key 'shapes', which is missing"),
    (A_JSON, lambda path: path.unlink(), "has no annotation"),
    (A_JSON, lambda path: edit_json(path, text=lambda text: []), r"non-empty phrases.*got \[\]"),
    (A_JSON, lambda path: edit_json(path, shapes=lambda shapes: [shapes[0] | {"points": []}]), r"the points \[\]"),
    (A_JPG, lambda path: path.write_bytes(b""), "cannot be read"),
    (EXPLANATIONS, lambda path: path.write_text('[{"image": "a"}]'), "key 'outputs', which is missing"),
    (PASCAL_JSON, lambda path: path.write_text(path.read_text()[:200]), "expected a JSON file"),
    (PASCAL_JSON, lambda path: path.write_text("{}"), "key 'images', which is missing"),
    (PASCAL_JSON, lambda path: edit_json(path, categories=lambda old: [{"id": 1, "name": ""}]), "got ''"),
    (
        PASCAL_JSON,
        lambda path: edit_json(path, categories=lambda old: old[1:]),
        "image 1: expected a name for the category 1",
    ),
    (PASCAL_JSON, lambda path: edit_mask(path, {"size": [66, 50], "counts": [0, 3300]}), r"\[50, 66\].*\[66, 50\]"),
    (PASCAL_JSON, lambda path: edit_mask(path, {"size": [50, 66], "counts": [0, 33]}), "3300 pixels.*got 33"),
    (PASCAL_JSON, lambda path: edit_mask(path, {"size": [50, 66], "counts": "0d0"}), "3300 pixels.*got 20"),
    (PASCAL_JSON, lambda path: edit_file_name(path, "/etc/hostname"), "is outside"),
    (PASCAL_JSON, lambda path: edit_file_name(path, "../../secret.jpg"), "is outside"),
    (PASCAL_JSON, lambda path: edit_file_name(path, "a\\..\\..\\b.jpg"), "is outside"),
    (PASCAL_JSON, lambda path: edit_file_name(path, ""), "is outside"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("path", "damage", "message"), BAD_FILES)
def test_bad_files_give_one_line_that_names_them(load, tree, path, damage, message, streaming):
    damage(tree / path)
    with pytest.raises(ValueError, match=message) as error:
        list(load("pascal_part" if path == PASCAL_JSON else "reason_seg", tree, streaming=streaming))
    assert str(tree / path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("counts", [[0, 3300], "0TW3"], ids=["uncompressed", "compressed"])
def test_coco_masks_may_be_run_lengths(load, tree, counts):
    edit_mask(tree / PASCAL_JSON, {"size": [50, 66], "counts": counts})
    target = load("pascal_part", tree)[0]["targets"][0]
    assert decode_mask(target["rle"]).sum() == 3300


# The page of data sources


PAGE = (ROOT / "docs" / "data_sources.md").read_text()


@pytest.mark.parametrize("name", sorted(name for name, builder in data_scripts.SOURCES.items() if builder.LICENSE))
def test_the_page_has_what_the_builders_say(name):
    builder = data_scripts.SOURCES[name]
    _, _, section = PAGE.partition(f"\n### `{name}`\n")
    section, _, _ = section.partition("\n### ")
    description = inspect.getdoc(builder)
    for line in [builder.DOWNLOAD_PAGE, builder.LICENSE, *re.findall(r"\n {4,}(.*)", description)]:
        assert line.strip() in section
    for number in re.findall(r"\d{3,}", description):
        assert number in section


def test_example_of_a_new_source_works(load, tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(\"\"\"Boxes.*?)```", PAGE, re.DOTALL)
    assert example.count("\n") < 60
    (tmp_path / "my_builder.py").write_text(example)
    monkeypatch.chdir(tmp_path)

    photos = tmp_path / "dataset" / "boxes" / "photos"
    photos.mkdir(parents=True)
    PIL.Image.new("RGB", (60, 40)).save(photos / "a.jpg")
    lines = ["image,name,left,top,right,bottom", "a.jpg,the bottom left,0,20,30,40", "a.jpg,a dot,1,1,2,2"]
    (photos.parent / "boxes.csv").write_text("\n".join(lines))
    rows = load("mine", tmp_path / "dataset", builder="my_builder.py:Boxes")
    assert rows["source"] == ["boxes"] * 2
    expected = np.zeros((40, 60), dtype=np.uint8)
    expected[20:, :30] = 1
    (target,) = rows[0]["targets"]
    assert target["phrases"] == ["the bottom left"]
    np.testing.assert_array_equal(decode_mask(target["rle"]), expected)
    (photos / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"boxes.csv, line 2: The image .*a.jpg' cannot be read"):
        list(load("mine", tmp_path / "dataset", builder="my_builder.py:Boxes", streaming=True))
    with pytest.raises(ValueError, match="got 'Boxen'. It has Boxes"):
        load("mine", builder=str(tmp_path / "my_builder.py:Boxen"))
    with pytest.raises(FileNotFoundError, match="my_other.py', which does not exist"):
        load("mine", builder="my_other.py:Boxes")
    with pytest.raises(ValueError, match="got ''. It has Boxes"):
        load("mine", builder="my_builder.py")


OWN_BUILDER = """
from data_scripts.source import SourceBuilder

class Own(SourceBuilder):
    def annotation_files(self, data_dir):
        return []
    def read_records(self, data_dir):
        return {"train": [1]}
    def make_row(self, record):
        return ROW
"""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{}['phrase']", r"KeyError: 'phrase' \(.*own.py, line 10\)"),
        ("int('x'", r"can be imported, got '.*own.py' \(SyntaxError: .*line 10"),
    ],
)
def test_bugs_of_own_builders_say_where_they_are(load, tmp_path, row, message):
    (tmp_path / "own.py").write_text(OWN_BUILDER.replace("ROW", row))
    with pytest.raises(ValueError, match=message):
        load("mine", builder=str(tmp_path / "own.py:Own"))
    (report,) = check_source("mine", builder=str(tmp_path / "own.py:Own"), cache_dir=str(tmp_path / "cache")).errors
    assert re.search(message, report)
