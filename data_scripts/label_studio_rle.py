"""Brush masks of Label Studio: packed bits in the format of the JavaScript package `@thi.ng/rle-pack`.

    32 bits         number N of values
    5 bits          bits of a value, less 1
    4 x 4 bits      bits of a count, less 1, in four sizes
    then blocks     1 bit: is it a run; 2 bits: which size the count has; the count, less 1;
                    the value of the run, or `count` values

The values are the pixels of the image, row by row, each with red, green, blue and alpha. The mask is where alpha,
whose edges are soft, exceeds half of its maximum.
"""

from collections.abc import Sequence

import numpy as np


def decode_brush(content: Sequence[int], height: int, width: int) -> np.ndarray:
    """Decode a mask of shape `(height, width)`, bool.

    Args:
        content: The `rle` of a region: bytes as numbers.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Raises:
        ValueError: If it is damaged, or belongs to an image of a different size.
    """
    if not isinstance(content, list) or not all(isinstance(v, int) and 0 <= v <= 255 for v in content):
        raise ValueError("expected a brush mask of bytes (numbers from 0 to 255), got other values. Export it again.")
    bits = np.unpackbits(np.array(content, dtype=np.uint8))
    digits = (bits + ord("0")).tobytes()
    position = 0

    def read(size: int) -> int:
        nonlocal position
        position += size
        if position > len(bits):
            raise ValueError("expected a complete brush mask, got a truncated one. Export it again.")
        return int(digits[position - size : position], 2)

    num_values = read(32)
    if num_values != 4 * height * width:
        raise ValueError(
            f"expected a brush mask of {height} x {width} pixels, got one of {num_values / 4:g}. It belongs to "
            "another image."
        )
    value_size = read(5) + 1
    count_sizes = [read(4) + 1 for _ in range(4)]
    values = np.zeros(num_values, dtype=np.uint8)
    filled = 0
    while filled < num_values:
        is_run = read(1)
        count = read(count_sizes[read(2)]) + 1
        if is_run:
            values[filled : filled + count] = min(read(value_size), 255)
        else:
            count = min(count, num_values - filled)
            end = position + count * value_size
            if end > len(bits):
                raise ValueError("expected a complete brush mask, got a truncated one. Export it again.")
            weights = 2 ** np.arange(value_size - 1, -1, -1, dtype=np.int64)
            values[filled : filled + count] = np.minimum(bits[position:end].reshape(count, value_size) @ weights, 255)
            position = end
        filled += count
    alpha = values.reshape(height, width, 4)[..., 3]
    return alpha > alpha.max() // 2
