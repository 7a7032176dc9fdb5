"""The mixture of datasets: item k is a function of seed and k, weights hold, and bad rows are skipped or named."""

import io
import itertools
import json
import logging
import os
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
from datasets import Dataset, Image, IterableDataset
from fixtures.paths import REAL_SAMPLES, ROOT, STORIES
from fixtures.rows import HEIGHT, WIDTH, comparable, dataset, image_file, mask, segmentation_row, vqa_row
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lisa_hf.data import mixture
from lisa_hf.data.masks import Mask
from lisa_hf.data.mixture import EvaluationDataset, MixtureDataset, default_weights
from lisa_hf.data.rows import FEATURES, make_row


NO_ROWS = Dataset.from_dict({name: [] for name in FEATURES}, features=FEATURES)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three sources of 5, 3 and 4 rows: masks, one explained question, conversations."""
    image = image_file(tmp_path_factory.mktemp("images") / "image.png")
    explained = make_row(
        image,
        "reasons/0",
        "reasons",
        "reasoning",
        targets=[{"phrases": ["what rolls", "what is round"], "rle": mask(1)}],
        ignore=mask(2),
        explanation="It is round.",
    )
    return {
        "classes": dataset(*[segmentation_row("classes", index, image) for index in range(5)]),
        "reasons": dataset(explained, explained, explained),
        "talk": dataset(*[vqa_row("talk", index, image) for index in range(4)]),
    }


@given(seed=st.integers(0, 2**40), order=st.lists(st.integers(0, 2**20), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_an_item_is_a_function_of_seed_and_index_alone(sources, seed, order):
    data = MixtureDataset(sources, length=2**20 + 1, seed=seed)
    np.random.seed(0)
    expected = {index: comparable(data[index]) for index in order}
    np.random.seed(1)
    again = pickle.loads(pickle.dumps(data))
    for index in reversed(order):
        assert comparable(again[index]) == expected[index]
    # A longer mixture begins with the same items, so that a run can be extended.
    assert comparable(MixtureDataset(sources, length=2**21, seed=seed)[order[0]]) == expected[order[0]]


def test_items_do_not_depend_on_the_number_of_loader_workers(sources):
    data = MixtureDataset(sources, length=24, seed=3)
    expected = [comparable(data[index]) for index in range(24)]
    loader = DataLoader(data, batch_size=5, num_workers=2, collate_fn=list)
    assert [comparable(item) for batch in loader for item in batch] == expected


def test_another_seed_and_another_index_give_other_items(sources):
    def drawn(seed):
        return [(item["image_id"], str(item["questions"])) for item in MixtureDataset(sources, length=60, seed=seed)]

    assert len(set(drawn(0))) > 30
    assert sum(a == b for a, b in zip(drawn(0), drawn(1))) < 20


@given(index=st.integers(0, 9999), num_questions=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_every_seg_token_has_its_mask_of_the_size_of_the_image(sources, index, num_questions):
    item = MixtureDataset(sources, length=10_000, num_questions=num_questions)[index]

    assert item["image"].mode == "RGB" and item["image"].size == (WIDTH, HEIGHT)
    assert 1 <= len(item["questions"]) <= num_questions
    for question in item["questions"]:
        answers = [m["content"][0]["text"] for m in question.messages if m["role"] == "assistant"]
        assert sum(answer.count("[SEG]") for answer in answers) == len(question.masks)
        assert all(mask.draw().shape == (HEIGHT, WIDTH) for mask in question.masks)
    assert item["ignore"] == (Mask.from_rle(mask(2)) if item["source"] == "reasons" else None)
    assert item["num_skipped"] == 0


@pytest.mark.parametrize(
    "weights, shares",
    [
        (None, {"classes": 9 / 13, "reasons": 1 / 13, "talk": 3 / 13}),
        ({"talk": 1, "classes": 9, "reasons": 0}, {"classes": 0.9, "reasons": 0, "talk": 0.1}),
    ],
)
def test_sources_come_in_the_proportions_of_their_weights(sources, weights, shares):
    length = 900
    items = list(MixtureDataset(sources, length=length, weights=weights))
    counts = Counter(item["source"] for item in items)
    for name, share in shares.items():
        # Five standard deviations of a binomial count.
        assert abs(counts[name] - share * length) <= 5 * (share * (1 - share) * length) ** 0.5
    rows = Counter(item["image_id"] for item in items if item["source"] == "classes")
    assert len(rows) == 5 and min(rows.values()) > 0.6 * max(rows.values())


def test_lisa_draws_kinds_9_3_3_1_and_the_sources_of_a_kind_equally(sources):
    def of_task(task):
        return dataset({**sources["classes"].cast_column("image", Image(decode=False))[0], "task": task})

    # The table of LISA's training sets; a source whose image cannot be read has a kind all the same.
    names = {
        "semantic": ["ade20k", "cocostuff", "pascal_part", "paco_lvis", "mapillary"],
        "referring": ["refclef", "refcoco", "refcoco+", "refcocog"],
        "vqa": ["llava_instruct"],
        "reasoning": ["reason_seg"],
    }
    lisa = {name: of_task(task) for task, group in names.items() for name in group}
    weights = default_weights(lisa)
    assert list(weights) == list(lisa)
    for task, share in {"semantic": 9, "referring": 3, "vqa": 3, "reasoning": 1}.items():
        assert {weights[name] for name in names[task]} == {share / len(names[task])}
    assert MixtureDataset(lisa, length=1).probabilities.sum() == pytest.approx(1)
    np.testing.assert_allclose(MixtureDataset(lisa, length=1).probabilities, np.array([*weights.values()]) / 16)

    # Without VQA, the others keep their proportions; weights of one's own start from LISA's.
    del lisa["llava_instruct"]
    assert default_weights(lisa) == {name: weight for name, weight in weights.items() if name in lisa}
    data = MixtureDataset(lisa, length=1, weights=default_weights(lisa) | {"reason_seg": 12})
    assert dict(zip(data.names, data.probabilities))["reason_seg"] == 0.5
    with pytest.raises(ValueError, match="Source 'void': expected at least one row"):
        default_weights({"void": NO_ROWS})


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
    # The others go on, and so does a worker that has not seen enough yet.
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


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1"])
def test_images_of_every_mode_become_rgb(mode, tmp_path):
    image = image_file(tmp_path / "image", mode=mode, format="TIFF" if mode == "CMYK" else "PNG")
    assert EvaluationDataset(dataset(segmentation_row("classes", 0, image)))[0]["image"].mode == "RGB"


def test_a_photo_is_turned_upright_before_its_masks_are_compared(tmp_path):
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    image = image_file(tmp_path / "turned.jpg", size=(HEIGHT, WIDTH), exif=exif)
    assert EvaluationDataset(dataset(segmentation_row("classes", 0, image)))[0]["image"].size == (WIDTH, HEIGHT)


def photo_row(path, size, orientation=1):
    """A row about a photo of smooth colors; its EXIF orientation turns it to `size` (width, height)."""
    across, down = (np.linspace(0, 3, edge) for edge in (size if orientation < 5 else size[::-1]))
    colors = [np.sin(np.add.outer(down, across) * frequency) * 120 + 128 for frequency in (1, 2, 3)]
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = orientation
    PIL.Image.fromarray(np.stack(colors, axis=-1).astype(np.uint8)).save(path, exif=exif)
    targets = [{"phrases": ["sea"], "rle": mask(1, size[::-1])}]
    return make_row(str(path), "photos/0", "photos", "semantic", targets=targets)


@pytest.mark.parametrize(
    "size, min_decoded_edge, factor",
    [
        ((192, 128), 24, 8),
        ((192, 128), 25, 4),
        ((128, 192), 49, 2),
        ((192, 128), 97, 1),  # small enough
        ((192, 124), 24, 4),
        ((191, 128), 24, 1),  # no factor divides it
    ],
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_photo_is_decoded_at_reduced_scale(size, min_decoded_edge, factor, orientation, tmp_path):
    rows = dataset(photo_row(tmp_path / "photo.jpg", size, orientation))
    full = EvaluationDataset(rows)[0]
    item = MixtureDataset({"photos": rows}, length=1, min_decoded_edge=min_decoded_edge)[0]
    width, height = size
    assert full["image"].size == size and item["image"].size == (width // factor, height // factor)
    assert item["original_size"] == full["original_size"] == [height, width]
    assert {mask.size for question in item["questions"] for mask in question.masks} == {(height, width)}
    expected = np.asarray(full["image"].reduce(factor), dtype=float)
    assert np.abs(expected - np.asarray(item["image"])).mean() < (2 if factor > 1 else 1e-9)


def test_other_files_are_decoded_in_full(tmp_path):
    rows = dataset(photo_row(tmp_path / "photo.png", (192, 128)))
    plain, item = (MixtureDataset({"photos": rows}, length=1, min_decoded_edge=edge)[0] for edge in (None, 24))
    assert comparable(item) == comparable(plain)


def test_images_may_be_stored_in_the_rows(tmp_path):
    encoded = io.BytesIO()
    PIL.Image.new("RGB", (WIDTH, HEIGHT), "red").save(encoded, format="PNG")
    item = MixtureDataset({"made": dataset(segmentation_row("made", 0, encoded.getvalue()))}, length=1)[0]
    assert item["image"].getpixel((0, 0)) == (255, 0, 0)


def test_evaluation_goes_through_the_rows_in_order(sources):
    data = EvaluationDataset(sources["reasons"])
    assert len(data) == 3
    for item in data:
        (question,) = item["questions"]
        assert question.messages[0]["content"][1]["text"].startswith(" What is what rolls in this image?")
        assert question.masks == [Mask.from_rle(mask(1))] and item["ignore"] == Mask.from_rle(mask(2))
    assert [len(item["questions"]) for item in EvaluationDataset(sources["classes"])] == [4] * 5
    with pytest.raises(IndexError):
        data[3]


def test_settings_reach_the_questions(sources):
    explained = MixtureDataset({"reasons": sources["reasons"]}, length=20, explanatory_probability=1.0)
    assert all(not question.masks for item in explained for question in item["questions"])

    image = sources["classes"].cast_column("image", Image(decode=False))[0]["image"]["path"]
    twice = make_row(image, "0", "cups", "semantic", targets=[{"phrases": ["cup"], "rle": mask(i)} for i in range(2)])
    for merge_instances, expected in ((True, 1), (False, 2)):
        for data in (
            MixtureDataset({"cups": dataset(twice)}, length=1, merge_instances=merge_instances),
            EvaluationDataset(dataset(twice), merge_instances=merge_instances),
        ):
            assert len(data[0]["questions"]) == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weights": {"clases": 1.0}}, r"got `clases`. Did you mean `classes`\?"),
        ({"weights": {"classes": 1.0}}, r"got none for \['reasons', 'talk'\]"),
        ({"weights": {"classes": 1.0, "reasons": -1, "talk": 0}}, "0 or more"),
        ({"weights": dict.fromkeys(("classes", "reasons", "talk"), 0)}, "not all 0"),
        ({"weights": {"classes": float("nan"), "reasons": 1, "talk": 0}}, "finite"),
        ({"sources": {}}, "sources: expected at least one, got none"),
        ({"sources": {"void": NO_ROWS}}, "Source 'void': expected at least one row"),
        ({"sources": {"flow": IterableDataset.from_generator(list)}}, "'flow': .* Dataset, got IterableDataset"),
        ({"length": 0}, "length: expected 1 item or more, got 0"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"num_questions": 0}, "num_questions: expected 1 or more, got 0"),
        ({"explanatory_probability": -1}, r"in \[0, 1\], got -1"),
        ({"on_bad_row": "ignore"}, "'raise' or 'skip', got 'ignore'"),
        ({"min_decoded_edge": 0}, "min_decoded_edge: expected 1 pixel or more, got 0"),
    ],
)
def test_contradictory_arguments_are_refused(sources, arguments, message):
    with pytest.raises(ValueError, match=message):
        MixtureDataset(**{"sources": sources, "length": 10, **arguments})


def test_an_index_outside_is_refused(sources):
    data = MixtureDataset(sources, length=3)
    for index in (3, -1):
        with pytest.raises(IndexError):
            data[index]


def test_epochs_continue_the_sequence(sources):
    short, long = (MixtureDataset(sources, length=length, seed=3) for length in (4, 8))
    short.set_epoch(1)
    assert [comparable(short[index]) for index in range(4)] == [comparable(long[index]) for index in range(4, 8)]


def test_rows_that_a_short_run_draws_are_known_beforehand(sources):
    data = MixtureDataset(sources, length=4, seed=3)
    expected = {name: set() for name in sources}
    for epoch in range(2):
        data.set_epoch(epoch)
        for index in range(4 - epoch):
            item = data[index]
            expected[item["source"]].add(item["image_id"])
    drawn = data.drawn_rows(7)
    assert {name: set(rows["image_id"]) for name, rows in drawn.items()} == {k: v for k, v in expected.items() if v}
    assert data.drawn_rows(7)["classes"]._fingerprint == drawn["classes"]._fingerprint  # by which a cache knows them


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_workers_hear_of_a_new_epoch(sources, num_workers):
    data = MixtureDataset(sources, length=6, seed=3)
    expected = [comparable(item) for item in MixtureDataset(sources, length=12, seed=3)]
    loader = DataLoader(
        data, batch_size=2, num_workers=num_workers, collate_fn=list, persistent_workers=num_workers > 0
    )
    found = []
    for epoch in range(2):
        data.set_epoch(epoch)
        found += [comparable(item) for batch in loader for item in batch]
    assert found == expected


def anonymous_memory(_):
    """Bytes of this process that no file backs."""
    with open("/proc/self/smaps_rollup") as lines:
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous"))


def test_a_loader_worker_does_not_grow_with_the_annotations(tmp_path):
    image = image_file(tmp_path / "image.png")
    row = segmentation_row("classes", 0, image, explanation="x" * 50_000)
    memory, message = {}, {}
    for num_rows in (20, 2000):  # 1 and 100 MB
        cache_dir = str(tmp_path / str(num_rows))
        rows = Dataset.from_generator(lambda: itertools.repeat(row, num_rows), FEATURES, cache_dir=cache_dir)
        data = MixtureDataset({"classes": rows}, length=400)
        message[num_rows] = len(pickle.dumps(data))
        loader = DataLoader(data, batch_size=100, num_workers=1, collate_fn=anonymous_memory)
        *_, memory[num_rows] = loader
    assert message[2000] < message[20] + 1000 < 50_000  # what goes to a worker that is spawned
    assert memory[2000] < memory[20] + 30e6


# The names of LISA's training sets, with all of which it is drawn 9 : 3 : 3 : 1.
LISA_SOURCES = (
    *("ade20k", "cocostuff", "pascal_part", "paco_lvis", "mapillary"),
    *("refclef", "refcoco", "refcoco+", "refcocog"),
    *("llava_instruct", "reason_seg"),
)


@pytest.mark.slow
@pytest.mark.skipif(not (REAL_SAMPLES.is_dir() and STORIES.is_dir()), reason="needs the real samples and stories260K")
@pytest.mark.parametrize("streaming", [False, True])
def test_fifty_steps_over_the_whole_mixture_with_two_processes_and_two_workers(streaming, tmp_path):
    arguments = {
        "config": ROOT / "recipes" / "configs" / "real_samples.yaml",
        "data_dir": REAL_SAMPLES,
        "language_model": STORIES,
        "tokenizer": STORIES / "tokenizer.model",
        "output_dir": tmp_path / "run",
        "sources": json.dumps(dict.fromkeys(LISA_SOURCES)),
        "max_steps": 50,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 2,
        "use_cpu": True,
        "streaming": streaming,
    }
    environment = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [*launcher, str(ROOT / "recipes" / "train.py"), *(f"--{name}={value}" for name, value in arguments.items())],
        cwd=tmp_path,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    assert process.returncode == 0, process.stdout[-5000:]
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    losses = [entry["loss"] for entry in logs]
    assert state["global_step"] == 50 and np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    # The photo of one conversation is not there.
    assert 0 < logs[-1]["num_skipped_rows"] < 50
