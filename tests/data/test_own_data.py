"""Your own data, as named in a recipe: COCO instances, LabelMe, a folder with questions, columns of Parquet."""

import io
import json
import pickle
import re

import datasets
import numpy as np
import PIL.Image
import pytest
import yaml
from fixtures.paths import TREE

from data_scripts import load_source, load_sources
from lisa_hf.data.masks import decode_mask, encode_mask
from lisa_hf.data.mixture import EvaluationDataset, MixtureDataset
from lisa_hf.data.rows import FEATURES


SIZE = (40, 60)
SQUARE = [[10, 5], [30, 5], [30, 25], [10, 25]]


@pytest.fixture
def folder(tmp_path):
    """Two photos of 40 x 60 pixels with a mask of their upper left quarter each, annotated in four ways."""
    root = tmp_path / "data"
    for name in ("photos", "masks", "labelme", "coco"):
        (root / name).mkdir(parents=True)
    for index in range(2):
        noise = np.random.default_rng(index).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(root / "photos" / f"{index}.jpg")
        PIL.Image.fromarray(quarter() * np.uint8(255)).save(root / "masks" / f"{index}.png")
        shapes = [{"label": "wheel", "points": SQUARE}, {"label": "car", "points": [[0, 0], [9, 9]]}]
        shapes[1]["shape_type"] = "rectangle"
        content = {"imagePath": f"..\\photos\\{index}.jpg", "shapes": shapes}
        (root / "labelme" / f"{index}.json").write_text(json.dumps(content))
    lines = [
        {
            "image": "0.jpg",
            "mask": "0.png",
            "question": ["What could break?", "What is weak?"],
            "explanation": "It is.",
        },
        {"image": "1.jpg", "mask": "1.png", "phrase": "the corner", "author": "us"},
    ]
    (root / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    write_coco(root)
    return root


def write_coco(root, file_names=("0.jpg", "1.jpg")):
    flat = [value for point in SQUARE for value in point]
    images = [{"id": i, "file_name": name, "height": 40, "width": 60} for i, name in enumerate(file_names)]
    crowd = {"size": list(SIZE), "counts": [0, 80, 2320]}
    objects = [
        {"image_id": 0, "category_id": 7, "segmentation": [flat]},
        {"image_id": 0, "category_id": 7, "segmentation": crowd, "iscrowd": 1},
        {"image_id": 1, "category_id": 9, "segmentation": [flat]},
    ]
    content = {"images": images, "annotations": objects}
    content["categories"] = [{"id": 7, "name": "wheel"}, {"id": 9, "name": "car"}]
    (root / "coco" / "train.json").write_text(json.dumps(content))


def quarter():
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[:20, :30] = 1
    return mask


def png(array):
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def load(tmp_path, folder):
    """Rows of a recipe's one source, prepared; they are the streamed ones, and an item can be made of each."""

    def load(text, **kwargs):
        (name, options), *_ = yaml.safe_load(text).items()
        arguments = {"data_dir": str(folder), "cache_dir": str(tmp_path / "cache")} | kwargs | options
        rows = load_source(name, **arguments)
        assert rows.features == FEATURES
        undecoded = datasets.Image(decode=False)
        streamed = load_source(name, **arguments, streaming=True).cast_column("image", undecoded)
        assert list(rows.cast_column("image", undecoded)) == list(streamed)
        assert set(rows["source"]) == {name}
        assert len([*EvaluationDataset(rows)]) == len(rows) > 0
        return rows

    return load


def test_coco_instances(load, folder):
    rows = load("wheels: {builder: coco_instances, annotations: coco/train.json, images: photos}")
    assert [[target["phrases"] for target in row["targets"]] for row in rows] == [[["wheel"], ["wheel"]], [["car"]]]
    areas = [decode_mask(target["rle"]).sum() for target in rows[0]["targets"]]
    assert areas == [400, 80]
    assert rows["task"] == ["semantic"] * 2 and rows[0]["image"].size == (60, 40)
    # The name of the builder may be the name of the source; paths may be absolute.
    text = f"coco_instances: {{annotations: {folder}/coco/train.json, images: {folder}/photos}}"
    assert len(load(text, data_dir=None)) == 2


def test_coco_instances_leave_out_the_photos_that_are_evaluated_on(load, folder):
    names = ["COCO_train2014_000000000005.jpg", "000000000006.jpg"]
    for index, name in enumerate(names):
        (folder / "photos" / f"{index}.jpg").rename(folder / "photos" / name)
    write_coco(folder, names)
    (folder / "refer_seg" / "refcoco").mkdir(parents=True)
    refs = [{"image_id": 5, "split": "testB"}, {"image_id": 6, "split": "train"}]
    (folder / "refer_seg" / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs))
    text = "cars: {builder: coco_instances, annotations: coco/train.json, images: photos, exclude_refer_val: true}"
    assert load(text)["image_id"] == ["1"]
    assert load(text, split="validation")["image_id"] == ["0", "1"]
    with pytest.raises(ValueError, match="exclude_refer_val: expected `data_dir`"):
        load(text.replace("coco/", f"{folder}/coco/").replace("photos", f"{folder}/photos"), data_dir=None)


def test_labelme(load, folder):
    rows = load("garage: {builder: labelme, annotations: labelme, images: photos}")
    assert rows["image_id"] == ["0", "1"]
    assert [target["phrases"] for target in rows[0]["targets"]] == [["wheel"], ["car"]]
    assert [decode_mask(target["rle"]).sum() for target in rows[0]["targets"]] == [400, 81]
    for path in (folder / "photos").iterdir():
        path.rename(folder / "labelme" / path.name)
    assert len(load("garage: {builder: labelme, annotations: labelme}")) == 2


def test_image_folder(load):
    text = "damage: {builder: image_folder, questions: questions.jsonl, images: photos, masks: masks}"
    asked, named = load(text, split="validation")
    assert asked["task"] == "reasoning" and asked["is_sentence"] and asked["explanation"] == "It is."
    assert asked["targets"][0]["phrases"] == ["What could break?", "What is weak?"]
    assert named["task"] == "referring" and not named["is_sentence"]
    assert named["targets"] == [{"phrases": ["the corner"], "rle": encode_mask(quarter())}]


@pytest.mark.parametrize("mask", ["image", "bytes", "rle"])
def test_columns_of_parquet(load, folder, mask):
    masks = [encode_mask(quarter())] * 2 if mask == "rle" else [png(quarter())] * 2
    columns = {"photo": [png(np.zeros((*SIZE, 3), np.uint8))] * 2, "label": masks, "caption": ["a corner", "a piece"]}
    if mask == "rle":
        columns["label"] = [rle | {"counts": rle["counts"].decode()} for rle in masks]
    table = datasets.Dataset.from_dict(columns)
    if mask == "image":
        table = table.cast_column("label", datasets.Image())
    for index in range(2):
        table.select([index]).to_parquet(folder / f"part{index}.parquet")
    names = "image_column: photo, mask_column: label, phrases_column: caption"
    rows = load(f"captions: {{builder: hub, path: part*.parquet, {names}}}")
    assert [row["targets"][0]["phrases"] for row in rows] == [["a corner"], ["a piece"]]
    assert all(row["targets"][0]["rle"] == encode_mask(quarter()) for row in rows)
    assert rows["image_id"] == ["0-0", "1-0"] and rows[0]["image"].size == (60, 40)


def test_columns_of_conversations(load, folder):
    answer = {"role": "assistant", "content": "Yes.", "reasoning_content": "It is one."}
    messages = [{"role": "user", "content": "Hello?", "reasoning_content": None}, answer]
    table = datasets.Dataset.from_dict({"image": [str(folder / "photos" / "0.jpg")], "turns": [messages]})
    (folder / "chat").mkdir()
    table.to_parquet(folder / "chat" / "train.parquet")
    (row,) = load("chat: {builder: hub, path: chat, messages_column: turns}")
    assert row["task"] == "vqa" and row["messages"] == messages and row["image"].size == (60, 40)


def test_parquet_of_rows_is_taken_as_it_is(load, folder, tmp_path):
    expected = load_source("refcoco", str(TREE), cache_dir=str(tmp_path / "cache"))
    expected.to_parquet(folder / "rows.parquet")
    arguments = {"path": str(folder / "rows.parquet"), "cache_dir": str(tmp_path / "cache")}
    rows = load_source("mine", str(TREE), builder="hub", **arguments)
    undecoded = datasets.Image(decode=False)
    columns = [name for name in FEATURES if name != "image"]
    assert list(rows.select_columns(columns)) == list(expected.select_columns(columns))
    assert len(rows.cast_column("image", undecoded)) == len(expected)


def test_one_source_may_be_used_in_two_ways(tmp_path):
    options = {"builder": "refcoco", "cache_dir": str(tmp_path)}
    splits = {"people": {"split": "testA"}, "others": {"split": "testB"}}
    loaded = load_sources({name: options | split for name, split in splits.items()}, str(TREE))
    assert loaded.keys() == {"people", "others"}
    counts = [sum(len(row["targets"]) for row in rows) for rows in loaded.values()]
    assert counts == [2, 1] and set(loaded["people"]["source"]) == {"refcoco"}


def test_a_recipe_mixes_own_data_with_others(folder, tmp_path):
    sources = yaml.safe_load(
        """
        shapes: {weight: 9, split: train, num_train_scenes: 5}
        wheels: {builder: coco_instances, annotations: coco/train.json, images: photos, weight: 1}
        damage: {builder: image_folder, questions: questions.jsonl, images: photos, masks: masks}
        """
    )
    sources = {name: options | {"cache_dir": str(tmp_path)} for name, options in sources.items()}
    loaded = load_sources(sources, str(folder), max_rows=3, on_bad_row="skip")
    assert {name: len(rows) for name, rows in loaded.items()} == {"shapes": 3, "wheels": 2, "damage": 2}
    items = [*MixtureDataset(loaded, length=30)]
    assert {item["source"] for item in items} == {"shapes", "wheels", "damage"}
    streamed = load_sources(sources, str(folder), max_rows=3, streaming=True)
    assert {name: len(list(rows)) for name, rows in streamed.items()} == {"shapes": 3, "wheels": 2, "damage": 2}


WRONG = [
    ("x: {builder: coco}", "coco_instances.*got 'coco'"),
    ("x: {builder: coco_instances, images: photos}", "source 'x': expected the option `annotations`"),
    ("x: {builder: coco_instances, annotations: no.json, images: photos}", "`annotations` .*data/no.json', which"),
    ("x: {builder: coco_instances, annotation: a.json}", "'annotations'.*got 'annotation'"),
    (
        "refcoco: {image_size: 3}",
        r"\['exclude_refer_val', 'on_bad_row', 'split_by'\], got 'image_size'",
    ),
    ("x: {builder: labelme, annotations: photos}", r"source 'x': expected \*.json in .*photos"),
    ("x: {builder: hub}", "expected the option `path`"),
    ("x: {builder: hub, path: '*.parquet'}", r"expected the column 'mask' in .*got \['image'\].*mask_column"),
    ("shapes: {on_bad_row: ignore}", "on_bad_row: expected 'raise' or 'skip', got 'ignore'"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_wrong_options_name_the_right_ones(folder, tmp_path, text, message):
    datasets.Dataset.from_dict({"image": ["a.jpg"]}).to_parquet(folder / "a.parquet")
    ((name, options),) = yaml.safe_load(text).items()
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_source(name, str(folder), cache_dir=str(tmp_path / "cache"), **options)
    assert not re.search("\n.*\n", str(error.value))
