"""Bad data, one case at a time: read anyway, skipped and counted, or one clear error that names the file.

Every source here has 120 records, of which the first is damaged: a share that may be skipped. Records are bad for the
builder, which reads the annotations, or for the mixture, which opens the images; both obey `on_bad_row`.
"""

import io
import json
import logging
import pickle
import re
import shutil
import tracemalloc
import zlib

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets.distributed import split_dataset_by_node

from data_scripts import load_source
from data_scripts.coco import read_refs
from data_scripts.source import SourceBuilder
from lisa_hf.data.mixture import MixtureDataset
from lisa_hf.data.rows import make_row


NUM_RECORDS = 120
HEIGHT, WIDTH = 8, 12
SQUARE = [2, 1, 6, 1, 6, 5, 2, 5]
RLE = {"size": [HEIGHT, WIDTH], "counts": [0, 8, 88]}


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """All sources in LISA's directory layout, without a fault."""
    root = tmp_path_factory.mktemp("complete")
    jpeg, png = io.BytesIO(), io.BytesIO()
    PIL.Image.new("RGB", (WIDTH, HEIGHT), "teal").save(jpeg, "JPEG")
    PIL.Image.fromarray(np.full((HEIGHT, WIDTH), 4, np.uint8)).save(png, "PNG")
    shape = {"label": "target", "points": [SQUARE[:2], SQUARE[2:4], SQUARE[4:6]]}
    annotation = json.dumps({"shapes": [shape], "text": ["the corner"], "is_sentence": False})
    for index in range(NUM_RECORDS):
        name = f"{index:012d}"
        for directory in (ADE_JPG, COCO_JPG, REFER_JPG, REASON):
            write(root / directory / f"{name}.jpg", jpeg.getvalue())
        write(root / ADE_PNG / f"{name}.png", png.getvalue())
        write(root / REASON / f"{name}.json", annotation.encode())
    write_json(root / EXPLANATIONS, [{"image": FIRST + ".jpg", "outputs": "It is a corner."}])
    images = [
        {"id": index, "file_name": f"{index:012d}.jpg", "height": HEIGHT, "width": WIDTH}
        for index in range(NUM_RECORDS)
    ]
    annotations = [
        {"id": index, "image_id": index, "category_id": 1 + (index > 0), "segmentation": [SQUARE]}
        for index in range(NUM_RECORDS)
    ]
    categories = [{"id": 1, "name": "mug"}, {"id": 2, "name": "mug:handle"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(root / INSTANCES, content)
    paco_images = [image | {"file_name": f"train2017/{image['file_name']}"} for image in images]
    write_json(root / PACO, content | {"images": paco_images})
    refs = [
        {"ref_id": index, "image_id": index, "ann_id": index, "split": "train", "sentences": [{"sent": "it"}]}
        for index in range(NUM_RECORDS)
    ]
    write(root / REFS, pickle.dumps(refs))
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A mug."}]
    write_json(root / LLAVA, [{"image": image["file_name"], "conversations": turns} for image in images])
    return root


ADE_JPG, ADE_PNG = "ade20k/images/training", "ade20k/annotations/training"
COCO_JPG, REFER_JPG = "coco/train2017", "refer_seg/images/mscoco/images/train2014"
REASON, EXPLANATIONS = "reason_seg/ReasonSeg/train", "reason_seg/ReasonSeg/explanatory/train.json"
PACO, LLAVA = "vlpart/paco/annotations/paco_lvis_v1_train.json", "llava_dataset/llava_instruct_150k.json"
REFS, INSTANCES = "refer_seg/refcoco/refs(unc).p", "refer_seg/refcoco/instances.json"
FIRST = "0" * 12
DIRECTORIES = {
    "ade20k": ["ade20k"],
    "paco_lvis": ["vlpart", "coco"],
    "refcoco": ["refer_seg"],
    "reason_seg": ["reason_seg"],
    "llava_instruct": ["llava_dataset", "coco"],
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_json(path, content):
    write(path, json.dumps(content).encode())


def save(mode="RGB", array=None, size=(WIDTH, HEIGHT), **options):
    """Damage: another image in place of the file."""

    def damage(path):
        image = PIL.Image.new(mode, size, 4) if array is None else PIL.Image.fromarray(array)
        if mode == "P":
            image.putpalette([value for gray in range(256) for value in (255 - gray, gray, 0)])
        image.save(path, **options)

    return damage


def turn(path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (HEIGHT, WIDTH)).save(path, exif=exif)


def claim_huge(path):
    """A PNG whose header claims 60000 x 60000 pixels."""
    buffer = io.BytesIO()
    PIL.Image.new("L", (1, 1)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = (60000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(bytes(content))


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def change(key, **changes):
    """Damage: the first entry of a list in a JSON file has these values, or lacks those that are None."""

    def damage(path):
        content = json.loads(path.read_text())
        entries = content[key] if key else content
        entries[0] = {name: value for name, value in (entries[0] | changes).items() if value is not None}
        write_json(path, content)

    return damage


def change_ref(**changes):
    def damage(path):
        refs = pickle.loads(path.read_bytes())
        refs[0] |= changes
        path.write_bytes(pickle.dumps(refs))

    return damage


def label_of(path):
    return path.parents[2] / "annotations" / "training" / f"{path.stem}.png"


def mask(segmentation):
    return change("annotations", segmentation=segmentation)


class Payload:
    def __reduce__(self):
        return print, ("owned",)


A_PNG, A_JPG = f"{ADE_PNG}/{FIRST}.png", f"{ADE_JPG}/{FIRST}.jpg"
R_JPG, R_JSON = f"{REASON}/{FIRST}.jpg", f"{REASON}/{FIRST}.json"
P_JPG, V_JPG = f"{COCO_JPG}/{FIRST}.jpg", f"{COCO_JPG}/{FIRST}.jpg"

READ = [
    ("palette_label", "ade20k", A_PNG, save("P")),
    ("cmyk_photo", "ade20k", A_JPG, save("CMYK", size=(WIDTH, HEIGHT), format="JPEG")),
    ("gray_photo", "ade20k", A_JPG, save("L")),
    ("palette_photo", "ade20k", A_JPG, save("P", format="PNG")),
    ("photo_with_alpha", "ade20k", A_JPG, save("RGBA", format="PNG")),
    ("rotated_photo", "ade20k", A_JPG, turn),
    ("rotated_photo_of_polygons", "reason_seg", R_JPG, turn),
    ("cp1252_json", "reason_seg", R_JSON, lambda path: path.write_bytes(
        path.read_bytes().replace(b"the corner", "the café".encode("cp1252")))),
    ("json_with_byte_order_mark", "reason_seg", R_JSON, lambda path: path.write_bytes(
        b"\xef\xbb\xbf" + path.read_bytes())),
    ("no_explanations", "reason_seg", EXPLANATIONS, remove),
    ("uncompressed_counts", "paco_lvis", PACO, mask(RLE)),
    ("compressed_counts", "paco_lvis", PACO, mask(RLE | {"counts": "08h2"})),
    ("polygon_partly_outside", "paco_lvis", PACO, mask([[-5, -5, 6, -5, 6, 5, -5, 5]])),
]  # fmt: skip


SKIPPED = [
    ("truncated_photo", "ade20k", A_JPG, cut, "expected an image that can be read"),
    ("truncated_photo_of_polygons", "reason_seg", R_JPG, cut, "image .* cannot be read.*Download it again"),
    ("empty_photo", "ade20k", A_JPG, empty, "expected an image that can be read"),
    ("photo_that_is_text", "ade20k", A_JPG, lambda path: path.write_text("<html>"), "expected an image that can be"),
    ("decompression_bomb", "ade20k", A_JPG, claim_huge, "at most 179 megapixels, got .*decompression bomb"),
    ("missing_photo", "paco_lvis", P_JPG, remove, "expected an image that can be read.*Restore the file or remove"),
    ("missing_photo_of_talk", "llava_instruct", V_JPG, remove, "expected an image that can be read"),
    ("empty_label", "ade20k", A_PNG, empty, "expected a label map.*Download it again"),
    ("truncated_label", "ade20k", A_PNG, cut, "expected a label map"),
    ("photo_of_another_size", "ade20k", A_JPG, save(size=(5, 4)), r"image's size \[4, 5\].*\[8, 12\].*Restore"),
    ("label_of_another_size", "ade20k", A_JPG, lambda path: save("L", size=(5, 4))(label_of(path)),
     r"image's size \[8, 12\].*\[4, 5\].*Restore"),
    ("16_bit_label", "ade20k", A_PNG, save(array=np.full((HEIGHT, WIDTH), 4, np.uint16)), "8 bits.*mode I;16"),
    ("label_in_color", "ade20k", A_PNG, save("RGB"), "one channel.*mode RGB"),
    ("unknown_label", "ade20k", A_PNG, save(array=np.full((HEIGHT, WIDTH), 200, np.uint8)), r"below 151.*\[200\]"),
    ("category_without_name", "paco_lvis", PACO, change("categories", name=None), "name for the category 1, got none"),
    ("category_with_empty_name", "paco_lvis", PACO, change("categories", name=" "), "non-empty phrases"),
    ("unknown_category", "paco_lvis", PACO, change("annotations", category_id=9), "name for the category 9, got none"),
    ("unknown_image", "paco_lvis", PACO, change("annotations", image_id=999), "image 999: expected an entry in `"),
    ("polygon_outside", "paco_lvis", PACO, mask([[50, 50, 60, 50, 60, 60]]), "12 x 8 pixels.*another image"),
    ("polygon_of_nan", "paco_lvis", PACO, mask([[float("nan"), 1, 5, 1, 5, 5]]), "12 x 8 pixels.*nan"),
    ("rle_of_another_size", "paco_lvis", PACO, mask(RLE | {"size": [WIDTH, HEIGHT]}), r"\[8, 12\].*\[12, 8\]"),
    ("counts_too_short", "paco_lvis", PACO, mask(RLE | {"counts": [0, 8]}), "96 pixels.*got 8"),
    ("compressed_counts_too_short", "paco_lvis", PACO, mask(RLE | {"counts": "08"}), "96 pixels.*got 8"),
    ("path_out_of_the_directory", "paco_lvis", PACO, change("images", file_name="../../a.jpg"), "without '..'"),
    ("absolute_path", "paco_lvis", PACO, change("images", file_name="/etc/hostname"), "relative path"),
    ("path_of_windows", "llava_instruct", LLAVA, change("", image="..\\a.jpg"), "relative path"),
    ("ref_without_sentences", "refcoco", REFS, change_ref(sentences=[]), r"non-empty phrases.*got \[\]"),
    ("ref_with_empty_sentence", "refcoco", REFS, change_ref(sentences=[{"sent": ""}]), "non-empty phrases"),
    ("ref_without_annotation", "refcoco", REFS, change_ref(ann_id=999), "Ref 0 needs the annotation 999.*Download"),
    ("ref_without_image", "refcoco", REFS, change_ref(image_id=999), "Ref 0 needs the image 999"),
    ("talk_without_answer", "llava_instruct", LLAVA, change("", conversations=[{"from": "human", "value": "?"}]),
     "pairs of user and assistant"),
    ("talk_without_image", "llava_instruct", LLAVA, change("", image=None), "record 0: expected the key 'image'"),
    ("question_without_shapes", "reason_seg", R_JSON, lambda path: path.write_text("{}"), "the key 'shapes'"),
    ("truncated_json_of_a_photo", "reason_seg", R_JSON, cut, "expected a JSON file"),
    ("photo_without_json", "reason_seg", R_JSON, remove, "has no annotation.*Download it, or remove the image"),
]  # fmt: skip


STOPPED = [
    ("pickle_that_imports", "refcoco", REFS, lambda path: path.write_bytes(pickle.dumps([Payload()])),
     "asks to import builtins.print.*only from a source that you trust"),
    ("truncated_pickle", "refcoco", REFS, cut, "expected a pickle.*Download it again"),
    ("truncated_json", "paco_lvis", PACO, cut, "expected a JSON file.*Download it again"),
    ("json_in_no_encoding", "llava_instruct", LLAVA, lambda path: path.write_bytes(b'["\x81\x8d"]'), "UTF-8"),
    ("json_without_images", "paco_lvis", PACO, lambda path: path.write_text("{}"), "key 'images', which is missing"),
    ("empty_split", "llava_instruct", LLAVA, lambda path: path.write_text("[]"), "expected records"),
    ("empty_directory", "ade20k", ADE_PNG, lambda path: [*map(remove, path.iterdir())], "expected records"),
    ("missing_file", "llava_instruct", LLAVA, remove, "which does not exist.*arrange it as in docs/data_sources.md"),
]  # fmt: skip


def test_a_pickle_cannot_claim_more_memory_than_it_has_bytes(tmp_path):
    (tmp_path / "refs(unc).p").write_bytes(b"\x80\x02]r\xff\xff\xff\x00.")  # a list, number 2**24 - 1 of its memo
    tracemalloc.start()
    assert read_refs(str(tmp_path / "refs(unc).p")) == []
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def cases(table):
    return [pytest.param(*case, id=name) for name, *case in table]


@pytest.fixture
def damaged(complete, tmp_path):
    """Gives a copy of a source after a damage, which a test may damage further."""

    def copy(name, path, damage):
        for directory in DIRECTORIES[name]:
            shutil.copytree(complete / directory, tmp_path / "dataset" / directory)
        damage(tmp_path / "dataset" / path)
        return tmp_path / "dataset"

    return copy


def use(name, tree, on_bad_row, streaming=False):
    """Prepares a source, and draws items of its first two rows: gives the number of rows and of skipped records."""
    options = {"cache_dir": str(tree / "cache"), "on_bad_row": on_bad_row}
    rows = load_source(name, str(tree), streaming=streaming, **options)
    if streaming:
        return len(list(rows.decode(False)))
    mixture = MixtureDataset({name: rows.select(range(2))}, length=16, on_bad_row=on_bad_row)
    items = [*mixture]
    assert all(m.draw().any() for item in items for question in item["questions"] for m in question.masks)
    return len(rows), NUM_RECORDS - len(rows) + sum(item["num_skipped"] for item in items)


@pytest.mark.parametrize(("name", "path", "damage"), cases(READ))
def test_what_can_be_read_is_read(damaged, name, path, damage):
    tree = damaged(name, path, damage)
    if damage is turn and name == "ade20k":
        assert PIL.Image.open(tree / A_JPG).size == PIL.Image.open(tree / A_PNG).size[::-1]  # Shown, they are equal.
    for on_bad_row in ("skip", "raise"):
        assert use(name, tree, on_bad_row) == (NUM_RECORDS, 0)


@pytest.mark.parametrize(("name", "path", "damage", "message"), cases(SKIPPED))
def test_a_bad_record_is_skipped_and_counted_or_raises(damaged, caplog, name, path, damage, message):
    tree = damaged(name, path, damage)
    with pytest.raises(ValueError, match=message) as error:
        use(name, tree, "raise")
    assert path in str(error.value) and "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        num_rows, num_skipped = use(name, tree, "skip")
    assert num_skipped >= 1
    assert re.search(f"Skipped: .*{re.escape(path)}", caplog.text) and re.search(message, caplog.text)
    if num_rows < NUM_RECORDS:
        assert num_rows == NUM_RECORDS - 1 and "skipped 1 bad records of the split 'train'" in caplog.text
    assert use(name, tree, "skip", streaming=True) == num_rows


@pytest.mark.parametrize("on_bad_row", ["skip", "raise"])
@pytest.mark.parametrize(("name", "path", "damage", "message"), cases(STOPPED))
def test_a_file_that_is_bad_as_a_whole_always_raises(damaged, name, path, damage, message, on_bad_row):
    tree = damaged(name, path, damage)
    for streaming in (False, True):
        with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}") as error:
            use(name, tree, on_bad_row, streaming)
        assert str(tree) in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_more_bad_records_than_one_in_a_hundred_always_raise(damaged, streaming):
    tree = damaged("reason_seg", R_JSON, remove)
    assert use("reason_seg", tree, "skip", streaming) in (NUM_RECORDS - 1, (NUM_RECORDS - 1, 1))
    for index in range(NUM_RECORDS - 3, NUM_RECORDS):
        last = tree / REASON / f"{index:012d}.json"
        last.unlink()
    message = f"at most 1% of bad records, or 3, got at least 4 of 120 in the split 'train'.*{last}"
    with pytest.raises(ValueError, match=message):
        use("reason_seg", tree, "skip", streaming)


class Numbers(SourceBuilder):
    """Numbers of which every so many-th is bad."""

    period = 0

    def annotation_files(self, data_dir):
        return []

    def read_records(self, data_dir):
        return {"train": range(16 * 200)}

    def make_row(self, number):
        if number % self.period == 0:
            raise ValueError(f"{number} is bad")
        target = {"phrases": [str(number)], "rle": {"size": [1, 1], "counts": b"01"}}
        return make_row("", str(number), "numbers", "semantic", [target])


@pytest.mark.parametrize(
    ("num_records", "num_bad", "fits"), [(20, 1, True), (20, 3, True), (20, 4, False), (4, 1, False)]
)
def test_a_few_bad_records_leave_a_small_source(tmp_path, monkeypatch, num_records, num_bad, fits):
    monkeypatch.setattr(Numbers, "read_records", lambda self, data_dir: {"train": range(num_records)})
    monkeypatch.setattr(Numbers, "period", num_records // num_bad + (num_records % num_bad > 0))
    builder = Numbers(str(tmp_path), on_bad_row="skip", cache_dir=str(tmp_path))
    if fits:
        builder.download_and_prepare()
        assert len(builder.as_dataset("train")) == num_records - num_bad
    else:
        with pytest.raises(datasets.exceptions.DatasetGenerationError) as error:
            builder.download_and_prepare()
        assert "at most 1% of bad records, or 3" in str(error.value.__cause__)


@pytest.mark.parametrize("num_readers", [1, 16])
def test_a_reader_of_a_part_of_a_stream_judges_its_part(tmp_path, monkeypatch, num_readers):
    def read():
        for reader in range(num_readers):
            rows = Numbers(str(tmp_path), on_bad_row="skip", cache_dir=str(tmp_path)).as_streaming_dataset("train")
            list(split_dataset_by_node(rows.decode(False), reader, num_readers, "shards"))

    monkeypatch.setattr(Numbers, "period", 200)  # One in each shard.
    read()
    monkeypatch.setattr(Numbers, "period", 20)  # A reader of one shard meets 10, far from one in a hundred of all.
    with pytest.raises(ValueError, match=r"got at least \d+ of (200|3200) in the split 'train'"):
        read()


def test_rows_that_were_prepared_with_skips_say_so_when_they_are_opened_again(damaged, caplog):
    tree = damaged("reason_seg", R_JSON, remove)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            load_source("reason_seg", str(tree), cache_dir=str(tree / "cache"), on_bad_row="skip")
        assert "reason_seg: skipped 1 bad records of the split 'train'." in caplog.text


def test_a_second_epoch_of_a_stream_counts_no_record_twice(damaged):
    tree = damaged("reason_seg", R_JSON, remove)
    options = {"cache_dir": str(tree / "cache"), "on_bad_row": "skip", "streaming": True}
    rows = load_source("reason_seg", str(tree), **options).decode(False)
    assert [len(list(rows)) for _ in range(3)] == [NUM_RECORDS - 1] * 3


def test_what_was_prepared_without_skipping_is_used(damaged, caplog):
    tree = damaged("reason_seg", EXPLANATIONS, remove)
    files = [
        load_source("reason_seg", str(tree), cache_dir=str(tree / "cache"), on_bad_row=on_bad_row).cache_files
        for on_bad_row in ("raise", "skip")
    ]
    assert files[0] == files[1]
