"""Tell whether two datasets share images, without their pixels: COCO photos by id, others by file name or content.

Many datasets annotate the photos of COCO, under several file names, so a benchmark may ask about what a model was
trained on in another source. A training run keeps the keys of its images in `train_images.npz`, which travels with the
model: an array of 64-bit keys by the name of each source.
"""

import hashlib
import re
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..files import atomic_file


TRAIN_IMAGES = "train_images.npz"
COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)20\d\d_)?(\d{12})")
SHORT_NAME = 8  # characters; names like "0012" say nothing without their directory
ENDS = 4096  # bytes at both ends of a file, which tell photos apart


def name_key(path: str) -> int:
    """Return the key of an image by its path or address: of COCO photos, by their id; of others, by their name."""
    *parents, name = path.split("::")[0].replace("\\", "/").split("/")
    stem = name.rpartition(".")[0] or name
    if match := COCO_NAME.fullmatch(stem):
        return _hash(f"coco {int(match[1])}".encode())
    parent = parents[-1] if parents and len(stem) < SHORT_NAME else ""
    return _hash(f"name {parent}/{stem}".encode())


def content_key(content: bytes | memoryview) -> int:
    """Return the key of an image by the bytes of its file."""
    return _hash(b"".join([b"content %d " % len(content), content[:ENDS], content[-ENDS:]]))


def image_keys(rows: Dataset) -> np.ndarray:
    """Return the distinct keys of the images of rows, `(num_keys,)` uint64: of stored images by content, else by name.

    Args:
        rows: Rows of `lisa_hf.data.rows.FEATURES`. Images are not decoded, and files are not opened.
    """
    keys = [np.empty(0, dtype=np.uint64)]
    for table in rows.select_columns("image").with_format("arrow").iter(batch_size=1000):
        images = table["image"].combine_chunks()
        contents, paths = images.field("bytes"), images.field("path")
        found = [content_key(memoryview(content.as_buffer())) for content in contents.drop_null()]
        found += map(name_key, paths.filter(contents.is_null()).drop_null().unique().to_pylist())
        keys.append(np.array(found, dtype=np.uint64))
    return np.unique(np.concatenate(keys))


def read_image_keys(directory: Path) -> dict[str, np.ndarray]:
    """Read the keys of a model's training images by source, as far as they are in its directory or its run's."""
    for path in (directory / TRAIN_IMAGES, directory.resolve().parent / TRAIN_IMAGES):
        if path.is_file() and (path.parent == directory or directory.name.startswith("checkpoint-")):
            with np.load(path, allow_pickle=False) as found:
                return {name: found[name] for name in found.files}
    return {}


def write_image_keys(directory: Path, keys: dict[str, np.ndarray]) -> None:
    """Write the keys of training images by source."""
    with atomic_file(directory / TRAIN_IMAGES) as path, open(path, "wb") as file:
        np.savez_compressed(file, **keys)


def merge_image_keys(*several: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the union of keys by source."""
    names = dict.fromkeys(name for keys in several for name in keys)
    return {name: np.unique(np.concatenate([keys[name] for keys in several if name in keys])) for name in names}


def _hash(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
