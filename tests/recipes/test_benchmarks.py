"""The benchmark is fair: its baseline computes the same loss and gradients at the original's cost."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import growth
import pytest
import rows
import torch
from fixtures.paths import ROOT
from growth import growth_table, measure_growth, plot_growth
from measure import Benchmark
from models import SIZES


RECIPE = ROOT / "recipes" / "benchmarks" / "step.py"
METRICS = {
    *("gflop_per_step", "gflop_by_part", "wall_s", "cpu_s", "seconds_by_part", "peak_memory_mb", "speedup"),
    *("speedup_cpu", "images_per_s", "tokens_per_s", "loss", "gradient_error"),
}


def run(tmp_path, *arguments: str) -> tuple[dict, str]:
    path = tmp_path / "benchmark.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RECIPE), "--device", "cpu", "--json", str(path), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text()), result.stdout


def assert_equal_results(variants: dict[str, dict]):
    first, *_ = variants.values()
    for name, metrics in variants.items():
        assert metrics.keys() == METRICS
        assert metrics["loss"] == pytest.approx(first["loss"], rel=1e-5), name
        assert metrics["gradient_error"] < 1e-4, name


def test_variants_agree_and_cost_less(tmp_path):
    report, table = run(tmp_path, "--size", "tiny", "--repeats", "1", "--features")
    variants = {name: report.pop(name) for name in ("reference", "candidate", "cached")}
    features = report.pop("features")
    assert report.keys() == {"speedup", "speedup_cached", "generation"}
    assert report["generation"]["equal_answers"] == 16 and report["generation"]["speedup"] > 1
    assert_equal_results(variants)
    reference, candidate, cached = variants.values()
    for metrics in variants.values():
        assert sum(metrics["gflop_by_part"].values()) == pytest.approx(metrics["gflop_per_step"])
        assert metrics["seconds_by_part"].keys() == metrics["gflop_by_part"].keys()
    parts, reference_parts = candidate["gflop_by_part"], reference["gflop_by_part"]
    assert parts["vision tower"] == pytest.approx(reference_parts["vision tower"] / 3)  # once per image
    assert parts["mask encoder"] == pytest.approx(reference_parts["mask encoder"])
    assert parts["vocabulary"] < 0.3 * reference_parts["vocabulary"]
    assert parts["backward and rest"] < 0.6 * reference_parts["backward and rest"]
    assert cached["gflop_by_part"]["mask encoder"] == cached["gflop_by_part"]["vision tower"] == 0
    assert candidate["peak_memory_mb"] > cached["peak_memory_mb"] > 1
    assert "times faster" in table

    # From the reference to this project, each feature makes a step cheaper, or, where it is about memory, leaves it.
    assert_equal_results(features)
    steps = {name: metrics["gflop_per_step"] for name, metrics in features.items()}
    for name, before, after in zip(list(steps)[1:], steps.values(), list(steps.values())[1:]):
        cheaper = name in ("+ images_once", "+ labels_only", "+ packing", "+ no_recomputation")
        assert after < before if cheaper else after == pytest.approx(before, rel=0.05), name
    assert steps["reference"] == reference["gflop_per_step"]
    assert list(steps.values())[-1] == pytest.approx(candidate["gflop_per_step"], rel=0.01)


def test_a_packed_row_grows_with_its_questions_alone():
    """A row of T tokens costs a T + b T^2, and T is that of the prefix once and of each question's own tokens."""

    def gflop(num_questions: int, variant: str) -> float:
        benchmark = Benchmark(replace(SIZES["tiny"], num_questions=num_questions))
        return benchmark.count(variant)[0]["gflop_by_part"]["language model"]

    size = SIZES["tiny"]
    prefix, own = size.system_length + size.num_image_tokens, size.question_length + size.answer_length
    lengths = torch.tensor([prefix + count * own for count in (1, 2)], dtype=torch.float64)
    costs = torch.tensor([gflop(count, "candidate") for count in (1, 2)], dtype=torch.float64)
    linear, quadratic = torch.linalg.solve(torch.stack([lengths, lengths**2], dim=1), costs).tolist()
    length = prefix + 8 * own
    assert gflop(8, "candidate") == pytest.approx(linear * length + quadratic * length**2, rel=1e-3)
    assert gflop(8, "reference") == pytest.approx(8 * gflop(1, "reference"), rel=1e-3)


def test_growth(tmp_path, monkeypatch):
    size = SIZES["tiny"]
    sizes = {
        "image size, megapixels": {"0.02": replace(size, image_size=(100, 200)), "0.08": size},
        "vocabulary": {"600": replace(size, text={**size.text, "vocab_size": 600})},
    }
    monkeypatch.setattr(growth, "axes", lambda size: sizes)
    report = measure_growth(size, "cpu", torch.float32, repeats=1)
    assert list(report["vocabulary"]["600"]) == ["reference", "candidate", "cached"]
    assert list(report["image size, megapixels"]["0.08"]) == ["reference", "candidate", "cached", "points"]
    table = growth_table(report)
    assert table.count("\n") == 5 and "| vocabulary: 600 |" in table
    pytest.importorskip("matplotlib")
    plot_growth(report, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000


@pytest.mark.slow
def test_baseline_costs_what_the_original_costs(tmp_path):
    """The original, measured at this geometry: 718 GFLOP per step."""
    report, _ = run(tmp_path, "--size", "mid", "--repeats", "3")
    assert report["reference"]["gflop_per_step"] == pytest.approx(718, rel=0.05)
    expected = {"mask encoder": 117, "vision tower": 17.5, "language model": 107, "vocabulary": 62.5}
    for part, gflop in {**expected, "mask decoder": 21.6, "backward and rest": 390}.items():
        assert report["reference"]["gflop_by_part"][part] == pytest.approx(gflop, rel=0.05), part
    variants = {name: report[name] for name in ("reference", "candidate", "cached")}
    assert_equal_results(variants)
    assert variants["candidate"]["gflop_per_step"] <= 290 and variants["cached"]["gflop_per_step"] <= 170
    assert report["speedup"] >= 2.2 and report["speedup_cached"] >= 4
    memory = [metrics["peak_memory_mb"] for metrics in variants.values()]
    assert memory == sorted(memory, reverse=True)
    assert report["generation"]["speedup"] >= 5 and report["generation"]["equal_answers"] == 16


def test_startup_and_memory_of_rows_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "NUM_ITEMS", 20)
    rows.write_rows(tmp_path, 1000)
    for kind in ("prepared", "streamed"):
        *seconds, keys, main, worker = rows.measure(kind, 1000, tmp_path)
        assert all(0 < number < 60 for number in seconds) and 0 <= main < 500 and 0 < worker < 500
        assert (keys > 0) == (kind == "prepared")
