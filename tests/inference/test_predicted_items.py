"""Predictions for display: worst first with the truth; and the answers of predict.py."""

import json

import numpy as np
import pytest
from datasets import Dataset
from fixtures.tiny_models import image

from lisa_hf.data.masks import encode_mask
from lisa_hf.data.mixture import EvaluationDataset
from lisa_hf.data.rows import FEATURES, make_row
from lisa_hf.evaluation.benchmarks import score_predictions
from lisa_hf.evaluation.predictions import read_predictions
from lisa_hf.inference.predicted_items import EvaluatedItems, Evaluation, LabeledItems


def columns(*numbers) -> np.ndarray:
    """Return a mask of some of four columns."""
    mask = np.zeros((3, 4), dtype=bool)
    mask[:, numbers] = True
    return mask


def rle(mask: np.ndarray) -> dict:
    found = encode_mask(mask)
    return {"size": found["size"], "counts": found["counts"].decode()}


@pytest.fixture
def dataset(tmp_path) -> EvaluationDataset:
    """An image with two phrases, a conversation whose second turn has two masks, an image with a phrase of nothing."""
    for number in range(3):
        image(3, 4, seed=number).save(tmp_path / f"{number}.png")
    left, right, nothing = (encode_mask(columns(*numbers)) for numbers in ((0, 1), (2, 3), ()))
    turns = [("What?", "A [SEG]."), ("And?", "B [SEG] and C [SEG]."), ("More?", "No.")]
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]
    rows = [
        make_row(
            str(tmp_path / "0.png"),
            "first",
            "own",
            "referring",
            targets=[{"phrases": ["left"], "rle": left}, {"phrases": ["right"], "rle": right}],
            ignore=encode_mask(columns(3)),
        ),
        make_row(
            str(tmp_path / "1.png"),
            "second",
            "own",
            "conversation",
            targets=[{"rle": left}, {"rle": left}, {"rle": right}],
            messages=messages,
        ),
        make_row(
            str(tmp_path / "2.png"), "third", "own", "referring", targets=[{"phrases": ["a ghost"], "rle": nothing}]
        ),
    ]
    return EvaluationDataset(Dataset.from_list(rows, features=FEATURES))


@pytest.fixture
def items(dataset, tmp_path) -> EvaluatedItems:
    answers = {
        "first_0": ("It is [SEG].", [columns(0, 1)]),
        "first_1": ("It is [SEG].", [columns(1, 2)]),
        "second_0": ("", [columns(2, 3)]),
        "second_1": ("B [SEG], C [SEG] & D [SEG].", [columns(0, 1), columns(2), columns(0)]),
        "second_2": ("No.", []),
        "third_0": ("Sure, [SEG].", [columns(3)]),
    }
    lines = [
        json.dumps({"question_id": name, "text": text, "masks": list(map(rle, masks))})
        for name, (text, masks) in answers.items()
    ]
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n".join(lines))
    predictions = read_predictions(path, dataset)
    _, scores = score_predictions(dataset, predictions, ["generated"])
    return EvaluatedItems({"own": Evaluation(dataset, predictions, scores["generated"], "generated")})


def test_the_worst_come_first(items):
    shown = [items[number].title[:2] for number in items.find()]
    assert shown == [
        ["IoU 0.000 (generated)", "own, question second_0"],
        ["IoU 0.000 (generated)", "own, question third_0"],
        ["IoU 0.333 (generated)", "own, question first_1"],
        ["IoU 0.750 (generated)", "own, question second_1"],
        ["IoU 1.000 (generated)", "own, question first_0"],
        ["IoU 1.000 (generated)", "own, question second_2"],
    ]
    assert items.find(image_id="FIRST").tolist() == [1, 0]
    assert items.find(without_mask=True).tolist() == [5, 4]
    assert items.find(group="own").tolist() == items.find().tolist() and len(items) == 6


def test_truth_and_prediction_are_beside_each_other(items):
    item = items[3]
    assert [
        np.array_equal(mask.draw(), columns(*numbers))
        for mask, numbers in zip(item.pictures["Truth"], [(0, 1), (2, 3)])
    ] == [True, True]
    assert [int(mask.draw().sum()) for mask in item.pictures["Prediction"]] == [6, 3, 3]
    assert [(message.title, message.text, message.mask_numbers) for message in item.messages] == [
        ("", "What?", []),
        ("", "A [SEG].", []),
        ("", "And?", []),
        ("Truth", "B [SEG] and C [SEG].", [0, 1]),
        ("Prediction", "B [SEG], C [SEG] & D [SEG].", [0, 1, 2]),
    ]
    assert items[0].ignore is not None and items[0].image.size == (4, 3)
    assert [message.title for message in items[2].messages] == ["", "Truth"]  # masks of another program


def test_answers_of_predict(tmp_path):
    image(3, 4).save(tmp_path / "a.png")
    record = {"image": "a.png", "height": 3, "width": 4, "label": "", "scores": [0.5]}
    records = [
        record | {"question": "What?", "text": "A [SEG].", "masks": [rle(columns(1))]},
        record | {"question": "Which?", "text": "A [SEG].", "masks": [rle(columns())]},
        {"image": "more/b.png", "question": "What?", "error": "expected an image"},
    ]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    paths = {"a.png": str(tmp_path / "a.png"), "more/b.png": str(tmp_path / "b.png")}
    (tmp_path / "settings.json").write_text(json.dumps({"images": paths}))
    items = LabeledItems(tmp_path)
    assert items.groups == ["What?", "Which?"]
    assert items.find("What?").tolist() == [0, 2] and items.find(image_id="MORE/").tolist() == [2]
    assert items.find(without_mask=True).tolist() == [1, 2]
    assert np.array_equal(items[0].pictures["Prediction"][0].draw(), columns(1))
    assert [message.text for message in items[0].messages] == ["What?", "A [SEG]."]
    assert "No such file" in items[2].error
