"""Files of the annotation tool LabelMe.

sources:
  rooms: {builder: labelme, annotations: rooms/json, images: rooms/photos}
"""

import base64
import dataclasses
import io
import os
from typing import Any

import numpy as np

from .file_names import list_images
from .orientation import Size, read_orientation
from .own_data import Labeled, LabeledConfig
from .segmentation import encode_ellipse, encode_patch, encode_visible, load_mask
from .source import errors_naming, read_json


@dataclasses.dataclass
class LabelMeConfig(LabeledConfig):
    """Options of LabelMe files.

    Args:
        annotations: Directory of the JSON files.
        images: Directory of the images. Defaults to that of the JSON files.
    """

    annotations: str = ""
    images: str = ""


class LabelMe(Labeled):
    """Files of the annotation tool LabelMe. One row per file, one target per shape with an area, named by its label.

    annotations     directory of *.json, one per image
    images          the directory of the images; default: that of the JSON files

    Polygons, rectangles, rotated boxes, circles and masks are drawn. Points and lines are passed over and counted.
    """

    BUILDER_CONFIG_CLASS = LabelMeConfig
    DIRECTORIES = ("annotations", "images")

    def annotation_files(self, data_dir):
        directory = self.locate(data_dir, "annotations")
        images = list_images(self.locate(data_dir, "images" if self.config.images else "annotations"))
        return [*self._json_files(directory), *images]

    def _json_files(self, directory: str) -> list[str]:
        paths = sorted(entry.path for entry in os.scandir(directory) if entry.name.endswith(".json"))
        if not paths:
            raise FileNotFoundError(f"source {self.source!r}: expected *.json in {directory!r}, got none.")
        return paths

    def read_records(self, data_dir):
        return {self.config.split: self._json_files(self.locate(data_dir, "annotations"))}

    def make_row(self, record):
        directory = self.locate(self.config.data_dir, "images" if self.config.images else "annotations")
        annotation = read_json(record, self.config.encoding)
        with errors_naming(record):
            if not {"imagePath", "shapes"} & annotation.keys():
                # predict.py keeps its settings beside the LabelMe files that it writes.
                self.pass_over("JSON files that are not LabelMe's")
                return None
            # The path is that on the annotator's machine.
            image = self.find_image(directory, annotation["imagePath"])
            _, (height, width) = self.find_space(*read_orientation(image), _declared_size(annotation))
            objects = []
            for shape in annotation["shapes"]:
                rle = _encode_shape(shape, height, width)
                if rle is None:
                    self.pass_over(f"shapes of the kind {shape.get('shape_type') or 'polygon'!r} without an area")
                else:
                    objects.append((shape["label"], rle))
            if not annotation["shapes"]:
                self.pass_over("files without shapes")
            return self.make_labeled_row(image, os.path.splitext(os.path.basename(image))[0], objects)

    def annotated_size(self, record):
        annotation = read_json(record, self.config.encoding)
        directory = self.locate(self.config.data_dir, "images" if self.config.images else "annotations")
        return self.find_image(directory, annotation["imagePath"]), _declared_size(annotation)


def _declared_size(annotation: dict) -> Size | None:
    """Return the height and width that a LabelMe file says, or None if it does not."""
    size = annotation.get("imageHeight"), annotation.get("imageWidth")
    return size if all(size) else None


def _encode_shape(shape: dict, height: int, width: int) -> dict[str, Any] | None:
    """Encode a shape of LabelMe or X-AnyLabeling as RLE, or return None if it covers no pixel, as points and lines."""
    points, kind = shape["points"], shape.get("shape_type") or "polygon"
    if kind == "mask":
        patch = load_mask(io.BytesIO(base64.b64decode(shape["mask"], validate=True)))[0] != 0
        return encode_patch(patch, *points[0], height, width)
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        points = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
    elif kind == "circle":
        (x, y), rim = points
        radius = float(np.hypot(rim[0] - x, rim[1] - y))
        return encode_ellipse((x, y), (radius, radius), 0, height, width)
    elif kind not in ("polygon", "rectangle", "rotation", "quadrilateral"):
        return None
    return encode_visible([[value for x, y in points for value in (x, y)]], height, width)
