"""ReasonSeg: implicit questions about photos that are answered with masks (LISA, arXiv 2308.00692).

    from data_scripts import load_source
    rows = load_source("reason_seg", data_dir="dataset", split="val")

Mirrors `get_mask_from_json` and the ReasonSeg datasets of the original.
"""

import os
from typing import Any

import cv2
import numpy as np

from lisa_hf.data.masks import encode_mask
from lisa_hf.data.rows import make_row

from .segmentation import check_points
from .source import SourceBuilder, errors_naming, read_image_size, read_json


SPLITS = ("train", "val", "test")
TARGET, IGNORE = 1, 255
# Limits for one annotation: lines times edges of a polygon, and pixels of all its polygons.
MAX_CROSSINGS = 20_000_000
MAX_PAINTED = 4_000_000_000


def paint_polygons(shapes: list[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """Paint labeled polygons over each other, largest first, so that smaller ones stay visible.

    Args:
        shapes: Dicts of `label` and `points`. The label is "target", contains "ignore", or is the obsolete "flag",
            which is skipped; case does not matter. Points [[x, y], ...] in pixels are truncated to integers.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Returns:
        Labels of shape `(H, W)`, uint8: 1 target, 255 ignored, 0 neither.
    """
    if len(shapes) * height * width > MAX_PAINTED:
        raise ValueError(
            f"expected at most {MAX_PAINTED // (height * width)} shapes in an image of {width} x {height} pixels, got "
            f"{len(shapes)}. Repair the annotation."
        )
    polygons = []
    for shape in shapes:
        label = shape["label"].lower()
        if label == "flag":
            continue
        points = np.array(shape["points"], dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"expected polygons of points [x, y], got the points {shape['points']!r}.")
        check_points(points, height, width)
        if len(points) * height > MAX_CROSSINGS:
            raise ValueError(
                f"expected polygons of at most {MAX_CROSSINGS // height} points in an image of {height} lines, got "
                f"one of {len(points)}. Repair the polygon."
            )
        inside = fill_polygon(points.astype(np.int32), height, width)
        polygons.append((int(inside.sum()), len(polygons), inside, IGNORE if "ignore" in label else TARGET))

    labels = np.zeros((height, width), dtype=np.uint8)
    # As in the original, which paints the later of two equal areas first.
    for _, _, inside, value in sorted(polygons, key=lambda polygon: polygon[:2], reverse=True):
        labels[inside] = value
    return labels


def fill_polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill a polygon and its outline by the even-odd rule, as OpenCV up to 4.10 did.

    The published scores on ReasonSeg were measured on such masks. Since OpenCV 4.11, `cv2.fillPoly` omits some pixels
    next to slanted edges, and more next to edges that cross the image border.

    Args:
        points: Corners (x, y), shape `(num_corners, 2)`, int32.
        height: Height of the mask in pixels.
        width: Width of the mask in pixels.

    Returns:
        Mask of shape `(H, W)`, bool.
    """
    outline = np.zeros((height, width), dtype=np.uint8)
    cv2.polylines(outline, [points], isClosed=True, color=1)

    # Collect the edges that are not horizontal: first and last line, position at the first line, step per line.
    edges = []
    for (x0, y0), (x1, y1) in zip(np.roll(points, 1, axis=0).tolist(), points.tolist()):
        if y0 == y1:
            continue
        # Fixed-point x with 16 fractional bits, at both ends of the edge, which is clipped at the image border.
        half = 1 << 15
        first, last = (y0, (x0 << 16) + half), (y1, (x1 << 16) + half)
        if not (0 <= min(x0, x1) and max(x0, x1) < width and 0 <= min(y0, y1) and max(y0, y1) < height):
            _, start, end = cv2.clipLine((0, 0, width, height), (x0, y0), (x1, y1))
            first, last = (y0, x0 << 16), (y1, x1 << 16)
            if start[1] != end[1]:
                first, last = (start[1], start[0] << 16), (end[1], end[0] << 16)
        rise, run = last[0] - first[0], last[1] - first[1]
        step = abs(run) // abs(rise) * (1 if run * rise >= 0 else -1)
        y, x = first if y0 < y1 else last
        edges.append((min(y0, y1), max(y0, y1), x + (min(y0, y1) - y) * step, step))
    if not edges:
        return outline.astype(bool)

    # Find where each line crosses the edges, from left to right.
    top, bottom, x, step = np.array(edges, dtype=np.int64).T
    rows = np.arange(height)[:, None]
    crossed = (top <= rows) & (rows < bottom)
    beyond = width << 16
    crossings = np.where(crossed, x + step * (rows - top), beyond)
    crossings = np.clip(np.sort(crossings, axis=1) >> 16, -1, width)
    crossings = np.pad(crossings, ((0, 0), (0, crossings.shape[1] % 2)), constant_values=width)
    # Fill the spans from each odd crossing to the next even one, both inclusive.
    changes = np.zeros((height, width + 2), dtype=np.int16)
    np.add.at(changes, (rows, np.maximum(crossings[:, 0::2], 0)), 1)
    np.add.at(changes, (rows, crossings[:, 1::2] + 1), -1)
    return (changes.cumsum(axis=1, dtype=np.int16)[:, :width] > 0) | (outline > 0)


class ReasonSeg(SourceBuilder):
    """ReasonSeg: 239 images for training, 200 for validation, 779 for test. One row per image, one target per row.

    Splits: train, val and test, if their directories exist; val_short and test_short with short phrases,
    val_long and test_long with complete sentences. `ignore` holds ambiguous pixels.

        <data_dir>/reason_seg/ReasonSeg/
            train/*.jpg *.json              a JSON file per image: shapes, text, is_sentence
            val/*.jpg *.json
            test/*.jpg *.json
            explanatory/train.json          optional: explanations of training images
    """

    SOURCE = "reason_seg"
    DOWNLOAD_PAGE = "https://github.com/dvlab-research/LISA#dataset"
    LICENSE = "Apache-2.0 as the LISA repository; the photos keep their own licenses."

    def annotation_files(self, data_dir):
        root = self.find(data_dir, "reason_seg/ReasonSeg")
        images = [image for split in SPLITS for image in _list_images(root, split)]
        if not images:
            raise FileNotFoundError(f"ReasonSeg: expected {SPLITS} with *.jpg in {root!r}, got no image. Download it.")
        explanations = os.path.join(root, "explanatory", "train.json")
        # The image sizes matter too: polygons are clipped at the borders.
        return [
            *images,
            *(path for path in map(_annotation_path, images) if os.path.exists(path)),
            *([explanations] if os.path.exists(explanations) else []),
        ]

    def read_records(self, data_dir):
        root = self.find(data_dir, "reason_seg/ReasonSeg")
        path = os.path.join(root, "explanatory", "train.json")
        explanations = {}
        if os.path.exists(path):
            content = read_json(path)
            with errors_naming(path):
                explanations = {record["image"]: record["outputs"] for record in content}
        records = {}
        for split in SPLITS:
            images = _list_images(root, split)
            records[split] = [(image, explanations.get(os.path.basename(image))) for image in images]
            if split != "train":
                records[f"{split}_short"] = [
                    record for record in records[split] if _is_sentence(record[0]) is not True
                ]
                records[f"{split}_long"] = [
                    record for record in records[split] if _is_sentence(record[0]) is not False
                ]
        return records

    def make_row(self, record):
        image_path, explanation = record
        path = _annotation_path(image_path)
        if not os.path.exists(path):
            raise ValueError(f"The image {image_path!r} has no annotation {path!r}. Download it, or remove the image.")
        annotation = read_json(path)
        with errors_naming(path):
            labels = paint_polygons(annotation["shapes"], *read_image_size(image_path))
            return make_row(
                image=image_path,
                image_id=os.path.splitext(os.path.basename(image_path))[0],
                source=self.source,
                task="reasoning",
                targets=[{"phrases": annotation["text"], "rle": encode_mask(labels == TARGET)}],
                # The original trains on these pixels as background and ignores them in evaluation only.
                ignore=encode_mask(labels == IGNORE) if (labels == IGNORE).any() else None,
                is_sentence=annotation["is_sentence"],
                explanation=explanation,
            )


def _is_sentence(image_path: str) -> bool | None:
    """Return whether the question is a complete sentence. None if unreadable: both splits then get the record."""
    try:
        return bool(read_json(_annotation_path(image_path))["is_sentence"])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _list_images(root: str, split: str) -> list[str]:
    directory = os.path.join(root, split)
    if not os.path.isdir(directory):
        return []
    return sorted(entry.path for entry in os.scandir(directory) if entry.name.endswith(".jpg"))


def _annotation_path(image_path: str) -> str:
    return os.path.splitext(image_path)[0] + ".json"
