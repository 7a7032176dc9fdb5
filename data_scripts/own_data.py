"""Your own data, as named in a recipe: COCO instances, LabelMe files, or images with masks and a list of questions.

    sources:
      parts: {builder: coco_instances, annotations: parts/train.json, images: parts/photos, weight: 3}
      rooms: {builder: labelme, annotations: rooms}
      damage: {builder: image_folder, questions: damage/train.jsonl, images: damage/photos, masks: damage/masks}

You choose the key, which becomes the source of the rows. Paths are relative to `data_dir`, if it is set. Each of these
sources has a single split. For another split, add a source with other files, for example in `eval_sources`.
"""

import base64
import dataclasses
import functools
import io
import itertools
import json
import os
from collections.abc import Sequence
from typing import IO, Any, get_args

import numpy as np
import PIL.Image
from datasets.utils.file_utils import xopen

from lisa_hf.data.masks import encode_mask
from lisa_hf.data.rows import make_row

from .coco import CocoBuilder, CocoConfig, make_instances_row, read_instances
from .orientation import Size, Space, count_spaces, decide_space, fitting_spaces, read_orientation, turn_mask
from .segmentation import encode_visible, load_mask, read_mask
from .source import (
    SourceBuilder,
    SourceConfig,
    errors_naming,
    join_inside,
    read_json,
    write_json,
)
from .text import read_text


ORIENTATION = "orientation.json"
# Corners of the polygon that is drawn for a circle.
CIRCLE_POINTS = 180


@dataclasses.dataclass
class OwnDataConfig(SourceConfig):
    """Options of your own data.

    Args:
        split: Name of its only split.
        orientation: Whether annotations of photos with an EXIF orientation are in the pixels as stored ("stored") or
            as viewers turn them ("display"). By default, and where only one fits, the sizes decide.
        encoding: Encoding of annotation files that are not in Unicode, as Python calls it. By default, it is detected.
    """

    split: str = "train"
    orientation: Space | None = None
    encoding: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.orientation not in (None, *get_args(Space)):
            raise ValueError(f"orientation: expected 'stored' or 'display', got {self.orientation!r}.")


class OwnData(SourceBuilder):
    """Base of the builders that find their files by options, and turn masks with their photos."""

    BUILDER_CONFIG_CLASS = OwnDataConfig

    def annotated_size(self, record: Any) -> tuple[str, Size | None]:
        """Return the path of a record's image, and the height and width of its annotation, or None if it says none.

        Raises:
            Exception: Of any kind, if the record is bad.
        """
        raise NotImplementedError

    def write_records(self, records, remarks=()):
        def find_images():
            for record in itertools.chain.from_iterable(records.values()):
                try:
                    yield self.annotated_size(record)
                except Exception:  # a bad record, which `make_row` reports
                    continue

        space, found = decide_space(count_spaces(find_images()), self.config.orientation)
        super().write_records(records, [*remarks, *found])
        write_json(os.path.join(self.records_dir, ORIENTATION), space)

    @functools.cached_property
    def space(self) -> Space | None:
        """Return the space of annotations that fit both, or None if nothing says so."""
        path = os.path.join(self.records_dir, ORIENTATION)
        return self.config.orientation or (read_json(path) if os.path.exists(path) else None)

    def find_space(self, orientation: int, sizes: dict[Space, Size], size: Sequence[int] | None) -> tuple[int, Size]:
        """Return the EXIF orientation by which a mask must be turned, 1 for none, and the size of the annotation.

        Args:
            orientation: EXIF orientation of the image, from [`read_orientation`].
            sizes: Height and width of the image by space, from [`read_orientation`].
            size: Height and width that the annotation says. None if it says none.

        Raises:
            ValueError: If the annotation fits the photo as stored and as displayed, and nothing says which it is.
        """
        spaces = fitting_spaces(size, sizes)
        if not spaces:
            raise ValueError(
                f"expected an annotation of the image's size {sizes['display']} (height, width), got {tuple(size)}. "
                "Restore the image that was annotated, or remove the annotation."
            )
        space = spaces[0] if len(spaces) == 1 else self.space
        if orientation > 1 and space is None:
            raise ValueError(
                f"expected to know how the photo was turned when it was annotated, got the EXIF orientation "
                f"{orientation} and an annotation that fits it as stored and as displayed. Set `orientation: display` "
                "if your tool turns photos as viewers do, else `orientation: stored`, and look at a preview."
            )
        return (orientation if space == "stored" else 1), sizes[space or "stored"]

    def turn_upright(self, row: dict[str, Any]) -> dict[str, Any]:
        """Turn the masks of a row as viewers turn its photo. Every later reader sees both upright."""
        masks = [target["rle"] for target in row["targets"]]
        if not masks:
            return row
        try:
            with open_file(row["image"]) as image:
                orientation, sizes = read_orientation(image)
        except (OSError, ValueError):
            orientation = 1
        if orientation == 1:
            return row  # a missing or broken image, or one of another size, is found where it is decoded
        turn, _ = self.find_space(orientation, sizes, masks[0]["size"])
        targets = [target | {"rle": turn_mask(target["rle"], turn)} for target in row["targets"]]
        return row | {"targets": targets, "ignore": row["ignore"] and turn_mask(row["ignore"], turn)}

    def locate(self, data_dir: str | None, option: str) -> str:
        """Return the path in an option.

        Raises:
            ValueError: If the option is not set.
            FileNotFoundError: If the path does not exist.
        """
        path = getattr(self.config, option)
        if not path:
            raise ValueError(f"source {self.source!r}: expected the option `{option}`, a path, got none.")
        path = os.path.abspath(os.path.join(data_dir or "", os.path.expanduser(path)))
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"source {self.source!r}: expected `{option}` to exist, got {path!r}, which does not. Use a path that "
                "is absolute or relative to `data_dir`."
            )
        return path


@dataclasses.dataclass
class CocoInstancesConfig(CocoConfig, OwnDataConfig):
    """Options of COCO instances.

    Args:
        annotations: Path of the JSON file.
        images: Directory of the images.
    """

    annotations: str = ""
    images: str = ""


class CocoInstances(CocoBuilder, OwnData):
    """Annotations in the COCO format. One row per annotated image, one target per annotation, named by its category.

    annotations     JSON with images, annotations (polygons or RLE) and categories
    images          the directory of the images
    """

    BUILDER_CONFIG_CLASS = CocoInstancesConfig

    def annotation_files(self, data_dir):
        self.locate(data_dir, "images")
        return [self.locate(data_dir, "annotations"), *self.held_out_files(data_dir)]

    def photo(self, record):
        return record["image"].get("file_name", "")

    def read_records(self, data_dir):
        path = self.locate(data_dir, "annotations")
        return {self.config.split: read_instances(path, self.read_remarks, self.config.encoding)}

    def make_row(self, record):
        path = self.locate(self.config.data_dir, "annotations")
        directory = self.locate(self.config.data_dir, "images")
        row = make_instances_row(record, path, directory, self.source, lambda name: [name], self.pass_over)
        if row is None:
            return None
        with errors_naming(f"{path!r}, image {record['image']['id']}"):
            return self.turn_upright(row)

    def annotated_size(self, record):
        image = record["image"]
        path = join_inside(self.locate(self.config.data_dir, "images"), image["file_name"])
        return path, (image["height"], image["width"])


@dataclasses.dataclass
class LabelMeConfig(OwnDataConfig):
    """Options of LabelMe files.

    Args:
        annotations: Directory of the JSON files.
        images: Directory of the images. Defaults to that of the JSON files.
    """

    annotations: str = ""
    images: str = ""


class LabelMe(OwnData):
    """Files of the annotation tool LabelMe. One row per file, one target per shape with an area, named by its label.

    annotations     directory of *.json, one per image
    images          the directory of the images; default: that of the JSON files

    Polygons, rectangles, rotated boxes, circles and masks are drawn. Points and lines are passed over and counted.
    """

    BUILDER_CONFIG_CLASS = LabelMeConfig

    def annotation_files(self, data_dir):
        directory = self.locate(data_dir, "annotations")
        paths = sorted(entry.path for entry in os.scandir(directory) if entry.name.endswith(".json"))
        if not paths:
            raise FileNotFoundError(f"source {self.source!r}: expected *.json in {directory!r}, got none.")
        return paths

    def read_records(self, data_dir):
        return {self.config.split: self.annotation_files(data_dir)}

    def make_row(self, record):
        directory = self.locate(self.config.data_dir, "images" if self.config.images else "annotations")
        annotation = read_json(record, self.config.encoding)
        with errors_naming(record):
            # The path is that on the annotator's machine.
            name = annotation["imagePath"].replace("\\", "/").split("/")[-1]
            image = join_inside(directory, name)
            _, (height, width) = self.find_space(*read_orientation(image), _declared_size(annotation))
            targets = []
            for shape in annotation["shapes"]:
                rle = _encode_shape(shape, height, width)
                if rle is None:
                    self.pass_over(f"shapes of the kind {shape.get('shape_type') or 'polygon'!r} without an area")
                else:
                    targets.append({"phrases": [shape["label"]], "rle": rle})
            if not targets:
                return None
            return self.turn_upright(make_row(image, os.path.splitext(name)[0], self.source, "semantic", targets))

    def annotated_size(self, record):
        annotation = read_json(record, self.config.encoding)
        directory = self.locate(self.config.data_dir, "images" if self.config.images else "annotations")
        name = annotation["imagePath"].replace("\\", "/").split("/")[-1]
        return join_inside(directory, name), _declared_size(annotation)


def _declared_size(annotation: dict) -> Size | None:
    """Return the height and width that a LabelMe file says, or None if it does not."""
    size = annotation.get("imageHeight"), annotation.get("imageWidth")
    return size if all(size) else None


def _encode_shape(shape: dict, height: int, width: int) -> dict[str, Any] | None:
    """Encode a shape of LabelMe or X-AnyLabeling as RLE, or return None if it covers no pixel, as points and lines."""
    points, kind = shape["points"], shape.get("shape_type") or "polygon"
    if kind == "mask":
        return _encode_patch(shape["mask"], points[0], height, width)
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        points = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
    elif kind == "circle":
        center, rim = np.array(points, dtype=np.float64)
        angles = np.linspace(0, 2 * np.pi, CIRCLE_POINTS, endpoint=False)
        circle = center + np.hypot(*(rim - center)) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        points = circle.tolist()
    elif kind not in ("polygon", "rectangle", "rotation", "quadrilateral"):
        return None
    return encode_visible([[value for x, y in points for value in (x, y)]], height, width)


def _encode_patch(content: str, corner: Sequence[float], height: int, width: int) -> dict[str, Any] | None:
    """Encode a mask that LabelMe stores as a PNG of the box around it, at the box's upper left corner."""
    patch = load_mask(io.BytesIO(base64.b64decode(content, validate=True)))[0] != 0
    left, top = (round(value) for value in corner)
    bottom, right = top + patch.shape[0], left + patch.shape[1]
    if top < 0 or left < 0 or bottom > height or right > width:
        raise ValueError(
            f"expected a mask inside an image of {width} x {height} pixels, got one from {[left, top]} to "
            f"{[right, bottom]}. It belongs to another image."
        )
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = patch
    return encode_mask(mask) if mask.any() else None


@dataclasses.dataclass
class ImageFolderConfig(OwnDataConfig):
    """Options of an image folder.

    Args:
        questions: Path of the JSON Lines file.
        images: Directory of the images.
        masks: Directory of the masks.
    """

    questions: str = ""
    images: str = ""
    masks: str = ""


class ImageFolder(OwnData):
    """Images, masks, and a list of questions about them. One row per line of the list, with one target.

    questions   JSON Lines: {"image": "a.jpg", "mask": "a.png", "question": "What could break?"}
                or {..., "phrase": "the cracked wheel"}; a list of either: they are interchangeable;
                optional "explanation": why the mask answers the question
    images      the directory of the images
    masks       the directory of the masks: images of the photo's size with 0 for the background and one other value;
                255 beside a smaller value is ignored
    """

    BUILDER_CONFIG_CLASS = ImageFolderConfig

    def annotation_files(self, data_dir):
        self.locate(data_dir, "images"), self.locate(data_dir, "masks")
        return [self.locate(data_dir, "questions")]

    def read_records(self, data_dir):
        lines = read_text(self.locate(data_dir, "questions"), self.config.encoding).split("\n")
        return {self.config.split: [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]}

    def make_row(self, record):
        number, line = record
        data_dir = self.config.data_dir
        with errors_naming(f"{self.locate(data_dir, 'questions')!r}, line {number}"):
            record = json.loads(line)
            is_sentence = "question" in record
            phrases = record["question" if is_sentence else "phrase"]
            image = join_inside(self.locate(data_dir, "images"), record["image"])
            mask, ignore = read_mask(join_inside(self.locate(data_dir, "masks"), record["mask"]))
            _, sizes = read_orientation(image)
            if mask.shape not in sizes.values():
                size = sizes["display"]
                raise ValueError(f"expected a mask of the image's size {size} (height, width), got {mask.shape}.")
            row = make_row(
                image=image,
                image_id=record["image"],
                source=self.source,
                task="reasoning" if is_sentence else "referring",
                targets=[{"phrases": [phrases] if isinstance(phrases, str) else phrases, "rle": encode_mask(mask)}],
                ignore=None if ignore is None else encode_mask(ignore),
                is_sentence=is_sentence,
                explanation=record.get("explanation"),
            )
            return self.turn_upright(row)

    def annotated_size(self, record):
        line = json.loads(record[1])
        data_dir = self.config.data_dir
        with PIL.Image.open(join_inside(self.locate(data_dir, "masks"), line["mask"])) as mask:
            return join_inside(self.locate(data_dir, "images"), line["image"]), (mask.height, mask.width)


def open_file(image: dict[str, Any]) -> IO[bytes]:
    """Open the file of an undecoded image, also of an archive or a server."""
    return io.BytesIO(image["bytes"]) if image["bytes"] else xopen(image["path"], "rb")
