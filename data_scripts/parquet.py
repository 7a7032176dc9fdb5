"""Write rows to Parquet with embedded images: a directory that loads like a Hub dataset, or becomes one.

from data_scripts.parquet import write_card, write_parquet
write_parquet(load_source("refcoco", data_dir="dataset", split="val"), "parquet/refcoco", "val")
write_card("parquet", {"refcoco": RefCoco.LICENSE})
datasets.load_dataset("parquet", "refcoco", split="val", streaming=True)

The rows are split into shards, whose content and order are the same on every engine and with any number of workers.
Shards are staged in a hidden directory and moved when all of them exist, so a split that can be loaded is complete.
"""

import dataclasses
import hashlib
import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Image
from datasets.table import embed_table_storage
from datasets.utils.file_utils import xgetsize
from datasets.utils.py_utils import convert_file_size_to_int
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from huggingface_hub import DatasetCardData
from tqdm.contrib.concurrent import thread_map

from .duplicates import KnownImages
from .engines import Engine, map_pieces


# The choice of `datasets` for images: a reader holds this many in memory.
ROWS_PER_GROUP = 100
FINGERPRINT = b"lisa_hf_fingerprint"
EXCLUDED = b"lisa_hf_excluded"  # number of excluded rows, by the name of their images' owner
STAGING = ".incomplete"  # hidden: `load_dataset` does not look into it
SHARD_NAME = re.compile(r"(?P<split>.+)-(?P<index>\d{5})-of-(?P<total>\d{5})\.parquet")
CHECKSUM = "<!-- checksum of the above: "


@dataclasses.dataclass
class WrittenSplit:
    """Result of [`write_parquet`]: paths of the shards in order, number of rows, number of excluded rows by name."""

    paths: list[str]
    num_rows: int
    num_excluded: Counter[str]


def write_parquet(
    rows: Dataset,
    directory: str,
    split: str,
    num_workers: int = 1,
    max_shard_size: str = "500MB",
    overwrite: bool = False,
    engine: Engine = "datasets",
    excluded: KnownImages | None = None,
) -> WrittenSplit:
    """Write one split as shards `data/<split>-00000-of-00007.parquet`, except those that exist for the same rows.

    With these names, `load_dataset` finds splits of any name. An interrupted conversion continues where it stopped.

    Args:
        rows: Prepared rows of `lisa_hf.data.rows.FEATURES`.
        directory: Directory of the source, a path or the URL of an fsspec file system. It is created if it does not
            exist.
        split: Name of the split.
        num_workers: Number of shards to write at once.
        max_shard_size: Approximate maximum size of a shard.
        overwrite: Whether to replace shards of this split that contain other rows.
        engine: Engine that writes the shards, see [`~engines.map_pieces`]. All of its workers must see the images and
            `directory`.
        excluded: Images whose rows are excluded.

    Raises:
        ValueError: If an image is missing or empty, there are shards of other rows, or no row is left. The readable
            files do not change then.
        OSError: If a shard was not written completely. The others are kept for the next call.
    """
    rows = rows.cast_column("image", Image())  # even for undecoded rows: the files tell how to read them
    fs, root = url_to_fs(str(directory))
    names, fingerprint = _plan_shards(rows, split, max_shard_size, excluded)
    final = {path for path in _shard_paths(fs, root) if SHARD_NAME.fullmatch(_name(path))["split"] == split}
    others = {path for path in final if not _is_written(fs, path, fingerprint)}
    if others and not overwrite:
        raise ValueError(
            f"--output_dir: expected no shards of other rows, or of other sizes, got {min(others)}. Name another, or "
            "replace them with --overwrite."
        )
    fs.makedirs(f"{root}/data", exist_ok=True)
    fs.makedirs(f"{root}/{STAGING}", exist_ok=True)
    staged = {name: f"{root}/{STAGING}/{name}" for name in names if f"{root}/data/{name}" not in final - others}
    missing = [
        index for index, name in enumerate(names) if name in staged and not _is_written(fs, staged[name], fingerprint)
    ]
    shared = directory if "://" in str(directory) else root  # workers may run in another directory
    write = partial(_write_shard, rows, f"{shared}/{STAGING}", names, missing, fingerprint, excluded)
    map_pieces(write, len(missing), engine, num_workers, f"{_name(root)} {split}")
    for path in staged.values():
        if not _is_written(fs, path, fingerprint):
            raise OSError(f"expected {path}, got none. Name an output directory that all workers share.")
    paths = {name: f"{root}/data/{name}" for name in names}
    num_rows, num_excluded = _count_rows(fs, list((paths | staged).values()))
    if not num_rows:
        raise ValueError(f"{_name(root)} {split}: expected a row, got none: all show excluded images. Omit it.")
    # From here on, shards of old and new rows never exist together.
    for path in others:
        fs.rm(path)
    thread_map(fs.mv, staged.values(), [paths[name] for name in staged], disable=True)
    for path in _staged_paths(fs, root, split):  # left by killed workers
        fs.rm(path)
    # An object store has no empty directories.
    if fs.exists(f"{root}/{STAGING}") and not fs.find(f"{root}/{STAGING}"):
        fs.rm(f"{root}/{STAGING}", recursive=True)
    return WrittenSplit([f"{directory}/data/{name}" for name in names], num_rows, num_excluded)


def check_card(directory: str):
    """Raise a `ValueError` if a directory has a README.md that [`write_card`] did not write, or that was edited."""
    fs, root = url_to_fs(str(directory))
    if not fs.exists(f"{root}/README.md"):
        return
    text, _, end = fs.cat_file(f"{root}/README.md").decode().rpartition(CHECKSUM)
    if end != _checksum_line(text).removeprefix(CHECKSUM):
        raise ValueError(
            f"--output_dir: expected no README.md of your own, got {directory}/README.md. Move it, or replace it with "
            "--overwrite."
        )


def write_card(directory: str, licenses: dict[str, str]):
    """Write the README.md that tells `load_dataset` about sources and splits.

    It names every shard, so `load_dataset` fails if one is missing. It ends with its checksum in a comment, see
    [`check_card`].

    Args:
        directory: Directory of all sources, a path or the URL of an fsspec file system.
        licenses: License of each source, by its name.

    Raises:
        ValueError: If a split is not finished, see [`check_finished`].
    """
    fs, root = url_to_fs(str(directory))
    shards: dict[str, dict[str, list[str]]] = {}  # by source and split
    for source in sorted(_name(path) for path in fs.ls(root, detail=False)):
        for path in _shard_paths(fs, f"{root}/{source}"):
            split = SHARD_NAME.fullmatch(_name(path))["split"]
            shards.setdefault(source, {}).setdefault(split, []).append(f"{source}/data/{_name(path)}")
        for split in shards.get(source, {}):
            check_finished(f"{directory}/{source}", split)
    configs = [
        {"config_name": source, "data_files": [{"split": split, "path": paths} for split, paths in splits.items()]}
        for source, splits in shards.items()
    ]
    lines = [f"- {name}: {licenses[name]}" for name in shards if licenses.get(name)]
    card = "# Rows for lisa_hf\n\nOne configuration per source. Their licenses apply to these copies too.\n\n"
    metadata = DatasetCardData(configs=configs, task_categories=["image-segmentation"])
    text = f"---\n{metadata}\n---\n\n{card}" + "\n".join(lines) + "\n\n"
    part = f"{root}/README.md.{uuid.uuid4().hex}.part"
    fs.pipe_file(part, (text + _checksum_line(text)).encode())
    fs.mv(part, f"{root}/README.md")


def check_finished(directory: str, split: str):
    """Raise a `ValueError` if a conversion stopped while it moved the shards of a split into place."""
    fs, root = url_to_fs(str(directory))
    if not _staged_paths(fs, root, split):
        return
    found = [SHARD_NAME.fullmatch(_name(path)) for path in _shard_paths(fs, root)]
    totals = [int(match["total"]) for match in found if match["split"] == split]
    if totals and len(totals) != totals[0]:
        raise ValueError(
            f"{directory}: expected {totals[0]} shards of the split {split!r}, got {len(totals)}. Run the conversion "
            "again, which ended before it was finished."
        )


def _checksum_line(text: str) -> str:
    return f"{CHECKSUM}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _shard_paths(fs: AbstractFileSystem, root: str) -> list[str]:
    """Return the paths of the shards of a source, sorted."""
    return sorted(path for path in fs.find(f"{root}/data") if SHARD_NAME.fullmatch(_name(path)))


def _staged_paths(fs: AbstractFileSystem, root: str, split: str) -> list[str]:
    """Return the paths of what is staged for a split: its shards, and parts of them."""
    shard = re.compile(rf"{re.escape(split)}-\d{{5}}-of-\d{{5}}\.parquet(\..*)?")
    paths = fs.find(f"{root}/{STAGING}") if fs.exists(f"{root}/{STAGING}") else []
    return [path for path in paths if shard.fullmatch(_name(path))]


def _plan_shards(
    rows: Dataset, split: str, max_shard_size: str, excluded: KnownImages | None
) -> tuple[list[str], bytes]:
    """Return the names of the shards, and the fingerprint of everything that their content depends on."""
    sizes = np.fromiter(_image_sizes(rows), np.int64, len(rows))
    num_shards = max(1, -(-int(sizes.sum()) // convert_file_size_to_int(max_shard_size)))
    num_shards = min(num_shards, max(1, len(rows)))
    # The fingerprint of prepared rows changes with the annotations, the sizes with the images.
    options = f"{num_shards} {excluded.fingerprint() if excluded else None}"
    digest = hashlib.sha256(f"{rows._fingerprint} {options} ".encode() + sizes.tobytes())
    names = [f"{split}-{index:05d}-of-{num_shards:05d}.parquet" for index in range(num_shards)]
    return names, digest.hexdigest().encode()


def _image_sizes(rows: Dataset) -> Iterator[int]:
    """Yield the size in bytes of the image of every row."""
    for table in rows.select_columns("image").with_format("arrow").iter(batch_size=1000):
        images = table["image"].combine_chunks()
        lengths = pc.binary_length(images.field("bytes")).to_pylist()
        for length, path in zip(lengths, images.field("path").to_pylist()):
            size = length
            if length is None:
                size = xgetsize(path) if path and ("://" in path or os.path.isfile(path)) else 0
            if size == 0:
                raise ValueError(
                    f"expected an image in every row, but {path!r} is empty or missing. Restore it, or remove its "
                    "annotation."
                )
            yield size


def _is_written(fs: AbstractFileSystem, path: str, fingerprint: bytes) -> bool:
    try:
        with fs.open(path, "rb") as file:
            return (pq.read_metadata(file).metadata or {}).get(FINGERPRINT) == fingerprint
    except (FileNotFoundError, pa.ArrowInvalid):
        return False


def _count_rows(fs: AbstractFileSystem, paths: list[str]) -> tuple[int, Counter[str]]:
    """Return the number of rows in shards, and the number of excluded rows by name."""
    num_rows, num_excluded = 0, Counter()
    for path in paths:
        with fs.open(path, "rb") as file:
            footer = pq.read_metadata(file)
        num_rows += footer.num_rows
        num_excluded.update(json.loads(footer.metadata[EXCLUDED]))
    return num_rows, num_excluded


def _write_shard(
    rows: Dataset,
    directory: str,
    names: list[str],
    chosen: list[int],
    fingerprint: bytes,
    excluded: KnownImages | None,
    piece: int,
):
    """Write one of the chosen shards into a directory, completely or not at all."""
    fs, root = url_to_fs(directory)
    path = f"{root}/{names[chosen[piece]]}"
    part = f"{path}.{uuid.uuid4().hex}.part"  # a worker that is considered dead may still write
    shard = rows.shard(len(names), chosen[piece], contiguous=True)
    num_excluded = Counter()
    with fs.open(part, "wb") as file:
        with pq.ParquetWriter(
            file, shard.features.arrow_schema, use_content_defined_chunking=True, write_page_index=True
        ) as writer:
            for table in shard.with_format("arrow").iter(batch_size=ROWS_PER_GROUP):
                table = embed_table_storage(table)
                if excluded:
                    table, found = excluded.filter(table)
                    num_excluded.update(found)
                if table.num_rows:  # an empty group cannot be read
                    writer.write_table(table)
            # Last, because an error closes the writer too.
            writer.add_key_value_metadata({FINGERPRINT: fingerprint, EXCLUDED: json.dumps(num_excluded)})
        size = file.tell()
    if fs.size(part) != size or not _is_written(fs, part, fingerprint):
        raise OSError(
            f"expected {size} bytes in {part}, got {fs.size(part)}: the storage lost data. Run the same command again."
        )
    fs.mv(part, path)
