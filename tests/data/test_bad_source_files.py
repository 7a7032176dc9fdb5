"""Damaged, hostile and missing files of the sources give one line that names them."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from fixtures.paths import TREE
from fixtures.sources import NAMES, edit_json, read_pickle, write_pickle

from data_scripts import load_source


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
