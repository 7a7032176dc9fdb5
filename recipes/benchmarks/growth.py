"""Measure how the cost of a step grows with questions per image, image tokens, image size and vocabulary."""

import statistics
from dataclasses import replace
from pathlib import Path

from measure import Benchmark
from models import Size


CURVES = {"reference": "original's arithmetic", "candidate": "this code", "cached": "with a warm feature cache"}
POINTS_CURVE = {"points": "losses on 12544 pixels"}
METRICS = {"gflop_per_step": "GFLOP per step", "cpu_s": "CPU time, s", "peak_memory_mb": "peak memory, MB"}


def axes(size: Size) -> dict[str, dict[str, Size]]:
    """Return sizes by axis and position on it."""
    patch = size.vision["patch_size"]
    sides = {16: 256, 24: 576, 54: 2916}  # 2916: close to LLaVA-NeXT's 2880, from five crops
    photos = [(480, 640), (1440, 1920), (3000, 4000), (4000, 4000)]
    return {
        "questions per image": {str(count): replace(size, num_questions=count) for count in (1, 2, 4, 8, 16)},
        "image tokens": {
            str(tokens): replace(size, vision={**size.vision, "image_size": side * patch})
            for side, tokens in sides.items()
        },
        "image size, megapixels": {
            f"{height * width / 1e6:.2g}": replace(size, image_size=(height, width)) for height, width in photos
        },
        "vocabulary, thousands": {
            str(thousands): replace(size, text={**size.text, "vocab_size": 1000 * thousands})
            for thousands in (32, 64, 152)
        },
    }


def measure_growth(size: Size, device: str, dtype, repeats: int) -> dict[str, dict[str, dict[str, dict]]]:
    """Return metrics by axis, position on it and variant."""
    report = {}
    for axis, sizes in axes(size).items():
        variants = [*CURVES, *(POINTS_CURVE if axis.startswith("image size") else {})]
        report[axis] = {}
        for place, grown in sizes.items():
            benchmark = Benchmark(grown, device, dtype)
            seconds = benchmark.time_steps(variants, repeats)
            report[axis][place] = {
                variant: {
                    **benchmark.count(variant)[0],
                    "wall_s": statistics.median(wall for wall, _ in seconds[variant]),
                    "cpu_s": statistics.median(cpu for _, cpu in seconds[variant]),
                    "peak_memory_mb": benchmark.peak_memory_mb(variant),
                }
                for variant in variants
            }
    return report


def growth_table(report: dict) -> str:
    """Return a Markdown table with cells original's arithmetic / this code / with a warm cache (/ sampled losses)."""
    lines = [f"| | {' | '.join(METRICS.values())} |", "|---|" + "---:|" * len(METRICS)]
    for axis, places in report.items():
        for place, variants in places.items():
            cells = [" / ".join(_three_digits(metrics[name]) for metrics in variants.values()) for name in METRICS]
            lines.append(f"| {axis}: {place} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def plot_growth(report: dict, path: Path) -> None:
    """Draw one column per axis and one row per metric."""
    from matplotlib.figure import Figure  # nothing else needs matplotlib

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    panels = figure.subplots(len(METRICS), len(report), sharex="col", squeeze=False)
    for column, (axis, places) in enumerate(report.items()):
        positions = [float(place) for place in places]
        for row, (name, label) in enumerate(METRICS.items()):
            panel = panels[row, column]
            for variant, title in (CURVES | POINTS_CURVE).items():
                values = [variants[variant][name] for variants in places.values() if variant in variants]
                if values:
                    panel.plot(positions, values, marker="o", markersize=3, label=title)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(label)
            if row == len(METRICS) - 1:
                panel.set_xlabel(axis)
    handles, labels = max((panel.get_legend_handles_labels() for panel in panels[0]), key=lambda found: len(found[0]))
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=80)
