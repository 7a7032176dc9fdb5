"""Items for display: they have all masks and questions of their row, and are found without reading the rows."""

import time

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from fixtures.sources import NAMES
from fixtures.tiny_models import image

from lisa_hf.data.masks import decode_mask, encode_mask
from lisa_hf.data.mixture import EvaluationDataset
from lisa_hf.data.rows import FEATURES, make_row
from lisa_hf.inference.data_items import DataItems


@pytest.fixture
def own_rows(tmp_path) -> Dataset:
    """A row with two masks, one of them for two phrases; a conversation; one without [SEG]; nothing; a lost image."""
    paths = [str(tmp_path / f"Photo_{number}.png") for number in range(5)]
    for path in paths[:4]:
        image(20, 30).save(path)
    masks = np.zeros((3, 20, 30), dtype=bool)
    masks[0, :, 5:], masks[1, 3, 3] = True, True
    first, pixel, empty = map(encode_mask, masks)
    question = {"role": "user", "content": "What is it? [SEG]?"}
    answers = ["The door [SEG], the wall [SEG] and the door again [SEG].", "There is none."]
    answers = [{"role": "assistant", "content": text, "reasoning_content": "Hm."} for text in answers]
    targets = [{"phrases": ["a door", "an exit"], "rle": first}, {"phrases": ["a wall"], "rle": pixel}]
    rows = [
        make_row(paths[0], "Photo_0", "own", "referring", targets=targets),
        make_row(
            paths[1],
            "Photo_1",
            "own",
            "conversation",
            targets=[{"rle": first}, {"rle": pixel}, {"rle": first}],
            messages=[question, answers[0], question, answers[1]],
        ),
        make_row(paths[2], "Photo_2", "own", "conversation", messages=[question, answers[1]]),
        make_row(paths[3], "Photo_3", "own", "referring", targets=[{"phrases": ["a ghost"], "rle": empty}]),
        make_row(paths[4], "Photo_4", "own", "referring", targets=targets),
    ]
    return Dataset.from_list(rows, features=FEATURES)


def test_an_item_shows_each_mask_once_and_all_questions(own_rows):
    items = DataItems({"own": own_rows}, {"own": EvaluationDataset(own_rows)})
    assert items.groups == ["own", "own (evaluation)"] and len(items) == 10
    for number in (0, 5):  # in training, and in evaluation
        item = items[number]
        assert len(item.pictures["Masks"]) == 2 and item.image.size == (30, 20)
        answers = {}
        for question, answer in zip(item.messages[::2], item.messages[1::2]):
            (phrase,) = (phrase for phrase in ("a door", "an exit", "a wall") if phrase in question.text)
            answers[phrase] = answer.mask_numbers
        assert answers["a door"] == answers["an exit"] != answers["a wall"]
        area = item.pictures["Masks"][answers["a wall"][0]].draw().sum()
        assert area == 1
    for number in (1, 6):
        item = items[number]
        assert [message.mask_numbers for message in item.messages] == [[], [0, 1, 0], [], []]
        assert [message.text for message in item.messages][::2] == ["What is it? [SEG]?"] * 2
        assert item.messages[1].reasoning == "Hm."


def test_items_are_found(own_rows):
    items = DataItems({"own": own_rows, "more": own_rows}, {"own": EvaluationDataset(own_rows.take(3))})
    assert items.find().tolist() == list(range(13))
    assert items.find(group="more").tolist() == [5, 6, 7, 8, 9]
    assert items.find(without_mask=True).tolist() == [2, 3, 7, 8, 12]
    assert items.find(image_id="photo_2").tolist() == [2, 7, 12]
    assert items.find(group="more", image_id="3", without_mask=True).tolist() == [8]
    assert items.find(image_id="no such").tolist() == []
    assert "row 2" in items[12].title[0] and "own (evaluation)" in items[12].title[0]


def test_an_image_that_is_lost_says_so(own_rows):
    item = DataItems({"own": own_rows}, {})[4]
    assert item.image is None and "No such file" in item.error and "Photo_4.png" in item.title[-1]


@pytest.mark.parametrize("name", NAMES)
def test_every_source_is_shown(load, name):
    rows = load(name)
    items = DataItems({name: rows}, {name: EvaluationDataset(rows)})
    without_mask = set(items.find(without_mask=True).tolist())
    for number in range(len(items)):
        item, row = items[number], rows[number % len(rows)]
        assert not item.error
        masks = [decode_mask(target["rle"]) for target in row["targets"]]
        shown = [mask.draw() for mask in item.pictures["Masks"]]
        if number < len(rows):  # evaluation may ask less
            assert np.array_equal(np.any(shown, axis=0), np.any(masks, axis=0))
        assert (number in without_mask) == (not np.any(masks))
        for message in item.messages:
            assert len(message.mask_numbers) == message.text.count("[SEG]") * (message.role == "assistant")
        assert [message.role for message in item.messages] == ["user", "assistant"] * (len(item.messages) // 2)


def test_100_000_rows_are_there_at_once(own_rows):
    rows = concatenate_datasets([concatenate_datasets([own_rows] * 200).flatten_indices()] * 100)
    start = time.monotonic()
    items = DataItems({"own": rows.select(range(10, 100_000))}, {"own": EvaluationDataset(rows)})
    assert len(items.find(without_mask=True)) == 40_000 - 4 + 40_000
    assert len(items.find(image_id="Photo_1")) == 40_000 - 2
    assert items[150_001].title[1] == "Image Photo_1"
    assert time.monotonic() - start < 5  # 0.3 s, and minutes if rows were read one by one
