"""Masks of classes: images whose values or colors are classes, and COCO panoptic. Your own data.

    sources:
      streets: {builder: class_masks, images: photos, masks: masks, classes: {road: 1, sidewalk: 2, sky: 10}}
      voc: {builder: class_masks, images: VOC/JPEGImages, masks: VOC/SegmentationClass, classes: VOC/labelmap.txt}
      scenes: {builder: coco_panoptic, annotations: panoptic.json, images: photos, masks: panoptic}

A row has one target per class, or per instance if the masks distinguish instances.
"""

import dataclasses
import functools
import os
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from .coco import CocoBuilder, CocoConfig, id_key, index_by_id
from .file_names import list_images
from .orientation import read_orientation
from .own_data import Labeled, LabeledConfig
from .segmentation import LOSSY_FORMATS, encode_labels
from .source import errors_naming, read_image_size, read_json
from .text import read_text


# Tools' names for background pixels and for undecided pixels.
BACKGROUND_NAMES = ("background", "_background_")
VOID_NAMES = ("void", "unlabeled", "ignore", "ignored", "__ignore__")
# How PASCAL VOC marks the borders of objects, by value and by color.
VOID = 255
# The label of a color is this number plus 0xRRGGBB, so that it is never mistaken for a value.
COLORED = 1 << 24
VOID_COLOR = COLORED + 0xE0E0C0


@dataclasses.dataclass
class ClassMasksConfig(LabeledConfig):
    """Options of class masks.

    Args:
        images: Directory of the images.
        masks: Directory of the masks, which have the names of their images.
        classes: Value, or color [red, green, blue], by class; or the classes in the order of their values from 0; or
            the path of a file: labelmap.txt of CVAT and Datumaro, or a text file with one class per line, from 0.
            Pixels of a class called "background" are background, those of 255 or of a class called "void" are ignored.
        instances: Directory of masks whose values distinguish the instances of a class, like PASCAL VOC's
            SegmentationObject.
        label_divisor: For masks of classes and instances, such as those of Cityscapes: a value of at least this number
            is a class times this number, plus an instance number.
        image_set: Text file with the names of the images to use, one per line, as in PASCAL VOC.
    """

    images: str = ""
    masks: str = ""
    classes: dict[str, Any] | list[str] | str | None = None
    instances: str = ""
    label_divisor: int = 0
    image_set: str = ""


class ClassMasks(Labeled):
    """Masks of classes: grayscale, 16-bit, palette or colored. One row per mask, one target per class or instance.

    images          directory of the images
    masks           directory of the masks: a.png for a.jpg
    classes         what the values or colors mean
    """

    BUILDER_CONFIG_CLASS = ClassMasksConfig

    def annotation_files(self, data_dir):
        directories = dict.fromkeys(self._directories(data_dir).values())
        files = [self.locate(data_dir, "image_set")] if self.config.image_set else []
        files += [self.locate(data_dir, "classes")] if isinstance(self.config.classes, str) else []
        return [*files, *(file for directory in directories for file in list_images(directory))]

    def _directories(self, data_dir: str | None) -> dict[str, str]:
        """Return the directories by option: the images, and masks or instances or both."""
        given = [option for option in ("masks", "instances") if getattr(self.config, option)]
        options = ["images", *(given or ["masks"])]
        return {option: self.locate(data_dir, option) for option in options}

    @functools.cached_property
    def classes(self) -> dict[int, str]:
        """Return the class names by label: the value, or the color plus `COLORED`."""
        classes = self.config.classes
        if not isinstance(classes, str):
            return _label_classes(classes)
        path = self.locate(self.config.data_dir, "classes")
        with errors_naming(path):
            return _read_classes(path, self.config.encoding)

    def read_records(self, data_dir):
        names = [name for name in self.classes.values() if _meaning(name) is name]
        if not self.config.masks and len(names) != 1:
            raise ValueError(
                f"source {self.source!r}: expected `masks`, or instances of a single class, got the classes {names}."
            )
        files = {option: _by_stem(directory) for option, directory in self._directories(data_dir).items()}
        stems = files["masks" if self.config.masks else "instances"].keys()
        if self.config.image_set:
            text = read_text(self.locate(data_dir, "image_set"), self.config.encoding)
            stems = [os.path.splitext(line.strip())[0] for line in text.splitlines() if line.strip()]
        paired = [stem for stem in stems if all(stem in found for found in files.values())]
        for paths in (found[stem] for stem in paired for found in files.values()):
            if len(paths) > 1:
                raise ValueError(
                    f"source {self.source!r}: expected one image of each name besides its extension, got {paths[:3]}. "
                    "Keep photos and masks in directories of their own, and remove what belongs to neither."
                )
        if len(paired) < len(stems):
            lone = next(stem for stem in stems if stem not in paired)
            self.read_remarks.append(
                f"found no pair for {len(stems) - len(paired)} of {len(stems)} masks, such as {lone!r}"
            )
        return {self.config.split: [{option: found[stem][0] for option, found in files.items()} for stem in paired]}

    def make_row(self, record):
        path = record.get("masks") or record["instances"]
        with errors_naming(path):
            is_colored = max(self.classes) >= COLORED
            instances = _read_labels(record["instances"]) if "instances" in record else None
            labels = _read_labels(record["masks"], is_colored) if "masks" in record else None
            classes = self.classes
            if labels is None:
                classes = {1: next(name for name in classes.values() if _meaning(name) is name)}
                labels = (instances != 0).astype(np.int64)
            elif self.config.label_divisor:
                instances, divisor = labels, self.config.label_divisor
                labels = np.where(labels >= divisor, labels // divisor, labels)
            _check_fit(record["images"], labels.shape)
            if instances is not None and instances.shape != labels.shape:
                raise ValueError(f"expected instances of the size {labels.shape}, got {instances.shape}.")
            objects, ignore = encode_regions(labels, classes, instances)
            name = os.path.splitext(os.path.basename(record["images"]))[0]
            return self.make_labeled_row(record["images"], name, objects, ignore)

    def annotated_size(self, record):
        return record["images"], read_image_size(record.get("masks") or record["instances"])


def encode_regions(
    labels: np.ndarray, classes: dict[int, str], instances: np.ndarray | None = None
) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Any] | None]:
    """Encode the region of every class, or of every instance of it.

    Args:
        labels: Shape `(H, W)`, int64.
        classes: Names by label. Without a name, 0 and black are background, and `VOID` and `VOID_COLOR` are ignored.
        instances: Shape `(H, W)`, int64. Pixels of the same class and number are one instance.

    Returns:
        Pairs of a name and its RLE, and the RLE of the ignored pixels, if there are any.

    Raises:
        ValueError: If a label has no name.
    """
    defaults = {0: BACKGROUND_NAMES[0], COLORED: BACKGROUND_NAMES[0], VOID: VOID_NAMES[0], VOID_COLOR: VOID_NAMES[0]}
    names = defaults | classes
    values, regions = np.unique(labels, return_inverse=True)
    unknown = [value for value in values.tolist() if value not in names]
    if unknown:
        raise ValueError(
            f"expected the classes {_describe(classes)}, got {len(unknown)} others: "
            f"{', '.join(map(_describe_label, unknown[:5]))}. Add them to `classes`; call undecided pixels 'void'."
        )
    regions = regions.reshape(labels.shape)
    meanings = [_meaning(names[value]) for value in values.tolist()]
    is_void = np.array([meaning is None for meaning in meanings])[regions]
    is_target = np.array([bool(meaning) for meaning in meanings])[regions]
    if instances is not None:
        _, numbers = np.unique(instances, return_inverse=True)
        regions = regions + len(values) * numbers.reshape(labels.shape)
    rles = encode_labels(np.where(is_target, regions, -1))
    objects = [(meanings[region % len(values)], rle) for region, rle in rles.items() if region >= 0]
    return objects, encode_labels(is_void.astype(np.int64))[1] if is_void.any() else None


def _meaning(name: str) -> str | None:
    """Return the name of a class; an empty string for the background, None if ignored."""
    if name.lower() in BACKGROUND_NAMES:
        return ""
    return None if name.lower() in VOID_NAMES else name


def _read_labels(path: str, by_color: bool | None = None) -> np.ndarray:
    """Read a mask, rotated by its EXIF orientation, as labels of shape `(H, W)`, int64.

    Args:
        path: Path of the mask.
        by_color: Whether to read colors and palettes as colors, and gray values as gray colors. By default, whichever
            distinguishes pixels.
    """
    try:
        with PIL.Image.open(path) as image:
            if image.format in LOSSY_FORMATS:
                raise ValueError(f"expected exact values, got the lossy format {image.format}. Save masks as PNG.")
            image = PIL.ImageOps.exif_transpose(image)
            image.load()
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"expected a mask, got a file that cannot be read: {error}. Restore it.") from error
    if image.mode == "RGBA" and image.getextrema()[3] == (255, 255):
        image = image.convert("RGB")
    if by_color and image.mode in ("1", "L", "P"):
        image = image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[2] == 3 and image.mode == "RGB":
        if by_color is False and (pixels == pixels[..., :1]).all():
            return pixels[..., 0].astype(np.int64)
        if by_color is not False:
            red, green, blue = np.moveaxis(pixels.astype(np.int64), 2, 0)
            labels = (red << 16) + (green << 8) + blue
            return labels + (COLORED if by_color else 0)
    if pixels.ndim != 2 or pixels.dtype.kind == "f" or by_color:
        raise ValueError(
            f"expected {'colors' if by_color else 'one value per pixel'} as in `classes`, got the mode {image.mode}. "
            "Give `classes` by color for colored masks, else by value, and save masks without transparency."
        )
    return pixels.astype(np.int64)


def _label_classes(classes: Any) -> dict[int, str]:
    """Return the option `classes` as names by label."""
    if isinstance(classes, list) and classes:
        classes = {name: value for value, name in enumerate(classes)}
    if not isinstance(classes, dict) or not classes:
        raise ValueError(
            f"expected `classes`, values or colors by name such as {{rust: 1, crack: 2}}, got {classes!r}."
        )
    named = {}
    for name, value in classes.items():
        if isinstance(name, bool) or not isinstance(name, str | int | float) or not str(name).strip():
            raise ValueError(
                f"expected text as the names of `classes`, got {name!r}. Put words that YAML reads otherwise, such as "
                "yes, no and null, in quotes."
            )
        if isinstance(value, list | tuple) and len(value) == 3 and all(v in range(256) for v in value):
            label = COLORED + (value[0] << 16) + (value[1] << 8) + value[2]
        elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < COLORED:
            label = value
        else:
            raise ValueError(f"expected a value or a color [red, green, blue] for the class {name!r}, got {value!r}.")
        if label in named:
            raise ValueError(f"expected one class per value, got {named[label]!r} and {name!r} for {value!r}.")
        named[label] = str(name)
    if len({label >= COLORED for label in named}) > 1:
        raise ValueError(f"expected either values or colors for classes, got both: {classes!r}.")
    return named


def _read_classes(path: str, encoding: str | None) -> dict[int, str]:
    """Read classes from labelmap.txt, `name:red,green,blue:parts:actions` with or without colors, or from names."""
    lines = [line.strip() for line in read_text(path, encoding).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    fields = [line.split(":") for line in lines]
    if any(len(field) < 2 for field in fields):
        return _label_classes(lines)
    colors = {
        field[0]: [int(value) for value in field[1].split(",")] if field[1] else _voc_color(index)
        for index, field in enumerate(fields)
    }
    return _label_classes(colors)


def _voc_color(index: int) -> list[int]:
    """Return the color of a class in PASCAL VOC: the bits of its number, dealt to red, green and blue from the top."""
    return [sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]


def _describe(classes: dict[int, str]) -> dict[str, str]:
    return {_describe_label(label): name for label, name in list(classes.items())[:20]}


def _describe_label(label: int) -> str:
    return str(label) if label < COLORED else f"#{label - COLORED:06x}"


def _by_stem(directory: str) -> dict[str, list[str]]:
    """Return the images of a directory by their relative path without the extension."""
    found: dict[str, list[str]] = {}
    for path in list_images(directory):
        found.setdefault(os.path.splitext(os.path.relpath(path, directory))[0], []).append(path)
    return found


def _check_fit(image: str, size: tuple[int, int]):
    sizes = read_orientation(image)[1]
    if size not in sizes.values():
        raise ValueError(f"expected a mask of the image's size {sizes['display']} (height, width), got {size}.")


@dataclasses.dataclass
class CocoPanopticConfig(CocoConfig, LabeledConfig):
    """Options of COCO panoptic.

    Args:
        annotations: Path of the JSON file.
        images: Directory of the images.
        masks: Directory of the PNG files that the JSON file names.
    """

    annotations: str = ""
    images: str = ""
    masks: str = ""


class CocoPanoptic(CocoBuilder, Labeled):
    """COCO panoptic. One row per image, one target per segment. Pixels of no segment are ignored.

    annotations     JSON with images, annotations (file_name and segments_info) and categories
    images          directory of the images
    masks           directory of the PNG files, whose colors are the ids of segments
    """

    BUILDER_CONFIG_CLASS = CocoPanopticConfig

    def annotation_files(self, data_dir):
        images, masks = (list_images(self.locate(data_dir, option)) for option in ("images", "masks"))
        return [self.locate(data_dir, "annotations"), *images, *masks, *self.held_out_files(data_dir)]

    def photo(self, record):
        return str(record["image"].get("file_name", ""))

    def read_records(self, data_dir):
        path = self.locate(data_dir, "annotations")
        content = read_json(path, self.config.encoding)
        with errors_naming(path):
            images = index_by_id(content["images"], "images", "file_name")
            categories = index_by_id(content["categories"], "categories", "name")
            records = []
            for annotation in content["annotations"]:
                image = images.get(id_key(annotation["image_id"]), {"id": annotation["image_id"]})
                segments = [
                    (segment["id"], categories.get(id_key(segment["category_id"]), {}).get("name"))
                    for segment in annotation["segments_info"]
                ]
                if segments:
                    records.append({"image": image, "mask": annotation["file_name"], "segments": segments})
            return {self.config.split: records}

    def make_row(self, record):
        path, image = self.locate(self.config.data_dir, "annotations"), record["image"]
        with errors_naming(f"{path!r}, image {image['id']}"):
            file, mask = self._find_files(record)
            red, green, blue = (_read_labels(mask) >> shift & 255 for shift in (16, 8, 0))
            labels = red + (green << 8) + (blue << 16)
            _check_fit(file, labels.shape)
            names = dict(record["segments"])
            for number, name in names.items():
                if not isinstance(name, str):
                    raise ValueError(f"expected a category for segment {number}, got none. Add it to `categories`.")
            rles = encode_labels(labels)
            ignore = rles.pop(0, None)
            unknown = sorted(rles.keys() - names.keys())
            if unknown:
                raise ValueError(f"expected the segments {sorted(names)[:5]} in {mask!r}, got others: {unknown[:5]}.")
            objects = [(names[number], rles.get(number)) for number in names]
            return self.make_labeled_row(file, str(image["id"]), objects, ignore)

    def annotated_size(self, record):
        image, mask = self._find_files(record)
        return image, read_image_size(mask)

    def _find_files(self, record: dict[str, Any]) -> tuple[str, str]:
        data_dir = self.config.data_dir
        image = self.find_image(self.locate(data_dir, "images"), record["image"]["file_name"])
        return image, self.find_image(self.locate(data_dir, "masks"), record["mask"])
