"""Markdown pages about evaluations, made from the results of [`~comparison.compare_evaluations`]."""

from typing import Any

from .benchmarks import metric_columns
from .comparison import environment, shared_results
from .leakage import describe_seen_images


INTRODUCTION = """# Results

In percent, with 95% intervals from a bootstrap over images. Differences are those to the first model of a table, in
points, on the same images; the sign test counts images on which the mean IoU is higher or lower.
"""


def results_page(comparisons: list[dict[str, Any]]) -> str:
    """Return a page about comparisons: a table for each benchmark and protocol, and how the numbers were made."""
    return "\n".join([INTRODUCTION, *map(_section, comparisons)])


def _section(comparison: dict[str, Any]) -> str:
    evaluations, changed = comparison["evaluations"], comparison["changed"]
    first = next(iter(evaluations))
    lines = [f"## {comparison['title']}", ""]
    for name, settings in changed.items():
        if settings:
            lines += [f"**{name} was evaluated differently from {first}**: {', '.join(settings)}.", ""]
    shared = shared_results(evaluations)
    for benchmark in dict.fromkeys(benchmark for benchmark, _ in shared):
        options = evaluations[first]["benchmarks"][benchmark]
        options = ", ".join(f"{key} {value}" for key, value in options.items() if key != "protocols")
        lines += [f"### {benchmark}", "", f"{options}.", ""]
        for protocol in [protocol for name, protocol in shared if name == benchmark]:
            results = {
                name: found["benchmarks"][benchmark]["protocols"][protocol] for name, found in evaluations.items()
            }
            differences = {
                found["model"]: found
                for found in comparison["differences"]
                if (found["benchmark"], found["protocol"]) == (benchmark, protocol)
            }
            titles = {name: f"{name} (evaluated differently)" if changed.get(name) else name for name in evaluations}
            lines += [f"Protocol `{protocol}`:", "", *_table(results, differences, titles), ""]
    return "\n".join([*lines, *_provenance(evaluations)])


def _table(results: dict[str, dict], differences: dict[str, dict], titles: dict[str, str]) -> list[str]:
    """Return the rows of a table, one per model: its metrics, and its differences from the first."""
    shown = set().union(*results.values())
    columns = {name: title for name, title in metric_columns(results.values()).items() if name in shown}
    names = ["model", "questions", "gIoU", "cIoU", *columns.values()]
    if differences:
        names += ["gIoU difference", "cIoU difference", "better / worse / equal images", "sign test"]
    rows = [names, ["---"] + ["---:"] * (len(names) - 1)]
    for name, metrics in results.items():
        row = [titles[name], str(metrics["num_questions"])]
        for metric in ("giou", "ciou"):
            row.append("{:.1f} ({:.1f} to {:.1f})".format(*(100 * metrics[metric + x] for x in ("", "_low", "_high"))))
        row += [f"{100 * metrics[column]:.1f}" if column in metrics else "" for column in columns]
        if found := differences.get(name):
            row += ["{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in found[m])) for m in ("giou", "ciou")]
            row.append("{num_better} / {num_worse} / {num_equal}".format(**found))
            row.append(f"p = {found['p_value']:.2g}")
        rows.append(row + [""] * (len(names) - len(row)))
    return [f"| {' | '.join(row)} |" for row in rows]


def _provenance(evaluations: dict[str, dict]) -> list[str]:
    """Describe what evaluations were made with, and which images their models have seen."""
    rows = {}
    for name, evaluation in evaluations.items():
        for key, value in ({"model": evaluation["model"]} | environment(evaluation)).items():
            rows.setdefault(key, {})[name] = str(value)
        if text := evaluation.get("text"):
            cell = "{perplexity:.2f}; {perplexity_of_base:.2f} under {base_model}".format(**text)
            rows.setdefault("perplexity of the base's answers", {})[name] = cell
    lines = [f"| made with | {' | '.join(evaluations)} |", "|---|" + "---|" * len(evaluations)]
    for key, cells in rows.items():
        lines.append(f"| {key} | {' | '.join(cells.get(name, '') for name in evaluations)} |")
    lines.append("")
    for name, evaluation in evaluations.items():
        note = evaluation.get("training_data", "")
        for benchmark, seen in evaluation.get("train_overlap", {}).items():
            number = evaluation["benchmarks"][benchmark]["num_items"]
            lines.append(f"- {name}: {describe_seen_images(benchmark, number, seen, note)}")
    return [*lines, ""]
