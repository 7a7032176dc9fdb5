"""Comparing two models: intervals that cover, a sign test that is exact, and questions that are the same."""

import dataclasses
import json

import numpy as np
import pytest
from fixtures.paths import ROOT

from lisa_hf.evaluation.benchmarks import QuestionScore, read_scores, write_scores
from lisa_hf.evaluation.comparison import compare_evaluations, compare_scores, read_comparison, sign_test
from lisa_hf.evaluation.metrics import SegmentationMetric
from lisa_hf.evaluation.protocols import PROTOCOLS
from lisa_hf.evaluation.report import results_page


GENERATED = PROTOCOLS["generated"]


def simulate(rng: np.random.Generator, num_images: int, shift: float = 0.0) -> list[QuestionScore]:
    """Scores of one to three similar masks per image: their IoU is that of the image plus some noise."""
    scores = []
    for image in range(num_images):
        quality = np.clip(rng.beta(4, 2) + shift, 0, 1)
        for number in range(rng.integers(1, 4)):
            iou = np.clip(quality + rng.normal(0, 0.05), 0, 1)
            union = int(rng.integers(1000, 5000))
            intersection = round(iou * union)
            target = (union + intersection) // 2
            scores.append(QuestionScore(f"{image}_{number}", str(image), [intersection], [union], [target], 1))
    return scores


def test_intervals_of_a_metric_cover_its_expectation():
    rng = np.random.default_rng(0)
    expected = np.mean([np.mean([s.intersections[0] / s.unions[0] for s in simulate(rng, 3000)]) for _ in range(3)])
    covered = []
    for _ in range(100):
        scores = simulate(rng, 40)
        found = SegmentationMetric(keep_in_memory=True).compute(
            **{key: [getattr(s, key) for s in scores] for key in ("intersections", "unions", "targets")},
            num_seg_tokens=[1] * len(scores),
            images=[int(s.image_id) for s in scores],
            bootstrap=200,
        )
        covered.append(found["giou_low"] <= expected <= found["giou_high"])
    # 95% are promised; 100 trials tell it to 2%, and a percentile interval of 40 images is a bit short.
    assert 0.90 <= np.mean(covered) <= 0.99


def test_intervals_of_a_difference_cover_it():
    rng = np.random.default_rng(1)
    covered, significant = [], []
    for _ in range(80):
        first = simulate(rng, 40)
        other = [
            dataclasses.replace(score, intersections=[max(0, score.intersections[0] - int(rng.integers(0, 101)))])
            for score in first
        ]
        other = [dataclasses.replace(s, targets=f.targets) for s, f in zip(other, first)]
        expected = np.mean([-50 / score.unions[0] for score in first])  # up to the images that were drawn
        found = compare_scores(first, other, GENERATED, resamples=200)
        covered.append(found.giou[1] <= expected <= found.giou[2])
        significant.append(found.p_value < 0.05 and found.num_worse > found.num_better)
    assert np.mean(covered) >= 0.9 and all(significant)


def test_a_model_does_not_differ_from_itself(tmp_path):
    scores = simulate(np.random.default_rng(2), 10)
    found = compare_scores(scores, scores[::-1], GENERATED)
    assert found.giou == found.ciou == (0.0, 0.0, 0.0) and found.p_value == 1.0
    assert (found.num_better, found.num_worse, found.num_equal) == (0, 0, 10)
    write_scores(tmp_path / "scores.jsonl", {"generated": scores})
    assert read_scores(tmp_path / "scores.jsonl") == {"generated": scores}


def test_differences_are_those_of_the_metrics():
    rng = np.random.default_rng(3)
    first = simulate(rng, 20)
    other = [
        dataclasses.replace(s, intersections=[s.intersections[0] // 2], num_seg_tokens=int(rng.integers(2)))
        for s in first
    ]
    metrics = []
    for scores in (first, other):
        columns = {key: [getattr(s, key) for s in scores] for key in ("intersections", "unions", "targets")}
        columns |= {"num_seg_tokens": [s.num_seg_tokens for s in scores], "images": [int(s.image_id) for s in scores]}
        metrics.append(SegmentationMetric(keep_in_memory=True).compute(**columns))
    found = compare_scores(first, other, GENERATED)
    assert found.giou[0] == pytest.approx(metrics[1]["giou"] - metrics[0]["giou"])
    assert found.ciou[0] == pytest.approx(metrics[1]["ciou"] - metrics[0]["ciou"])


def test_other_questions_and_other_truth_are_refused():
    scores = simulate(np.random.default_rng(4), 4)
    with pytest.raises(ValueError, match="the same questions"):
        compare_scores(scores, scores[1:], GENERATED)
    changed = [dataclasses.replace(scores[0], targets=[7]), *scores[1:]]
    with pytest.raises(ValueError, match="the same true masks, got others in 0_0"):
        compare_scores(scores, changed, GENERATED)


@pytest.mark.parametrize(
    ("better", "worse", "p_value"), [(0, 0, 1.0), (3, 3, 1.0), (5, 0, 2 / 32), (8, 2, 112 / 1024)]
)
def test_sign_test_is_exact(better, worse, p_value):
    assert sign_test(better, worse) == sign_test(worse, better) == pytest.approx(p_value)


def test_an_evaluation_that_failed_has_no_results(tmp_path):
    (tmp_path / "evaluation.json").write_text('{"model": "m", "settings": {}, "benchmarks": {}}')
    with pytest.raises(ValueError, match="with results, got none. Start recipes/eval.py again"):
        compare_evaluations([tmp_path])


@pytest.fixture
def evaluations(tmp_path):
    """Directories of two evaluations of one benchmark."""
    metrics = {metric + end: 0.5 for metric in ("giou", "ciou") for end in ("", "_low", "_high")}
    for name in ("one", "two"):
        protocols = {"generated": {"num_questions": 6, **metrics}}
        result = {"num_items": 6, "split": "val", "protocols": protocols}
        content = {"model": f"/home/somebody/{name}", "settings": {}, "benchmarks": {"mine": result}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(json.dumps(content))
        write_scores(tmp_path / name / "scores_mine.jsonl", {"generated": simulate(np.random.default_rng(5), 6)})
    return tmp_path / "one", tmp_path / "two"


def test_what_others_see_of_a_comparison(evaluations):
    found = compare_evaluations([*evaluations])
    assert [entry["num_equal"] for entry in found["differences"]] == [6]
    assert [evaluation["model"] for evaluation in found["evaluations"].values()] == ["<local>/one", "<local>/two"]


def test_directories_of_the_same_name_keep_their_differences(evaluations, tmp_path):
    """As outputs/RUN/evaluation, also given by absolute paths, which are not shared."""
    moved = [tmp_path / "runs" / directory.name / "evaluation" for directory in evaluations]
    for directory, target in zip(evaluations, moved):
        target.parent.mkdir(parents=True)
        directory.rename(target)
    found = compare_evaluations(moved)
    assert [*found["evaluations"]] == ["one/evaluation", "two/evaluation"]
    page = results_page([found])
    assert "0 / 0 / 6" in page and "## one/evaluation, two/evaluation" in page and str(tmp_path) not in page


def test_paths_that_differ_in_a_hidden_part_count(evaluations):
    for directory in evaluations:
        path = directory / "evaluation.json"
        content = json.loads(path.read_text())
        content["benchmarks"]["mine"]["images"] = f"/data/{directory.name}/photos"
        path.write_text(json.dumps(content))
    page = results_page([compare_evaluations([*evaluations])])
    assert "**two was evaluated differently from one**: mine.images." in page and "/data" not in page


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("evaluation.json", "{", "two/evaluation.json: expected an evaluation that recipes/eval.py wrote"),
        ("evaluation.json", "[]", "expected an evaluation that recipes/eval.py wrote"),
        ("evaluation.json", '{"model": "m"}', "expected an evaluation that recipes/eval.py wrote"),
        ("scores_mine.jsonl", "{", "scores_mine.jsonl, line 1: expected a score"),
        ("scores_mine.jsonl", '{"protocol": "generated", "question_id": "0_0"}', "line 1: expected a score"),
        ("scores_mine.jsonl", "", "expected the scores of evaluation.json, got none by generated"),
    ],
)
def test_damaged_evaluations_are_refused(file, content, match, evaluations):
    (evaluations[1] / file).write_text(content)
    with pytest.raises(ValueError, match=match):
        compare_evaluations([*evaluations])


def test_an_evaluation_is_not_compared_with_itself(evaluations):
    with pytest.raises(ValueError, match="expected different directories, got one twice"):
        compare_evaluations([evaluations[0], evaluations[1] / ".." / "one"])


def test_protocols_of_another_version_are_refused(evaluations):
    for directory in evaluations:
        for file in directory.iterdir():
            file.write_text(file.read_text().replace('"generated"', '"forced"'))
    with pytest.raises(ValueError, match="expected protocols among lisa, .*, got forced. Evaluate again"):
        compare_evaluations([*evaluations])


def test_the_page_of_results_is_made_of_its_files(tmp_path):
    """`python recipes/compare.py docs/results/*.json --output docs/results.md --overwrite` makes it."""
    comparisons = [read_comparison(path) for path in sorted((ROOT / "docs" / "results").glob("*.json"))]
    assert comparisons and (ROOT / "docs" / "results.md").read_text() == results_page(comparisons)
    (tmp_path / "other.json").write_text('{"title": "a", "evaluations": 3, "changed": {}, "differences": []}')
    with pytest.raises(ValueError, match="other.json: expected a file written by recipes/compare.py --json"):
        read_comparison(tmp_path / "other.json")
