"""Measure how startup and memory of the data path grow with the number of rows, prepared and streamed.

    python recipes/benchmarks/rows.py --num_rows 100000 1000000 10000000 --directory DIRECTORY

Rows are synthetic: an image and a target with a small mask. Ten million take 3 GB in DIRECTORY and some minutes to
write, but only once. Every line of the table is measured in a new process, with two loader workers:

    open          seconds from the command to a mixture; of a stream, once its records are written
    first batch   seconds from there to the first batch of the workers
    image keys    CPU seconds for the keys of all training images, which train.py keeps with a run
    main, MB      peak memory of the main process beyond its imports, without mapped files
    worker, MB    private memory of a worker, after 1000 items
"""

import argparse
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import PIL.Image
import pyarrow as pa
from datasets import Dataset
from torch.utils.data import DataLoader

from data_scripts.source import MAX_BATCHES, SourceBuilder
from lisa_hf.data import mixture
from lisa_hf.data.image_keys import image_keys
from lisa_hf.data.rows import FEATURES, make_row
from lisa_hf.data.streaming import StreamingMixtureDataset


NUM_ITEMS = 1000  # of each worker
HEADER = "| | rows | open, s | first batch, s | image keys, s | main, MB | worker, MB |\n|---|" + "---:|" * 6


class SyntheticRows(SourceBuilder):
    """The same rows from records."""

    num_rows = 0

    def annotation_files(self, data_dir):
        return []

    def read_records(self, data_dir):
        return {"train": range(self.num_rows)}

    def make_row(self, record):
        return synthetic_row(f"{self.config.data_dir}/photos/{record}.jpg", record)


def synthetic_row(image: str, index: int) -> dict:
    """Make a row."""
    targets = [{"phrases": ["a column"], "rle": {"size": [6, 9], "counts": b"06`1"}}]
    return make_row(image, f"photo {index}", "synthetic", "semantic", targets)


def write_rows(directory: Path, num_rows: int) -> Path:
    """Write rows into an Arrow file as `datasets` does, unless it is there, and return its path."""
    path = directory / f"{num_rows}.arrow"
    if path.exists():
        return path
    part, size = path.with_suffix(".part"), max(100, num_rows // MAX_BATCHES)
    schema = FEATURES.arrow_schema
    row = synthetic_row("photo.jpg", 0)
    template = pa.Table.from_pylist([FEATURES.encode_example(row)], schema=schema).take([0] * size)
    with pa.OSFile(str(part), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for start in range(0, num_rows, size):
            paths = pa.array([f"{directory}/photos/{index}.jpg" for index in range(start, start + size)])
            images = pa.StructArray.from_arrays([pa.nulls(size, pa.binary()), paths], fields=list(schema[0].type))
            ids = pa.array([f"photo {index}" for index in range(start, start + size)])
            table = template.set_column(0, schema[0], images).set_column(1, schema[1], ids)
            writer.write_table(table.combine_chunks())
    with open(part, "rb") as file:
        os.fsync(file.fileno())  # until then, its mapped pages would count as memory of the workers
    return part.rename(path)


def anonymous_megabytes() -> float:
    """Return the memory of this process that is not mapped from files."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3


def private_megabytes(items: list) -> float:
    """Return the private memory of a loader worker, without copies of files, as a batch of any items."""
    return int(re.search(r"Private_Dirty:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) / 1e3


@contextmanager
def watch_memory() -> Iterator[list[float]]:
    """Append the memory of this process, in megabytes, to a list, many times per second."""
    seen, stop = [], threading.Event()

    def watch():
        while not stop.wait(0.02):
            seen.append(anonymous_megabytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def load_one_photo(row: dict, *args) -> dict:
    """Replace the photos of the rows, which do not exist."""
    return {"image": PIL.Image.new("RGB", (9, 6)), "original_size": [6, 9], "cached_features": None}


def measure(kind: str, num_rows: int, directory: Path) -> list[float]:
    """Return the numbers of a line of the table."""
    before = anonymous_megabytes()
    keys_seconds = float("nan")
    with watch_memory() as seen, mock.patch.object(mixture, "load_row_image", load_one_photo):
        if kind == "streamed":
            make_builder(num_rows, directory).as_streaming_dataset("train")  # writes the records
        start = time.perf_counter()
        if kind == "prepared":
            rows = Dataset.from_file(str(directory / f"{num_rows}.arrow"))
            items = mixture.MixtureDataset({"synthetic": rows}, length=num_rows)
        else:
            rows = make_builder(num_rows, directory).as_streaming_dataset("train")
            items = StreamingMixtureDataset({"synthetic": rows})
        opened = time.perf_counter()
        loader = DataLoader(
            items, batch_size=10, num_workers=2, collate_fn=private_megabytes, multiprocessing_context="fork"
        )
        batches = iter(loader)
        next(batches)
        first = time.perf_counter()
        worker = max(islice(batches, 2 * NUM_ITEMS // 10))
        if kind == "prepared":
            begun = time.process_time()
            image_keys(rows)
            keys_seconds = time.process_time() - begun
    return [opened - start, first - opened, keys_seconds, max(seen) - before, worker]


def make_builder(num_rows: int, directory: Path) -> SyntheticRows:
    SyntheticRows.num_rows = num_rows
    return SyntheticRows(str(directory), cache_dir=str(directory / f"{num_rows}"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_rows", type=int, nargs="+", default=[100_000])
    parser.add_argument("--directory", type=Path, required=True)
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    print(HEADER, flush=True)
    for num_rows in args.num_rows:
        write_rows(args.directory, num_rows)
        for kind in ("prepared", "streamed"):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:  # holds nothing else in memory
                numbers = process.submit(measure, kind, num_rows, args.directory).result()
            print(f"| {kind} | {num_rows} | " + " | ".join(f"{number:.3g}" for number in numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
