"""Benchmarks that share images with the training data, found by COCO id, by name and by content."""

import json
from pathlib import Path

import numpy as np
import pytest
from fixtures.paths import TREE
from fixtures.rows import dataset, image_file, segmentation_row

from lisa_hf.data.image_keys import (
    content_key,
    image_keys,
    merge_image_keys,
    name_key,
    read_image_keys,
    write_image_keys,
)
from lisa_hf.data.mixture import EvaluationDataset
from lisa_hf.evaluation.benchmarks import begin_evaluation, open_evaluation, write_evaluation
from lisa_hf.evaluation.comparison import compare_evaluations
from lisa_hf.evaluation.leakage import count_seen_images, describe_seen_images
from lisa_hf.evaluation.report import results_page
from lisa_hf.training.run_record import find_training_images, write_conversion_record


@pytest.mark.parametrize(
    ("path", "other", "is_same"),
    [
        ("/data/coco/train2017/000000000139.jpg", "refer_seg/COCO_train2014_000000000139.jpg", True),
        ("/data/coco/train2017/000000000139.jpg", "coco/train2017/000000000140.jpg", False),
        ("a/17259277046_bd60d5943b_o.jpg", "b/17259277046_bd60d5943b_o.png", True),
        ("mine/photos/0012.jpg", "other/scans/0012.jpg", False),  # such a name says nothing
        ("mine/photos/0012.jpg", "copy/photos/0012.jpg", True),
        ("zip://photos/a_long_name.jpg::photos.zip", "C:\\photos\\a_long_name.jpg", True),
    ],
)
def test_names_tell_photos(path, other, is_same):
    assert (name_key(path) == name_key(other)) is is_same


def test_contents_tell_images():
    photo = bytes(range(256)) * 100
    assert content_key(photo) == content_key(memoryview(photo)) != content_key(photo + b"!")
    assert content_key(photo) != content_key(b"!" + photo[1:]) and content_key(photo) != content_key(photo[:-1] + b"!")


def test_sources_on_coco_photos_share_them(load):
    """cocostuff and llava_instruct name the photos of train2017, refcoco the same ones of train2014."""
    train = {name: image_keys(load(name, TREE)) for name in ("cocostuff", "llava_instruct", "reason_seg", "mapillary")}
    refcoco = EvaluationDataset(load("refcoco", TREE, split="train"))
    photos = {int(row["image_id"]) for row in refcoco.rows}
    expected = {
        name: len(photos & {int(row["image_id"].split("_")[-1]) for row in load(name, TREE)})
        for name in ("cocostuff", "llava_instruct")
    }
    assert count_seen_images(train, refcoco) == expected | {"reason_seg": 0, "mapillary": 0} and sum(expected.values())
    assert count_seen_images(train, EvaluationDataset(load("reason_seg", TREE, split="val")))["reason_seg"] == 0


def test_images_inside_of_rows_are_told_by_content(tmp_path):
    files = [image_file(tmp_path / f"drawn_image_{number}.png", size=(9 + number, 6)) for number in range(3)]
    stored = [segmentation_row("stored", n, path) for n, path in enumerate(files[:2])]
    for row, path in zip(stored, files):
        row["image"] = {"bytes": Path(path).read_bytes(), "path": None}
    train = {"stored": image_keys(dataset(*stored)), "named": image_keys(dataset(segmentation_row("n", 0, files[2])))}
    benchmark = EvaluationDataset(dataset(*[segmentation_row("b", n, path) for n, path in enumerate(files)]))
    assert count_seen_images(train, benchmark) == {"stored": 2, "named": 1}


def test_keys_travel_with_the_model(tmp_path):
    first, second = (
        {"a": np.array([1, 5], np.uint64)},
        {"a": np.array([5, 7], np.uint64), "b+": np.array([2], np.uint64)},
    )
    write_image_keys(tmp_path, merge_image_keys(first, second))
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "other").mkdir()
    for directory in (tmp_path, tmp_path / "checkpoint-3"):
        found = read_image_keys(directory)
        assert {name: keys.tolist() for name, keys in found.items()} == {"a": [1, 5, 7], "b+": [2]}
    assert read_image_keys(tmp_path / "other") == {}


def test_sentences():
    assert "reason_seg 200." in describe_seen_images("reason_seg_val", 200, {"refcoco": 0, "reason_seg": 200})
    assert (
        describe_seen_images("x", 2, {"a": 0, "b": 0}) == "None of the 2 images of x is in the training data (a, b)."
    )
    for seen in (None, {"a": 0}, {"a": 1}):  # also of a model whose own images are known, and which continues another
        assert describe_seen_images("x", 2, seen, "LISA says so.").endswith(". LISA says so.")


def test_what_is_known_of_the_data_of_a_converted_model_and_of_streams(tmp_path):
    assert find_training_images(str(tmp_path)) == (None, "")
    write_conversion_record(tmp_path, "LISA-7B-v1", "Trained on val.")
    assert find_training_images(str(tmp_path)) == (None, "Trained on val.")
    # Trained further, on two sources of which one was streamed.
    record = json.loads((tmp_path / "run.json").read_text())
    train = [{"source": "ade20k"}, {"source": "streamed"}]
    (tmp_path / "run.json").write_text(
        json.dumps({"data": {"train": train}, "earlier_starts": [], "continues": record})
    )
    write_image_keys(tmp_path, {"ade20k": np.array([1], np.uint64)})
    keys, note = find_training_images(str(tmp_path))
    assert list(keys) == ["ade20k"]
    assert note == "Trained on val. Not compared: streamed, whose images were not recorded."


@pytest.fixture
def evaluate(tmp_path):
    """A function that writes an evaluation of one benchmark, whose environment may differ."""

    def evaluate(name, **environment):
        metrics = {"num_questions": 3, "giou": 0.5, "ciou": 0.5}
        metrics |= {f"{metric}_{end}": 0.5 for metric in ("giou", "ciou") for end in ("low", "high")}
        environment = {
            "date": name,
            "device": "cpu",
            "versions": {"torch": "2.14"},
            "protocol_version": 1,
        } | environment
        result = {"builder": "reason_seg", "split": "val", "num_items": 3, "protocols": {"lisa": metrics}}
        content = {"model": name, "settings": {}, "environments": [environment], "train_overlap": {}}
        write_evaluation(tmp_path / name, content | {"benchmarks": {"reason_seg_val": result}})
        return tmp_path / name

    return evaluate


def test_a_comparison_marks_other_software_and_refuses_other_protocols(evaluate):
    first, same = evaluate("first"), evaluate("same")
    assert "differently" not in results_page([compare_evaluations([first, same])])
    other = evaluate("other", device="H100", versions={"torch": "2.15"})
    page = results_page([compare_evaluations([first, same, other])])
    assert "**other was evaluated differently from first**: device, torch." in page
    assert page.count("| other (evaluated differently) | 3 |") == 1 and "| same | 3 |" in page
    with pytest.raises(ValueError, match=r"same protocol version, got .*'first': 1, 'newer': 2"):
        compare_evaluations([first, evaluate("newer", protocol_version=2)])


def test_an_evaluation_goes_on_with_other_software_but_not_with_other_protocols(tmp_path, caplog):
    known = {"date": "1", "device": "cpu", "protocol_version": 1}
    arguments = (tmp_path, "model", {"dtype": "float32"})
    options = {"sources": {"mine": {"builder": "shapes"}}, "overwrite": False}
    new = open_evaluation(*arguments, known, **options)
    assert new["environments"] == [known] and not list(tmp_path.iterdir())
    begin_evaluation(tmp_path, new, overwrite=False)
    assert open_evaluation(*arguments, known | {"date": "2"}, **options)["environments"] == [known]
    other = known | {"device": "H100"}
    assert open_evaluation(*arguments, other, **options)["environments"] == [known, other]
    assert "continues with other software or hardware" in caplog.text
    with pytest.raises(ValueError, match=r"with other settings \(protocol_version\)"):
        open_evaluation(*arguments, known | {"protocol_version": 2}, **options)
