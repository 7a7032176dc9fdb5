"""Protocols of benchmarks about nothing and about several objects, compared with the authors' code and rules."""

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

# What the originals give for `refs_and_answers(min_negative=1)` (a ref without a negative expression makes the second
# one divide by zero): `run_eval` in eval_sesame.py of see-say-segment/sesame at 91f1f2e4, which prints four
# digits, and `validate` in utils/validation.py of jianzongwu/robust-ref-seg at e7c7da6f, in single precision.
RECORDED = {
    "sesame": ({"ciou": 0.2235, "see_acc": 0.5183}, 5e-5),
    "ref_segformer": (
        {
            "miou": 0.3411021338775754,
            "oiou": 0.31647139903514816,
            "mrr": 0.4083333373069763,
            "riou": 0.2333552203141153,
        },
        1e-7,
    ),
}
# And for `answers_of_several_masks()`, with logits of -1 and 1: `ar_validate` in train_ds.py of MaverickRen/PixelLM at
# ebf07922, in single precision and with 1e-5 in denominators.
RECORDED_MASKS = {"giou": 0.3983885645866394, "ciou": 0.417758971452713}


def refs_and_answers(num_refs=40, seed=0, min_negative=0):
    """Refs with true and negative expressions, two per photo, and a mask or none as the answer to each expression."""
    rng = np.random.default_rng(seed)
    refs, answers = [], []
    for number in range(num_refs):
        target = rng.random(SIZE) < 0.4
        is_true = [True] * rng.integers(1, 4) + [False] * rng.integers(min_negative, 4)
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


@pytest.mark.parametrize("protocol", RECORDED)
def test_numbers_of_the_originals(protocol):
    expected, tolerance = RECORDED[protocol]
    metrics, _ = score(*refs_and_answers(min_negative=1), protocol)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=tolerance)


def test_intervals_are_over_photos_even_if_they_have_several_rows():
    refs, answers = refs_and_answers()
    metrics, scores = score(refs, answers, "generated")
    assert len({found.image_id for found in scores}) == 20 and len({found.row_id for found in scores}) == 40
    apart, _ = score([(str(n), *rest) for n, (_, *rest) in enumerate(refs)], answers, "generated")
    assert metrics["giou"] == apart["giou"] and metrics["giou_low"] != apart["giou_low"]


def answers_of_several_masks(num_questions=60, seed=0):
    """Masks due and given, one question per photo: moved by a pixel, in another order, some missing, some extra."""
    rng = np.random.default_rng(seed)

    def rectangle(top, left):
        mask = np.zeros(SIZE, bool)
        mask[top : top + rng.integers(3, 6), left : left + rng.integers(4, 8)] = True
        return mask

    questions = []
    for _ in range(num_questions):
        corners = rng.permutation([(0, 0), (0, 8), (6, 0), (6, 8)])
        number = rng.integers(1, 5)
        due = [rectangle(*corner) for corner in corners[:number]]
        given = [np.roll(mask, rng.integers(-1, 2, 2), (0, 1)) for mask in due if rng.random() < 0.8]
        given += [rectangle(*corner) for corner in corners[number:] if rng.random() < 0.4]
        questions.append((due, [given[index] for index in rng.permutation(len(given))]))
    return questions


MASKS = st.lists(arrays.arrays(bool, (3, 4)), max_size=4)


def score_masks(questions, protocol):
    rows, predictions = [], {}
    for number, (due, answer) in enumerate(questions):
        talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "[SEG] " * len(due)}]
        targets = [{"rle": encode_mask(mask)} for mask in due]
        rows.append(make_row("a.jpg", str(number), "drawn", "conversation", targets, messages=talk))
        predictions[f"{number}_0"] = QuestionPrediction("", [to_mask(mask) for mask in answer])
    dataset = EvaluationDataset(Dataset.from_list(rows, features=FEATURES))
    return score_predictions(dataset, predictions, [protocol])[0][""]["protocols"][protocol]


def test_several_masks_give_the_numbers_of_the_original():
    metrics = score_masks(answers_of_several_masks(), "pixel_lm")
    assert {name: metrics[name] for name in RECORDED_MASKS} == pytest.approx(RECORDED_MASKS, abs=5e-7)


@settings(max_examples=60, deadline=None)
@given(MASKS.filter(len), MASKS)
def test_masks_are_matched_as_well_as_any_order_can(due, given):
    def iou(a, b):
        return (a & b).sum() / max((a | b).sum(), 1)

    padded = [*given, *[np.zeros((3, 4), bool)] * max(len(due) - len(given), 0)]
    best = max(sum(map(iou, due, order)) for order in itertools.permutations(padded, len(due)))
    found = score_masks([(due, given)], "pixel_lm")
    right = sum(not mask.any() for mask in due)  # where nothing is due, an empty mask is right, too
    assert best - 1e-9 <= found["giou"] * found["num_masks"] <= best + right + 1e-9
    assert len(due) <= found["num_masks"] <= max(len(due), len(given)) and "n_acc" not in found


def test_swapped_masks_are_right_and_extra_ones_wrong():
    left, right = np.zeros((3, 4), bool), np.zeros((3, 4), bool)
    left[:, :2], right[:, 2:] = True, True
    assert score_masks([([left, right], [right, left])], "pixel_lm")["giou"] == 1
    assert score_masks([([left, right], [right, left])], "generated")["giou"] == 0
    found = score_masks([([left], [right, left])], "pixel_lm")
    assert (found["giou"], found["ciou"], found["num_masks"]) == (0.5, 0.5, 2)
    given = [left, np.zeros((3, 4), bool), right, right & False]
    assert score_masks([([left, right], given)], "pixel_lm")["giou"] == 1
