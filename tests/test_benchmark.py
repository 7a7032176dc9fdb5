"""The benchmark compares like with like: its baseline computes the same loss and gradients at the original's cost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


RECIPE = Path(__file__).parent.parent / "recipes" / "benchmark.py"
FIGURES = {
    *("gflop_per_step", "gflop_by_part", "wall_s", "cpu_s", "peak_memory_mb", "images_per_s", "tokens_per_s"),
    *("loss", "gradient_error"),
}


def run(tmp_path, *arguments: str) -> tuple[dict, str]:
    path = tmp_path / "benchmark.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RECIPE), "--device", "cpu", "--json", str(path), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text()), result.stdout


def test_variants_agree_and_cost_less(tmp_path):
    report, table = run(tmp_path, "--size", "tiny", "--repeats", "1")
    assert report.keys() == {"reference", "candidate", "cached", "speedup", "speedup_cached", "generation"}
    assert report["generation"]["equal_answers"] == 16 and report["generation"]["speedup"] > 1
    reference, candidate, cached = (report[name] for name in ("reference", "candidate", "cached"))
    for figures in (reference, candidate, cached):
        assert figures.keys() == FIGURES and figures["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert figures["gradient_error"] < 1e-4
        assert sum(figures["gflop_by_part"].values()) == pytest.approx(figures["gflop_per_step"])
    parts, reference_parts = candidate["gflop_by_part"], reference["gflop_by_part"]
    assert parts["vision tower"] == pytest.approx(reference_parts["vision tower"] / 3)  # once per image
    assert parts["mask encoder"] == pytest.approx(reference_parts["mask encoder"])
    assert parts["vocabulary"] < 0.3 * reference_parts["vocabulary"]
    assert parts["backward and rest"] < 0.6 * reference_parts["backward and rest"]
    assert cached["gflop_by_part"]["mask encoder"] == cached["gflop_by_part"]["vision tower"] == 0
    assert candidate["peak_memory_mb"] > cached["peak_memory_mb"] > 1
    assert "times faster" in table


@pytest.mark.slow
def test_baseline_costs_what_the_original_costs(tmp_path):
    """The original, measured at this geometry: 718 GFLOP per step."""
    report, _ = run(tmp_path, "--size", "mid", "--repeats", "1")
    assert report["reference"]["gflop_per_step"] == pytest.approx(718, rel=0.05)
    expected = {"mask encoder": 117, "vision tower": 17.5, "language model": 107, "vocabulary": 62.5}
    for part, gflop in {**expected, "mask decoder": 21.6, "backward and rest": 390}.items():
        assert report["reference"]["gflop_by_part"][part] == pytest.approx(gflop, rel=0.05), part
    assert report["candidate"]["gflop_per_step"] <= 290 and report["cached"]["gflop_per_step"] <= 170
    assert report["reference"]["peak_memory_mb"] >= report["candidate"]["peak_memory_mb"]
    for variant in ("candidate", "cached"):
        assert report[variant]["loss"] == pytest.approx(report["reference"]["loss"], rel=1e-5)
        assert report[variant]["gradient_error"] < 1e-4
