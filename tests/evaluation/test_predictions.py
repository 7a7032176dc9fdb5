"""Prediction files: which question a line is about, what a mask may be, and what is rejected."""

import json

import numpy as np
import PIL.Image
import pytest
from fixtures.scored import evaluation_dataset
from pycocotools import mask as coco_mask

from lisa_hf.data.masks import encode_mask
from lisa_hf.data.mixture import EvaluationDataset
from lisa_hf.evaluation.predictions import export_questions, find_predictions, read_predictions


TARGETS = [np.eye(4, 6, dtype=bool), np.ones((4, 6), dtype=bool)]


def rle(pixels: np.ndarray) -> dict:
    found = encode_mask(pixels)
    return {"size": found["size"], "counts": found["counts"].decode()}


def runs(pixels: np.ndarray) -> dict:
    """Uncompressed RLE."""
    flat = pixels.flatten(order="F").astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return {"size": list(pixels.shape), "counts": np.diff(np.concatenate([[0], edges])).tolist()}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def areas(predictions) -> dict[str, list[int]]:
    return {name: [int(mask.draw().sum()) for mask in found.masks] for name, found in predictions.items()}


@pytest.mark.parametrize(
    "keys",
    [
        {"question_id": "1_0"},
        {"image_id": "1"},
        {"image_id": "1", "question": "the red one"},
        {"image_id": 1, "question": "What is the red one in this image? Please output segmentation mask."},
    ],
)
@pytest.mark.parametrize("form", [rle, runs, "png"])
def test_a_line_names_its_question_and_its_mask(keys, form, tmp_path):
    mask = np.arange(24).reshape(4, 6) < 5
    if form == "png":
        PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
        given = "mask.png"
    else:
        given = form(mask)
    path = write(tmp_path / "a.jsonl", {"question_id": "0_0", "masks": []}, keys | {"masks": [given]})
    dataset = evaluation_dataset(TARGETS)
    assert areas(read_predictions(path, dataset)) == {"0_0": [], "1_0": [5]}
    (found,) = read_predictions(path, dataset)["1_0"].masks
    assert np.array_equal(found.draw(), mask)


def test_runs_are_those_of_pycocotools():
    for target in TARGETS:
        assert np.array_equal(coco_mask.decode(coco_mask.frPyObjects(runs(target), 4, 6)), target)


def test_a_directory_of_masks(tmp_path):
    for name, target in zip(("0_0", "1"), TARGETS):
        PIL.Image.fromarray(target.astype(np.uint8) * 255).save(tmp_path / f"{name}.png")
    assert areas(read_predictions(tmp_path, evaluation_dataset(TARGETS))) == {"0_0": [4], "1_0": [24]}
    assert find_predictions(tmp_path.parent, tmp_path.name) == tmp_path
    assert find_predictions(tmp_path, "other") == tmp_path


BOTH = [{"question_id": "0_0", "masks": []}, {"question_id": "1_0", "masks": []}]


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (BOTH[:1], r"a prediction for each of 2 questions, got none for 1, such as 1_0.*--missing_as_empty"),
        ([*BOTH, BOTH[0]], "line 3: expected one prediction per question, got a second one for 0_0"),
        ([BOTH[0], {"question_id": "1_0"}], "line 2: expected `masks`"),
        ([BOTH[0], BOTH[1] | {"masks": [rle(np.ones((6, 4), dtype=bool))]}], "4 x 6 pixels.*got one of 6 x 4"),
        ([BOTH[0], BOTH[1] | {"masks": [{"size": [4, 6], "counts": "zz"}]}], "line 2: expected.*counts"),
        ([BOTH[0], BOTH[1] | {"masks": [{"size": [4, 6], "counts": [30]}]}], "line 2: expected RLE counts of 24"),
        ([BOTH[0], BOTH[1] | {"masks": [{"size": [4, 6], "counts": [-6, 30]}]}], "line 2: expected RLE counts"),
        ([BOTH[0], BOTH[1] | {"masks": [{"size": [4, 6], "counts": [[24]]}]}], "line 2: "),
        ([BOTH[0], BOTH[1] | {"masks": [{"size": "x", "counts": [24]}]}], "line 2: expected a mask as RLE"),
        ([BOTH[0], BOTH[1] | {"masks": [3]}], "line 2: expected a mask as RLE or as path"),
        ([BOTH[0], BOTH[1] | {"masks": ["none.png"]}], "line 2: .*none.png"),
        ([BOTH[0], BOTH[1] | {"masks": "x"}], "line 2: expected an object with a list of `masks`"),
        ([BOTH[0], 3], "line 2: expected an object"),
        ([BOTH[0], {"question_id": ["1_0"], "masks": []}], "got none for 1, such as 1_0"),
        ([BOTH[0] | {"teacher_forced_masks": []}, BOTH[1]], "`teacher_forced_masks` for all questions or none"),
    ],
)
def test_what_is_refused(lines, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        read_predictions(write(tmp_path / "a.jsonl", *lines), evaluation_dataset(TARGETS))


def test_other_files_are_refused(tmp_path):
    for content in (b"{", b"\xff\xfe\x00", b"[" * 100_000):
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match="expected"):
            read_predictions(tmp_path / "a.jsonl", evaluation_dataset(TARGETS))
    with pytest.raises(ValueError, match="expected a JSON Lines file"):
        read_predictions(tmp_path / "b.jsonl", evaluation_dataset(TARGETS))


def test_a_png_file_without_content_is_refused(tmp_path):
    PIL.Image.new("L", (6, 4)).save(tmp_path / "0_0.png")
    content = (tmp_path / "0_0.png").read_bytes()
    for broken in (b"", content[:-20], content.replace(b"IDAT", b"IDAX")):
        (tmp_path / "0_0.png").write_bytes(broken)
        with pytest.raises(ValueError, match="0_0.png: "):
            read_predictions(tmp_path, evaluation_dataset(TARGETS[:1]))


def test_missing_and_extra_predictions_are_said(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", BOTH[0], {"question_id": "9_0", "masks": []})
    assert areas(read_predictions(path, evaluation_dataset(TARGETS), missing_as_empty=True)) == {"0_0": [], "1_0": []}
    assert "1 of 2 predictions match no question of this benchmark" in caplog.text
    assert "1 of 2 questions have no prediction, and count as answered without a mask" in caplog.text


def test_one_file_for_several_benchmarks(tmp_path):
    """Photos of COCO are in several benchmarks, whose questions then have the same ids."""
    full, empty = [rle(np.ones((4, 6), dtype=bool))], []
    lines = [
        {"benchmark": benchmark, "question_id": f"{number}_0", "masks": masks}
        for benchmark, masks in (("one", full), ("two", empty))
        for number in range(2)
    ]
    path = write(tmp_path / "a.jsonl", *lines)
    dataset = evaluation_dataset(TARGETS)
    assert areas(read_predictions(path, dataset, benchmark="one")) == {"0_0": [24], "1_0": [24]}
    assert areas(read_predictions(path, dataset, benchmark="two")) == {"0_0": [], "1_0": []}
    with pytest.raises(ValueError, match=r"got none for 2, such as 0_0. 4 are for other benchmarks \(one, two\)"):
        read_predictions(path, dataset, benchmark="three")


def test_answers_to_another_question_are_said(tmp_path, caplog):
    questions = [" the red one ", "the blue one"]
    path = write(tmp_path / "a.jsonl", *[line | {"question": text} for line, text in zip(BOTH, questions)])
    read_predictions(path, evaluation_dataset(TARGETS))
    assert "1 of 2 predictions name another question" in caplog.text and "1_0 with 'the blue one'" in caplog.text


def test_letters_with_accents_in_either_form(tmp_path):
    dataset = evaluation_dataset(TARGETS[:1], phrases=["caf\u00e9"])
    path = write(tmp_path / "a.jsonl", {"image_id": "0", "question": "cafe\u0301", "masks": []})
    assert areas(read_predictions(path, dataset)) == {"0_0": []}
    rows = dataset.rows.map(lambda row: {"image_id": "caf\u00e9"})
    dataset = EvaluationDataset(rows, merge_instances=False)
    PIL.Image.new("L", (6, 4), 1).save(tmp_path / "cafe\u0301.png")
    assert areas(read_predictions(tmp_path, dataset)) == {"caf\u00e9_0": [24]}


def test_a_name_that_two_objects_share_names_neither(tmp_path):
    dataset = evaluation_dataset(TARGETS[:1], phrases=["cup", "cup"])
    path = write(tmp_path / "a.jsonl", {"image_id": "0", "question": "cup", "masks": []})
    with pytest.raises(ValueError, match="got none for 2"):
        read_predictions(path, dataset)


def test_exported_questions_name_what_can_be_answered(tmp_path):
    dataset = evaluation_dataset(TARGETS)
    for number in range(2):
        PIL.Image.new("RGB", (6, 4)).save(tmp_path / f"{number}.jpg")
    stored = (tmp_path / "1.jpg").read_bytes()
    images = [
        {"path": str(tmp_path / "0.jpg"), "bytes": None},
        {"path": None, "bytes": stored},
    ]
    dataset.rows = dataset.rows.remove_columns("image").add_column(
        "image", images, feature=dataset.rows.features["image"]
    )
    path = tmp_path / "questions.jsonl"
    assert export_questions(path, {"mine": dataset}) == 2
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["question_id"] for line in lines] == ["0_0", "1_0"]
    assert lines[0]["image"] == str(tmp_path / "0.jpg")
    assert open(lines[1]["image"], "rb").read() == stored
    assert lines[0]["phrase"] == "the red one" and "first" in lines[0]["texts"]
    answers = write(tmp_path / "answers.jsonl", *[line | {"masks": []} for line in lines])
    assert areas(read_predictions(answers, dataset)) == {"0_0": [], "1_0": []}
    with pytest.raises(ValueError, match="expected a new file.*--overwrite"):
        export_questions(path, {"mine": dataset})
