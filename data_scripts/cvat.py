"""Exports of the annotation tool CVAT.

sources:
  cracks: {builder: cvat, annotations: cracks/annotations.xml, images: cracks/images}
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

import numpy as np

from .file_names import list_images
from .own_data import ImagesConfig, Labeled
from .segmentation import MAX_OVERHANG, check_size, encode_ellipse, encode_patch, encode_visible
from .source import errors_naming


class Cvat(Labeled):
    """CVAT for images 1.1. One row per image, one target per polygon, mask and ellipse.

    annotations     annotations.xml
    images          directory of the images
    """

    BUILDER_CONFIG_CLASS = ImagesConfig

    def annotation_files(self, data_dir):
        return [self.locate(data_dir, "annotations"), *list_images(self.locate(data_dir, "images"))]

    def read_records(self, data_dir):
        path = self.locate(data_dir, "annotations")
        try:
            return {self.config.split: list(_read_cvat(path))}
        except (ET.ParseError, IsADirectoryError, LookupError) as error:  # the last for an unknown encoding
            raise ValueError(
                f"expected an XML file of CVAT, got {path!r} ({error}). Name annotations.xml, or export it again."
            ) from error

    def make_row(self, record):
        image, shapes = record
        with errors_naming(f"{self.locate(self.config.data_dir, 'annotations')!r}, image {image.get('name')!r}"):
            path = self.find_image(self.locate(self.config.data_dir, "images"), image["name"])
            size = check_size(image["height"], image["width"])
            objects = []
            for kind, shape in shapes:
                if kind in ("polygon", "mask", "ellipse"):
                    objects.append((shape["label"], _encode_cvat(kind, shape, *size)))
                else:
                    self.pass_over(f"shapes of the kind {kind!r}")
            return self.make_labeled_row(path, image["name"], objects)

    def annotated_size(self, record):
        image, _ = record
        path = self.find_image(self.locate(self.config.data_dir, "images"), image["name"])
        return path, check_size(image["height"], image["width"])


def _read_cvat(path: str) -> Iterator[tuple[dict[str, str], list[tuple[str, dict[str, str]]]]]:
    """Yield the attributes of every image that has shapes, and its shapes: kind and attributes."""
    root = None
    for event, element in ET.iterparse(path, events=("start", "end")):
        root = element if root is None else root
        if element.tag == "track":
            raise ValueError(
                f"expected the format 'CVAT for images', got tracks of a video in {path!r}. Export the job as 'CVAT "
                "for images 1.1'."
            )
        if event == "end" and element.tag == "image":
            shapes = [(shape.tag, dict(shape.attrib)) for shape in element if shape.tag != "tag"]
            if shapes:
                yield dict(element.attrib), shapes
            root.clear()  # frees what was read: files may be larger than memory
    if root is None or root.tag != "annotations":
        raise ValueError(
            f"expected <annotations> of CVAT in {path!r}, got {'nothing' if root is None else root.tag!r}."
        )


def _encode_cvat(kind: str, shape: dict[str, str], height: int, width: int) -> dict[str, Any] | None:
    if kind == "polygon":
        points = [[float(value) for value in point.split(",")] for point in shape["points"].split(";")]
        return encode_visible([points], height, width)
    if kind == "ellipse":
        x, y, x_radius, y_radius = (float(shape[key]) for key in ("cx", "cy", "rx", "ry"))
        return encode_ellipse((x, y), (x_radius, y_radius), float(shape.get("rotation", 0)), height, width)
    # Run lengths along the rows of the mask's bounding box, starting with 0.
    left, top, box_width, box_height = (int(float(shape[key])) for key in ("left", "top", "width", "height"))
    runs = np.array(shape["rle"].split(","), dtype=np.int64)
    if min(box_width, box_height) < 1 or box_width > width + MAX_OVERHANG or box_height > height + MAX_OVERHANG:
        raise ValueError(
            f"expected a mask inside an image of {width} x {height} pixels, got {box_width} x {box_height}."
        )
    if runs.min() < 0 or runs.max() > box_width * box_height or runs.sum() != box_width * box_height:
        raise ValueError(f"expected a mask of {box_width} x {box_height} pixels, got runs of {runs.sum()} pixels.")
    patch = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(box_height, box_width)
    return encode_patch(patch, left, top, height, width)
