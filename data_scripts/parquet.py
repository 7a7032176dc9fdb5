"""Write rows to Parquet with their images inside: a folder that loads like a dataset on the Hub, and can become one.

from data_scripts.parquet import write_card, write_parquet
write_parquet(load_source("refcoco", data_dir="dataset", split="val"), "parquet/refcoco", "val")
write_card("parquet", {"refcoco": RefCoco.LICENSE})
datasets.load_dataset("parquet", "refcoco", split="val", streaming=True)
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Image
from datasets.table import embed_table_storage
from datasets.utils.file_utils import xgetsize
from datasets.utils.py_utils import convert_file_size_to_int
from huggingface_hub import DatasetCardData
from tqdm.contrib.concurrent import thread_map


# The choice of `datasets` for images: a reader holds this many in memory.
ROWS_PER_GROUP = 100
FINGERPRINT = b"lisa_hf_fingerprint"
CHECKSUM = "<!-- checksum of the above: "


def write_parquet(
    rows: Dataset,
    directory: str | os.PathLike,
    split: str,
    num_threads: int = 4,
    max_shard_size: str = "500MB",
    overwrite: bool = False,
) -> list[Path]:
    """Write one split as shards `data/<split>-00000-of-00007.parquet`, except those that exist for the same rows.

    These names let `load_dataset` find splits of any name.

    Args:
        rows: Prepared rows of `lisa_hf.data.rows.FEATURES`.
        directory: Directory of the source, which is created if it does not exist.
        split: Name of the split.
        num_threads: Number of shards to write at once.
        max_shard_size: Approximate largest size of a shard.
        overwrite: Whether to replace shards of this split that hold other rows.

    Returns:
        Paths of the shards, in order.

    Raises:
        ValueError: If an image is missing or empty, or there are shards of other rows. Nothing is written then.
    """
    rows = rows.cast_column("image", Image())  # also of undecoded rows: the files say how to read them
    data = Path(directory) / "data"
    data.mkdir(parents=True, exist_ok=True)
    sizes = list(_image_sizes(rows))
    num_shards = max(1, -(-sum(sizes) // convert_file_size_to_int(max_shard_size)))
    num_shards = min(num_shards, max(1, len(rows)))
    # The fingerprint of prepared rows changes with the annotations, the sizes with the images.
    fingerprint = hashlib.sha256(f"{rows._fingerprint} {num_shards} {sizes}".encode()).hexdigest().encode()
    paths = [data / f"{split}-{index:05d}-of-{num_shards:05d}.parquet" for index in range(num_shards)]
    others = [path for path in data.glob(f"{split}-*-of-*.parquet") if not _is_written(path, fingerprint)]
    if others and not overwrite:
        raise ValueError(
            f"--output_dir: expected no shards of other rows, or of other sizes, got {min(others)}. Name another, or "
            "replace them with --overwrite."
        )

    def write(index: int):
        if not _is_written(paths[index], fingerprint):
            _write_shard(rows.shard(num_shards, index, contiguous=True), paths[index], fingerprint)

    thread_map(write, range(num_shards), max_workers=num_threads, desc=f"{data.parent.name} {split}", unit="shard")
    for path in {*others, *data.glob(f"{split}-*-of-*.parquet.part")} - set(paths):
        path.unlink(missing_ok=True)
    return paths


def check_card(directory: str | os.PathLike):
    """Raise a `ValueError` if a directory has a README.md that [`write_card`] did not write, or not all of it."""
    path = Path(directory, "README.md")
    if not path.exists():
        return
    text, _, end = path.read_text(encoding="utf-8").rpartition(CHECKSUM)
    if end != _checksum_line(text).removeprefix(CHECKSUM):
        raise ValueError(
            f"--output_dir: expected no README.md of your own, got {path}. Move it, or replace it with --overwrite."
        )


def write_card(directory: str | os.PathLike, licenses: dict[str, str]):
    """Write the README.md that tells `load_dataset` about sources and splits.

    It ends with its checksum in a comment, see [`check_card`].

    Args:
        directory: Directory of all sources.
        licenses: License of each source, by its name.
    """
    directory = Path(directory)
    configs = []
    for source in sorted(path for path in directory.iterdir() if path.is_dir()):
        splits = sorted({path.name.rpartition("-of-")[0].rpartition("-")[0] for path in source.glob("data/*.parquet")})
        files = [{"split": split, "path": f"{source.name}/data/{split}-*.parquet"} for split in splits]
        configs += [{"config_name": source.name, "data_files": files}] if files else []
    names = [config["config_name"] for config in configs]
    lines = [f"- {name}: {licenses[name]}" for name in names if licenses.get(name)]
    card = "# Rows for lisa_hf\n\nA configuration per source. Their licenses hold for these copies too.\n\n"
    metadata = DatasetCardData(configs=configs, task_categories=["image-segmentation"])
    text = f"---\n{metadata}\n---\n\n{card}" + "\n".join(lines) + "\n\n"
    (directory / "README.md").write_text(text + _checksum_line(text), encoding="utf-8")


def _checksum_line(text: str) -> str:
    return f"{CHECKSUM}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


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
                    f"expected an image in every row, but {path!r} is empty or not there. Restore it, or remove its "
                    "annotation."
                )
            yield size


def _is_written(path: Path, fingerprint: bytes) -> bool:
    try:
        return (pq.read_metadata(path).metadata or {}).get(FINGERPRINT) == fingerprint
    except (FileNotFoundError, pa.ArrowInvalid):
        return False


def _write_shard(rows: Dataset, path: Path, fingerprint: bytes):
    part = path.with_name(path.name + ".part")
    schema = rows.features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, FINGERPRINT: fingerprint})
    with pq.ParquetWriter(part, schema, use_content_defined_chunking=True, write_page_index=True) as writer:
        for table in rows.with_format("arrow").iter(batch_size=ROWS_PER_GROUP):
            writer.write_table(embed_table_storage(table))
    os.replace(part, path)
