"""The drawn scenes: reproducible, and everything that a row says about its picture is true."""

import re

import cv2
import numpy as np
import pytest
from datasets import Image

from data_scripts import load_source
from data_scripts.shapes import (
    COLORS,
    TASK_PROPORTIONS,
    WORDS,
    Item,
    draw_conversation,
    make_scene_row,
    referring_phrases,
)
from lisa_hf.data.masks import decode_mask


@pytest.fixture(scope="module")
def scenes():
    return [make_scene_row(0, "train", index, image_size=128) for index in range(400)]


def test_a_scene_depends_on_seed_split_and_index_alone(tmp_path, scenes):
    rows = {
        num_scenes: load_source(
            "shapes", num_train_scenes=num_scenes, num_validation_scenes=1, cache_dir=str(tmp_path)
        ).cast_column("image", Image(decode=False))
        for num_scenes in (17, 20)
    }
    assert rows[17].to_list() == rows[20].to_list()[:17] == scenes[:17]
    images = {
        make_scene_row(seed, split, index, 64)["image"]["bytes"]
        for seed in range(2)
        for split in ("train", "validation")
        for index in range(2)
    }
    assert len(images) == 8


def test_scene_tasks_are_in_proportion(scenes):
    shares = {task: np.mean([row["task"] == task for row in scenes]) for task in TASK_PROPORTIONS}
    assert shares == pytest.approx(TASK_PROPORTIONS, abs=0.08)


def test_scene_masks_show_what_their_phrases_say(scenes):
    checked = 0
    for row in scenes:
        if row["task"] != "semantic":
            continue
        image = cv2.imdecode(np.frombuffer(row["image"]["bytes"], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        masks = {target["phrases"][0]: decode_mask(target["rle"]) for target in row["targets"]}
        names = [phrase for phrase in masks if phrase.split()[0] in COLORS and not phrase.endswith(" object")]
        assert all(len(target["phrases"]) == 1 for target in row["targets"])
        for name in names:
            color, shape = name.split()
            assert shape in masks and f"{color} object" in masks
            mask = masks[name]
            inside = cv2.erode(mask, np.ones((3, 3), np.uint8)).astype(bool)
            mean = image[inside].mean(axis=0)
            nearest = min(COLORS, key=lambda name: np.abs(mean - COLORS[name]).sum())
            assert nearest == color, row["image_id"]
            assert mask.sum() >= 0.01 * mask.size
            checked += 1
    assert checked > 300


def test_reasoning_scenes_ask_for_a_part_of_what_is_there(scenes):
    rows = [row for row in scenes if row["task"] == "reasoning"]
    for row in rows:
        assert row["is_sentence"] and len(row["targets"]) == 1 and len(row["targets"][0]["phrases"]) == 3
        assert re.fullmatch(r"(It is|They are) the .+ because .+\.", row["explanation"])
    assert any(row["explanation"].startswith("They are") for row in rows)


def test_scene_texts_use_the_listed_words_only(scenes):
    texts = []
    for row in scenes:
        texts += [phrase for target in row["targets"] for phrase in target["phrases"]]
        texts += [row["explanation"] or "", *(message["content"] for message in row["messages"])]
    found = {word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)}
    assert found <= set(WORDS)
    assert len(WORDS) < 200


def item(color, shape, x, y, radius=0.15):
    side = int(radius * 100)
    return Item(color, shape, x, y, radius, turn=0.0, mask=np.ones((side, side), dtype=bool))


def test_referring_phrases_are_unambiguous():
    left, right = item("red", "circle", 0.2, 0.5), item("red", "circle", 0.8, 0.52, radius=0.2)
    star = item("blue", "star", 0.5, 0.51)
    found = referring_phrases([left, right, star])
    assert len(found) == len({phrase for phrase, _ in found})
    nouns = ("red circle", "circle", "red object")
    expected = {f"{noun} left of the blue star": left for noun in nouns}
    # The two red circles cannot serve as an anchor, and nothing lies clearly above anything.
    assert dict(found) == expected | {f"{noun} right of the blue star": right for noun in nouns}


def test_places_that_hardly_differ_decide_nothing():
    pair = [item("red", "circle", 0.45, 0.5), item("blue", "circle", 0.5, 0.5)]
    assert referring_phrases(pair) == []
    # Farther up than to the left: "left of" would be disputed.
    slanted = [item("red", "circle", 0.3, 0.1), item("red", "square", 0.9, 0.5), item("blue", "star", 0.5, 0.8)]
    assert "red object left of the blue star" not in dict(referring_phrases(slanted))


def test_conversations_tell_the_truth():
    items = [item("red", "circle", 0.2, 0.2), item("blue", "circle", 0.8, 0.2), item("blue", "square", 0.5, 0.8)]
    answers = {}
    for seed in range(300):
        messages = draw_conversation(np.random.default_rng(seed), items)
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2
        answers |= {messages[turn]["content"]: messages[turn + 1]["content"] for turn in (0, 2)}
    assert answers["How many circles are there?"] == "There are two circles."
    assert answers["How many squares are there?"] == "There is one square."
    assert answers["How many stars are there?"] == "There are no stars."
    assert answers["What colour is the square?"] == "The square is blue."
    assert answers["What shape is the red object?"] == "The red object is a circle."
    assert answers["Is there a blue square?"] == "Yes, there is a blue square."
    for question, answer in answers.items():
        assert "the circle" not in question and "the blue object" not in question
        if question.startswith("Is there") and answer.startswith("Yes"):
            assert question[len("Is there a ") : -1] in {"red circle", "blue circle", "blue square"}


@pytest.mark.parametrize("kwargs", [{"image_size": 16}, {"num_train_scenes": 0}])
def test_impossible_scenes_are_refused(kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))}.*{next(iter(kwargs.values()))}"):
        load_source("shapes", **kwargs)
