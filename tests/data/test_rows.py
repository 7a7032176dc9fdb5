"""The row format and its checks."""

import json

import datasets
import numpy as np
import pytest

from lisa_hf.data.masks import encode_mask
from lisa_hf.data.rows import FEATURES, make_row


def rle_of(height=4, width=5):
    return encode_mask(np.ones((height, width), dtype=bool))


def test_rows_survive_arrow():
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    rows = [
        make_row("a.jpg", "a", "here", "semantic", targets=[{"phrases": ["dog", "the dog"], "rle": rle_of()}]),
        make_row(
            "b.jpg",
            "b",
            "here",
            "reasoning",
            targets=[{"phrases": ["Who barks?"], "rle": rle_of()}],
            ignore=rle_of(),
            is_sentence=True,
            explanation="Dogs bark.",
        ),
        make_row(b"png", "c", "here", "vqa", messages=messages),
    ]
    dataset = datasets.Dataset.from_list(rows, features=FEATURES)
    assert dataset.cast_column("image", datasets.Image(decode=False)).to_list() == rows
    assert rows[0]["image"] == {"path": "a.jpg", "bytes": None} and rows[2]["image"] == {"path": None, "bytes": b"png"}
    assert rows[0]["ignore"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "detection"}, "'detection'"),
        ({"task": "semantic"}, "0 targets"),
        ({"task": "vqa"}, "0 messages"),
        ({"task": "vqa", "targets": [{"phrases": ["dog"], "rle": rle_of()}]}, "1 targets"),
        ({"task": "semantic", "targets": [{"phrases": [], "rle": rle_of()}]}, r"target 0, got \[\]"),
        ({"task": "semantic", "targets": [{"phrases": "dog", "rle": rle_of()}]}, "got 'dog'"),
        ({"task": "semantic", "targets": [{"phrases": [" "], "rle": rle_of()}]}, "non-empty phrases"),
        (
            {"task": "semantic", "targets": [{"phrases": ["dog"], "rle": rle_of()}], "ignore": rle_of(5, 4)},
            r"\(4, 5\), \(5, 4\)",
        ),
        ({"task": "vqa", "messages": [{"role": "assistant", "content": "Hm."}]}, r"roles \['assistant'\]"),
        ({"task": "vqa", "messages": [{"role": "user", "content": "Hm?"}]}, r"roles \['user'\]"),
    ],
)
def test_make_row_refuses_and_names_the_row(arguments, message):
    with pytest.raises(ValueError, match=f"Row 'img7' of 'here'.*{message}"):
        make_row("a.jpg", "img7", "here", **arguments)


def test_halves_of_characters_are_replaced():
    """JSON can spell them, but no file and no tokenizer takes them."""
    half, whole = json.loads('"\\ud83d"'), json.loads('"\\ud83d\\ude00"')
    messages = [{"role": "user", "content": f"{half}?"}, {"role": "assistant", "content": f"{whole} \x00"}]
    row = make_row("a.jpg", "a", "here", "vqa", messages=messages)
    assert [message["content"] for message in row["messages"]] == ["\ufffd?", "\U0001f600 \x00"]
    target = {"phrases": [f"{half} red", "[SEG] red"], "rle": rle_of()}
    row = make_row("a.jpg", "a", "here", "reasoning", targets=[target], explanation=half)
    assert row["targets"][0]["phrases"] == ["\ufffd red", "[SEG] red"] and row["explanation"] == "\ufffd"
