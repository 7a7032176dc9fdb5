"""Rows, questions and masks of the sources equal those of the original loaders."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from fixtures.paths import TREE
from fixtures.sources import REFERRING, SEMANTIC, measure, pairs, read_pickle, write_pickle

from data_scripts.label_maps import encode_labels
from data_scripts.paco_lvis import category_phrases
from lisa_hf.data.masks import Mask, decode_mask, encode_mask, merge_masks
from lisa_hf.data.mixture import EvaluationDataset
from lisa_hf.data.prompts import evaluation_questions, sample_questions


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


@pytest.fixture(params=[*(f"sem_seg/{name}" for name in SEMANTIC), *(f"refer_seg/{name}" for name in REFERRING)])
def recorded_rows(request, golden, load):
    """Pairs of a row and what was recorded of its image."""
    recorded = golden[request.param]["images"]
    rows = by_path(load(Path(request.param).name, TREE))
    assert rows.keys() == recorded.keys()
    if request.param == "sem_seg/mapillary":
        # Fixed: the pixels of the second class that is called "car" were excluded of its mask.
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
