"""Check that sources are complete before training.

    from data_scripts.check import check_source
    print(check_source("refcoco", data_dir="dataset"))

A source is opened as in training, so its rows are prepared only once. It is ready only if every record and image is
valid, even if training would skip bad ones.
"""

import dataclasses
import inspect
import os
from typing import Any

from datasets import Dataset, DatasetDict
from tqdm.contrib.concurrent import thread_map

from lisa_hf.data.images import load_row_image, read_file, undecoded
from lisa_hf.data.masks import Mask
from lisa_hf.data.rows import describe_row
from lisa_hf.model.images import open_image

from . import find_builder, load_source, make_builder


# Published numbers of rows (photos; conversations for LLaVA-Instruct; questions on the Hub). Rows without anything to
# ask are omitted.
PUBLISHED_ROWS = {
    "ade20k": {"train": 20210, "validation": 2000},
    "cocostuff": {"train": 118287},
    "mapillary": {"train": 18000},
    "paco_lvis": {"train": 45790},
    "refcoco": {"train": 16994, "val": 1500, "testA": 750, "testB": 750, "test": 1500},
    "refcoco+": {"train": 16992, "val": 1500, "testA": 750, "testB": 750, "test": 1500},
    "refcocog": {"train": 21899, "val": 1300, "test": 2600},
    "grefcoco": {"train": 16994, "val": 1500, "testA": 750, "testB": 750, "test": 1500},
    "llava_instruct": {"train": 157712},
    "reason_seg": {"train": 239, "val": 200, "test": 779},
    "Ricky06662/ReasonSeg_val": {"test": 200},
    "Ricky06662/ReasonSeg_test": {"test": 779},
    "sj9909/ReasonSegX_val": {"test": 156},
    "sj9909/ReasonSegX_test": {"test": 773},
}
# Numbers of expressions, all of which an evaluation asks, from FlagEval for the UNC split.
PUBLISHED_EXPRESSIONS = {"refcoco": {"val": 10834, "testA": 5657, "testB": 5095}}


def describe_other_counts(benchmark: str, builder: str, options: dict[str, Any], rows: Dataset) -> str:
    """Describe how the numbers of rows or expressions of a benchmark differ from the published ones; "" if they do
    not.

    Args:
        benchmark: Name of the benchmark.
        builder: Builder of its source.
        options: Options of the source, such as `split`.
        rows: Its rows.
    """
    name, split, differing = options.get("path", builder), options["split"], []
    expected = PUBLISHED_ROWS.get(name, {}).get(split, len(rows))
    if len(rows) != expected:
        differing.append(f"{len(rows)} rows, where {expected} are published")
    if expected := PUBLISHED_EXPRESSIONS.get(name, {}).get(split):
        found = sum(len(target["phrases"]) for targets in rows["targets"] for target in targets)
        differing += [f"{found} expressions, where {expected} are published"] if found != expected else []
    if not differing:
        return ""
    return f"{benchmark} has {' and '.join(differing)}: its metrics cannot be compared with published ones."


@dataclasses.dataclass
class Report:
    """State of one source.

    Args:
        name: Name of the source.
        builder: As in [`load_source`].
        published: Published numbers of rows by split.
        num_rows: Number of rows by split.
        num_images: Number of distinct image files in the rows.
        missing_images: Paths of the image files that do not exist or are empty.
        bad_images: Descriptions of what is wrong with other images or their masks.
        errors: Reasons why the source cannot be opened: one line, or one line for each of its first bad records,
            including those skipped with `on_bad_row: skip`.
        remarks: What was decided or excluded while its rows were made.
    """

    name: str
    builder: str
    published: dict[str, int] = dataclasses.field(default_factory=dict)
    num_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    num_images: int = 0
    missing_images: list[str] = dataclasses.field(default_factory=list)
    bad_images: list[str] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_ready(self) -> bool:
        return not self.errors and not self.missing_images and not self.bad_images

    def __str__(self) -> str:
        builder = find_builder(self.name, self.builder)
        lines = [("source", inspect.getdoc(builder).splitlines()[0])]
        lines += [("error", error) for error in self.errors]
        lines += [("note", remark) for remark in self.remarks]
        for split, found in self.num_rows.items():
            expected = f", {self.published[split]} published" if split in self.published else ""
            lines.append((split, f"{found} rows{expected}"))
        if self.num_images:
            lines.append(("images", f"{self.num_images - len(self.missing_images)} of {self.num_images} found"))
        if self.missing_images:
            lines.append(("missing", _list_some(self.missing_images)))
        lines += [("bad", message) for message in self.bad_images[:10]]
        if len(self.bad_images) > 10:
            lines.append(("bad", f"and {len(self.bad_images) - 10} more"))
        if builder.DOWNLOAD_PAGE:
            lines += [("page", builder.DOWNLOAD_PAGE), ("license", builder.LICENSE)]
        title = f"{self.name}: {'ready' if self.is_ready else 'NOT READY'}"
        return "\n".join([title, *(f"  {key:<10}  {text}" for key, text in lines)])


def check_source(name: str, data_dir: str | None = None, split: str | None = None, **options: Any) -> Report:
    """Open a source and check that every row can be trained on: its image decodes, and its masks have the same size.

    Args:
        name: Name of the source, see [`load_source`].
        data_dir: Directory of all datasets, see [`load_source`].
        split: Split to check. By default, all.
        options: Options of the source, see [`load_source`].
    """
    builder = options.get("builder") or name
    report = Report(name, builder, PUBLISHED_ROWS.get(options.get("path", builder), {}))
    try:
        loaded = load_source(name, data_dir, split=split, **options)
    except (OSError, ValueError) as error:
        report.errors = _bad_records(name, data_dir, split, options) or [str(error).splitlines()[0]]
        return report
    splits = loaded if isinstance(loaded, DatasetDict) else {split: loaded}
    opened = make_builder(name, data_dir, split, **options)
    report.remarks = opened.remarks()
    report.errors = [error for found in splits for error in opened.skipped_records().get(str(found), [])]
    report.num_rows = {split: len(rows) for split, rows in splits.items()}
    paths = sorted({path for rows in splits.values() for path in image_paths(rows) if path})
    report.num_images = len(paths)
    report.missing_images = [path for path in paths if not os.path.isfile(path) or os.path.getsize(path) == 0]
    missing, num_deep = set(report.missing_images), 0
    for found_split, rows in splits.items():
        rows = undecoded(rows)

        def inspect_row(index: int) -> tuple[str | None, bool]:
            return _inspect_row(rows[index], missing)

        found = thread_map(inspect_row, range(len(rows)), desc=f"{name} {found_split}", unit="image", leave=False)
        report.bad_images += [error for error, _ in found if error]
        num_deep += sum(is_deep for _, is_deep in found)
    if num_deep:
        report.remarks.append(f"{num_deep} images have more than 8 bits, and are converted to 8 bits like in viewers")
    return report


def _inspect_row(row: dict[str, Any], missing: set[str]) -> tuple[str | None, bool]:
    """Return what is wrong with the image and masks of a row, or None, and whether the image has more than 8 bits."""
    if row["image"] and row["image"]["path"] in missing:
        return None, False
    try:
        load_row_image(row)
        for rle in [target["rle"] for target in row["targets"]] + ([row["ignore"]] if row["ignore"] else []):
            Mask.from_rle(rle)
        mode = open_image(read_file(row)).mode
    except ValueError as error:
        return f"{describe_row(row)}: {error}".splitlines()[0], False
    return None, mode in ("I", "F") or mode.startswith("I;16")


def image_paths(rows: Dataset) -> list[str | None]:
    """Return the path of the image file of every row, or None for images stored in their rows."""
    tables = rows.select_columns("image").with_format("arrow").iter(batch_size=10_000)
    images = [image for table in tables for image in table["image"].to_pylist()]
    return [image["path"] if image and image["bytes"] is None else None for image in images]


def _bad_records(name: str, data_dir: str | None, split: str | None, options: dict) -> list[str]:
    """Return the errors of the first bad records of a source, which training would report one at a time."""
    try:
        return make_builder(name, data_dir, split, **options).find_bad_records()
    except Exception:  # files are missing, an option is wrong, or a builder of the user's has a bug: it was said
        return []


def _list_some(paths: list[str], number: int = 3) -> str:
    more = f" and {len(paths) - number} more" if len(paths) > number else ""
    return ", ".join(paths[:number]) + more
