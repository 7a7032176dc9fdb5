"""The codec of masks: COCO run-length encodings (RLE), dicts of `size` [H, W] and compressed `counts`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import List, Value
from pycocotools import mask as coco_mask


RLE_FEATURES = {"size": List(Value("int32")), "counts": Value("binary")}


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encodes a binary mask of shape (H, W), dtype bool or uint8 in {0, 1}, as compressed RLE."""
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"A mask has the shape (height, width), but this one has the shape {mask.shape}.")
    if mask.dtype not in (np.bool_, np.uint8):
        raise ValueError(f"A mask has the dtype bool or uint8, but this one is {mask.dtype}.")
    if mask.size and mask.max() > 1:
        raise ValueError(
            f"A mask holds 0 and 1 only, but this one holds {mask.max()}. Ignored pixels are a mask of their own."
        )
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"]}


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """Decodes a compressed RLE to a mask of shape (H, W), dtype uint8 in {0, 1}."""
    height, width = _checked_size(rle)
    runs = run_lengths(rle)
    mask = np.repeat(np.arange(len(runs), dtype=np.uint8) % 2, runs)
    return np.ascontiguousarray(mask.reshape(width, height).T)


def run_lengths(rle: dict[str, Any]) -> np.ndarray:
    """Lengths of an RLE's runs, in turn of 0 and 1 down the columns, dtype int64; their sum is H * W.

    Raises:
        ValueError: The RLE is damaged. So this also checks a mask, without drawing its pixels.
    """
    height, width = _checked_size(rle)
    # pycocotools would fill the rest of a mask that is larger than its counts with whatever is in memory.
    runs = _parse_counts(rle["counts"])
    if runs.min(initial=0) < 0 or runs.sum() != height * width:
        raise ValueError(
            f"A mask of {height} x {width} has {height * width} pixels, but its RLE counts describe {runs.sum()}. "
            "The `size` is that of another image or the counts are damaged."
        )
    return runs


def merge_masks(rles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The union of at least one RLE, all of one size, as RLE."""
    sizes = {_checked_size(rle) for rle in rles}
    if len(sizes) != 1:
        raise ValueError(f"Merging needs at least one mask and all of one size, but found the sizes {sorted(sizes)}.")
    for rle in rles:
        run_lengths(rle)  # pycocotools does not check them
    union = coco_mask.merge(list(rles))
    return {"size": [int(side) for side in union["size"]], "counts": union["counts"]}


def _checked_size(rle: dict[str, Any]) -> tuple[int, int]:
    size, counts = rle["size"], rle["counts"]
    if len(size) != 2 or not isinstance(counts, bytes):
        raise ValueError(
            "An RLE has a `size` of [height, width] and compressed `counts` of bytes, but found a size of "
            f"{list(size)} and counts of {type(counts).__name__}. Compress it with pycocotools.mask.frPyObjects."
        )
    return int(size[0]), int(size[1])


def _parse_counts(counts: bytes) -> np.ndarray:
    """Lengths of the runs from compressed counts, see [`run_lengths`].

    A number is a little-endian chain of characters, code point 48 upwards: five bits of data and a bit for "more
    follows", negative if the last one's highest data bit is set. From the fourth number on it is the difference to
    the run before the previous one.
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(codes & 32 == 0)
    if not len(last) or last[-1] != len(codes) - 1 or codes.min() < 0 or codes.max() > 63:
        raise ValueError(f"The {len(counts)} bytes are not the compressed counts of a COCO RLE, or they were cut off.")
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    position = np.arange(len(codes)) - np.repeat(first, length)
    runs = np.add.reduceat((codes & 31) << (5 * position), first)
    runs -= np.where(codes[last] & 16, 1 << (5 * length), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
