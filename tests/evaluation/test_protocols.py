"""Protocols: published ones equal their own code, and each gives the right result for clear-cut answers."""

import numpy as np
import pytest
import torch
from fixtures.scored import evaluation_dataset, predict, synthetic_answers, to_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lisa_hf.evaluation.benchmarks import intersection_and_union_of_runs, score_predictions
from lisa_hf.evaluation.metrics import intersection_and_union
from lisa_hf.evaluation.protocols import PROTOCOLS


# What the originals print for `synthetic_answers`: calculate_iou.py and calculate_iou_with_bbox_nonobj.py of
# JIA-Lab-research/VisionReasoner at c0131322, and refer_evaluation.py of henghuiding/ReLA at 3ca95519.
RECORDED = {
    "seg_zero": {"giou": 0.3772, "ciou": 0.4335},
    "vision_reasoner": {"giou": 0.3939, "ciou": 0.4335, "n_acc": 0.0833},
    "gres": {
        "giou": 0.3939050056387149,
        "ciou": 0.4335430593786866,
        "t_acc": 0.8541666666666666,
        "n_acc": 0.08333333333333333,
        "p@0.7": 0.4375,
        "p@0.8": 0.375,
        "p@0.9": 0.29166666666666668,
    },
}
PIXELS = arrays.arrays(bool, (5, 7))


def results_of(targets, answers, ignored=None, **row) -> dict[str, dict]:
    dataset = evaluation_dataset(targets, ignored, **row)
    results, _ = score_predictions(dataset, predict(answers), PROTOCOLS)
    return results[""]["protocols"]


@pytest.mark.parametrize("protocol", RECORDED)
def test_numbers_of_the_originals(protocol):
    found = results_of(*synthetic_answers())[protocol]
    tolerance = 1e-12 if protocol == "gres" else 5e-5  # the others print four digits
    assert {name: found[name] for name in RECORDED[protocol]} == pytest.approx(RECORDED[protocol], abs=tolerance)


@given(PIXELS, PIXELS, st.none() | PIXELS)
def test_counting_runs_equals_counting_pixels(predicted, target, ignored):
    labels = target.astype(np.uint8)
    if ignored is not None:
        labels[ignored & ~target] = 255
    expected = intersection_and_union(torch.from_numpy(predicted), torch.from_numpy(labels))
    found = intersection_and_union_of_runs(
        to_mask(predicted), to_mask(target), None if ignored is None else to_mask(ignored)
    )
    assert found == (*map(int, expected), target.sum())


@settings(max_examples=25, deadline=None)
@given(st.lists(PIXELS, min_size=1, max_size=4))
def test_perfect_answers(targets):
    """What is due is given; where nothing is due, nothing is answered."""
    results = results_of(targets, [[target] if target.any() else [] for target in targets])
    for name, metrics in results.items():
        is_empty = np.array([not target.any() for target in targets])
        giou = 1 - is_empty.mean() if name == "seg_zero" else 1.0
        assert metrics["giou"] == pytest.approx(giou), name
        assert metrics["ciou"] == (0.0 if is_empty.all() else 1.0), name


@settings(max_examples=25, deadline=None)
@given(st.lists(PIXELS.filter(np.any), min_size=1, max_size=4))
def test_answers_without_masks_and_swapped_ones(targets):
    for metrics in results_of(targets, [[] for _ in targets]).values():
        assert metrics["giou"] == metrics["ciou"] == 0 and metrics.get("seg_rate", 0) == 0
    for metrics in results_of(targets, [[~target] for target in targets]).values():
        assert metrics["giou"] == metrics["ciou"] == 0


def test_an_empty_mask_where_nothing_is_due():
    nothing = np.zeros((2, 3), dtype=bool)
    results = results_of([nothing, nothing], [[nothing], []])
    expected = {"lisa": 1.0, "generated": 1.0, "seg_zero": 0.0, "vision_reasoner": 0.5, "gres": 0.5}
    assert {name: results[name]["giou"] for name in expected} == expected
    assert {name: results[name]["n_acc"] for name in ("generated", "gres")} == {"generated": 1.0, "gres": 0.5}


def test_a_prediction_of_ignored_pixels_alone():
    target = np.array([[True, False, False]])
    ignored = np.array([[False, True, False]])
    results = results_of([target], [[target | ignored]], [ignored])
    assert results["generated"]["giou"] == results["gres"]["giou"] == 1.0
    assert results["seg_zero"]["giou"] == 0.5  # there are no ignored pixels


def test_masks_are_merged_by_the_protocols_of_others():
    left, right = np.array([[True, False]]), np.array([[False, True]])
    results = results_of([left | right], [[left, right]])
    assert results["generated"]["giou"] == 0.5  # the first mask counts
    assert results["gres"]["giou"] == results["seg_zero"]["giou"] == 1.0


def test_texts_of_protocols():
    target = np.ones((1, 1), dtype=bool)
    dataset = evaluation_dataset([target], task="reasoning", phrases=["What Cuts?", "the knife"], is_sentence=True)
    row = dataset.rows[0]
    asked = {q.prompt: q.texts for q in dataset.questions(row)}
    assert asked == {
        "What Cuts? Please output segmentation mask.": {"first", "all", "one_per_object"},
        "what cuts Please output segmentation mask.": {"normalized"},
        "the knife Please output segmentation mask.": {"all"},
    }
    assert [q.phrase for q in dataset.questions(row)] == ["What Cuts?", "what cuts", "the knife"]
    # Referring expressions are in lower case already: one question is asked for several protocols.
    dataset = evaluation_dataset([target], phrases=["The Left one", "left"])
    first, second = dataset.questions(dataset.rows[0])
    assert first.texts == {"first", "all", "one_per_object", "normalized"} and second.texts == {"first", "all"}
