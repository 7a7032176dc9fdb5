"""Compare evaluations of several models on the same benchmarks.

    python recipes/compare.py outputs/evaluate/mine outputs/evaluate/other [...] [--output report.md]

Prints a report in Markdown: the results side by side, and the differences to the first model with 95% intervals and a
sign test over images. Says where evaluations were not made alike.
"""

import argparse
from pathlib import Path

from lisa_hf.errors import report_user_errors
from lisa_hf.evaluation.comparison import comparison_report
from lisa_hf.files import atomic_file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="output directory of recipes/eval.py")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report to this file too")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    args = parser.parse_args()
    with report_user_errors():
        if args.output and args.output.exists() and not args.overwrite:
            raise ValueError(f"--output: expected a new file, got {args.output}. Name another, or add --overwrite.")
        report = comparison_report(args.directories)
        if args.output:
            with atomic_file(args.output) as path:
                path.write_text(report, encoding="utf-8")
        print(report)


if __name__ == "__main__":
    main()
