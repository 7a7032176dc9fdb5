"""Projects of the annotation platform Supervisely.

sources:
  cells: {builder: supervisely, annotations: cells}
"""

import base64
import io
import math
import os
import zlib
from typing import Any

import numpy as np
import PIL.Image

from .file_names import list_files, list_images
from .own_data import AnnotationFileConfig, Labeled
from .segmentation import check_size, encode_patch, encode_with_holes
from .source import errors_naming, read_json


class Supervisely(Labeled):
    """Supervisely's format of images. One row per image, one target per polygon and bitmap.

    annotations     directory of a project or one of its datasets: directories `ann` with a JSON file per image, each
                    next to a directory `img`
    """

    BUILDER_CONFIG_CLASS = AnnotationFileConfig
    DIRECTORIES = ("annotations",)

    def _json_files(self, data_dir: str | None) -> list[str]:
        directory = self.locate(data_dir, "annotations")
        found = [path for path in list_files(directory) if _is_annotation(path)]
        if not found:
            raise FileNotFoundError(f"source {self.source!r}: expected ann/*.json in {directory!r}, got none.")
        return found

    def annotation_files(self, data_dir):
        return [*self._json_files(data_dir), *list_images(self.locate(data_dir, "annotations"))]

    def read_records(self, data_dir):
        return {self.config.split: self._json_files(data_dir)}

    def make_row(self, record):
        annotation = read_json(record, self.config.encoding)
        with errors_naming(record):
            image, size = _supervisely_image(record), _supervisely_size(annotation)
            objects = []
            for shape in annotation["objects"]:
                if shape["geometryType"] in ("polygon", "bitmap"):
                    objects.append((shape["classTitle"], _encode_supervisely(shape, *size)))
                else:
                    self.pass_over(f"objects of the kind {shape['geometryType']!r}")
            return self.make_labeled_row(image, os.path.splitext(os.path.basename(image))[0], objects)

    def annotated_size(self, record):
        return _supervisely_image(record), _supervisely_size(read_json(record, self.config.encoding))


def _is_annotation(path: str) -> bool:
    return os.path.basename(os.path.dirname(path)) == "ann" and path.endswith(".json")


def _supervisely_image(path: str) -> str:
    directory, name = os.path.split(path)
    return os.path.join(os.path.dirname(directory), "img", name.removesuffix(".json"))


def _supervisely_size(annotation: dict[str, Any]) -> tuple[int, int]:
    return check_size(annotation["size"]["height"], annotation["size"]["width"])


def _encode_supervisely(shape: dict[str, Any], height: int, width: int) -> dict[str, Any] | None:
    if shape["geometryType"] == "polygon":
        points = shape["points"]
        return encode_with_holes(points["exterior"], points.get("interior") or [], height, width)
    (left, top), content = shape["bitmap"]["origin"], base64.b64decode(shape["bitmap"]["data"], validate=True)
    # A small file may decompress to terabytes. No mask is larger than its pixels with four channels, plus some
    # headers.
    limit = 4 * height * (width + 1) + 10_000
    try:
        unpacked = zlib.decompressobj().decompress(content, limit)
        with PIL.Image.open(io.BytesIO(unpacked)) as image:
            if math.prod(image.size) > height * width:
                raise ValueError(f"expected a bitmap in an image of {width} x {height} pixels, got {image.size}.")
            image.load()
    except (OSError, SyntaxError, zlib.error) as error:
        raise ValueError(f"expected a bitmap as compressed PNG, got other data ({error}). Export it again.") from error
    pixels = np.asarray(image)
    if image.mode in ("RGBA", "LA"):
        pixels = pixels[..., -1]
    elif pixels.ndim == 3:
        pixels = pixels.max(axis=2)
    return encode_patch(pixels != 0, left, top, height, width)
