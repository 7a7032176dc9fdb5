"""Compare evaluations of several models on the same benchmarks, or make a page of comparisons.

    python recipes/compare.py outputs/evaluate/mine outputs/evaluate/other [...] [--output report.md]
    python recipes/compare.py outputs/evaluate/mine outputs/evaluate/other --title "Two seeds" --json two_seeds.json
    python recipes/compare.py two_seeds.json other_comparison.json --output results.md

Prints a Markdown page: for each benchmark and protocol, the results of the models and their differences from the first
one, with 95% intervals and a sign test over images. It points out where evaluations were made differently. `--json`
stores everything that the page needs in one small file.
"""

import argparse
import json
from pathlib import Path

from lisa_hf.errors import report_user_errors
from lisa_hf.evaluation.comparison import compare_evaluations, read_comparison
from lisa_hf.evaluation.report import results_page
from lisa_hf.files import atomic_file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="output directories of recipes/eval.py, or files written by --json",
    )
    parser.add_argument("--title", default="", help="title of the comparison (default: the names)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the page to this file too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison to this file")
    parser.add_argument("--overwrite", action="store_true", help="replace the files")
    args = parser.parse_args()
    with report_user_errors():
        for option, path in (("--output", args.output), ("--json", args.json)):
            if path and path.exists() and not args.overwrite:
                raise ValueError(f"{option}: expected a new file, got {path}. Name another, or add --overwrite.")
        files = [path for path in args.paths if path.is_file()]
        if files and (files != args.paths or args.json or args.title):
            raise ValueError(
                f"expected either directories to compare or files of comparisons, got {files[0]} among others or "
                "with --json or --title. Name one kind."
            )
        comparisons = list(map(read_comparison, files)) or [compare_evaluations(args.paths, args.title)]
        page = results_page(comparisons)
        texts = {args.output: page, args.json: json.dumps(comparisons[0], indent=2) + "\n"}
        for path in filter(None, texts):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as incomplete:
                incomplete.write_text(texts[path], encoding="utf-8")
        print(page)


if __name__ == "__main__":
    main()
