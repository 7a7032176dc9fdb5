"""Measures a training step and generation against the original's arithmetic, alternating in one process.

    python recipes/benchmark.py --size mid --baseline reference --json outputs/benchmark.json
    python recipes/benchmark.py --size 7b --device cuda --dtype bfloat16

Random weights, no downloads. `reference` runs the vision tower once per question, projects every position to the
vocabulary, repeats system prompt and image per question, encodes and decodes masks image by image and recomputes
activations, as the original does. `candidate` is this project, `cached` the same with the features of the frozen
encoders given.
"""

import json
import sys
from pathlib import Path


# This directory comes first on the path, where evaluate.py would hide the package of that name.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]


from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch

from lisa_hf.benchmark import SIZES, Benchmark


ROWS = {
    "gflop_per_step": "GFLOP per step",
    "wall_s": "wall time, s",
    "cpu_s": "CPU time, s",
    "peak_memory_mb": "peak memory, MB",
    "images_per_s": "images per s",
    "tokens_per_s": "tokens per s (before packing)",
    "loss": "loss",
    "gradient_error": "gradient error",
}


def parse_arguments():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="Geometry of the model and its batch.")
    parser.add_argument("--baseline", choices=["reference"], default="reference", help="What it is compared to.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3, help="Timed steps of each variant.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the figures to this file.")
    return parser.parse_args()


def print_table(report: dict):
    variants = [name for name, figures in report.items() if isinstance(figures, dict) and "loss" in figures]
    print(f"{'':<32}" + "".join(f"{variant:>12}" for variant in variants))
    for key, label in ROWS.items():
        print(f"{label:<32}" + "".join(f"{report[variant][key]:>12.4g}" for variant in variants))
    print("GFLOP by part:")
    for part in report[variants[0]]["gflop_by_part"]:
        print(f"  {part:<30}" + "".join(f"{report[variant]['gflop_by_part'][part]:>12.4g}" for variant in variants))
    print(f"Wall time, median of pairs: {report['speedup']:.2f} times faster, {report['speedup_cached']:.2f} cached.")
    print(
        "16 questions about an image: {separate_s:.2f} s in separate calls, {shared_s:.2f} s in one, {speedup:.2f} "
        "times faster, {equal_answers} answers equal.".format(**report["generation"])
    )


def main():
    arguments = parse_arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmark.py: error: --device: expected cpu, found cuda, but torch sees no GPU")
    benchmark = Benchmark(SIZES[arguments.size], arguments.device, getattr(torch, arguments.dtype))
    report = benchmark.run(arguments.baseline, arguments.repeats)
    print_table(report)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
