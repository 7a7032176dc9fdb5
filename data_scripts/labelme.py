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

from .file_names import list_files, list_images, split_name
from .orientation import Size, read_orientation
from .own_data import Labeled, LabeledConfig
from .segmentation import encode_ellipse, encode_patch, encode_visible, load_mask
from .source import errors_naming, is_inside, read_json


# Kinds of shapes whose points are their corners. The last two are those of X-AnyLabeling.
POLYGONS = ("polygon", "rectangle", "oriented_rectangle", "rotation", "quadrilateral")


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

    annotations     directory of *.json, one per image, or of folders of them
    images          the directory of the images; default: that of the JSON files

    Polygons, rectangles, rotated boxes, circles and masks are drawn. Points and lines are skipped and counted. A
    missing image is read from the JSON file, if LabelMe has stored it there.
    """

    BUILDER_CONFIG_CLASS = LabelMeConfig
    DIRECTORIES = ("annotations", "images")

    def annotation_files(self, data_dir):
        directory = self.locate(data_dir, "annotations")
        images = list_images(self.locate(data_dir, "images" if self.config.images else "annotations"))
        return [*self._json_files(directory), *images]

    def _json_files(self, directory: str) -> list[str]:
        found = [path for path in list_files(directory) if path.lower().endswith(".json")]
        paths = [path for path in found if os.path.dirname(path) == directory] or found
        if not paths:
            raise FileNotFoundError(f"source {self.source!r}: expected *.json in {directory!r}, got none.")
        return paths

    def read_records(self, data_dir):
        return {self.config.split: self._json_files(self._root())}

    def make_row(self, record):
        annotation = read_json(record, self.config.encoding)
        with errors_naming(record):
            if not {"imagePath", "shapes"} & annotation.keys():
                # predict.py stores its settings next to the LabelMe files that it writes.
                self.pass_over("JSON files that are not LabelMe's")
                return None
            image = self._find_photo(record, annotation)
            _, (height, width) = self.find_space(*read_orientation(_open(image)), _declared_size(annotation))
            objects = []
            for shape in annotation["shapes"]:
                rle = _encode_shape(shape, height, width)
                if rle is None:
                    self.pass_over(f"shapes of the kind {shape.get('shape_type') or 'polygon'!r} without an area")
                else:
                    objects.append((shape["label"], rle))
            if not annotation["shapes"]:
                self.pass_over("files without shapes")
            if isinstance(image, bytes):
                self.count("read {} images that are embedded in the JSON files")
            path, root = (image, self._image_directory()) if isinstance(image, str) else (record, self._root())
            return self.make_labeled_row(image, os.path.splitext(os.path.relpath(path, root))[0], objects)

    def annotated_size(self, record):
        annotation = read_json(record, self.config.encoding)
        return _open(self._find_photo(record, annotation)), _declared_size(annotation)

    def _root(self) -> str:
        return self.locate(self.config.data_dir, "annotations")

    def _image_directory(self) -> str:
        return self.locate(self.config.data_dir, "images" if self.config.images else "annotations")

    def _find_photo(self, path: str, annotation: dict[str, Any]) -> str | bytes:
        """Return the path of the image of a JSON file, or the image itself if only that file has it."""
        directory, data = self._image_directory(), annotation.get("imageData")
        try:
            name = annotation["imagePath"]
            # Paths are relative to the JSON file; those from another machine match nothing here.
            folder = os.path.relpath(os.path.dirname(path), self._root())
            beside = os.path.normpath(os.path.join(directory, folder, *split_name(name))) if name else directory
            if is_inside(beside, directory) and os.path.isfile(beside):
                return beside
            found = self.find_image(directory, name)
        except (KeyError, ValueError):
            if not data:
                raise
            found = ""
        return base64.b64decode(data, validate=True) if data and not os.path.isfile(found) else found


def _open(image: str | bytes) -> str | io.BytesIO:
    return image if isinstance(image, str) else io.BytesIO(image)


def _declared_size(annotation: dict) -> Size | None:
    """Return the height and width in a LabelMe file, or None if it has none."""
    size = annotation.get("imageHeight"), annotation.get("imageWidth")
    return size if all(size) else None


def _encode_shape(shape: dict, height: int, width: int) -> dict[str, Any] | None:
    """Encode a shape of LabelMe or X-AnyLabeling as RLE; return None if it covers no pixel, like points and lines."""
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
    elif kind not in POLYGONS:
        return None
    return encode_visible([[value for x, y in points for value in (x, y)]], height, width)
