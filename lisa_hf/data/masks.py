"""Binary masks as COCO run-length encodings (RLE): encode, check once, merge, and draw on any device.

A row holds its masks as compressed RLEs: dicts of `size` [H, W] and `counts` bytes, as pycocotools writes them. An RLE
is parsed and checked once, when a question asks for it, and is a [`Mask`] from then on. For example, 2 x 3 pixels:

    1 1 0       down the columns        1 0 1 1 0 0
    0 1 0       lengths of the runs     0 1 1 2 2       runs of 0 and 1 alternate, a run of 0 comes first
                ends of the runs        0 1 2 4 6       the last end is H * W

No pixel is touched before [`draw_run_ends`], so the cost of a mask is proportional to its runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import List, Value
from pycocotools import mask as coco_mask
from torch.nn.utils.rnn import pad_sequence

from ..model.losses import MASK_IGNORE_INDEX


RLE_FEATURES = {"size": List(Value("int32")), "counts": Value("binary")}
# Pillow treats larger photos as decompression bombs, and run ends are int32.
MAX_PIXELS = 178_956_970


@dataclass(frozen=True, eq=False)
class Mask:
    """A binary mask, as the ends of its runs.

    Args:
        size: Height and width in pixels.
        run_ends: Ends of the alternating runs of 0 and 1, down the columns. Shape `(R,)`, int32, ascending.
    """

    size: tuple[int, int]
    run_ends: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.size == other.size and np.array_equal(self.run_ends, other.run_ends)

    @classmethod
    def from_rle(cls, rle: dict[str, Any]) -> "Mask":
        """Parse and check a compressed RLE.

        Raises:
            ValueError: If the RLE is damaged.
        """
        height, width = rle_size(rle)
        if min(height, width) < 1 or height * width > MAX_PIXELS:
            raise ValueError(
                f"expected a mask of at least one and at most {MAX_PIXELS // 10**6} million pixels, got a size of "
                f"{height} x {width}. Restore the annotation."
            )
        runs = _decompress(rle["counts"])
        # pycocotools does not check this, and fills pixels not covered by the counts with uninitialized memory. Each
        # run is checked too, because the sum of huge runs may overflow to the right number.
        is_too_long = runs.min(initial=0) < 0 or runs.max(initial=0) > height * width
        if is_too_long or runs.sum() != height * width:
            raise ValueError(
                f"expected RLE counts of {height * width} pixels for a mask of {height} x {width}, got {runs.sum()}. "
                "The `size` belongs to another image, or the counts are damaged. Restore the annotation."
            )
        return cls((height, width), runs.cumsum().astype(np.int32))

    def to_rle(self) -> dict[str, Any]:
        """Return the compressed RLE."""
        size = list(self.size)
        rle = coco_mask.frPyObjects({"size": size, "counts": np.diff(self.run_ends, prepend=0).tolist()}, *size)
        return {"size": size, "counts": rle["counts"]}

    def at(self, pixels: np.ndarray) -> np.ndarray:
        """Return the values of pixels, bool, given their indices down the columns."""
        return np.searchsorted(self.run_ends, pixels, side="right") % 2 == 1

    def draw(self) -> np.ndarray:
        """Return the pixels, shape `(H, W)`, uint8 in {0, 1}."""
        return draw_run_ends(torch.from_numpy(self.run_ends)[None], self.size)[0].numpy()


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode a binary mask of shape `(H, W)`, bool or uint8 in {0, 1}, as compressed RLE."""
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"expected a mask of shape (height, width), got the shape {mask.shape}.")
    if mask.dtype not in (np.bool_, np.uint8):
        raise ValueError(f"expected a mask of dtype bool or uint8, got {mask.dtype}.")
    if mask.size and mask.max() > 1:
        raise ValueError(
            f"expected a mask of 0 and 1, got {mask.max()}. Encode ignored pixels as a mask of their own."
        )
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"]}


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """Decode a compressed RLE to a mask of shape `(H, W)`, uint8 in {0, 1}."""
    return Mask.from_rle(rle).draw()


def rle_size(rle: dict[str, Any]) -> tuple[int, int]:
    """Return the height and width of a compressed RLE, whose counts are not parsed."""
    size, counts = rle["size"], rle["counts"]
    if len(size) != 2 or not isinstance(counts, bytes):
        raise ValueError(
            "expected an RLE with a `size` of [height, width] and compressed `counts` of bytes, got a size of "
            f"{list(size)} and counts of {type(counts).__name__}. Compress it with pycocotools.mask.frPyObjects."
        )
    return int(size[0]), int(size[1])


def merge_masks(masks: Sequence[Mask]) -> Mask:
    """Return the union of at least one mask, all of one size."""
    sizes = sorted({mask.size for mask in masks})
    if len(sizes) != 1:
        raise ValueError(f"expected at least one mask and all of one size, got the sizes {sizes}.")
    # A run of 1 begins where a run of 0 ends, and vice versa.
    ends = np.concatenate([mask.run_ends for mask in masks])
    steps = np.concatenate([np.resize([1, -1], len(mask.run_ends)) for mask in masks])
    # Number of masks that cover the pixels after each end; ends at the same pixel are summed.
    ends, inverse = np.unique(ends, return_inverse=True)
    is_covered = np.bincount(inverse, weights=steps).cumsum() > 0
    changes = ends[np.diff(is_covered, prepend=False)]
    height, width = sizes[0]
    # The last run ends with the image, whatever its value.
    run_ends = np.append(changes[changes < height * width], height * width)
    return Mask((height, width), run_ends.astype(np.int32))


def stack_run_ends(masks: Sequence[Mask]) -> torch.Tensor:
    """Stack the run ends of masks of the same size.

    Returns:
        Shape `(M, R)`, int32. Masks with fewer runs are padded with runs of length 0 at the end of the image.
    """
    if not masks:
        return torch.zeros(0, 0, dtype=torch.int32)
    run_ends = [torch.from_numpy(mask.run_ends) for mask in masks]
    return pad_sequence(run_ends, batch_first=True, padding_value=int(run_ends[0][-1]))


def draw_run_ends(run_ends: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Draw masks of the same size, on the device of their run ends.

    Args:
        run_ends: Shape `(M, R)`, int32, from [`stack_run_ends`].
        size: Height and width in pixels.

    Returns:
        Shape `(M, H, W)`, uint8 in {0, 1}.
    """
    height, width = size
    # A pixel's value is the parity of the number of runs that end at or before it. Ends at H * W lie outside the
    # image.
    changes = torch.zeros(len(run_ends), height * width + 1, dtype=torch.uint8, device=run_ends.device)
    changes.scatter_add_(1, run_ends.long(), torch.ones_like(run_ends, dtype=torch.uint8))
    masks = changes[:, :-1].cumsum(1, dtype=torch.uint8) & 1  # [M, W * H]; a sum beyond 255 keeps its parity
    return masks.view(len(run_ends), width, height).transpose(1, 2).contiguous()  # [M, H, W]


def compact_mask_labels(masks: Sequence[Mask], ignore: Mask | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the run ends of an image's masks and of its ignored pixels, for [`draw_mask_labels`].

    Returns:
        Shapes `(M, R)` and `(1, R')`, or `(0, 0)` without ignored pixels, both int32.
    """
    return stack_run_ends(masks), stack_run_ends([] if ignore is None else [ignore])


def draw_mask_labels(run_ends: torch.Tensor, ignored_run_ends: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Draw the mask labels of an image, on the device of its run ends.

    Args:
        run_ends: Shape `(M, R)`, int32, from [`compact_mask_labels`].
        ignored_run_ends: Shape `(1, R')` or `(0, 0)`, int32, from [`compact_mask_labels`].
        size: Height and width in pixels.

    Returns:
        Shape `(M, H, W)`, uint8: 1 target, 0 background, 255 ignored.
    """
    masks = draw_run_ends(run_ends, size)
    if len(ignored_run_ends):
        # A pixel annotated as both is a target.
        masks.masked_fill_((masks == 0) & (draw_run_ends(ignored_run_ends, size) == 1), MASK_IGNORE_INDEX)
    return masks


def _decompress(counts: bytes) -> np.ndarray:
    """Return the lengths of the runs, shape `(R,)`, int64, from compressed counts.

    Each number is a sequence of characters whose codes minus 48 hold six bits. The lower five are data, least
    significant first, and the sixth is set if another character follows. Numbers are in two's complement, so the
    highest data bit of the last character is the sign. From the fourth number on, they are differences from the
    second-to-last number.
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    # Split the characters into numbers: the last character of a number has no sixth bit.
    last = np.flatnonzero(codes & 32 == 0)
    if not len(last) or last[-1] != len(codes) - 1 or codes.min() < 0 or codes.max() > 63:
        raise ValueError(
            f"expected the compressed counts of a COCO RLE, got {len(counts)} other or truncated bytes. Restore the "
            "annotation."
        )
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    # Join the data bits of each number, five per character.
    position = np.arange(len(codes)) - np.repeat(first, length)
    runs = np.add.reduceat((codes & 31) << (5 * position), first)
    # Extend the sign.
    runs -= np.where(codes[last] & 16, 1 << (5 * length), 0)
    # Undo the differences, which are from the previous run of the same value. The first run of 0 is not part of them.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
