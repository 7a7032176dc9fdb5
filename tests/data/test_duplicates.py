"""Rows with an image of a benchmark or of another source are found, and excluded from conversions."""

import io

import datasets
import numpy as np
import PIL.Image
import pytest
import yaml
from fixtures.paths import TREE
from fixtures.recipes import prepare_data

from data_scripts import load_source
from data_scripts.duplicates import KnownImages
from data_scripts.parquet import write_parquet
from lisa_hf.data.image_keys import coco_id, perceptual_hash
from lisa_hf.data.masks import encode_mask
from lisa_hf.data.rows import FEATURES, make_row


def draw(seed: int, size=(128, 96)) -> PIL.Image.Image:
    """Draw a picture that is smooth like a photo, another one for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize(size, PIL.Image.Resampling.BICUBIC)


def encode(image: PIL.Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, **{"format": "JPEG"} | options)
    return file.getvalue()


def bits(first: bytes, second: bytes) -> int:
    return (perceptual_hash(first) ^ perceptual_hash(second)).bit_count()


@pytest.mark.parametrize(
    "path, expected",
    [
        ("a/COCO_val2014_000000000139.jpg", 139),
        ("000000000139.jpg", 139),
        ("zip://train2017/000000000139.jpg::coco.zip", 139),
        ("139.jpg", None),
        ("", None),
    ],
)
def test_photos_of_coco_have_ids(path, expected):
    assert coco_id(path) == expected


def test_a_copy_has_nearly_the_same_hash_and_another_image_has_not():
    image = draw(0)
    original = encode(image, quality=95)
    turned = PIL.Image.Exif()
    turned[0x0112] = 6  # viewers turn it to the right
    copies = [
        encode(image, format="PNG"),
        encode(image, quality=30),
        encode(image.resize((64, 48))),
        encode(image.resize((96, 96))),
        encode(image.resize((1280, 960))),  # decoded at a quarter of its size
        encode(image.transpose(PIL.Image.Transpose.ROTATE_90), quality=95, exif=turned),
    ]
    assert max(bits(original, copy) for copy in copies) <= 4
    assert min(bits(original, encode(draw(seed))) for seed in range(1, 200)) > 8
    assert perceptual_hash(encode(PIL.Image.new("RGB", (64, 64), "gray"))) is None
    with pytest.raises(ValueError):
        perceptual_hash(b"no image")


def make_rows(images: dict[str, bytes]):
    targets = [{"phrases": ["it"], "rle": encode_mask(np.ones((96, 128), dtype=np.uint8))}]
    rows = [make_row(content, name, "mine", "referring", targets) for name, content in images.items()]
    for row in rows:
        row["image"]["path"] = f"{row['image_id']}.jpg"
    return datasets.Dataset.from_list(rows, features=FEATURES)


def test_known_images_are_left_out_and_counted(tmp_path):
    known = KnownImages()
    known.add("first", make_rows({"000000000007": encode(draw(1)), "a": encode(draw(2))}))
    known.add("second", make_rows({"b": encode(draw(3)), "c": encode(draw(2), quality=40)}))
    rows = make_rows(
        {
            "COCO_train2014_000000000007": encode(draw(10)),  # by its id alone
            "renamed": encode(draw(1), quality=50),
            "x": encode(draw(2).resize((64, 48))),
            "y": encode(draw(3), format="PNG"),
            "z": encode(draw(4)),
            "blank": encode(PIL.Image.new("RGB", (128, 96))),
            "damaged": b"no image",
        }
    )
    written = write_parquet(rows, tmp_path / "mine", "train", max_shard_size="4KB", excluded=known)
    assert len(written.paths) > 2 and written.num_rows == 3
    assert written.num_excluded == {"first": 3, "second": 1}
    left = load_source("mine", builder="hub", path=str(tmp_path / "mine"), cache_dir=str(tmp_path / "cache"))
    assert left["image_id"] == ["z", "blank", "damaged"]
    # A second run finds all shards; one with other images to exclude must not take them for its own.
    assert write_parquet(rows, tmp_path / "mine", "train", max_shard_size="4KB", excluded=known) == written
    known.add("third", make_rows({"d": encode(draw(4))}))
    with pytest.raises(ValueError, match="expected no shards of other rows"):
        write_parquet(rows, tmp_path / "mine", "train", max_shard_size="4KB", excluded=known)
    with pytest.raises(ValueError, match="expected a row, got none: all show excluded images"):
        write_parquet(rows.select([0]), tmp_path / "none", "train", excluded=known)
    with pytest.raises(ValueError, match="'damaged.jpg': .* Restore it"):
        KnownImages().add("bad", rows)


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return lambda *arguments: prepare_data(capsys, *arguments)


def count_rows(out: str) -> dict[str, int]:
    """Return the numbers of rows by source and split that `convert` has printed."""
    return {line.partition(":")[0]: int(line.split()[2]) for line in out.splitlines() if " rows in " in line}


def test_convert_leaves_out_images_of_benchmarks_from_training_rows(cli, tmp_path):
    sources = ["refcoco", "cocostuff", "llava_instruct"]
    arguments = ["--data_dir", TREE, "--num_workers", "1"]
    whole = count_rows(cli("convert", *sources, *arguments, "--output_dir", tmp_path / "whole")[1])
    arguments += ["--exclude_images_of", "refcoco_testB", "--output_dir", tmp_path / "parquet"]
    status, out, err = cli("convert", *sources, *arguments)
    assert status == 0, err
    fewer = {"refcoco train": 1, "cocostuff train": 1, "llava_instruct train": 2}
    assert count_rows(out) == whole | fewer and {name: whole[name] - 1 for name in fewer} == fewer
    for name in fewer:
        assert f"{name}: excluded 1 rows with images of refcoco_testB" in out
    status, _, err = cli("convert", *sources, *arguments, "--exclude_images_of", "refcoco_testsA")
    assert status == 2 and len(err.splitlines()) == 1 and "Did you mean `refcoco_testA`?" in err


def test_convert_takes_evaluation_sources_of_the_recipe(cli, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    evaluation = {"mine": {"builder": "refcoco", "split": "testB"}}
    values = {"sources": {"cocostuff": 1}, "eval_sources": evaluation, "data_dir": str(TREE)}
    recipe.write_text(yaml.safe_dump(values))
    arguments = ["--num_workers", "1", "--output_dir", tmp_path / "parquet"]
    status, out, err = cli("convert", "--config", recipe, *arguments, "--exclude_images_of", "mine")
    assert status == 0, err
    assert count_rows(out) == {"cocostuff train": 1, "mine testB": 1}


def test_deduplicate_leaves_out_what_an_earlier_source_has(cli, tmp_path):
    arguments = ["--data_dir", TREE, "--num_workers", "1", "--output_dir", tmp_path / "parquet", "--deduplicate"]
    status, out, err = cli("convert", "cocostuff", "llava_instruct", *arguments)
    assert status == 0, err
    assert count_rows(out) == {"cocostuff train": 2, "llava_instruct train": 1}
    assert "llava_instruct train: excluded 2 rows with images of cocostuff train" in out
