"""Measure how fast a recipe's data is loaded: rows per CPU second of a loader worker, and the share of each stage.

    python recipes/benchmarks/data.py --config recipes/configs/real_samples.yaml --data_dir dataset \\
        --dataloader_num_workers 4

The arguments are those of train.py, but nothing is trained: `--num_train_items` items of each source are loaded (64 by
default). The last line shows how many workers keep a GPU busy, by the images that it trains on per second.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import torch

from data_scripts import load_sources
from lisa_hf import LisaDataCollator
from lisa_hf.data.images import load_row_image, undecoded
from lisa_hf.data.mixture import MixtureDataset
from lisa_hf.errors import report_user_errors
from lisa_hf.training.arguments import parse_arguments
from lisa_hf.training.build import build_config_and_processor


IMAGES_PER_SECOND = (2, 4, 8, 16, 32, 64)  # of a GPU; recipes/benchmarks/step.py measures it for a model


def measure(function: Callable, arguments: list) -> tuple[float, list[Any]]:
    """Call a function with each argument; return the mean CPU seconds of a call, and the results."""
    # CPU time, because other programs on the machine do not affect it.
    start = time.process_time()
    results = [function(argument) for argument in arguments]
    return (time.process_time() - start) / len(arguments), results


def measure_stages(rows: datasets.Dataset, mixture: MixtureDataset, collator: LisaDataCollator) -> dict[str, float]:
    """Return the CPU seconds per row of each stage; "rest" is text, labels and checks."""
    processor = collator.processor
    rows = undecoded(rows)
    # The first pass is not measured: it reads files into the page cache and loads libraries.
    measure(lambda item: collator([item]), [mixture[index] for index in range(len(mixture))])
    whole, items = measure(mixture.__getitem__, range(len(mixture)))
    collating, _ = measure(lambda item: collator([item]), items)
    images = [item["image"] for item in items]
    stages = {}
    stages["row"], found = measure(lambda index: rows[index % len(rows)], range(len(items)))
    stages["decode"], _ = measure(partial(load_row_image, min_decoded_edge=mixture.min_decoded_edge), found)
    stages["vlm"], _ = measure(lambda image: processor.preprocess_for_vlm([image], do_normalize=False), images)
    stages["mask_model"], _ = measure(
        lambda image: processor.preprocess_for_mask_model([image], do_normalize=False), images
    )
    return stages | {"rest": max(0.0, whole + collating - sum(stages.values()))}


def measure_loader(mixture: MixtureDataset, collator: LisaDataCollator, num_workers: int) -> float:
    """Return the rows per second of a loader with workers, from its first batch on, when all have started."""
    loader = torch.utils.data.DataLoader(mixture, batch_size=1, num_workers=num_workers, collate_fn=collator)
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    num_rows = sum(1 for _ in batches)
    return num_rows / (time.perf_counter() - start)


def main():
    model_args, data_args, training_args = parse_arguments()
    torch.set_num_threads(1)  # As in a loader worker.
    with report_user_errors():
        if not data_args.sources:
            raise ValueError("sources: expected at least one training source, got none. Name one in the config.")
        start = time.perf_counter()
        sources = load_sources(
            data_args.sources,
            data_args.data_dir,
            on_bad_row=data_args.on_bad_row,
            exclude_refer_val=data_args.exclude_refer_val,
        )
        print(f"Opened {len(sources)} sources in {time.perf_counter() - start:.1f} s.")
        _, processor = build_config_and_processor(model_args)
        collator = LisaDataCollator(processor, data_args.max_length, data_args.on_bad_row, compact=True)
        num_items = data_args.num_train_items or 64
        settings = {"on_bad_row": data_args.on_bad_row, "min_decoded_edge": data_args.min_decoded_edge}

        totals = []
        print(f"\n{'source':<16}{'rows/CPU s':>12}", end="")
        for index, (name, rows) in enumerate(sources.items()):
            mixture = MixtureDataset({name: rows}, length=num_items, **settings)
            seconds = measure_stages(rows, mixture, collator)
            if index == 0:
                print("".join(f"{stage:>12}" for stage in seconds))
            total = sum(seconds.values())
            totals.append(total)
            print(f"{name:<16}{1 / total:>12.1f}" + "".join(f"{part / total:>12.0%}" for part in seconds.values()))
        num_workers = max(1, training_args.dataloader_num_workers)
        weights = data_args.weights
        mixture = MixtureDataset(sources, length=4 * num_items, weights=weights, **settings)
        rate = measure_loader(mixture, collator, num_workers)
        print(f"\nThe mixture: {rate:.1f} rows/s with {num_workers} workers, {rate / num_workers:.1f} per worker.")
        mean = sum(share * total for share, total in zip(mixture.probabilities, totals))
        needed = ", ".join(f"{math.ceil(speed * mean)} for {speed}" for speed in IMAGES_PER_SECOND)
        print(f"Workers with a core each that keep a GPU busy, by its images/s: {needed}.")


if __name__ == "__main__":
    main()
