"""Sources that are benchmarks: false premises, several masks per answer, and datasets on the Hub by name."""

import json
import pickle

import datasets
import numpy as np
import pytest
from fixtures.paths import TREE
from fixtures.sources import FALSE_PREMISES
from pycocotools import mask as coco_mask

from data_scripts.benchmarks import BENCHMARKS
from data_scripts.check import check_source
from lisa_hf.data.masks import decode_mask
from lisa_hf.data.mixture import EvaluationDataset
from lisa_hf.data.prompts import evaluation_questions


# ---- false premises -------------------------------------------------------------------------------------------------


def write_false_premises(tree, name):
    """Write refs like those of refCOCO: three of image 1, of which one has a false expression and one only those."""
    fp_split_by, r_split_by = (
        "berkeley_exclude_unified",
        "umd_exclude_unified" if name[-1] == "g" else "unc_exclude_unified",
    )
    split_by, true, false = (
        (fp_split_by, {"is_false_premise": False}, {"is_false_premise": True, "gt_sent": "the left person"})
        if name.startswith("fp")
        else (r_split_by, {"exist": True}, {"exist": False})
    )
    sentences = (
        [{"sent": "left person"} | true, {"sent": "left horse"} | false, {"sent": "guy on the left"} | true],
        [{"sent": "the dog"}],
        [{"sent": "a ghost"} | false, {"sent": "a witch"} | false],
    )
    refs = [
        {"ref_id": 1 + number, "ann_id": 11 + number, "image_id": 1, "split": "val", "sentences": found}
        for number, found in enumerate(sentences)
    ]
    directory = tree / "refer_seg" / name
    directory.mkdir()
    (directory / f"refs({split_by}).p").write_bytes(pickle.dumps(refs))
    (directory / "instances.json").write_bytes((tree / "refer_seg/refcoco/instances.json").read_bytes())


@pytest.mark.parametrize("name", FALSE_PREMISES)
def test_a_false_expression_has_an_empty_mask(load, tree, name):
    write_false_premises(tree, name)
    prepared = load(name, tree, split="val")
    rows = list(prepared)
    assert rows == list(load(name, tree, split="val", streaming=True))
    targets = [[(target["phrases"], decode_mask(target["rle"]).any()) for target in row["targets"]] for row in rows]
    person = [(["left person", "guy on the left"], True), (["left horse"], False)]
    dog, ghost = [(["the dog"], True)], [(["a ghost", "a witch"], False)]
    if name.startswith("fp"):
        assert targets == [[*person, *dog, *ghost]]
    else:
        assert targets == [person, dog, ghost]  # one row per ref
        assert EvaluationDataset(prepared).image_ids == ["1", "1#2", "1#3"]
    asked = [question.phrase for row in rows for question in evaluation_questions(row, merge_instances=False)]
    assert asked == ["left person", "guy on the left", "left horse", "the dog", "a ghost", "a witch"]


def test_the_true_masks_are_those_of_refcoco(load, tree):
    write_false_premises(tree, "fprefcoco")
    (row,) = load("fprefcoco", tree, split="val")
    refcoco = {
        target["phrases"][0].strip(): target["rle"] for row in load("refcoco", tree) for target in row["targets"]
    }
    assert row["targets"][0]["rle"] == refcoco["Left Person"] and row["targets"][2]["rle"] == refcoco["dog"]


def test_photos_with_false_premises_are_held_out_too(load, tree):
    write_false_premises(tree, "fprefcoco+")
    for path in (tree / "refer_seg").glob("*/*refs(*)*"):
        if path.parent.name != "fprefcoco+":
            path.unlink()
    assert "000000000001" in load("cocostuff", tree)["image_id"]
    assert "000000000001" not in load("cocostuff", tree, exclude_refer_val=True)["image_id"]


# ---- MUSE -----------------------------------------------------------------------------------------------------------


SQUARE = [[2, 2, 22, 2, 22, 22, 2, 22]]
CORNER = [[30, 30, 50, 30, 50, 50, 30, 50]]


def annotation(name, segmentation):
    return {"id": 7, "category_name": "thing", "rephrased_name": name, "segmentation": segmentation}


@pytest.fixture
def muse(tree):
    """A function that writes a split of MUSE: an image of COCO 2017 and one of 2014."""
    (tree / "muse").mkdir()

    def write(split="val", **changes):
        of_2017 = {
            "id": 1,
            "height": 48,
            "width": 64,
            "coco_url": "http://images.cocodataset.org/train2017/000000000001.jpg",
            "ann_list": [],
            "questions": ["Who plays?", "What is there?", "Anything else?"],
            "text_answers": ["The person {seg} and the dog {seg}.", None, "The dog {seg}."],
            "answers": [
                [annotation("person", SQUARE), annotation("dog", CORNER)],
                [annotation("red ball", SQUARE), annotation("dog", CORNER), annotation("cup", CORNER)],
                [annotation("dog", CORNER), annotation("cup", CORNER)],
            ],
        }
        of_2014 = {
            "id": 2,
            "height": 60,
            "width": 44,
            "file_name": "COCO_train2014_000000000002.jpg",
            "questions": ["What is red?"],
            "answers": [[annotation("kite", SQUARE)]],
        }
        (tree / "muse" / f"muse_{split}.json").write_text(json.dumps([of_2017 | changes, of_2014]))

    return write


def test_answers_of_muse_have_a_mask_per_object(load, tree, muse, caplog):
    caplog.set_level("INFO")
    muse()
    rows = list(load("muse", tree, split="val"))
    assert rows == list(load("muse", tree, split="val", streaming=True))
    assert "skipped 1 questions whose answer does not have one mask" in caplog.text
    talks = [[message["content"] for message in row["messages"]] for row in rows]
    assert talks == [
        ["Who plays? Please output segmentation mask.", "The person [SEG] and the dog [SEG]."],
        ["What is there? Please output segmentation mask.", "The red ball [SEG], the dog [SEG] and the cup [SEG]."],
        ["What is red? Please output segmentation mask.", "The kite [SEG]."],
    ]
    assert [row["image_id"] for row in rows] == ["000000000001"] * 2 + ["COCO_train2014_000000000002"]
    assert [decode_mask(target["rle"]).argmax() for target in rows[0]["targets"]] == [2 * 64 + 2, 30 * 64 + 30]
    items = EvaluationDataset(load("muse", tree, split="val"))
    assert [len(item["questions"][0].masks) for item in map(items.__getitem__, range(3))] == [2, 3, 1]


def test_splits_of_muse_are_those_whose_files_exist(load, tree, muse):
    for split in ("test_less", "test_many"):
        muse(split)
    assert load("muse", tree, split=None).keys() == {"test_less", "test_many"}
    (tree / "muse/muse_test_less.json").unlink()
    (tree / "muse/muse_test_many.json").unlink()
    with pytest.raises(FileNotFoundError, match="MUSE: expected .*muse_val.json.*got none"):
        load("muse", tree)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coco_url": "http://x/../../secret.jpg"}, "is outside"),
        ({"answers": [[annotation("person", SQUARE)]]}, "list index out of range"),
        (
            {"answers": [[annotation("person", [[900, 900, 990, 900, 990, 990]])]] * 3, "text_answers": []},
            "another image",
        ),
    ],
)
def test_a_bad_record_of_muse_names_its_question(load, tree, muse, changes, message):
    muse(**changes)
    with pytest.raises(ValueError, match=rf"muse_val.json.*question \d: .*{message}"):
        load("muse", tree, split="val")


# ---- on the Hub -----------------------------------------------------------------------------------------------------


RNG = np.random.default_rng(0)
PIXELS = RNG.random((48, 64)) < 0.3
NOTHING = np.zeros_like(PIXELS)
COUNTS = coco_mask.encode(np.asfortranarray(PIXELS, dtype=np.uint8))["counts"]


def write_hub_dataset(directory, texts, masks):
    """Write Parquet in the layout of Seg-Zero, whose masks are rows of truth values."""
    photo = {"bytes": (TREE / "coco/train2017/000000000001.jpg").read_bytes(), "path": "1.jpg"}
    columns = {
        "image": [photo] * len(texts),
        "text": texts,
        "mask": masks,
        "image_id": ["17"] * len(texts),
        "ann_id": [str(number) for number in range(len(texts))],
        "img_height": [48] * len(texts),
        "img_width": [64] * len(texts),
    }
    (directory / "data").mkdir(parents=True)
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    rows.to_parquet(directory / "data" / "test-00000-of-00001.parquet")


@pytest.mark.parametrize(
    "name", ["Ricky06662/ReasonSeg_val", "sj9909/ReasonSegX_test", "sj9909/MUSE_val", "Ricky06662/grefcoco_val_all"]
)
def test_a_dataset_on_the_hub_is_a_benchmark_by_its_name(load, tmp_path, name):
    texts = ["the cesspit", "Which animal barks?", "no such thing."]
    write_hub_dataset(tmp_path / name, texts, [PIXELS.tolist(), (~PIXELS).tolist(), NOTHING.tolist()])
    builder, options = BENCHMARKS[name]
    rows = load("mine", tmp_path, builder=builder, **options)
    assert [target["phrases"] for row in rows for target in row["targets"]] == [[text] for text in texts]
    masks = [decode_mask(row["targets"][0]["rle"]) == 1 for row in rows]
    assert all(map(np.array_equal, masks, [PIXELS, ~PIXELS, NOTHING]))
    assert rows["image_id"] == ["17"] * 3
    is_reasoning = options["task"] == "reasoning"
    assert rows["is_sentence"] == [False, is_reasoning, is_reasoning]
    prompts = [question.prompt for row in rows for question in evaluation_questions(row)]
    assert prompts[0] == "What is the cesspit in this image? Please output segmentation mask."
    if is_reasoning:
        assert prompts[1] == "Which animal barks? Please output segmentation mask."


@pytest.mark.parametrize(
    "mask",
    [
        COUNTS,
        COUNTS.decode(),
        {"size": [48, 64], "counts": COUNTS},
        json.dumps({"size": [48, 64], "counts": COUNTS.decode()}),
    ],
    ids=["counts", "text", "RLE", "JSON"],
)
def test_masks_on_the_hub_may_be_rle(load, tmp_path, mask):
    write_hub_dataset(tmp_path / "rows", ["it"], [mask])
    (row,) = load("mine", tmp_path, builder="hub", path="rows", split="test", phrases_column="text")
    assert np.array_equal(decode_mask(row["targets"][0]["rle"]) == 1, PIXELS)


def test_rows_of_pixels_must_have_the_size_of_the_image(load, tmp_path):
    write_hub_dataset(tmp_path / "rows", ["it"], [PIXELS[:40].tolist()])
    with pytest.raises(ValueError, match=r"expected an annotation of the image's size \(48, 64\).*got \(40, 64\)"):
        load("mine", tmp_path, builder="hub", path="rows", split="test", phrases_column="text")


def test_masks_without_a_pixel_are_passed_over_unless_they_mean_something(load, tmp_path):
    write_hub_dataset(tmp_path / "rows", ["it", "nothing"], [PIXELS.tolist(), NOTHING.tolist()])
    options = {"builder": "hub", "path": "rows", "split": "test", "phrases_column": "text"}
    assert len(load("mine", tmp_path, **options)) == 1
    assert len(load("mine", tmp_path, **options, empty_masks=True)) == 2


def test_the_numbers_of_the_authors_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    name = "Ricky06662/ReasonSeg_val"
    write_hub_dataset(tmp_path / name, ["it"], [PIXELS.tolist()])
    builder, options = BENCHMARKS[name]
    report = check_source("mine", str(tmp_path), builder=builder, cache_dir=str(tmp_path / "cache"), **options)
    assert "1 rows, 200 published" in str(report)
