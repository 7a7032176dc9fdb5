"""The sources on label maps, COCO annotations, refs and conversations: parity with the original, and bad input."""

import io
import json
import logging
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import Image
from datasets.distributed import split_dataset_by_node
from fixtures.paths import REAL_SAMPLES, TREE
from fixtures.sources import FALSE_PREMISES, NAMES, REFERRING, SEMANTIC, edit_json, keep_first, measure
from torch.utils.data import DataLoader

from data_scripts import SOURCES, load_source, load_sources
from data_scripts.label_maps import encode_labels
from data_scripts.paco_lvis import category_phrases
from lisa_hf.data.masks import Mask, decode_mask, encode_mask, merge_masks
from lisa_hf.data.mixture import EvaluationDataset
from lisa_hf.data.prompts import evaluation_questions, sample_questions
from lisa_hf.data.rows import FEATURES


REFER_SEG = TREE / "refer_seg"
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. "
)


def by_path(rows):
    return {str(Path(row["image"]["path"]).relative_to(TREE)): row for row in rows}


def text(message):
    return message["content"][-1]["text"]


def digest(mask):
    """What the golden data say of a mask, too: without its sum, because the original's are 2 in places."""
    return tuple(measure(mask).values())[::2]


def recorded_digests(masks):
    return {(mask["area"], mask["sha1_binary_uint8"]) for mask in masks}


# The original loaders


@pytest.fixture(params=[*(f"sem_seg/{name}" for name in SEMANTIC), *(f"refer_seg/{name}" for name in REFERRING)])
def recorded_rows(request, golden, load):
    """Pairs of a row and what was recorded of its image."""
    recorded = golden[request.param]["images"]
    rows = by_path(load(Path(request.param).name, TREE))
    assert rows.keys() == recorded.keys()
    if request.param == "sem_seg/mapillary":
        # Mended: the pixels of the second class that is called "car" were excluded of its mask.
        (car,) = recorded["mapillary/training/images/m1.jpg"]["phrases"]["car"]
        assert car["area"] == 0
        label_map = np.asarray(PIL.Image.open(TREE / "mapillary/training/v2.0/labels/m1.png"))
        car.update(measure(label_map == 6), area=int((label_map == 6).sum()))
        assert car["area"] > 0
    return [(row, recorded[path]) for path, row in rows.items()]


def test_phrases_and_masks_equal_the_original(recorded_rows):
    for row, recorded in recorded_rows:
        found = {}
        for target in row["targets"]:
            mask = decode_mask(target["rle"])
            assert list(mask.shape) == recorded["label_shape"] and mask.max() <= 1
            for phrase in target["phrases"]:
                found.setdefault(phrase, set()).add(digest(mask))
        assert found == {phrase: recorded_digests(masks) for phrase, masks in recorded["phrases"].items()}


def test_questions_and_answers_equal_the_original(recorded_rows):
    for row, recorded in recorded_rows:
        masks, answers = {}, set()
        for seed in range(200):
            questions = sample_questions(row, np.random.default_rng(seed), merge_instances=False)
            assert [len(questions)] == recorded["conversation_counts"] == recorded["mask_counts"]
            for question in questions:
                masks.setdefault(f"<image>\n{text(question.messages[0])}", set()).add(digest(question.masks[0].draw()))
                answers.add(f"{text(question.messages[1])}</s>")
        assert sorted(answers) == sorted(recorded["answers"])
        expected = {
            question: recorded_digests(recorded["phrases"][phrase])
            for phrase, questions in recorded["questions"].items()
            for question in questions
        }
        assert masks == expected


@pytest.mark.parametrize(
    ("name", "image_id", "phrase"),
    [("refcoco", "1", "dog"), ("refclef", "112", "the house"), ("grefcoco", "1", "person and dog")],
)
def test_overlapping_parts_are_one_mask(load, golden, name, image_id, phrase):
    images = golden[f"refer_seg/{name}"]["images"].values()
    (mask,) = [masks[0] for image in images for key, masks in image["phrases"].items() if key == phrase]
    assert mask["max"] == 2 and mask["sum"] > mask["area"]
    (row,) = [row for row in load(name, TREE) if row["image_id"] == image_id]
    (target,) = [target for target in row["targets"] if phrase in target["phrases"]]
    assert decode_mask(target["rle"]).max() == 1 and decode_mask(target["rle"]).sum() == mask["area"]


def test_a_class_is_all_of_its_instances(load, golden):
    row = load("paco_lvis", TREE)[0]
    one_by_one = golden["sem_seg/paco_lvis"]["images"]["coco/train2017/000000000001.jpg"]["phrases"]["mug"]
    (union,) = [q.masks[0] for q in evaluation_questions(row) if " What is mug in " in text(q.messages[0])]
    assert len(one_by_one) == 2
    mugs = [target["rle"] for target in row["targets"] if target["phrases"] == ["mug"]]
    assert union == merge_masks([Mask.from_rle(rle) for rle in mugs])
    assert union.draw().sum() > max(mask["area"] for mask in one_by_one)


@pytest.mark.parametrize(
    ("name", "labels", "unnamed"),
    [("ade20k", "ade20k/annotations/training", {0}), ("cocostuff", "cocostuff/train2017", {95, 101, 255})],
)
def test_pixels_without_a_named_class_are_ignored(load, name, labels, unnamed):
    # The original trains on them as background.
    for row in load(name, TREE):
        label_map = np.asarray(PIL.Image.open(TREE / labels / f"{row['image_id']}.png"))
        np.testing.assert_array_equal(decode_mask(row["ignore"]) == 1, np.isin(label_map, list(unnamed)))
        assert (sum(decode_mask(target["rle"]) for target in row["targets"]) + decode_mask(row["ignore"]) == 1).all()


@pytest.mark.parametrize("key", ["refcoco|unc|val", "refcoco|unc|testA", "refcoco+|unc|testB", "refcocog|umd|test"])
def test_refer_evaluation_equals_the_original(load, golden, key):
    name, _, split = key.split("|")
    recorded = golden["val"][key]["items"]
    rows = by_path(load(name, TREE, split=split))
    assert rows.keys() == recorded.keys() and len(rows) == golden["val"][key]["len"]
    for path, row in rows.items():
        questions = evaluation_questions(row, merge_instances=False)
        conversations = [
            f"{SYSTEM}USER: <image>\n{text(question.messages[0])} ASSISTANT: {text(question.messages[1])}</s>"
            for question in questions
        ]
        assert conversations == recorded[path]["conversations"]
        found = [digest(question.masks[0].draw()) for question in questions]
        assert found == [(mask["area"], mask["sha1_binary_uint8"]) for mask in recorded[path]["masks"]]


def test_refer_evaluation_asks_for_every_expression_of_every_ref(load, tree):
    # In real data, too, two refs of an image may share an expression, and one ref may have an expression twice.
    refs = read_pickle(tree / "refer_seg/refcoco/refs(unc).p")
    for index, ref in enumerate(refs[:2]):
        ref["split"] = "val"
        ref["sentences"] = [{"sent": sent} for sent in (("left one", "dog"), ("dog", "dog"))[index]]
    write_pickle(tree / "refer_seg/refcoco/refs(unc).p", refs)
    rows = load("refcoco", tree, split="val")
    (row,) = [row for row in rows if row["image_id"] == "1"]
    person, dog, nobody = [Mask.from_rle(target["rle"]) for target in row["targets"]]
    questions = evaluation_questions(row, merge_instances=False)
    assert [question.masks for question in questions] == [[person], [person], [dog], [dog], [nobody]]
    assert len(EvaluationDataset(rows, merge_instances=False)[0]["questions"]) == 5
    # Merged is another score: one question per text, for all that it names.
    assert [q.masks for q in evaluation_questions(row)] == [[person], [merge_masks([person, dog])], [nobody]]


def test_conversations_equal_the_original(load, golden):
    recorded = golden["vqa/llava_instruct_150k"]["images"]
    rows = by_path(load("llava_instruct", TREE))
    assert rows.keys() == recorded.keys()
    for path, row in rows.items():
        (question,) = sample_questions(row, np.random.default_rng(0))
        turns = [f"USER: {text(user)} ASSISTANT: {text(answer)}</s>" for user, answer in pairs(question.messages)]
        turns[0] = turns[0].replace("USER: ", "USER: <image>\n", 1)
        assert [SYSTEM + "".join(turns)] == recorded[path]["conversations"]
        assert question.messages[0]["content"][0] == {"type": "image"} and not question.masks


def pairs(turns):
    return zip(turns[::2], turns[1::2], strict=True)


@pytest.mark.parametrize(
    ("category", "phrases"),
    [
        ("mouse_(computer_equipment)", ["mouse"]),
        ("trash_can", ["trash_can"]),
        ("tape_(sticky_cloth_or_paper):roll", ["tape roll", "the roll of the tape"]),
        ("trash_can:lid_(top)", ["trash_can lid", "the lid of the trash_can"]),
    ],
)
def test_category_phrases(category, phrases):
    assert category_phrases(category) == phrases


def test_labels_are_encoded_as_masks_one_by_one():
    rng = np.random.default_rng(0)
    for size in ((1, 1), (1, 7), (7, 1), (6, 5), (40, 30)):
        for num_labels in (1, 2, 9):
            labels = rng.integers(-2, num_labels - 2, size=size).astype(np.int16)
            rles = encode_labels(labels)
            assert list(rles) == np.unique(labels).tolist()
            assert all(rle == encode_mask(labels == value) for value, rle in rles.items())


# All sources alike


EVERY_SOURCE = [(name, {}) for name in (*NAMES, "reason_seg", "pascal_part")]
EVERY_SOURCE += [("shapes", {"num_train_scenes": 20, "num_validation_scenes": 3})]


@pytest.mark.parametrize(("name", "options"), EVERY_SOURCE)
def test_streamed_rows_are_the_prepared_rows(load, name, options):
    prepared, streamed = load(name, TREE, **options), load(name, TREE, streaming=True, **options)
    rows = list(prepared)
    assert rows == list(streamed) and len(rows) > 0
    assert {row["source"] for row in rows} == {name}
    decoded = prepared.cast_column("image", Image())
    assert decoded.features == load_source(name, TREE, streaming=True, **options).features == FEATURES
    for row in decoded:
        assert all(target["rle"]["size"] == [row["image"].height, row["image"].width] for target in row["targets"])


@pytest.mark.parametrize(("name", "options"), EVERY_SOURCE)
def test_streams_divide_among_ranks_and_workers(load, name, options):
    stream = load(name, TREE, streaming=True, **options)
    expected = sorted(row["image_id"] for row in stream)
    parts = [split_dataset_by_node(stream, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(row["image_id"] for part in parts for row in part) == expected
    assert sorted(DataLoader(stream, batch_size=1, num_workers=2, collate_fn=keep_first)) == expected


def test_every_split_of_the_refs_is_there(load):
    refs = read_pickle(REFER_SEG / "refcoco" / "refs(unc).p")
    counts = {}
    for split in ("train", "val", "testA", "testB", "test"):
        rows = load("refcoco", TREE, split=split)
        counts[split] = sum(len(row["targets"]) for row in rows)
        labels = {"testA": ("testA", "testAB"), "testB": ("testAB",), "test": ("testA", "testAB")}.get(split, (split,))
        expressions = [s["sent"] for ref in refs if ref["split"] in labels for s in ref["sentences"]]
        assert sorted(p for row in rows for t in row["targets"] for p in t["phrases"]) == sorted(expressions)
    assert counts == {"train": 4, "val": 3, "testA": 2, "testB": 1, "test": 2}


def test_the_refs_of_another_split_may_be_named(load, tree):
    refs = read_pickle(tree / "refer_seg/refcocog/refs(umd).p")
    write_pickle(tree / "refer_seg/refcocog/refs(google).p", [ref | {"split": "val"} for ref in refs])
    found = {ref["image_id"] for ref in refs}
    assert {int(i) for i in load("refcocog", tree, split="val", split_by="google")["image_id"]} == found
    assert {int(i) for i in load("refcocog", tree, split="val")["image_id"]} < found
    with pytest.raises(FileNotFoundError, match=r"refs\(berkeley\).p"):
        load("refcocog", tree, split_by="berkeley")


def test_ade20k_has_a_validation_split(load, tree):
    with pytest.raises(ValueError, match="validation"):
        load("ade20k", tree, split="validation")
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        directory = tree / "ade20k" / kind / "validation"
        directory.mkdir()
        shutil.copy(tree / "ade20k" / kind / f"training/ADE_train_00000001.{suffix}", directory / f"v1.{suffix}")
    assert load("ade20k", tree, split="validation")["image_id"] == ["v1"]
    assert len(load("ade20k", tree)) == 2


def test_label_maps_may_have_a_palette(load, tree):
    path = tree / "mapillary/training/v2.0/labels/m0.png"
    expected = list(load("mapillary", tree))
    image = PIL.Image.open(path)
    image.load()
    image.putpalette([value for gray in range(256) for value in (255 - gray, gray, 0)])
    image.save(path)
    assert PIL.Image.open(path).mode == "P"
    assert list(load("mapillary", tree)) == expected


def test_a_gif_among_the_photos_is_read(load, tree):
    # As 19579.jpg of refCLEF.
    path = tree / "refer_seg/images/saiapr_tc-12/112.jpg"
    PIL.Image.open(path).save(path, format="GIF")
    item = EvaluationDataset(load("refclef", tree))[0]
    assert item["image"].mode == "RGB" and item["image"].size == (48, 36)


# Training without the photos that are evaluated on


def read_pickle(path):
    return pickle.loads(path.read_bytes())


def write_pickle(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def hold_out(tree, **image_ids):
    """Writes refs whose val and test splits show these images, in place of those that are there."""
    for name, path in (("refcoco", "refs(unc).p"), ("refcoco+", "refs(unc).p"), ("refcocog", "refs(umd).p")):
        (tree / "refer_seg" / name / path).unlink()
    (tree / "refer_seg/grefcoco/grefs(unc).json").unlink()
    sentence = {"sent": "it", "sent_id": 0}
    refs = [
        {"ref_id": image_id, "image_id": image_id, "ann_id": {1: 11, 2: 21, 3: 31}[image_id], "split": split}
        | {"sentences": [sentence]}
        for split, ids in image_ids.items()
        for image_id in ids
    ]
    write_pickle(tree / "refer_seg/refcoco/refs(unc).p", refs)


@pytest.mark.parametrize(
    ("name", "kept", "count"),
    [
        ("cocostuff", ["000000000002"], "excluded 2 of 3"),
        ("paco_lvis", ["2"], "excluded 1 of 2"),
        ("llava_instruct", ["000000000002"], "excluded 2 of 3"),
        ("refcoco", ["2"], "excluded 1 of 2"),
        ("refclef", ["112", "113"], "excluded 0 of 2"),
    ],
)
def test_photos_of_refer_val_and_test_splits_can_be_left_out(load, tree, caplog, name, kept, count):
    hold_out(tree, train=[1, 2], val=[3], testA=[1])
    everything = load(name, tree)["image_id"]
    assert len(everything) > len(kept) or name == "refclef"
    caplog.set_level(logging.INFO)
    for _ in range(2):  # The second time from the cache: every training is told.
        caplog.clear()
        assert load(name, tree, exclude_refer_val=True)["image_id"] == kept
        assert f"{name}: {count}" in caplog.text and "split of refcoco shows" in caplog.text
    assert [row["image_id"] for row in load(name, tree, exclude_refer_val=True, streaming=True)] == kept
    # The refs decide the rows, too; evaluation keeps what training leaves out.
    refs = tree / "refer_seg/refcoco/refs(unc).p"
    write_pickle(refs, [ref | {"split": "train"} for ref in read_pickle(refs)])
    assert len(load(name, tree, exclude_refer_val=True)) >= len(everything)


def test_evaluation_splits_keep_the_photos_that_training_leaves_out(load, tree):
    hold_out(tree, train=[1, 2], val=[3], testA=[1])
    for split, expected in (("val", ["3"]), ("testA", ["1"])):
        assert load("refcoco", tree, split=split, exclude_refer_val=True)["image_id"] == expected


def test_a_recipe_leaves_them_out_of_all_its_sources(tree, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    hold_out(tree, train=[1, 2], val=[3], testA=[1])
    cache = {"cache_dir": str(tmp_path / "cache")}
    sources = {
        "cocostuff": {"weight": 9},
        "ade20k": {"weight": 9},
        "refcoco": {},
        "all_talk": {"builder": "llava_instruct", "exclude_refer_val": False},
    }
    sources = {name: options | cache for name, options in sources.items()}
    loaded = load_sources(sources, str(tree), exclude_refer_val=True)
    assert {name: len(rows) for name, rows in loaded.items()} == {
        "cocostuff": 1,
        "ade20k": 2,
        "refcoco": 1,
        "all_talk": 3,
    }
    assert "does not change these sources, which have no COCO photos: ade20k." in caplog.text
    assert re.findall(r"(\w+): excluded (\d) of (\d)", caplog.text) == [("cocostuff", "2", "3"), ("refcoco", "1", "2")]


def test_all_refer_sources_hold_photos_out(load, tree):
    with pytest.raises(ValueError, match="CocoStuff: expected records .*excluded 3 of 3 .*refcoco, .*, grefcoco"):
        load("cocostuff", tree, exclude_refer_val=True)
    shutil.rmtree(tree / "refer_seg")
    with pytest.raises(FileNotFoundError, match=r"exclude_refer_val: expected refcoco/refs\(unc\).p or "):
        load("cocostuff", tree, exclude_refer_val=True)


# Bad input


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_cannot_run_code(load, tree, protocol):
    path = tree / "refer_seg/refcoco/refs(unc).p"
    write_pickle(path, [Payload(tree / "owned")], protocol)
    with pytest.raises(ValueError, match="expected a pickle of plain dicts.*asks to import") as error:
        load("refcoco", tree)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tree / "owned").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_of_any_age_are_read(load, tree, protocol):
    path = tree / "refer_seg/refcoco/refs(unc).p"
    expected = load("refcoco", TREE)["targets"]
    write_pickle(path, read_pickle(path), protocol)
    assert load("refcoco", tree)["targets"] == expected


def test_pickles_of_python_2_are_read(load, tree):
    # As cPickle of Python 2 wrote them: byte strings, protocol 0.
    path = tree / "refer_seg/refclef/refs(unc).p"
    path.write_bytes(
        b"(lp1\n(dp2\nS'ref_id'\nI7\nsS'ann_id'\nI1\nsS'image_id'\nI112\nsS'split'\nS'train'\n"
        b"sS'sentences'\n(lp3\n(dp4\nS'sent'\nVcaf\\u00e9\nsS'raw'\nS'caf\\xc3\\xa9'\nsasa."
    )
    assert load("refclef", tree)[0]["targets"][0]["phrases"] == ["café"]


@pytest.mark.parametrize("name", [*NAMES, "reason_seg", "pascal_part"])
def test_missing_data_names_what_was_looked_for_and_where_it_is(load, tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"^[^\n]*{tmp_path}/\w+[^\n]*http[^\n]*\n(?s:.*)<data_dir>"):
        load(name, tmp_path)
    with pytest.raises(ValueError, match="expected `data_dir`"):
        load_source(name)


def edit_refs(path, **changes):
    refs = read_pickle(path)
    write_pickle(path, [refs[0] | changes, *refs[1:]])


def edit_image(path, **changes):
    edit_json(path, images=lambda old: [old[0] | changes, *old[1:]])


def edit_annotation(path, **changes):
    edit_json(path, annotations=lambda old: [old[0] | changes, *old[1:]])


def edit_category(path, **changes):
    edit_json(path, categories=lambda old: [old[0] | changes, *old[1:]])


def edit_mask(path, **rle):
    edit_annotation(path, segmentation=[rle] if "refclef" in str(path) else rle)


def save_png(path, array):
    PIL.Image.fromarray(array).save(path)


def edit_first(path, **changes):
    records = json.loads(path.read_text())
    path.write_text(json.dumps([records[0] | changes, *records[1:]]))


def png_of(size):
    buffer = io.BytesIO()
    PIL.Image.new("L", size).save(buffer, "PNG")
    return buffer.getvalue()


ADE_PNG = "ade20k/annotations/training/ADE_train_00000001.png"
STUFF_PNG = "cocostuff/train2017/000000000001.png"
VISTAS_PNG, VISTAS_CONFIG = "mapillary/training/v2.0/labels/m0.png", "mapillary/config_v2.0.json"
PACO_JSON = "vlpart/paco/annotations/paco_lvis_v1_train.json"
REFS, INSTANCES = "refer_seg/refcoco/refs(unc).p", "refer_seg/refcoco/instances.json"
GREFS = "refer_seg/grefcoco/grefs(unc).json"
CLEF_INSTANCES = "refer_seg/refclef/instances.json"
LLAVA = "llava_dataset/llava_instruct_150k.json"
BAD_FILES = [
    ("ade20k", ADE_PNG, lambda path: path.write_bytes(b""), "got an unreadable file"),
    ("ade20k", ADE_PNG, lambda path: path.write_bytes(png_of((90, 90))[:50]), "got an unreadable file"),
    ("ade20k", ADE_PNG, lambda path: save_png(path, np.full((40, 60), 151, np.uint8)), r"below 151.* got \[151\]"),
    ("ade20k", ADE_PNG, lambda path: save_png(path, np.ones((40, 60), np.uint16)), "8 bits.*got the mode I"),
    ("ade20k", ADE_PNG, lambda path: save_png(path, np.ones((40, 60, 3), np.uint8)), "8 bits.*got the mode RGB"),
    ("cocostuff", STUFF_PNG, lambda path: save_png(path, np.full((48, 64), 182, np.uint8)), r"182.*got \[182\]"),
    ("mapillary", VISTAS_PNG, lambda path: save_png(path, np.full((45, 70), 9, np.uint8)), r"below 8.*got \[9\]"),
    ("mapillary", VISTAS_CONFIG, lambda path: path.write_text("{"), "expected a JSON file"),
    ("mapillary", VISTAS_CONFIG, lambda path: path.write_text("{}"), "key 'labels', which is missing"),
    ("mapillary", VISTAS_CONFIG, lambda path: path.write_text('{"labels": [{}]}'), "key 'readable', which is missing"),
    ("mapillary", VISTAS_CONFIG, lambda path: path.write_text('{"labels": [{"readable": null}]}'), "NoneType"),
    ("paco_lvis", PACO_JSON, lambda path: path.write_text(path.read_text()[:100]), "expected a JSON file"),
    ("paco_lvis", PACO_JSON, lambda path: edit_json(path, categories=lambda old: [{"id": 1}]), "category 1, got none"),
    ("paco_lvis", PACO_JSON, lambda path: edit_json(path, categories=lambda old: old[1:]), "category 1, got none"),
    ("paco_lvis", PACO_JSON, lambda path: edit_category(path, name="a:"), "'a:'"),
    ("paco_lvis", PACO_JSON, lambda path: edit_category(path, name="_(a)"), "non-empty phrases"),
    ("paco_lvis", PACO_JSON, lambda path: edit_mask(path, size=[1, 1], counts="1"), r"\[48, 64\].*\[1, 1\]"),
    ("paco_lvis", PACO_JSON, lambda path: edit_image(path, file_name="../../secret.jpg"), "is outside"),
    ("paco_lvis", PACO_JSON, lambda path: edit_json(path, annotations=lambda old: []), "expected records"),
    ("refcoco", REFS, lambda path: path.write_bytes(b""), "expected a pickle"),
    ("refcoco", REFS, lambda path: path.write_bytes(path.read_bytes()[:100]), "expected a pickle"),
    ("refcoco", REFS, lambda path: write_pickle(path, 5), "not iterable"),
    ("refcoco", REFS, lambda path: write_pickle(path, [5]), "not subscriptable"),
    ("refcoco", REFS, lambda path: write_pickle(path, [{"ref_id": 1}]), "key 'image_id', which is missing"),
    ("refcoco", REFS, lambda path: edit_refs(path, sentences=[]), r"non-empty phrases for target 0, got \[\]"),
    ("refcoco", REFS, lambda path: edit_refs(path, sentences=[{"sent": " "}]), "non-empty phrases"),
    ("refcoco", REFS, lambda path: edit_refs(path, ann_id=99), "Ref 1 needs the annotation 99, which .*lacks"),
    ("refcoco", REFS, lambda path: edit_refs(path, image_id=99), "Ref 1 needs the image 99, which .*lacks"),
    ("refcoco", INSTANCES, lambda path: path.write_text("[]"), "indices must be integers"),
    ("refcoco", INSTANCES, lambda path: edit_image(path, file_name="/etc/hostname"), "is outside"),
    ("refcoco", INSTANCES, lambda path: edit_annotation(path, segmentation=[[1, 2, 3]]), r"got \[3\] numbers"),
    ("grefcoco", GREFS, lambda path: edit_first(path, ann_id=[-1, 11]), "needs the annotation -1, which"),
    ("refclef", CLEF_INSTANCES, lambda path: edit_image(path, height=48, width=36), r"\[48, 36\].*\[36, 48\]"),
    ("refclef", CLEF_INSTANCES, lambda path: edit_mask(path, size=[36, 48], counts="0d0"), "1728 pixels.*got 20"),
    ("llava_instruct", LLAVA, lambda path: path.write_bytes(b'["\x81\x8d"]'), "UTF-8 or cp1252"),
    ("llava_instruct", LLAVA, lambda path: path.write_text("[]"), "expected records"),
    ("llava_instruct", LLAVA, lambda path: edit_first(path, image="../secret.jpg"), "record 0.*is outside"),
    ("llava_instruct", LLAVA, lambda path: edit_first(path, conversations=[]), "got 0 targets and 0 messages"),
    ("llava_instruct", LLAVA, lambda path: edit_first(path, conversations=[{"from": "tool", "value": ""}]), "'tool'"),
    ("llava_instruct", LLAVA, lambda path: edit_first(path, conversations=[{"from": "human", "value": "?"}]), "pairs"),
]  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "path", "damage", "message"), BAD_FILES)
def test_bad_files_give_one_line_that_names_them(load, tree, name, path, damage, message, streaming):
    damage(tree / path)
    with pytest.raises(ValueError, match=message) as error:
        list(load(name, tree, streaming=streaming))
    where = "" if message == "expected records" else path
    assert str(tree / where) in str(error.value)
    assert "\n" not in str(error.value)


# Real annotations


REAL_ROWS = [
    ("ade20k", {"train": 1}),
    ("cocostuff", {"train": 2}),
    ("mapillary", {"train": 3}),
    ("paco_lvis", {"train": 2}),
    ("pascal_part", {"train": 16}),
    ("refcoco", {"train": 2, "val": 1, "testA": 1, "test": 1}),
    ("refcoco+", {"train": 2, "val": 1, "testA": 1, "test": 1}),
    ("refcocog", {"train": 2, "val": 1, "test": 1}),
    ("refclef", {"train": 1}),
    ("grefcoco", {"train": 2, "val": 1}),
    ("llava_instruct", {"train": 3}),
    ("reason_seg", {"train": 1, "val": 4}),
]


NOT_THERE = ("the referee in yellow", "a bicycle")


@pytest.mark.skipif(not REAL_SAMPLES.is_dir(), reason="the real samples are not here (LISA_REAL_SAMPLES)")
@pytest.mark.parametrize(("name", "num_rows"), REAL_ROWS)
def test_real_samples_open_and_their_masks_decode(load, name, num_rows):
    for split, expected in num_rows.items():
        rows = load(name, REAL_SAMPLES, split=split)
        assert len(rows) == expected
        for row in rows:
            path = Path(row["image"]["path"])
            if path.name == "000000033471.jpg":
                continue  # A published conversation, whose photo is not here.
            size = np.asarray(PIL.Image.open(path)).shape[:2]
            assert row["ignore"] is None or decode_mask(row["ignore"]).shape == size
            for target in row["targets"]:
                mask = decode_mask(target["rle"])
                assert mask.shape == size
                assert mask.any() or (name == "grefcoco" and target["phrases"][0] in NOT_THERE)


def test_all_sources_are_tested():
    published = {name for name, builder in SOURCES.items() if builder.DOWNLOAD_PAGE}
    elsewhere = {*FALSE_PREMISES, "muse", "lisa_plus"}  # test_benchmark_sources.py, test_multi_target_sources.py
    assert {name for name, _ in REAL_ROWS} == published - elsewhere
