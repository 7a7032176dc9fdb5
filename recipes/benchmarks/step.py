"""Compare a training step and generation with the original's arithmetic, alternating in one process.

    python recipes/benchmarks/step.py --size mid --baseline reference --json outputs/benchmark.json
    python recipes/benchmarks/step.py --size mid --features
    python recipes/benchmarks/step.py --size small --growth outputs/growth
    python recipes/benchmarks/step.py --size 7b --device cuda --dtype bfloat16

Weights are random; nothing is downloaded. Like the original, `reference` runs the vision tower per question, projects
all positions to the vocabulary, repeats system prompt and image per question, handles masks image by image, recomputes
activations and materializes attention scores. `reference_sdpa` is the same with today's attention kernels, `candidate`
is this project, and `cached` is this project with precomputed features of the frozen encoders.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.util import find_spec
from pathlib import Path

import torch
from growth import growth_table, measure_growth, plot_growth
from measure import Benchmark
from models import SIZES
from variants import BASELINES


ROWS = {
    "gflop_per_step": "GFLOP per step",
    "wall_s": "wall time, s",
    "cpu_s": "CPU time, s",
    "speedup": "times faster (wall, of pairs)",
    "speedup_cpu": "times faster (CPU, of pairs)",
    "peak_memory_mb": "peak memory, MB",
    "images_per_s": "images per s",
    "tokens_per_s": "tokens per s (before packing)",
    "loss": "loss",
    "gradient_error": "gradient error",
}
FEATURE_COLUMNS = ("gflop_per_step", "wall_s", "cpu_s", "speedup", "speedup_cpu", "peak_memory_mb")


def parse_arguments():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="Size of the model and its batch.")
    parser.add_argument("--baseline", choices=BASELINES, default="reference", help="Variant to compare with.")
    parser.add_argument(
        "--features", action="store_true", help="Also add the features from reference to candidate one by one."
    )
    parser.add_argument(
        "--growth",
        type=Path,
        metavar="DIR",
        help="Instead, measure how the cost grows with questions, image tokens, image size and vocabulary; write "
        "growth.json, growth.md and growth.png (matplotlib).",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3, help="Timed steps of each variant.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the metrics to this file.")
    parser.add_argument("--overwrite", action="store_true", help="Replace earlier metrics.")
    return parser.parse_args()


def print_table(report: dict):
    variants = [name for name, metrics in report.items() if isinstance(metrics, dict) and "loss" in metrics]
    print(f"{'':<32}" + "".join(f"{variant:>12}" for variant in variants))
    for key, label in ROWS.items():
        print(f"{label:<32}" + "".join(f"{report[variant][key]:>12.4g}" for variant in variants))
    for key, label in (("gflop_by_part", "GFLOP"), ("seconds_by_part", "Seconds")):
        print(f"{label} by part:")
        for part in report[variants[0]][key]:
            print(f"  {part:<30}" + "".join(f"{report[variant][key][part]:>12.4g}" for variant in variants))
    if "features" in report:
        print(f"\n{'from the reference, one by one':<32}" + "".join(f"{ROWS[key]:>30}" for key in FEATURE_COLUMNS))
        for name, metrics in report["features"].items():
            print(f"{name:<32}" + "".join(f"{metrics[key]:>30.4g}" for key in FEATURE_COLUMNS))
    print(f"Wall time, median of pairs: {report['speedup']:.2f} times faster, {report['speedup_cached']:.2f} cached.")
    print(
        "16 questions about an image: {separate_s:.2f} s in separate calls, {shared_s:.2f} s in one, {speedup:.2f} "
        "times faster, {equal_answers} answers equal.".format(**report["generation"])
    )


def write_growth(directory: Path, report: dict):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "growth.json").write_text(json.dumps(report, indent=2) + "\n")
    table = growth_table(report)
    (directory / "growth.md").write_text(table)
    print(table)
    plot_growth(report, directory / "growth.png")


def main():
    arguments = parse_arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("step.py: error: --device: expected cpu, because torch sees no GPU, got cuda")
    for path in (arguments.json, arguments.growth and arguments.growth / "growth.json"):
        if path and path.exists() and not arguments.overwrite:
            sys.exit(f"step.py: error: expected a new file, got {path}. Name another, or add --overwrite.")
    if arguments.repeats < 1:
        sys.exit(f"step.py: error: --repeats: expected 1 or more, got {arguments.repeats}")
    if arguments.growth and find_spec("matplotlib") is None:  # before measuring for minutes
        sys.exit("step.py: error: --growth: its plot needs matplotlib: pip install matplotlib")
    size, dtype = SIZES[arguments.size], getattr(torch, arguments.dtype)
    if arguments.growth:
        write_growth(arguments.growth, measure_growth(size, arguments.device, dtype, arguments.repeats))
        return
    report = Benchmark(size, arguments.device, dtype).run(arguments.baseline, arguments.repeats, arguments.features)
    print_table(report)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
