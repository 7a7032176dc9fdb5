"""Metrics: parity with the original, ignore regions and empty masks, intervals, regrouping, several processes."""

import json
import math
import multiprocessing

import numpy as np
import pytest
import torch
from fixtures.paths import GOLDEN
from safetensors.torch import load_file
from transformers import EvalPrediction

from lisa_hf.evaluation.counts import PADDING, compute_metrics
from lisa_hf.evaluation.metrics import SegmentationMetric, intersection_and_union


CASES = json.loads((GOLDEN / "metrics.json").read_text())
ALL_CASES = CASES.pop("__all_samples_in_order__")
QUESTIONS = [  # intersections, unions, targets, [SEG] tokens, image
    ([648, 30], [648, 168], [648, 90], 2, 0),
    ([], [], [], 0, 0),
    ([0], [0], [0], 1, 1),
    ([0], [25], [25], 0, 2),
    ([], [], [], 1, 2),
    ([19], [24], [20], 1, 3),
    ([70], [136], [70], 1, 4),
]


@pytest.fixture(scope="module")
def golden_tensors():
    return load_file(GOLDEN / "metrics.safetensors")


@pytest.fixture
def metric(tmp_path):
    return SegmentationMetric(cache_dir=str(tmp_path))


def as_columns(questions):
    names = ("intersections", "unions", "targets", "num_seg_tokens", "images")
    return dict(zip(names, map(list, zip(*questions))))


def counts(golden_tensors, case):
    prediction, target = golden_tensors[f"{case}_pred"] > 0, golden_tensors[f"{case}_gt"]
    return tuple(count.tolist() for count in intersection_and_union(prediction, target))


@pytest.mark.parametrize("case", CASES)
def test_pixel_counts_equal_the_original(golden_tensors, case):
    expected = CASES[case]["per_mask"]
    intersections, unions = counts(golden_tensors, case)
    assert intersections == [mask["intersection"][1] for mask in expected]
    assert unions == [mask["union"][1] for mask in expected]


@pytest.mark.parametrize(
    "cases, expected", [([case], CASES[case]) for case in CASES] + [(ALL_CASES["order"], ALL_CASES)]
)
def test_giou_and_ciou_equal_the_original(golden_tensors, metric, cases, expected):
    for image, case in enumerate(cases):
        intersections, unions = counts(golden_tensors, case)
        targets = (golden_tensors[f"{case}_gt"] == 1).sum((-2, -1)).tolist()
        metric.add(
            intersections=intersections, unions=unions, targets=targets, num_seg_tokens=len(unions), images=image
        )
    result = metric.compute()
    assert result["giou"] == pytest.approx(expected["giou"], rel=1e-4)
    assert result["ciou"] == pytest.approx(expected["ciou"], rel=1e-4)
    assert result["num_masks"] == expected.get("total_masks", len(expected.get("per_mask", ())))


def test_counts_take_any_leading_shape_and_leave_ignored_pixels_out():
    prediction = torch.tensor([[True, True], [False, True]]).expand(3, 2, 2, 2)
    target = torch.tensor([[1, 255], [1, 0]], dtype=torch.uint8).expand(3, 2, 2, 2)
    intersection, union = intersection_and_union(prediction, target)
    assert intersection.dtype == union.dtype == torch.int64
    assert torch.equal(intersection, torch.full((3, 2), 1)) and torch.equal(union, torch.full((3, 2), 3))
    assert intersection_and_union(prediction[0, :0], target[0, :0])[0].shape == (0,)


def test_logits_and_wrong_sizes_are_refused():
    target = torch.zeros(1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"\(1, 4, 4\), got torch.float32 of shape \(1, 4, 4\)"):
        intersection_and_union(torch.zeros(1, 4, 4), target)
    with pytest.raises(ValueError, match=r"\(1, 4, 4\), got torch.bool of shape \(1, 2, 2\)"):
        intersection_and_union(torch.zeros(1, 2, 2, dtype=torch.bool), target)


def test_metrics_of_mixed_questions(metric):
    result = metric.compute(**as_columns(QUESTIONS))
    assert result["giou"] == pytest.approx((1 + 30 / 168 + 1 + 0 + 19 / 24 + 70 / 136) / 6)
    assert result["ciou"] == pytest.approx((648 + 30 + 19 + 70) / (648 + 168 + 25 + 24 + 136))
    assert result["seg_rate"] == 4 / 5 and result["false_seg_rate"] == 1 / 2
    assert result["num_masks"] == 6 and result["num_questions"] == 7
    # IoU of the masks with a target: 1, 30/168, 0, 19/24, 70/136.
    assert [result[f"p@{threshold}"] for threshold in (0.5, 0.6, 0.7, 0.8, 0.9)] == [0.6, 0.4, 0.4, 0.2, 0.2]


def test_accuracy_where_there_is_no_target(metric):
    questions = [  # two without a target, one of them noticed; three with one, one of them missed
        ([0], [0], [0], 1, 0),
        ([0], [7], [0], 1, 1),
        ([5], [9], [9], 1, 2),
        ([0], [12], [4], 1, 3),  # predicted, but elsewhere
        ([0], [4], [4], 0, 4),
    ]
    result = metric.compute(**as_columns(questions))
    assert (result["n_acc"], result["t_acc"]) == (1 / 2, pytest.approx(2 / 3))
    assert result["giou"] == pytest.approx((1 + 0 + 5 / 9 + 0 + 0) / 5)
    assert result["ciou"] == pytest.approx(5 / (7 + 9 + 12 + 4))
    assert result["p@0.5"] == pytest.approx(1 / 3)
    assert not {"n_acc", "t_acc"} & metric.compute(**as_columns(questions[2:])).keys()


@pytest.mark.parametrize("questions", [[], [([], [], [], 1, 0), ([], [], [], 0, 1)]])
def test_no_masks_give_zeros_not_nan(metric, questions):
    if questions:
        metric.add_batch(**as_columns(questions))
    result = metric.compute()
    assert all(math.isfinite(value) for value in result.values())
    assert result["giou"] == result["giou_high"] == result["num_masks"] == 0
    assert result["num_questions"] == len(questions) and json.dumps(result)


def test_counts_that_do_not_match_are_refused(metric):
    with pytest.raises(ValueError, match="question 1: .*got 2 intersections, 1 unions and 1 targets"):
        metric.compute(**as_columns([([1], [2], [2], 1, 0), ([1, 1], [2], [2], 1, 1)]))


def test_intervals_resample_images_and_follow_the_seed(tmp_path):
    ious = np.random.default_rng(1).uniform(size=200)

    def interval(repeats, seed=0):
        questions = [
            ([int(1000 * iou)], [1000], [1000], 1, image) for image, iou in enumerate(ious) for _ in range(repeats)
        ]
        result = SegmentationMetric(cache_dir=str(tmp_path)).compute(**as_columns(questions), bootstrap=500, seed=seed)
        assert result["giou_low"] < result["giou"] < result["giou_high"]
        # All unions are equal, so the two metrics are too, and they see the same resamples.
        assert [result[f"ciou{end}"] for end in ("", "_low", "_high")] == pytest.approx(
            [result[f"giou{end}"] for end in ("", "_low", "_high")]
        )
        return result["giou_low"], result["giou_high"]

    low, high = interval(repeats=1)
    assert high - low == pytest.approx(2 * 1.96 * ious.std() / 200**0.5, rel=0.2)
    assert interval(repeats=4) == pytest.approx((low, high))  # asking the same again adds no information
    assert interval(repeats=1) == (low, high) != interval(repeats=1, seed=1)


def test_compute_metrics_regroups_masks_by_question():
    # Three images: two questions with 1 and 2 masks; one without; 0, 3 and 1 masks.
    line = {
        "masks_due": [[1, 2, PADDING], [0, PADDING, PADDING], [0, 3, 1]],
        "num_seg_tokens": [[1, 1, PADDING], [2, PADDING, PADDING], [0, 5, 0]],
        "targets": [[8, 10, 0, PADDING], [PADDING] * 4, [9, 9, 9, 9]],
        "intersections": [[5, 10, 0, PADDING], [PADDING] * 4, [1, 2, 3, 4]],
        "unions": [[10, 10, 0, PADDING], [PADDING] * 4, [10, 10, 10, 10]],
        "generated_intersections": [[10, 10, 0, PADDING], [PADDING] * 4, [0, 0, 0, 0]],
        "generated_unions": [[10, 10, 5, PADDING], [PADDING] * 4, [1, 1, 1, 1]],
    }
    lines = {name: np.array(values) for name, values in line.items()}
    metrics = compute_metrics(EvalPrediction(predictions=lines, label_ids=lines["masks_due"]))
    assert metrics["giou"] == pytest.approx((0.5 + 1 + 1 + 0.1 + 0.2 + 0.3 + 0.4) / 7)
    assert metrics["ciou"] == pytest.approx(25 / 60)
    assert (metrics["num_masks"], metrics["num_questions"]) == (7, 6)
    assert metrics["generated_giou"] == pytest.approx(2 / 7)
    assert metrics["generated_ciou"] == pytest.approx(20 / 29)
    assert metrics["generated_seg_rate"] == pytest.approx(3 / 4)
    assert metrics["generated_false_seg_rate"] == pytest.approx(1 / 2)
    assert "seg_rate" not in metrics
    assert metrics["n_acc"] == metrics["t_acc"] == 1  # of the only mask without a target, and of all others
    # The intervals resample images, so they tell which masks belong together.
    by_question = SegmentationMetric(keep_in_memory=True).compute(
        intersections=[[5], [10, 0], [], [], [1, 2, 3], [4]],
        unions=[[10], [10, 0], [], [], [10, 10, 10], [10]],
        targets=[[8], [10, 0], [], [], [9, 9, 9], [9]],
        num_seg_tokens=[1, 1, 2, 0, 5, 0],
        images=[0, 0, 1, 2, 2, 2],
    )
    intervals = ("giou_low", "giou_high", "ciou_low", "ciou_high")
    assert [metrics[name] for name in intervals] == [by_question[name] for name in intervals]

    teacher_forced = {name: lines[name] for name in ("masks_due", "targets", "intersections", "unions")}
    metrics = compute_metrics(EvalPrediction(predictions=teacher_forced, label_ids=lines["masks_due"]))
    assert not any(name.startswith("generated") for name in metrics)


def compute_share(process_id, num_process, cache_dir, results):
    metric = SegmentationMetric(
        num_process=num_process, process_id=process_id, experiment_id="shares", cache_dir=cache_dir, timeout=60
    )
    share = QUESTIONS[process_id :: num_process - 1] if process_id < num_process - 1 else []
    if share:
        metric.add_batch(**as_columns(share))
    results.put((process_id, metric.compute()))


def test_processes_add_up_exactly_also_when_one_has_nothing(metric, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=compute_share, args=(i, 3, str(tmp_path), results)) for i in range(3)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert found[1] is None and found[2] is None
    assert found[0] == pytest.approx(metric.compute(**as_columns(QUESTIONS)), rel=1e-12)
