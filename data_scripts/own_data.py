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
from datasets.utils.file_utils import xopen

from lisa_hf.data.masks import encode_mask
from lisa_hf.data.rows import make_row

from .coco import CocoBuilder, CocoConfig, encode_objects, read_instances
from .file_names import find_image, list_images
from .orientation import Size, Space, count_spaces, decide_space, fitting_spaces, read_orientation, turn_mask
from .segmentation import encode_ellipse, encode_patch, encode_visible, load_mask, read_mask
from .source import (
    SourceBuilder,
    SourceConfig,
    errors_naming,
    read_image_size,
    read_json,
    write_json,
)
from .text import read_text


ORIENTATION = "orientation.json"


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

    def find_image(self, directory: str, name: str) -> str:
        """Return the path of the image that an annotation names, see [`~file_names.find_image`]."""
        path, is_guess = find_image(directory, name, self.hash or "")
        if is_guess:
            self.count("found {} images by the last part of their path or address")
        return path

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
class LabeledConfig(OwnDataConfig):
    """Options of annotations that name each object by the label of its class.

    Args:
        names: Interchangeable phrases by label: {"Rust_Patch": ["rust", "the corroded part"]}. The phrase of any other
            label is the label itself, with spaces for underscores. An empty list leaves the label out.
        templates: Complete questions about a phrase, such as "Where is {name}?", to ask instead of LISA's about
            classes. With "{name}" alone, `names` holds the questions.
    """

    names: dict[str, list[str]] | None = None
    templates: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.names is not None and not isinstance(self.names, dict):
            raise ValueError(f"names: expected lists of phrases by label, got {self.names!r}.")
        for label, phrases in (self.names or {}).items():
            if phrases != [] and not _is_texts(phrases):
                raise ValueError(f"names: expected a list of phrases for {label!r}, got {phrases!r}.")
        templates = self.templates
        if templates is not None and not (_is_texts(templates) and all("{name}" in text for text in templates)):
            raise ValueError(f"templates: expected a list of questions that hold '{{name}}', got {templates!r}.")


class Labeled(OwnData):
    """Base of the builders whose annotations name each object by the label of its class."""

    BUILDER_CONFIG_CLASS = LabeledConfig

    def make_labeled_row(
        self,
        image: str,
        image_id: str,
        objects: Sequence[tuple[Any, dict[str, Any] | None]],
        ignore: dict[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Make the row of an image, with one target per object. None if no object covers a pixel.

        Args:
            image: Path of the image.
            image_id: See [`~lisa_hf.data.rows.make_row`].
            objects: Label and RLE of every object. Objects with an RLE of None are passed over.
            ignore: RLE of the pixels to ignore.
        """
        targets = []
        for label, rle in objects:
            phrases = self.phrases(label)
            if rle is None or not phrases:
                self.pass_over("annotations without a pixel" if phrases else f"annotations of the label {label!r}")
            else:
                targets.append({"phrases": phrases, "rle": rle})
        if not targets:
            return None
        is_sentence = bool(self.config.templates)
        row = make_row(image, image_id, self.source, "semantic", targets, ignore, is_sentence)
        return self.turn_upright(row)

    def phrases(self, label: Any) -> list[str]:
        """Return the interchangeable phrases, or complete questions, of a label; none if `names` leaves it out."""
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"expected a label, got {label!r}. Name the class.")
        self.met_labels.add(label)
        phrases = (self.config.names or {}).get(label, [" ".join(label.replace("_", " ").split())])
        if not self.config.templates:
            return phrases
        return [template.replace("{name}", phrase) for template in self.config.templates for phrase in phrases]

    @functools.cached_property
    def met_labels(self) -> set[str]:
        """Labels of the rows that this process has made."""
        return set()

    def final_remarks(self):
        unknown = ", ".join(repr(label) for label in self.config.names or {} if label not in self.met_labels)
        return [f"no annotation has the labels {unknown} of the option `names`"] if unknown else []


def _is_texts(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) and v.strip() for v in values)


@dataclasses.dataclass
class CocoInstancesConfig(CocoConfig, LabeledConfig):
    """Options of COCO instances.

    Args:
        annotations: Path of the JSON file.
        images: Directory of the images.
    """

    annotations: str = ""
    images: str = ""


class CocoInstances(CocoBuilder, Labeled):
    """Annotations in the COCO format. One row per annotated image, one target per annotation, named by its category.

    annotations     JSON with images, annotations (polygons or RLE) and categories
    images          the directory of the images
    """

    BUILDER_CONFIG_CLASS = CocoInstancesConfig

    def annotation_files(self, data_dir):
        images = list_images(self.locate(data_dir, "images"))
        return [self.locate(data_dir, "annotations"), *images, *self.held_out_files(data_dir)]

    def photo(self, record):
        return record["image"].get("file_name", "")

    def read_records(self, data_dir):
        path = self.locate(data_dir, "annotations")
        return {self.config.split: read_instances(path, self.read_remarks, self.config.encoding)}

    def make_row(self, record):
        path, image = self.locate(self.config.data_dir, "annotations"), record["image"]
        with errors_naming(f"{path!r}, image {image['id']}"):
            objects = list(encode_objects(record, self.pass_over))
            if not objects:
                return None
            file = self.find_image(self.locate(self.config.data_dir, "images"), image["file_name"])
            return self.make_labeled_row(file, str(image["id"]), objects)

    def annotated_size(self, record):
        image = record["image"]
        path = self.find_image(self.locate(self.config.data_dir, "images"), image["file_name"])
        return path, (image["height"], image["width"])


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
                optional "explanation": why the mask answers the question;
                or {"image": "a.jpg", "messages": [{"role": "user", "content": "What is broken?"}, {"role":
                "assistant", "content": "The wheel [SEG]."}], "masks": ["a.png"]}: a mask per [SEG], in their order
    images      the directory of the images
    masks       the directory of the masks: images of the photo's size with 0 for the background and one other value;
                255 beside a smaller value is ignored
    """

    BUILDER_CONFIG_CLASS = ImageFolderConfig

    def annotation_files(self, data_dir):
        directories = {self.locate(data_dir, "images"), self.locate(data_dir, "masks")}
        return [
            self.locate(data_dir, "questions"),
            *(file for name in sorted(directories) for file in list_images(name)),
        ]

    def read_records(self, data_dir):
        lines = read_text(self.locate(data_dir, "questions"), self.config.encoding).split("\n")
        return {self.config.split: [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]}

    def make_row(self, record):
        number, line = record
        data_dir = self.config.data_dir
        with errors_naming(f"{self.locate(data_dir, 'questions')!r}, line {number}"):
            record = json.loads(line)
            if "messages" in record:
                return self._make_conversation(record)
            is_sentence = "question" in record
            phrases = record["question" if is_sentence else "phrase"]
            image = self.find_image(self.locate(data_dir, "images"), record["image"])
            mask, ignore = self._read_mask(image, record["mask"])
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

    def _read_mask(self, image: str, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a mask and what it ignores, of the size of its image."""
        mask, ignore = read_mask(self.find_image(self.locate(self.config.data_dir, "masks"), name))
        _, sizes = read_orientation(image)
        if mask.shape not in sizes.values():
            size = sizes["display"]
            raise ValueError(f"expected a mask of the image's size {size} (height, width), got {mask.shape}.")
        return mask, ignore

    def _make_conversation(self, record: dict[str, Any]) -> dict[str, Any]:
        image = self.find_image(self.locate(self.config.data_dir, "images"), record["image"])
        masks = [self._read_mask(image, name) for name in record.get("masks", [])]
        ignored = [ignore for _, ignore in masks if ignore is not None]
        row = make_row(
            image=image,
            image_id=record["image"],
            source=self.source,
            task="conversation",
            targets=[{"rle": encode_mask(mask)} for mask, _ in masks],
            ignore=encode_mask(np.any(ignored, axis=0)) if ignored else None,
            messages=record["messages"],
        )
        return self.turn_upright(row)

    def annotated_size(self, record):
        line = json.loads(record[1])
        data_dir = self.config.data_dir
        image = self.find_image(self.locate(data_dir, "images"), line["image"])
        masks = line.get("masks", []) if "messages" in line else [line["mask"]]
        if not masks:
            return image, None
        return image, read_image_size(self.find_image(self.locate(data_dir, "masks"), masks[0]))


def open_file(image: dict[str, Any]) -> IO[bytes]:
    """Open the file of an undecoded image, also of an archive or a server."""
    return io.BytesIO(image["bytes"]) if image["bytes"] else xopen(image["path"], "rb")
