"""Points where image states are similar to that of `[SEG]`, with which READ also prompts its mask decoder.

Computed as in READ (arXiv 2412.17741): CLIP saw the square in the middle of the image, so similarities fill that
square, and the rest has none.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


# Side of the map in which READ looks for the exact position of a point, before it is scaled to the image's size.
MAP_SIDE = 336
# Distance in pixels beyond which nothing moves a point: exp(-11**2) is negligible in float32.
REACH = 11


@dataclass(frozen=True)
class PointOptions:
    """Options for choosing points; the defaults are those of READ-7B.

    Args:
        count: Number of points per mask.
        positive: Minimum similarity, scaled to [0, 1] per image, of a point inside.
        negative: Maximum similarity of a point outside. Points in between are ignored by the decoder, but count.
        stride: Image tokens per cell of the map that points are chosen from.
    """

    count: int = 30
    positive: float = 0.8
    negative: float = 0.2
    stride: int = 2


def similarity_points(
    image_states: torch.Tensor, seg_state: torch.Tensor, original_size, options: PointOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the points of one mask.

    Args:
        image_states: States of the image's tokens, a square row by row, `(tokens, hidden_size)`.
        seg_state: State of `[SEG]`, `(hidden_size,)`.
        original_size: (H, W) of the image.

    Returns:
        `(P, 2)` float32, x and y in pixels of the image, and `(P,)` int64: 1 inside, 0 outside, -1 neither.
    """
    height, width = int(original_size[0]), int(original_size[1])
    similarity = (image_states @ seg_state).float()  # [tokens]
    side = int(len(similarity) ** 0.5)
    similarity = similarity.view(1, 1, side, side)

    # 1. Cells: those most similar to [SEG], then those least similar, then the rest.
    cells = F.interpolate(similarity, (side // options.stride,) * 2, mode="bilinear")
    cells = _pad_to_image(_normalize(cells), height, width, value=-1.0)  # [rows, columns]
    num_columns, values = cells.shape[1], cells.detach().flatten()
    inside = (values >= options.positive).nonzero()[:, 0]
    outside = ((values >= 0) & (values <= options.negative)).nonzero()[:, 0]
    between = ((values > options.negative) & (values < options.positive)).nonzero()[:, 0]
    inside = inside[values[inside].argsort(descending=True)]
    outside = outside[values[outside].argsort()]
    chosen = torch.cat([inside, outside, between])[: options.count]  # [P]
    labels = torch.full_like(chosen, -1)
    labels[values[chosen] >= options.positive] = 1
    labels[(values[chosen] >= 0) & (values[chosen] <= options.negative)] = 0

    # 2. The pixel in the middle of a cell, moved toward the similarity around it.
    x = ((chosen % num_columns + 0.5) * (width / num_columns)).clamp(max=width - 1).long()
    y = ((chosen // num_columns + 0.5) * (height / cells.shape[0])).clamp(max=height - 1).long()
    pixels = F.interpolate(_normalize(similarity), (MAP_SIDE, MAP_SIDE), mode="bilinear")
    pixels = _pad_to_image(pixels, height, width, value=0.0)
    pixels = F.interpolate(pixels[None, None], (height, width), mode="bilinear")[0, 0]  # [H, W]
    points = [_center(pixels, *point) for point in zip(x.tolist(), y.tolist())]
    return torch.stack(points), labels


def _normalize(similarity: torch.Tensor) -> torch.Tensor:
    return (similarity - similarity.min()) / (similarity.max() - similarity.min())


def _pad_to_image(square: torch.Tensor, height: int, width: int, value: float) -> torch.Tensor:
    """Pad a square `(1, 1, S, S)`, the middle of an image, to the image's shape: `(rows, columns)`."""
    side = square.shape[-1]
    scale = side / min(height, width)
    rows, columns = (int(height * scale) - side) // 2, (int(width * scale) - side) // 2
    return F.pad(square, (columns, columns, rows, rows), value=value)[0, 0]


def _center(pixels: torch.Tensor, x: int, y: int) -> torch.Tensor:
    """Return the center `(2,)`, x and y, of a map `(H, W)` around one pixel; close pixels count more."""
    rows = torch.arange(max(y - REACH, 0), min(y + REACH + 1, pixels.shape[0]), device=pixels.device)
    columns = torch.arange(max(x - REACH, 0), min(x + REACH + 1, pixels.shape[1]), device=pixels.device)
    near = torch.exp(-((columns - x) ** 2).float() - ((rows - y) ** 2).float()[:, None])
    weights = near * pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].exp()
    weights = weights / weights.sum()
    return torch.stack([(weights * columns).sum(), (weights * rows[:, None]).sum()])
