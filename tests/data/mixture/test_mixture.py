"""The mixture: items are a function of seed and index, weights, evaluation items, arguments."""

import pickle
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, Image, IterableDataset
from fixtures.rows import HEIGHT, WIDTH, comparable, dataset, mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lisa_hf.data.masks import Mask
from lisa_hf.data.mixture import EvaluationDataset, MixtureDataset, default_weights
from lisa_hf.data.rows import FEATURES, make_row


NO_ROWS = Dataset.from_dict({name: [] for name in FEATURES}, features=FEATURES)


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
