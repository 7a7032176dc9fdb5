"""Tell whether two datasets share images: COCO photos by id, others by file name, content, or how they look.

Many datasets annotate COCO photos under different file names, so a benchmark may ask about images that a model was
trained on through another source. A training run saves the keys of its images in `train_images.npz`, which stays with
the model: one array of 64-bit keys per source name.
"""

import hashlib
import re
from pathlib import Path

import cv2
import numpy as np
from datasets import Dataset
from PIL.Image import Resampling

from ..files import atomic_file
from ..model.images import load_image, open_image


TRAIN_IMAGES = "train_images.npz"
COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)20\d\d_)?(\d{12})")
SHORT_NAME = 8  # characters; names like "0012" identify nothing without their directory
ENDS = 4096  # bytes at both ends of a file, enough to tell photos apart
HASH_SIDE = 32  # pixels of the thumbnail of a perceptual hash
BLANK = 2  # standard deviation of gray values below which an image has no frequencies to compare


def coco_id(path: str) -> int | None:
    """Return the id of a COCO photo from its path or URL; None if it is not named like a COCO photo."""
    match = COCO_NAME.fullmatch(_split_name(path)[1])
    return int(match[1]) if match else None


def name_key(path: str) -> int:
    """Return the key of an image from its path or URL: by id for COCO photos, by name for others."""
    if (number := coco_id(path)) is not None:
        return _hash(f"coco {number}".encode())
    parent, stem = _split_name(path)
    return _hash(f"name {parent if len(stem) < SHORT_NAME else ''}/{stem}".encode())


def _split_name(path: str) -> tuple[str, str]:
    """Return the names of an image's directory and file, the latter without its extension."""
    *parents, name = path.split("::")[0].replace("\\", "/").split("/")
    return parents[-1] if parents else "", name.rpartition(".")[0] or name


def content_key(content: bytes | memoryview) -> int:
    """Return the key of an image from the bytes of its file."""
    return _hash(b"".join([b"content %d " % len(content), content[:ENDS], content[-ENDS:]]))


def perceptual_hash(content: bytes) -> int | None:
    """Return a 64-bit hash of which few bits change if the image is recompressed or resized. None for a blank image.

    The bits compare the 8 x 8 lowest frequencies of a gray thumbnail with their median (known as pHash). Cropping,
    mirroring or adding a border gives different bits.

    Raises:
        ValueError: If the image cannot be read.
    """
    image = open_image(content)
    image.draft("RGB", (4 * HASH_SIDE, 4 * HASH_SIDE))  # decode a JPEG no larger than needed
    thumbnail = load_image(image).convert("L").resize((HASH_SIDE, HASH_SIDE), Resampling.LANCZOS, reducing_gap=3)
    gray = np.asarray(thumbnail, dtype=np.float32)
    if gray.std() < BLANK:
        return None
    low = cv2.dct(gray)[:8, :8]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def image_keys(rows: Dataset) -> np.ndarray:
    """Return the distinct keys of the images of rows, `(num_keys,)` uint64: by content if stored in the row, else by
    name.

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
    return _distinct(np.concatenate(keys))


def read_image_keys(directory: Path) -> dict[str, np.ndarray]:
    """Read the keys of a model's training images by source, if its directory or that of its run has them."""
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
    return {name: _distinct(np.concatenate([keys[name] for keys in several if name in keys])) for name in names}


def _distinct(keys: np.ndarray) -> np.ndarray:
    """Return the sorted, distinct keys. `np.unique` takes ten times the memory, for a hash table."""
    keys = np.sort(keys)
    return keys[np.append(True, keys[1:] != keys[:-1])] if len(keys) else keys


def _hash(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
