"""Your own data, as named in a recipe: COCO instances, LabelMe files, or images with masks and a list of questions.

    sources:
      parts: {builder: coco_instances, annotations: parts/train.json, images: parts/photos, weight: 3}
      rooms: {builder: labelme, annotations: rooms}
      damage: {builder: image_folder, questions: damage/train.jsonl, images: damage/photos, masks: damage/masks}

You choose the key, which becomes the source of the rows. Paths are relative to `data_dir`, if it is set. Each of these
sources has a single split. For another split, add a source with other files, for example in `eval_sources`.
"""

import dataclasses
import json
import os

import numpy as np
import PIL.Image

from lisa_hf.data.masks import encode_mask
from lisa_hf.data.rows import make_row

from .coco import CocoBuilder, CocoConfig, make_instances_row, read_instances
from .source import (
    SourceBuilder,
    SourceConfig,
    encode_segmentation,
    errors_naming,
    join_inside,
    read_image_size,
    read_json,
    read_text,
)


@dataclasses.dataclass
class OwnDataConfig(SourceConfig):
    """Options of your own data.

    Args:
        split: Name of its only split.
    """

    split: str = "train"


class OwnData(SourceBuilder):
    """Base of the builders that find their files by options."""

    BUILDER_CONFIG_CLASS = OwnDataConfig

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
        return {self.config.split: read_instances(self.locate(data_dir, "annotations"))}

    def make_row(self, record):
        path = self.locate(self.config.data_dir, "annotations")
        directory = self.locate(self.config.data_dir, "images")
        return make_instances_row(record, path, directory, self.source, phrases_of=lambda name: [name])


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
    """Files of the annotation tool LabelMe. One row per file, one target per polygon or rectangle, named by its label.

    annotations     directory of *.json, one per image
    images          the directory of the images; default: that of the JSON files
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
        annotation = read_json(record)
        with errors_naming(record):
            # The path is that on the annotator's machine.
            name = annotation["imagePath"].replace("\\", "/").split("/")[-1]
            image = join_inside(directory, name)
            height, width = read_image_size(image)
            targets = [
                {"phrases": [shape["label"]], "rle": encode_segmentation([_outline(shape)], height, width)}
                for shape in annotation["shapes"]
            ]
            if not targets:
                return None
            return make_row(image, os.path.splitext(name)[0], self.source, "semantic", targets)


def _outline(shape: dict) -> list[float]:
    """Return the corners [x0, y0, x1, y1, ...] of a LabelMe shape."""
    points, kind = shape["points"], shape.get("shape_type", "polygon")
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points
        points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    elif kind != "polygon":
        raise ValueError(f"expected shapes that are polygons or rectangles, got a {kind}. Redraw or remove it.")
    return [float(value) for x, y in points for value in (x, y)]


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
    masks       the directory of the masks: PNG of one channel, of the image's size, 0 for the background
    """

    BUILDER_CONFIG_CLASS = ImageFolderConfig

    def annotation_files(self, data_dir):
        self.locate(data_dir, "images"), self.locate(data_dir, "masks")
        return [self.locate(data_dir, "questions")]

    def read_records(self, data_dir):
        lines = read_text(self.locate(data_dir, "questions")).splitlines()
        return {self.config.split: [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]}

    def make_row(self, record):
        number, line = record
        data_dir = self.config.data_dir
        with errors_naming(f"{self.locate(data_dir, 'questions')!r}, line {number}"):
            record = json.loads(line)
            is_sentence = "question" in record
            phrases = record["question" if is_sentence else "phrase"]
            image = join_inside(self.locate(data_dir, "images"), record["image"])
            mask = read_mask(join_inside(self.locate(data_dir, "masks"), record["mask"]))
            size = read_image_size(image)
            if mask.shape != size:
                raise ValueError(f"expected a mask of the image's size {size} (height, width), got {mask.shape}.")
            return make_row(
                image=image,
                image_id=record["image"],
                source=self.source,
                task="reasoning" if is_sentence else "referring",
                targets=[{"phrases": [phrases] if isinstance(phrases, str) else phrases, "rle": encode_mask(mask)}],
                is_sentence=is_sentence,
                explanation=record.get("explanation"),
            )


def read_mask(file) -> np.ndarray:
    """Read a mask from a path or file of an image with one channel. Returns bool of shape `(H, W)`, whether not 0."""
    try:
        with PIL.Image.open(file) as image:
            image.load()
    except Exception as error:  # Pillow has no exception of its own for broken files.
        raise ValueError(
            f"expected a mask, got {file!r}, which cannot be read: {error}. Restore it, or remove the row."
        ) from error
    if len(image.getbands()) > 1:
        raise ValueError(
            f"expected the mask {file!r} to have one channel, got the mode {image.mode}. Save it in grayscale, "
            "with 0 for the background."
        )
    return np.asarray(image) != 0
