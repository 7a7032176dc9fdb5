"""Preparing data: the check, the sheets, and Parquet that gives equal rows. Downloads: see test_download.py."""

import functools
import io
import os
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import yaml
from fixtures.paths import TREE
from fixtures.recipes import prepare_data
from fixtures.sources import NAMES

from data_scripts import parquet
from data_scripts.parquet import write_card, write_parquet
from lisa_hf.data.masks import encode_mask
from lisa_hf.data.rows import FEATURES, make_row
from lisa_hf.evaluation.visualization import COLORS, IGNORE_COLOR, preview_sheet


# The command line


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return functools.partial(prepare_data, capsys)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["check"], "expected source names, or --config"),
        (["check", "refcoco", "--config", "x.yaml"], "expected source names, or --config"),
        (["check", "refcocoo"], "got 'refcocoo'. Did you mean 'refcoco'?"),
        (["check", "coco"], "got 'coco'"),
        (["check", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["download", "refcoco"], "--data_dir: expected the directory"),
    ],
)
def test_wrong_arguments_are_one_line(cli, arguments, message):
    status, _, err = cli(*arguments)
    assert status == 2 and len(err.splitlines()) == 1 and message in err


@pytest.mark.parametrize(
    "text",
    [
        *("sources: {a", "- refcoco", "learning_rate: 1.0", "sources: {refcoco: [1]}", ""),
        *("source: {refcoco: 1}", "sources: {refcoco: 1}\nlerning_rate: 1", "sources: {refcoco: 1}\nmax_steps: many"),
        "sources: {refcoco: 1}\neval_sources: {refcoco: {on_bad_row: skip}}",
    ],
)
def test_a_wrong_recipe_is_one_line(cli, tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    status, _, err = cli("check", "--config", tmp_path / "recipe.yaml")
    assert status == 2 and len(err.splitlines()) == 1 and "recipe.yaml" in err


# Check


def write_recipe(path, **values):
    path.write_text(yaml.safe_dump({"learning_rate": 1e-3, **values}))
    return path


def test_check_of_a_complete_mixture(cli, tmp_path):
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        data_dir=str(TREE),
        sources={"ade20k": 9, "refcoco": {"weight": 3}},
        eval_sources={"reason_seg": {"split": "val"}},
    )
    status, out, _ = cli("check", "--config", recipe)
    assert status == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for line in (
        "ade20k: ready",
        "train 2 rows, 20210 published",
        "images 2 of 2 found",
        "page http://sceneparsing.csail.mit.edu",
        "license Images: non-commercial research and education; annotations: BSD-3-Clause.",
        "Ready: 3 of 3. Not ready: none.",
    ):
        assert line in lines, out
    assert not any(line.startswith("train") for line in lines[lines.index("reason_seg: ready") :])


def test_check_names_what_is_missing(cli, tmp_path, tree):
    (tree / "coco/train2017/000000000001.jpg").unlink()
    (tree / "coco/train2017/000000000002.jpg").write_bytes(b"")
    (tree / "vlpart/paco/annotations/paco_lvis_v1_train.json").unlink()
    recipe = write_recipe(tmp_path / "recipe.yaml", sources={"cocostuff": 9, "refcoco": 3, "paco_lvis": 3})
    status, out, _ = cli("check", "--config", recipe, "--data_dir", tree)
    assert status == 1
    assert "cocostuff: NOT READY" in out and "0 of 2 found" in out
    assert "000000000001.jpg" in out and "000000000002.jpg" in out
    assert "paco_lvis: NOT READY" in out and "paco_lvis_v1_train.json" in out
    assert out.splitlines()[-1] == "Ready: 1 of 3. Not ready: cocostuff, paco_lvis."


def test_check_lists_the_first_bad_records(cli, tmp_path, tree):
    photos = sorted(tree.glob("reason_seg/ReasonSeg/train/*.json"))
    for path in photos:
        path.write_text('{"text": []}')
    status, out, _ = cli("check", "reason_seg", "--data_dir", tree)
    assert status == 1 and all(f"{path}: expected the key" in out for path in photos[:10])
    assert out.count("  error  ") == min(10, len(photos)) >= 2


def test_check_takes_the_settings_of_the_recipe(cli, tmp_path, tree):
    recipe = write_recipe(
        tmp_path / "recipe.yaml", sources={"cocostuff": 9, "llava_instruct": 3}, data_dir=str(tree), bf16=True
    )
    status, out, _ = cli("check", "--config", recipe)
    assert status == 0 and "train       3 rows" in out
    # All photos are of a refer source's val or test split, and then none of these are there.
    recipe.write_text(recipe.read_text() + "exclude_refer_val: true\n")
    status, out, _ = cli("check", "--config", recipe)
    assert status == 1 and "excluded 3 of 3" in out
    shutil.rmtree(tree / "refer_seg")
    status, out, _ = cli("check", "--config", recipe)
    assert status == 1 and out.count("exclude_refer_val: expected refcoco") == 2


def test_check_of_names_looks_at_all_splits(cli):
    status, out, _ = cli("check", "refcoco", "mapillary", "--data_dir", TREE)
    assert status == 0
    assert "testA" in out and "Ready: 2 of 2." in out


# Preview


def has_text(sheet, color):
    return (np.asarray(sheet) == color).all(axis=-1).any()


def test_a_preview_shows_masks_and_phrases_in_one_color():
    mask = np.zeros((60, 80), dtype=np.uint8)
    mask[10:30, 10:30] = 1
    image = io.BytesIO()
    PIL.Image.new("RGB", (80, 60), "white").save(image, "PNG")
    masks = {"nothing": np.zeros_like(mask), "box": mask}
    targets = [{"phrases": [name], "rle": encode_mask(mask)} for name, mask in masks.items()]
    row = make_row(image.getvalue(), "1", "mine", "semantic", targets, ignore=encode_mask(np.flip(mask).copy()))
    sheet = preview_sheet([row], columns=1, side=160)
    assert sheet.size == (12 + 160 + 10 + 160 + 12, 12 + 120 + 4 * 18 + 6 + 12)
    overlay = np.asarray(sheet.crop((182, 12, 342, 132)))
    for (x, y), color in {(40, 40): COLORS[0], (120, 80): IGNORE_COLOR, (80, 60): (255, 255, 255)}.items():
        np.testing.assert_allclose(overlay[y, x], 127.5 + np.array(color) / 2, atol=1)
    assert (np.asarray(sheet.crop((12, 12, 172, 132))) == 255).all()
    assert has_text(sheet, COLORS[0]) and has_text(sheet, COLORS[1]) and not has_text(sheet, COLORS[2])


def test_a_preview_says_what_cannot_be_shown(tmp_path):
    target = {"phrases": ["box"], "rle": encode_mask(np.ones((6, 8), dtype=np.uint8))}
    image = io.BytesIO()
    PIL.Image.new("RGB", (80, 60), "white").save(image, "PNG")
    rows = [make_row(source, "1", "mine", "semantic", [target]) for source in ("nowhere.jpg", image.getvalue())]
    red = (np.asarray(preview_sheet(rows)) == (255, 0, 0)).all(axis=-1)
    assert red[:, : red.shape[1] // 2].any() and red[:, red.shape[1] // 2 :].any()


def test_preview_writes_a_sheet_per_source(cli, tmp_path):
    status, out, _ = cli(
        "preview", "ade20k", "llava_instruct", "--data_dir", TREE, "--output_dir", tmp_path / "sheets"
    )
    assert status == 0 and "ade20k: 2 of 2 rows" in out
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == [
        "ade20k_train.png",
        "llava_instruct_train.png",
    ]
    assert PIL.Image.open(tmp_path / "sheets/ade20k_train.png").width == 1336


# Convert


@pytest.fixture
def open_parquet(tmp_path):
    """Rows of a converted source, streamed; the image as bytes."""

    def open_parquet(directory, name, split="train"):
        rows = datasets.load_dataset(
            str(directory), name, split=split, streaming=True, cache_dir=str(tmp_path / "cache")
        )
        assert rows.features == FEATURES
        return without_paths(rows.cast_column("image", datasets.Image(decode=False)))

    return open_parquet


def without_paths(rows):
    rows = [dict(row) for row in rows]
    for row in rows:
        image = row["image"]
        row["image"] = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    return rows


@pytest.mark.parametrize("name", [*NAMES, "pascal_part", "reason_seg"])
def test_parquet_gives_equal_rows(load, open_parquet, tmp_path, name):
    rows = load(name)
    paths = write_parquet(rows, tmp_path / "parquet" / name, "train", max_shard_size="1KB").paths
    assert len(paths) == len(rows)  # No image is smaller than a shard.
    write_card(tmp_path / "parquet", {name: "none"})
    assert open_parquet(tmp_path / "parquet", name) == without_paths(rows)
    assert open_parquet(tmp_path / "parquet" / name, None) == without_paths(rows)


def test_converted_rows_train_like_the_source(load, tmp_path):
    rows = load("refcoco")
    write_parquet(rows, tmp_path / "parquet/refcoco", "train")
    converted = load("mine", tmp_path, builder="hub", path="parquet/refcoco")
    assert without_paths(converted) == without_paths(rows)


def test_a_shard_holds_many_rows_and_their_order_is_kept(load, open_parquet, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS_PER_GROUP", 4)
    rows = load("shapes", num_train_scenes=30, num_validation_scenes=1, image_size=32)
    paths = write_parquet(rows, tmp_path / "parquet/shapes", "train", max_shard_size="20KB").paths
    assert 2 < len(paths) < 20
    assert open_parquet(tmp_path / "parquet/shapes", None) == without_paths(rows)


def test_finished_shards_are_not_written_again(load, tmp_path):
    rows = load("cocostuff")
    paths = write_parquet(rows, tmp_path, "train", max_shard_size="1KB").paths
    first, second = map(Path, paths)
    before = first.stat().st_mtime_ns
    second.unlink()
    assert write_parquet(rows, tmp_path, "train", max_shard_size="1KB").paths == paths
    assert first.stat().st_mtime_ns == before and second.exists()


def test_a_killed_conversion_leaves_nothing_that_looks_whole(load, open_parquet, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS_PER_GROUP", 1)
    rows = load("cocostuff")
    embed, calls = parquet.embed_table_storage, []

    def die(table):
        calls.append(table)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed(table)

    directory = tmp_path / "parquet/cocostuff"

    def list_files():
        return [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]

    with monkeypatch.context() as patch:
        patch.setattr(parquet, "embed_table_storage", die)
        with pytest.raises(KeyboardInterrupt):
            write_parquet(rows, directory, "train")
    (left,) = list_files()
    assert left.startswith(".incomplete/") and left.endswith(".part")
    write_parquet(rows, directory, "train")
    assert list_files() == ["data/train-00000-of-00001.parquet"]
    assert open_parquet(directory, None) == without_paths(rows)


def test_shards_of_other_rows_or_sizes_are_replaced_if_asked(load, open_parquet, tmp_path, tree):
    other = write_parquet(load("cocostuff", tree), tmp_path / "parquet/x", "val").paths
    first = write_parquet(load("cocostuff", tree), tmp_path / "parquet/x", "train", max_shard_size="1KB").paths
    with pytest.raises(ValueError, match=f"got {first[0]}. Name another, or replace them with --overwrite"):
        write_parquet(load("cocostuff", tree), tmp_path / "parquet/x", "train")
    assert all(map(os.path.exists, first))
    write_parquet(load("cocostuff", tree), tmp_path / "parquet/x", "train", overwrite=True)
    assert open_parquet(tmp_path / "parquet/x", None) == without_paths(load("cocostuff", tree))
    path = tree / "coco/train2017" / Path(load("cocostuff", tree)[0]["image"]["path"]).name
    path.write_bytes(path.read_bytes() + b"more")
    write_parquet(load("cocostuff", tree), tmp_path / "parquet/x", "train", overwrite=True)
    assert open_parquet(tmp_path / "parquet/x", None)[0]["image"].endswith(b"more")
    assert os.path.exists(other[0])


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_missing_image_is_said_before_anything_is_written(load, tmp_path, tree, damage):
    damage(tree / "coco/train2017/000000000001.jpg")
    with pytest.raises(ValueError, match="000000000001.jpg' is empty or missing. Restore it"):
        write_parquet(load("llava_instruct", tree), tmp_path / "parquet", "train")
    assert not (tmp_path / "parquet").exists()


def test_convert_and_push_from_the_command_line(cli, open_parquet, load, monkeypatch, tmp_path):
    calls = {}
    for method in ("create_repo", "upload_folder"):
        record = functools.partial(lambda method, *args, **kwargs: calls.update({method: kwargs}), method)
        monkeypatch.setattr(huggingface_hub.HfApi, method, record)
    output_dir = tmp_path / "parquet"
    arguments = ["--data_dir", TREE, "--output_dir", output_dir, "--push_to_hub", "me/rows"]
    status, out, _ = cli("convert", "refcoco+", "grefcoco", *arguments)
    assert status == 0 and f'load_dataset("{output_dir}", "grefcoco", split="' in out
    for name in ("refcoco+", "grefcoco"):
        for split, rows in load(name, split=None).items():
            assert open_parquet(output_dir, name, split) == without_paths(rows)
    assert "- refcoco+: The expressions: Apache-2.0" in (output_dir / "README.md").read_text()
    assert calls["create_repo"] == {"repo_id": "me/rows", "repo_type": "dataset", "private": True, "exist_ok": True}
    assert (calls["upload_folder"]["repo_id"], calls["upload_folder"]["folder_path"]) == ("me/rows", str(output_dir))
    allowed = calls["upload_folder"]["allow_patterns"]
    files = [str(path.relative_to(output_dir)) for path in output_dir.rglob("*") if path.is_file()]
    assert sorted(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allowed)) == sorted(files)


def test_convert_of_a_recipe_takes_its_splits(cli, open_parquet, tmp_path):
    recipe = write_recipe(
        tmp_path / "r.yaml", data_dir=str(TREE), sources={"refcoco": 1}, eval_sources={"refcoco": {"split": "testA"}}
    )
    cli("convert", "ade20k", "--data_dir", TREE, "--output_dir", tmp_path / "parquet")
    status, _, _ = cli("convert", "--config", recipe, "--output_dir", tmp_path / "parquet")
    assert status == 0
    card = (tmp_path / "parquet/README.md").read_text()
    assert "- ade20k: Images: non-commercial" in card and "- refcoco: " in card and "grefcoco" not in card
    names = sorted(path.name.partition("-")[0] for path in (tmp_path / "parquet/refcoco/data").iterdir())
    assert names == ["testA", "train"]
    assert open_parquet(tmp_path / "parquet", "refcoco", "testA")
