"""Protocols of benchmarks about nothing and about several objects, beside the authors' code written out plainly."""

import itertools

import numpy as np
import pytest
from datasets import Dataset
from fixtures.scored import to_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lisa_hf.data.masks import encode_mask
from lisa_hf.data.mixture import EvaluationDataset
from lisa_hf.data.rows import FEATURES, make_row
from lisa_hf.evaluation.benchmarks import markdown_table, score_predictions
from lisa_hf.evaluation.predictions import QuestionPrediction


SIZE = (12, 16)


def refs_and_answers(num_refs=40, seed=0):
    """Refs with true and negative expressions, two per photo, and a mask or none as the answer to each expression."""
    rng = np.random.default_rng(seed)
    refs, answers = [], []
    for number in range(num_refs):
        target = rng.random(SIZE) < 0.4
        is_true = [True] * rng.integers(1, 4) + [False] * rng.integers(0, 4)
        refs.append((str(number // 2), target, is_true))
        choices = [None, np.zeros(SIZE, bool), target, rng.random(SIZE) < 0.3]
        answers.append([choices[rng.integers(4)] for _ in is_true])
    return refs, answers


def score(refs, answers, protocol):
    rows = []
    for image_id, target, is_true in refs:
        phrases = {truth: [f"{truth} {k}" for k in range(is_true.count(truth))] for truth in (True, False)}
        targets = [{"phrases": phrases[True], "rle": encode_mask(target)}]
        if phrases[False]:
            targets.append({"phrases": phrases[False], "rle": encode_mask(np.zeros(SIZE, bool))})
        rows.append(make_row("a.jpg", image_id, "drawn", "referring", targets))
    dataset = EvaluationDataset(Dataset.from_list(rows, features=FEATURES), merge_instances=False)
    predictions = {
        f"{row_id}_{number}": QuestionPrediction("", [] if mask is None else [to_mask(mask)])
        for row_id, masks in zip(dataset.image_ids, answers)
        for number, mask in enumerate(masks)
    }
    results, scores = score_predictions(dataset, predictions, [protocol])
    return results[""]["protocols"][protocol], scores[protocol]


def test_sesame_counts_all_pixels_and_sees_what_is_there():
    refs, answers = refs_and_answers()
    intersection = union = correct = total = 0
    for (_, target, is_true), masks in zip(refs, answers):
        for truth, mask in zip(is_true, masks):
            truth_mask = target & truth
            mask = np.zeros(SIZE, bool) if mask is None else mask
            intersection, union = intersection + (mask & truth_mask).sum(), union + (mask | truth_mask).sum()
            correct, total = correct + (mask.any() == truth), total + 1
    metrics, _ = score(refs, answers, "sesame")
    assert metrics["ciou"] == pytest.approx(intersection / union, abs=1e-12)
    assert metrics["see_acc"] == pytest.approx(correct / total, abs=1e-12)
    assert "| See |" in markdown_table({"fprefcoco_val": {"protocols": {"sesame": metrics}}})


def test_ref_segformer_averages_over_refs():
    refs, answers = refs_and_answers()
    means, recalls, robust, sums = [], [], [], np.zeros(2)
    for (_, target, is_true), masks in zip(refs, answers):
        masks = [np.zeros(SIZE, bool) if mask is None else mask for mask in masks]
        true = [mask for mask, truth in zip(masks, is_true) if truth]
        negative = [mask for mask, truth in zip(masks, is_true) if not truth]
        pixels = np.array([((mask & target).sum(), (mask | target).sum()) for mask in true])
        means.append(np.mean(pixels[:, 0] / pixels[:, 1]))
        sums += pixels.sum(0)
        robust.append(pixels[:, 0].sum() / (pixels[:, 1].sum() + sum(mask.sum() for mask in negative)))
        if negative:
            recalls.append(np.mean([not mask.any() for mask in negative]))
    metrics, _ = score(refs, answers, "ref_segformer")
    expected = {"miou": np.mean(means), "oiou": sums[0] / sums[1], "mrr": np.mean(recalls), "riou": np.mean(robust)}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert not expected.keys() & score(refs, answers, "generated")[0].keys()


def test_intervals_are_over_photos_even_if_they_have_several_rows():
    refs, answers = refs_and_answers()
    metrics, scores = score(refs, answers, "generated")
    assert len({found.image_id for found in scores}) == 20 and len({found.row_id for found in scores}) == 40
    apart, _ = score([(str(n), *rest) for n, (_, *rest) in enumerate(refs)], answers, "generated")
    assert metrics["giou"] == apart["giou"] and metrics["giou_low"] != apart["giou_low"]


MASKS = st.lists(arrays.arrays(bool, (3, 4)), max_size=4)


def score_masks(due, given, protocol):
    talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "[SEG] " * len(due)}]
    row = make_row("a.jpg", "1", "drawn", "conversation", [{"rle": encode_mask(mask)} for mask in due], messages=talk)
    dataset = EvaluationDataset(Dataset.from_list([row], features=FEATURES))
    prediction = {"1_0": QuestionPrediction("", [to_mask(mask) for mask in given])}
    return score_predictions(dataset, prediction, [protocol])[0][""]["protocols"][protocol]


@settings(max_examples=60, deadline=None)
@given(MASKS.filter(len), MASKS)
def test_masks_are_matched_as_well_as_any_order_can(due, given):
    def iou(a, b):
        return (a & b).sum() / max((a | b).sum(), 1)

    padded = [*given, *[np.zeros((3, 4), bool)] * max(len(due) - len(given), 0)]
    best = max(sum(map(iou, due, order)) for order in itertools.permutations(padded, len(due)))
    found = score_masks(due, given, "pixel_lm")
    right = sum(not mask.any() for mask in due)  # where nothing is due, an empty mask is right, too
    assert best - 1e-9 <= found["giou"] * found["num_masks"] <= best + right + 1e-9
    assert len(due) <= found["num_masks"] <= max(len(due), len(given)) and "n_acc" not in found


def test_swapped_masks_are_right_and_extra_ones_wrong():
    left, right = np.zeros((3, 4), bool), np.zeros((3, 4), bool)
    left[:, :2], right[:, 2:] = True, True
    assert score_masks([left, right], [right, left], "pixel_lm")["giou"] == 1
    assert score_masks([left, right], [right, left], "generated")["giou"] == 0
    found = score_masks([left], [right, left], "pixel_lm")
    assert (found["giou"], found["ciou"], found["num_masks"]) == (0.5, 0.5, 2)
    assert score_masks([left, right], [left, np.zeros((3, 4), bool), right, right & False], "pixel_lm")["giou"] == 1
