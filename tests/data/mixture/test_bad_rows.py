"""Bad rows are skipped and counted, or named; too many of them stop a run."""

import logging

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
from fixtures.rows import HEIGHT, WIDTH, comparable, dataset, image_file, mask, segmentation_row

from lisa_hf.data import mixture
from lisa_hf.data.mixture import EvaluationDataset, MixtureDataset


def broken_image(kind, path):
    """An image file that is broken in one way, and a part of what is said about it."""
    if kind == "missing":
        return str(path), "No such file or directory"
    if kind == "empty":
        path.write_bytes(b"")
        return str(path), "UnidentifiedImageError"
    if kind == "no image":
        path.write_text("<html>404</html>")
        return str(path), "UnidentifiedImageError"
    if kind == "truncated jpeg":
        noise = np.random.default_rng(0).integers(0, 256, (HEIGHT * 20, WIDTH * 20, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(path, format="JPEG")
        path.write_bytes(path.read_bytes()[:1500])
        return str(path), "truncated"
    if kind == "damaged png":
        content = bytearray(open(image_file(path, format="PNG"), "rb").read())
        content[content.index(b"IDAT") - 1] = 0
        path.write_bytes(content)
        return str(path), "SyntaxError"
    if kind == "damaged exif":
        exif = PIL.Image.Exif()
        exif[PIL.ExifTags.Base.Orientation], exif[PIL.ExifTags.Base.XResolution] = 6, 2.5
        content = bytearray(open(image_file(path, format="JPEG", exif=exif), "rb").read())
        # The type of the resolution's entry becomes one that does not exist.
        content[content.index(b"MM\0*") + 23] = 0
        path.write_bytes(content)
        return str(path), "expected an image that can be read, got error"
    if kind == "bomb":
        return image_file(path, size=(60, 60), format="PNG"), "expected an image of at most 0.002 megapixels"
    assert kind == "other size"
    return image_file(path, size=(WIDTH + 1, HEIGHT), format="PNG"), f"got one of [{HEIGHT}, {WIDTH}]"


KINDS = ("missing", "empty", "no image", "truncated jpeg", "damaged png", "damaged exif", "bomb", "other size")


@pytest.mark.parametrize("min_decoded_edge", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_is_skipped_and_counted_or_named(kind, min_decoded_edge, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000 if kind == "bomb" else 10**6)
    path, reason = broken_image(kind, tmp_path / "bad.file")
    good = segmentation_row("classes", "good", image_file(tmp_path / "good.png"))
    rows = dataset(segmentation_row("classes", "bad", path), good)
    settings = {"length": 40, "min_decoded_edge": min_decoded_edge}
    data = MixtureDataset({"classes": rows}, on_bad_row="skip", **settings)

    with caplog.at_level(logging.WARNING):
        items = list(data)
    assert {item["image_id"] for item in items} == {"classes/good"}
    # Half of the draws are bad: 40 items skip 40 rows on average.
    assert 10 < sum(item["num_skipped"] for item in items) < 120
    assert len(caplog.records) == sum(item["num_skipped"] for item in items)
    assert comparable(data[7]) == comparable(items[7])

    for strict in (MixtureDataset({"classes": rows}, on_bad_row="raise", **settings), EvaluationDataset(rows)):
        with pytest.raises(ValueError) as error:
            list(strict)
        for part in ("'classes/bad'", "of 'classes'", path, reason):
            assert part in str(error.value)


def damaged(**changes):
    row = segmentation_row("classes", "bad", "")
    for key, value in changes.items():
        if key == "ignore":
            row["ignore"] = value
        else:
            for target in row["targets"]:
                target["rle"] = {**target["rle"], key: value}
    return row


@pytest.mark.parametrize(
    "row, reason",
    [
        (damaged(counts=mask(0)["counts"][:-1]), "counts"),
        (damaged(size=[WIDTH, HEIGHT]), f"[{WIDTH}, {HEIGHT}]"),
        (damaged(ignore=mask(0, size=(HEIGHT + 1, WIDTH))), f"[{HEIGHT + 1}, {WIDTH}]"),
        (damaged(ignore={"size": [HEIGHT, WIDTH], "counts": b"~"}), "counts"),
    ],
    ids=["counts cut off", "transposed", "ignore of another size", "ignore damaged"],
)
def test_a_bad_mask_is_skipped_and_counted_or_named(row, reason, tmp_path):
    row["image"]["path"] = path = image_file(tmp_path / "image.png")
    rows = dataset(row, segmentation_row("classes", "good", path))

    items = list(MixtureDataset({"classes": rows}, length=20, on_bad_row="skip"))
    assert {item["image_id"] for item in items} == {"classes/good"}
    assert sum(item["num_skipped"] for item in items) > 0
    for strict in (MixtureDataset({"classes": rows}, length=40, on_bad_row="raise"), EvaluationDataset(rows)):
        with pytest.raises(ValueError, match="Row 'classes/bad' of 'classes'") as error:
            list(strict)
        assert reason in str(error.value) and path in str(error.value)


def test_a_row_without_an_image_is_bad(tmp_path):
    row = {**segmentation_row("classes", "bad", ""), "image": None}
    with pytest.raises(ValueError, match="Row 'classes/bad' of 'classes': expected an image, got none"):
        EvaluationDataset(dataset(row))[0]


def test_bad_rows_do_not_change_the_weights(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(mixture, "MAX_BAD_SHARE", 1)
    image = image_file(tmp_path / "image.png")
    missing = [segmentation_row("classes", index, str(tmp_path / "missing.png")) for index in range(3)]
    half_broken = {**sources, "classes": dataset(segmentation_row("classes", "good", image), *missing)}
    items = list(MixtureDataset(half_broken, length=300, weights=dict.fromkeys(sources, 1), on_bad_row="skip"))
    assert abs(sum(item["source"] == "classes" for item in items) - 100) < 45


def partly_broken(num_bad, num_rows, tmp_path):
    image = image_file(tmp_path / "image.png")
    paths = [str(tmp_path / "missing.png")] * num_bad + [image] * (num_rows - num_bad)
    return dataset(*[segmentation_row("classes", index, path) for index, path in enumerate(paths)])


@pytest.mark.parametrize("num_bad", [4, 10, 40])
def test_more_than_one_percent_of_bad_rows_raises(sources, num_bad, tmp_path):
    broken = {**sources, "classes": partly_broken(num_bad, 100, tmp_path)}
    data = MixtureDataset(broken, length=3000, seed=1, on_bad_row="skip")
    with pytest.raises(ValueError, match="'classes': expected at most 1% of bad rows.*missing.png") as error:
        for index in range(len(data)):
            data[index]
    num_found, num_drawn = (int(word) for word in str(error.value).split() if word.isdigit())
    assert num_drawn >= 100 and num_found / num_drawn > 0.01
    # The others continue, and so does a worker that has not seen enough yet.
    others = MixtureDataset(broken, length=300, weights={"classes": 0, "reasons": 1, "talk": 1})
    assert sum(item["num_skipped"] for item in others) == 0
    assert len(list(MixtureDataset(broken, length=50, on_bad_row="skip"))) == 50


@pytest.mark.parametrize(
    ("num_bad", "num_rows", "fits"), [(1, 10, True), (3, 20, True), (4, 20, False), (2, 4, False)]
)
def test_a_small_source_may_have_a_few_bad_rows(tmp_path, num_bad, num_rows, fits):
    data = MixtureDataset({"classes": partly_broken(num_bad, num_rows, tmp_path)}, length=2000, on_bad_row="skip")
    if fits:
        assert sum(item["num_skipped"] for item in data) > 100
    else:
        with pytest.raises(ValueError, match="expected at most 1% of bad rows, or 3, got"):
            for index in range(len(data)):
                data[index]


def test_a_few_bad_rows_never_raise(tmp_path):
    data = MixtureDataset({"classes": partly_broken(1, 200, tmp_path)}, length=2000, on_bad_row="skip")
    assert 2 < sum(item["num_skipped"] for item in data) < 30


@pytest.mark.parametrize("on_bad_row", ["skip", "raise"])
def test_a_row_without_a_target_is_redrawn_but_is_not_bad(on_bad_row, tmp_path):
    image = image_file(tmp_path / "image.png")
    empty = {**segmentation_row("classes", "empty", image), "targets": []}
    rows = dataset(empty, segmentation_row("classes", "good", image))
    items = list(MixtureDataset({"classes": rows}, length=20, on_bad_row=on_bad_row))

    assert {item["image_id"] for item in items} == {"classes/good"}
    assert {item["num_skipped"] for item in items} == {0}
    with pytest.raises(ValueError, match="'classes/empty' of 'classes' .*expected a target"):
        EvaluationDataset(rows)[0]


def test_a_source_without_a_usable_row_raises_instead_of_looping(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(mixture, "MAX_DRAWS", 10)
    missing = dataset(segmentation_row("lost", 0, str(tmp_path / "missing.png")))
    with pytest.raises(ValueError, match="'lost': expected a usable row among 10, got 10 bad .*missing.png"):
        weights = {**dict.fromkeys(sources, 0), "lost": 1}
        MixtureDataset({**sources, "lost": missing}, weights=weights, length=1, on_bad_row="skip")[0]
    image = image_file(tmp_path / "image.png")
    empty = dataset({**segmentation_row("void", 0, image), "targets": []})
    with pytest.raises(ValueError, match="'void': expected a usable row among 10, got 0 bad"):
        MixtureDataset({"void": empty}, length=1)[0]
