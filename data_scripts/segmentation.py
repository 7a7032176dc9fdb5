"""Segmentations as annotation tools write them, encoded as RLE: polygons, RLEs, pixel lists.

Annotations are not trusted: pycocotools crashes the process or exhausts memory on extreme coordinates and sizes, so
everything is checked and bounded here first.
"""

from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from pycocotools import mask as coco_mask

from lisa_hf.data.masks import MAX_PIXELS, Mask, encode_mask, merge_masks


# pycocotools walks along an outline in steps of a fifth of a pixel, with 16 bytes each. The outline of all of a mask's
# polygons may be 4 million pixels long, 100 times around a photo of 100 megapixels.
STEPS_PER_PIXEL = 5
MAX_STEPS = 20_000_000
# RLEs are merged in groups of this size, so that the time does not grow with the square of their number.
MERGED_AT_ONCE = 32
# In a mask image, 255 in addition to a value up to this one is void, as in PASCAL VOC. With a larger value, it is
# ambiguous.
MAX_CLASS = 63
# CVAT writes masks that are a pixel too large for their image.
MAX_OVERHANG = 1
# Number of corners of the polygon drawn for a circle or an ellipse.
ELLIPSE_POINTS = 180
LOSSY_FORMATS = ("JPEG", "MPO", "WEBP")


class NothingToDrawError(ValueError):
    """A segmentation has no polygon with at least three points."""


def encode_segmentation(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Encode a segmentation as compressed RLE.

    Args:
        segmentation: One of:
            - Polygons [[x0, y0, x1, y1, ...], ...] or [[[x0, y0], ...], ...] in pixels, whose union is the mask.
              Polygons with fewer than three points are omitted.
            - One polygon, [x0, y0, x1, y1, ...] or [[x0, y0], ...].
            - An RLE with compressed (str or bytes) or uncompressed (list of int) counts.
            - RLEs, whose union is the mask.
            - The pixels: rows of booleans, or of 0 and 1, with the size of the image.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Raises:
        NothingToDrawError: If no polygon has three points.
        ValueError: If the segmentation is damaged, or belongs to an image of another size.
    """
    height, width = check_size(height, width)
    if isinstance(segmentation, np.ndarray):
        segmentation = segmentation.tolist()
    if isinstance(segmentation, dict):
        return encode_rle(segmentation, height, width)
    if not isinstance(segmentation, list | tuple):
        raise ValueError(f"expected polygons (a list) or an RLE (a mapping) as a mask, got {segmentation!r}.")
    if segmentation and all(isinstance(part, dict) and "counts" in part for part in segmentation):
        masks = [Mask.from_rle(encode_rle(part, height, width)) for part in segmentation]
        return merge_masks(masks).to_rle()
    if _holds_pixels(segmentation, height, width):
        return encode_mask(np.array(segmentation, dtype=bool))
    return encode_polygons([_flatten(polygon) for polygon in _split_polygons(segmentation)], height, width)


def encode_visible(segmentation: Any, height: int, width: int) -> dict[str, Any] | None:
    """Encode a segmentation as compressed RLE, or return None if it covers no pixel."""
    try:
        rle = encode_segmentation(segmentation, height, width)
    except NothingToDrawError:
        return None
    # The RLE of an empty mask has one run, of 0.
    return rle if len(Mask.from_rle(rle).run_ends) > 1 else None


def encode_rle(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Encode an RLE with compressed or uncompressed counts as compressed RLE for an image of this size."""
    if list(rle["size"]) != [height, width]:
        raise ValueError(f"expected a mask of {[height, width]}, got one of {list(rle['size'])}.")
    counts = rle["counts"]
    if isinstance(counts, np.ndarray):
        counts = counts.tolist()
    if isinstance(counts, str | bytes):
        rle = {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
        Mask.from_rle(rle)  # raises if the counts describe a mask of another size
        return rle
    if not isinstance(counts, list | tuple) or not all(
        isinstance(count, int | float) and 0 <= count <= height * width and count == int(count) for count in counts
    ):
        raise ValueError(
            f"expected RLE counts of compressed text or whole numbers from 0 to {height * width}, got other values. "
            "Restore the annotation."
        )
    if sum(counts) != height * width:
        raise ValueError(
            f"expected RLE counts of {height * width} pixels for a mask of {height} x {width}, got {sum(counts)}. "
            "Restore the annotation."
        )
    return Mask((height, width), np.cumsum(counts).astype(np.int32)).to_rle()


def encode_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> dict[str, Any]:
    """Encode the union of polygons [x0, y0, x1, y1, ...] as compressed RLE."""
    lengths = [len(polygon) for polygon in polygons]
    if any(length % 2 for length in lengths):
        raise ValueError(f"expected polygons of at least three points (x, y), got {lengths} numbers.")
    arrays = [
        check_points(np.array(polygon, dtype=np.float64).reshape(-1, 2), height, width)
        for polygon in polygons
        if len(polygon) >= 6
    ]
    if not arrays:
        raise NothingToDrawError(f"expected polygons of at least three points (x, y), got {lengths} numbers.")
    steps = sum(_count_steps(points) for points in arrays)
    if steps > MAX_STEPS:
        raise ValueError(
            f"expected polygons whose outlines are at most {MAX_STEPS // STEPS_PER_PIXEL} pixels long, got "
            f"{steps // STEPS_PER_PIXEL}. Repair the polygons, or store the mask as RLE."
        )
    rles = coco_mask.frPyObjects([points.ravel().tolist() for points in arrays], height, width)
    while len(rles) > 1:
        rles = [coco_mask.merge(rles[i : i + MERGED_AT_ONCE]) for i in range(0, len(rles), MERGED_AT_ONCE)]
    return {"size": [height, width], "counts": rles[0]["counts"]}


def encode_patch(patch: np.ndarray, left: float, top: float, height: int, width: int) -> dict[str, Any] | None:
    """Encode a mask of part of an image, or return None if it covers no pixel.

    Tools round: the part may leave the image by `MAX_OVERHANG` pixels, which are cut off.

    Args:
        patch: Shape `(H', W')`, bool.
        left: Column of its upper-left corner in the image.
        top: Row of its upper-left corner in the image.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Raises:
        ValueError: If it is not inside the image.
    """
    height, width = check_size(height, width)
    left, top = round(left), round(top)
    bottom, right = top + patch.shape[0], left + patch.shape[1]
    overhang = max(-top, -left, bottom - height, right - width)
    if overhang > MAX_OVERHANG:
        raise ValueError(
            f"expected a mask inside an image of {width} x {height} pixels, got one from {[left, top]} to "
            f"{[right, bottom]}. It belongs to another image."
        )
    mask = np.zeros((height, width), dtype=bool)
    inner = patch[max(-top, 0) : height - top, max(-left, 0) : width - left]
    mask[max(top, 0) : bottom, max(left, 0) : right] = inner
    return encode_mask(mask) if mask.any() else None


def encode_ellipse(
    center: Sequence[float], radii: Sequence[float], rotation: float, height: int, width: int
) -> dict[str, Any] | None:
    """Encode an ellipse, or return None if it covers no pixel.

    Args:
        center: x and y in pixels.
        radii: Semi-axes along x and y before the rotation, in pixels.
        rotation: Clockwise rotation in degrees.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
    """
    angles = np.linspace(0, 2 * np.pi, ELLIPSE_POINTS, endpoint=False)
    turn = np.deg2rad(rotation)
    with np.errstate(over="ignore", invalid="ignore"):  # `check_points` reports where such an ellipse is
        x, y = radii[0] * np.cos(angles), radii[1] * np.sin(angles)
        x, y = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
        points = np.stack([center[0] + x, center[1] + y], axis=1)
    return encode_visible([points.ravel().tolist()], height, width)


def encode_with_holes(outline: Sequence, holes: Sequence[Sequence], height: int, width: int) -> dict[str, Any] | None:
    """Encode a polygon minus its holes, which are polygons too, or return None if no pixel is left."""
    rle = encode_visible([outline], height, width)
    inner = encode_visible(list(holes), height, width) if holes else None
    if rle is None or inner is None:
        return rle
    mask = (Mask.from_rle(rle).draw() == 1) & (Mask.from_rle(inner).draw() == 0)
    return encode_mask(mask) if mask.any() else None


def encode_labels(labels: np.ndarray) -> dict[int, dict[str, Any]]:
    """Encode the region of every label, in one pass over the runs of equal labels.

    Args:
        labels: Shape `(H, W)`, any integer dtype.

    Returns:
        RLE by label, for the labels that occur, in ascending order.
    """
    height, width = labels.shape
    pixels = labels.ravel(order="F")
    bounds = np.concatenate([[0], np.flatnonzero(pixels[1:] != pixels[:-1]) + 1, [pixels.size]])
    values = pixels[bounds[:-1]]
    rles = {}
    for value in np.unique(values).tolist():
        runs = np.flatnonzero(values == value)
        # The region begins where a run of 0 ends, and ends where a run of 1 does.
        ends = np.stack([bounds[runs], bounds[runs + 1]], axis=1).ravel()
        if ends[-1] < pixels.size:
            ends = np.append(ends, pixels.size)
        rles[value] = Mask((height, width), ends.astype(np.int32)).to_rle()
    return rles


def read_mask(file: str | IO[bytes]) -> tuple[np.ndarray, np.ndarray | None]:
    """Read a mask image with 0 for the background and one other value, rotated by its EXIF orientation.

    Args:
        file: Path or file of the image. Lossy images are thresholded at half brightness if nearly all of their pixels
            are black or white.

    Returns:
        The mask, shape `(H, W)`, bool, and the ignored pixels in the same form: those of 255 in addition to a class.
        None if there are none.

    Raises:
        ValueError: If it cannot be read, is empty or full, or has several values, so that the object is ambiguous.
    """
    pixels, is_lossy = load_mask(file)
    if is_lossy:
        is_clear = ((pixels < 64) | (pixels >= 192)).mean() > 0.9
        if pixels.dtype != np.uint8 or not is_clear:
            raise ValueError(
                f"expected a mask, got the lossy image {file!r}, whose pixels are not black or white. Save it as PNG."
            )
        pixels = pixels >= 128
    values = np.unique(pixels)
    others = values[values != 0].tolist()
    if not others or len(others) == len(values) == 1:
        raise ValueError(
            f"expected a mask with an object and a background of 0, got {file!r}, in which every pixel is "
            f"{values.tolist()[0]!r}. Draw the mask, or remove the row."
        )
    if len(others) == 1:
        return pixels != 0, None
    if len(others) == 2 and others[0] <= MAX_CLASS and others[1] == 255 and pixels.dtype == np.uint8:
        return pixels == others[0], pixels == 255
    raise ValueError(
        f"expected a mask with 0 for the background and one other value, got {file!r} with {len(others)} others, "
        f"{others[:5]}{' and so on' if len(others) > 5 else ''}. Save the object that is asked for as a separate "
        "mask, or threshold a soft mask."
    )


def load_mask(file: str | IO[bytes]) -> tuple[np.ndarray, bool]:
    """Load the values of a mask image, shape `(H, W)`, as viewers rotate it, and whether its format is lossy."""
    try:
        with PIL.Image.open(file) as image:
            is_lossy = image.format in LOSSY_FORMATS
            image = PIL.ImageOps.exif_transpose(image)
            image.load()
    except Exception as error:  # Pillow has no specific exception for broken files.
        raise ValueError(
            f"expected a mask, got {file!r}, which cannot be read: {error}. Restore it, or remove the row."
        ) from error
    pixels = np.asarray(image)
    if image.mode in ("RGB", "RGBA", "LA"):
        # Many tools save gray masks in color.
        colors, alpha = (pixels, None) if image.mode == "RGB" else (pixels[..., :-1], pixels[..., -1])
        is_opaque = alpha is None or (alpha == 255).all()
        if is_opaque and (colors == colors[..., :1]).all():
            pixels = colors[..., 0]
    if pixels.ndim != 2 or not np.isfinite(pixels).all():
        raise ValueError(
            f"expected the mask {file!r} to have one channel, got the mode {image.mode} with colors or transparency. "
            "Save it in grayscale, with 0 for the background."
        )
    if image.mode == "P":
        used = np.unique(pixels).tolist()
        palette = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
        black = [index for index in used if index < len(palette) and not palette[index].any()]
        if 0 in used and black and 0 not in black:
            raise ValueError(
                f"expected the palette of the mask {file!r} to show the background, 0, in black, got black for "
                f"{black}. Save it in grayscale, with 0 for the background."
            )
    return pixels, is_lossy


def check_points(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the points (x, y) of a polygon, shape `(N, 2)`, if they fit an image of this size.

    An outline may extend beyond the image by up to the image's longer side. It is clipped at the border.

    Raises:
        ValueError: If the polygon is not in the image, or a point is far outside it.
    """
    longer = max(height, width)
    with np.errstate(invalid="ignore"):
        fits = (
            not (points.max(axis=0) < 0).any()
            and not (points.min(axis=0) > (width, height)).any()
            and (points >= -longer).all()
            and (points <= (width + longer, height + longer)).all()
        )
    if not np.isfinite(points).all():
        damaged = points[~np.isfinite(points).all(axis=1)][0].tolist()
        raise ValueError(
            f"expected polygons in an image of {width} x {height} pixels, got one with the point {damaged}. Draw it "
            "again."
        )
    if not fits:
        raise ValueError(
            f"expected polygons in an image of {width} x {height} pixels, got one from "
            f"{points.min(axis=0).tolist()} to {points.max(axis=0).tolist()}. It belongs to another image."
        )
    return points


def check_size(height: Any, width: Any) -> tuple[int, int]:
    """Return the height and width of an image as integers.

    Raises:
        ValueError: If they are not whole numbers from 1 to `MAX_PIXELS` in total.
    """
    try:
        sides = [float(height), float(width)]
    except (TypeError, ValueError):
        sides = [0.0, 0.0]
    if not all(side >= 1 and side.is_integer() for side in sides) or sides[0] * sides[1] > MAX_PIXELS:
        raise ValueError(
            f"expected an image size of whole numbers and at most {MAX_PIXELS // 10**6} megapixels, got a height of "
            f"{height!r} and a width of {width!r}. Correct the size."
        )
    return int(sides[0]), int(sides[1])


def _count_steps(points: np.ndarray) -> int:
    edges = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1)
    return int((STEPS_PER_PIXEL * edges + 2).sum())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _holds_pixels(segmentation: Sequence, height: int, width: int) -> bool:
    """Return whether a list contains the rows of a mask instead of polygons."""
    return len(segmentation) == height and all(
        isinstance(row, list | tuple) and len(row) == width and all(value in (0, 1) for value in row)
        for row in segmentation
    )


def _split_polygons(segmentation: Sequence) -> list[Sequence]:
    """Return the polygons in a list of polygons, or in a list that is one polygon, of numbers or points."""
    if segmentation and all(_is_number(value) for value in segmentation):
        return [segmentation]
    is_polygon = len(segmentation) >= 3 and all(
        (isinstance(point, list | tuple) and len(point) == 2 and all(map(_is_number, point)))
        or (isinstance(point, dict) and {"x", "y"} <= point.keys())
        for point in segmentation
    )
    return [segmentation] if is_polygon else list(segmentation)


def _flatten(polygon: Any) -> list[float]:
    """Return a polygon as [x0, y0, x1, y1, ...], from numbers, points [x, y] or points with the keys x and y."""
    if isinstance(polygon, np.ndarray):
        polygon = polygon.tolist()
    if not isinstance(polygon, list | tuple):
        raise ValueError(f"expected a polygon as a list of numbers or points, got {polygon!r:.100}.")
    points = [[point["x"], point["y"]] if isinstance(point, dict) else point for point in polygon]
    if all(isinstance(point, list | tuple) for point in points):
        if any(len(point) != 2 for point in points):
            raise ValueError(f"expected points (x, y), got points of {[len(point) for point in points]} numbers.")
        points = [value for point in points for value in point]
    if not all(_is_number(value) for value in points):
        raise ValueError(f"expected a polygon of numbers, got {points!r:.100}.")
    return points
