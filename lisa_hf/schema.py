"""The one row format of every data set, and the codec of its masks.

A row is one image with everything that is annotated on it. Masks stay compressed COCO run-length encodings (RLE: a
dict of `size` [H, W] and `counts` bytes) from the builder to the collator, which decodes the few that were sampled.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Features, Image, List, Value
from pycocotools import mask as coco_mask


TASKS = ("semantic", "referring", "reasoning", "vqa")

RLE_FEATURES = {"size": List(Value("int32")), "counts": Value("binary")}

FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("string"),
        "source": Value("string"),
        "task": Value("string"),
        # One target per annotation; its phrases are interchangeable. Targets that share a phrase are wanted together.
        "targets": List({"phrases": List(Value("string")), "rle": RLE_FEATURES}),
        "ignore": RLE_FEATURES,
        "is_sentence": Value("bool"),
        "explanation": Value("string"),
        "messages": List({"role": Value("string"), "content": Value("string")}),
    }
)


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


def make_row(
    image: str | bytes,
    image_id: str,
    source: str,
    task: str,
    targets: Sequence[dict[str, Any]] = (),
    ignore: dict[str, Any] | None = None,
    is_sentence: bool = False,
    explanation: str | None = None,
    messages: Sequence[dict[str, str]] = (),
) -> dict[str, Any]:
    """Makes one row that fits `FEATURES`.

    Args:
        image: Path of the image file, or the encoded file itself (for images that are made, not stored).
        image_id: Name of the image within its source, for messages and for joining results.
        source: Name of the data set, as `data_scripts.load_source` knows it.
        task: One of `TASKS`. A "vqa" row has `messages`, every other row has `targets`.
        targets: Dicts of `phrases` (list of str, at least one) and `rle`, all of one size.
        ignore: RLE of the pixels that count neither as target nor as background, of the targets' size.
        is_sentence: Whether the phrases are whole questions instead of names.
        explanation: Why the targets answer the phrases.
        messages: Chat turns: dicts of `role` ("user" and "assistant" in turn, beginning with "user") and `content`.

    Raises:
        ValueError: If the parts contradict each other; the message names the source and the image.
    """
    where = f"Row {image_id!r} of {source!r}"
    if task not in TASKS:
        raise ValueError(f"{where}: the task is one of {TASKS}, but found {task!r}.")
    if task == "vqa" and (targets or not messages):
        raise ValueError(
            f"{where}: a vqa row has messages and no targets, but found {len(messages)} messages and "
            f"{len(targets)} targets."
        )
    if task != "vqa" and (messages or not targets):
        raise ValueError(
            f"{where}: a {task} row has targets and no messages, but found {len(targets)} targets and "
            f"{len(messages)} messages."
        )
    for index, target in enumerate(targets):
        phrases = target["phrases"]
        if isinstance(phrases, str) or not phrases or not all(isinstance(p, str) and p.strip() for p in phrases):
            raise ValueError(f"{where}: target {index} needs a list of non-empty phrases, but found {phrases!r}.")
    sizes = {_checked_size(rle) for rle in [target["rle"] for target in targets] + ([ignore] if ignore else [])}
    if len(sizes) > 1:
        raise ValueError(f"{where}: all masks of a row have the image's size, but found the sizes {sorted(sizes)}.")
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"{where}: messages are pairs of user and assistant turns, but found the roles {roles}.")
    return {
        "image": {"path": image, "bytes": None} if isinstance(image, str) else {"path": None, "bytes": image},
        "image_id": image_id,
        "source": source,
        "task": task,
        "targets": [{"phrases": list(target["phrases"]), "rle": target["rle"]} for target in targets],
        "ignore": ignore,
        "is_sentence": is_sentence,
        "explanation": explanation,
        "messages": [{"role": message["role"], "content": message["content"]} for message in messages],
    }


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
