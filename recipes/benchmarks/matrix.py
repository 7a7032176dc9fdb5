"""Check LISA with every VLM type in the installed transformers, as tiny random models; nothing is downloaded.

    python recipes/benchmarks/matrix.py --json outputs/matrix.json
    python recipes/benchmarks/matrix.py --json outputs/matrix.json --model_types qwen3_vl,gemma3

The types are those of AutoModelForImageTextToText. Each is checked in its own process, with limits on time and memory.
The file is written after each type; types in the file are not checked again unless they are named. Prints a table: a
check passes, is rejected with a reason (`-`), fails, or gives a wrong result.
"""

import importlib.metadata
import json
import logging
import multiprocessing
import resource
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

import torch
import transformers
from matrix_checks import CHECKS, run_checks
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from lisa_hf.files import atomic_file


COLUMNS = ("construct", *CHECKS)
MEMORY_LIMIT = 24 * 2**30  # address space, in bytes
SYMBOLS = {"ok": "ok", "refused": "-", "fail": "fail", "wrong": "WRONG"}


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="Write the results to this file.")
    parser.add_argument("--model_types", metavar="TYPE,...", help="Check these types only, even if the file has them.")
    parser.add_argument("--seconds", type=int, default=300, help="Time limit of a type.")
    arguments = parser.parse_args()
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    wanted = arguments.model_types.split(",") if arguments.model_types else None
    model_types = wanted or [name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in results]
    for number, model_type in enumerate(model_types, start=1):
        start = time.monotonic()
        results[model_type] = check_in_a_process(model_type, arguments.seconds)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(arguments.json) as path:
            path.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        outcome = ", ".join(f"{column} {SYMBOLS[kind(results[model_type][column])]}" for column in COLUMNS)
        print(f"{number}/{len(model_types)} {model_type}: {outcome} ({time.monotonic() - start:.0f} s)", flush=True)
    print(table(results))


def check_in_a_process(model_type: str, seconds: int) -> dict[str, str]:
    """Return the verdict of each column; checks not reached because of a crash or the time limit count as failed."""
    context = multiprocessing.get_context("fork")  # transformers is imported once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_verdicts, args=(model_type, sender))
    process.start()
    sender.close()
    deadline = time.monotonic() + seconds
    verdicts, reason = {}, "the process crashed"
    try:
        while len(verdicts) < len(COLUMNS):
            if not receiver.poll(max(0.0, deadline - time.monotonic())):
                reason = f"took more than {seconds} s"
                break
            column, verdict = receiver.recv()
            verdicts[column] = verdict
    except EOFError:
        pass
    process.kill()
    process.join()
    return {column: verdicts.get(column, f"fail: {reason}") for column in COLUMNS}


def _send_verdicts(model_type: str, sender) -> None:
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    for column_and_verdict in run_checks(model_type):
        sender.send(column_and_verdict)


def kind(verdict: str) -> str:
    return verdict.split(":")[0]


def table(results: dict[str, dict[str, str]]) -> str:
    """Return a Markdown table of all types, a table with the counts of each column, and the versions."""
    header = f"| type | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}"
    rows = [
        f"| {model_type} | {' | '.join(SYMBOLS[kind(verdicts[column])] for column in COLUMNS)} |"
        for model_type, verdicts in sorted(results.items())
    ]
    counts = {column: Counter(kind(verdicts[column]) for verdicts in results.values()) for column in COLUMNS}
    totals = [
        f"| {name} of {len(results)} | {' | '.join(str(counts[column][name]) for column in COLUMNS)} |"
        for name in SYMBOLS
    ]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch", "peft"))
    return "\n".join([header, *rows, "", header.replace("type", "", 1), *totals, "", versions])


if __name__ == "__main__":
    main()
