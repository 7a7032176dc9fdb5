"""Exports of annotation tools: YOLO, CVAT, Label Studio, Supervisely. Your own data, as those of `own_data.py`.

    sources:
      rust: {builder: yolo, annotations: rust/data.yaml}
      cracks: {builder: cvat, annotations: cracks/annotations.xml, images: cracks/images}
      rooms: {builder: label_studio, annotations: rooms.json, images: photos}
      cells: {builder: supervisely, annotations: cells}

Outlines, masks and ellipses are drawn. Boxes, lines and points are passed over and counted: they have no mask.
"""

import base64
import dataclasses
import glob
import io
import math
import os
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
import yaml

from .file_names import find_image, is_image, list_images, split_name
from .label_studio_rle import decode_brush
from .orientation import read_orientation
from .own_data import Labeled, LabeledConfig
from .segmentation import check_size, encode_ellipse, encode_patch, encode_visible, encode_with_holes
from .source import errors_naming, is_inside, read_json
from .text import read_text


@dataclasses.dataclass
class AnnotationFileConfig(LabeledConfig):
    """Options of an export with one file of annotations, or one directory.

    Args:
        annotations: Path of the file or directory.
    """

    annotations: str = ""


@dataclasses.dataclass
class ImagesConfig(AnnotationFileConfig):
    """Options of an export with one file of annotations and the images apart from it.

    Args:
        images: Directory of the images.
    """

    images: str = ""


class Yolo(Labeled):
    """Segmentation in the layout of YOLO (Ultralytics, Roboflow). One row per image, one target per outline.

    annotations     data.yaml with `names`, and directories or lists of images under the keys train, val and test; or
                    the directory of data.yaml or classes.txt. Without these keys, it means all images in there.
    split           which of these keys; default: train
    images          directory of the images, if they are apart from the labels

    A label file lies where its image does, with `labels` for `images` in its path. Its lines hold a class number and
    the outline, x and y in shares of the width and height.
    """

    BUILDER_CONFIG_CLASS = ImagesConfig

    def annotation_files(self, data_dir):
        pairs = self._pairs(data_dir)
        return [self._find_description(data_dir), *(path for pair in pairs for path in pair if os.path.exists(path))]

    def read_records(self, data_dir):
        names, pairs = self._names(data_dir), self._pairs(data_dir)
        records = [(image, label, names) for image, label in pairs if os.path.exists(label)]
        if len(records) < len(pairs):
            self.read_remarks.append(f"passed over {len(pairs) - len(records)} images without a label file")
        return {self.config.split: records}

    def _pairs(self, data_dir: str | None) -> list[tuple[str, str]]:
        """Return the paths of the images and of their label files, which need not exist."""
        if not self.config.images:
            pairs = [(image, _label_path(image)) for image in self._images(data_dir)]
        else:
            images, description = self.locate(data_dir, "images"), self._find_description(data_dir)
            found = glob.glob(f"{glob.escape(os.path.dirname(description))}/**/*.txt", recursive=True)
            version = str(os.stat(images).st_mtime_ns)
            pairs = []
            for label in (path for path in sorted(found) if path != description):
                name = os.path.relpath(label, os.path.dirname(description)).removeprefix(f"labels{os.sep}")
                pairs.append((find_image(images, os.path.splitext(name)[0], version)[0], label))
        if not any(os.path.exists(label) for _, label in pairs):
            example = pairs[0][1] if pairs else "labels/a.txt"
            raise FileNotFoundError(
                f"source {self.source!r}: expected label files such as {example!r} for the {len(pairs)} images of "
                f"the split {self.config.split!r}, got none. Check `annotations`, `images` and `split`."
            )
        return pairs

    def make_row(self, record):
        image, path, names = record
        with errors_naming(path):
            _, (height, width) = self.find_space(*read_orientation(image), None)
            objects = []
            for line in read_text(path, self.config.encoding).splitlines():
                numbers = line.split()
                if len(numbers) == 5:
                    self.pass_over("boxes")
                elif numbers:
                    objects.append((_class_name(numbers[0], names), _encode_shares(numbers[1:], height, width)))
            return self.make_labeled_row(image, _stem(image), objects)

    def annotated_size(self, record):
        return record[0], None

    def _find_description(self, data_dir: str | None) -> str:
        """Return the path of the file that names the classes."""
        path = self.locate(data_dir, "annotations")
        if os.path.isfile(path):
            return path
        for name in ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names"):
            if os.path.isfile(os.path.join(path, name)):
                return os.path.join(path, name)
        raise FileNotFoundError(f"source {self.source!r}: expected data.yaml or classes.txt in {path!r}, got neither.")

    def _describe(self, data_dir: str | None) -> dict[str, Any]:
        path = self._find_description(data_dir)
        text = read_text(path, self.config.encoding)
        if not path.endswith((".yaml", ".yml")):
            return {"names": text.splitlines()}
        try:
            content = yaml.safe_load(text)
        except (RecursionError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"expected YAML, got {path!r} ({' '.join(str(error).split())}).") from error
        if not isinstance(content, dict):
            raise ValueError(f"expected `names` and images in {path!r}, got {content!r:.100}.")
        return content

    def _names(self, data_dir: str | None) -> dict[str, str]:
        path, names = self._find_description(data_dir), self._describe(data_dir).get("names")
        if isinstance(names, list):
            names = dict(enumerate(names))
        if not isinstance(names, dict):
            raise ValueError(f"expected `names` of the classes in {path!r}, got {names!r}.")
        return {str(number): str(name) for number, name in names.items()}

    def _images(self, data_dir: str | None) -> list[str]:
        """Return the paths of the images of the split, all inside of the directory of the description."""
        path, content = self._find_description(data_dir), self._describe(data_dir)
        directory = os.path.dirname(path)
        entries = content.get(self.config.split)
        if entries is None and not {"train", "val", "test"} & content.keys():
            entries = "images" if os.path.isdir(os.path.join(directory, "images")) else "."
        if entries is None:
            raise ValueError(f"expected the split {self.config.split!r} in {path!r}, got {sorted(map(str, content))}.")
        entries = [entries] if isinstance(entries, str) else entries
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise ValueError(f"expected paths of the split {self.config.split!r} in {path!r}, got {entries!r:.100}.")
        # Exports say where they were made, and many of their paths are wrong by a "..", which YOLO forgives too.
        roots = [os.path.join(directory, str(content.get("path") or "")), directory]
        images = []
        for entry in entries:
            found = _first_inside(directory, [os.path.join(root, name) for root in roots for name in _variants(entry)])
            if found is None:
                raise FileNotFoundError(
                    f"source {self.source!r}: expected {entry!r} of {path!r} in {directory!r}, got none there. Keep "
                    "the images beside the file that lists them."
                )
            images += list_images(found) if os.path.isdir(found) else self._listed_images(found, roots)
        return images

    def _listed_images(self, path: str, roots: Sequence[str]) -> list[str]:
        """Return the paths of the images that a text file lists, one per line."""
        images, directory = [], roots[-1]
        for line in filter(None, map(str.strip, read_text(path, self.config.encoding).splitlines())):
            candidates = [os.path.join(root, name) for root in roots for name in _variants(line)]
            version = str(os.stat(directory).st_mtime_ns)
            images.append(_first_inside(directory, candidates) or find_image(directory, line, version)[0])
        return images


def _variants(path: str) -> Iterator[str]:
    """Yield a path, and without its leading "..", "." and "data": CVAT writes data/images/a.jpg for images/a.jpg."""
    parts = path.replace("\\", "/").split("/")
    yield "/".join(parts)
    while parts and parts[0] in ("..", "."):
        parts = parts[1:]
    yield "/".join(parts)
    if parts[:1] == ["data"]:
        yield "/".join(parts[1:])


def _first_inside(directory: str, paths: Sequence[str]) -> str | None:
    return next((path for path in paths if is_inside(path, directory) and os.path.exists(path)), None)


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _label_path(image: str) -> str:
    """Return the path of the label file of an image: beside it, if no directory is called `images`."""
    before, images, after = image.rpartition(f"{os.sep}images{os.sep}")
    path = f"{before}{os.sep}labels{os.sep}{after}" if images else image
    return f"{os.path.splitext(path)[0]}.txt"


def _class_name(number: str, names: dict[str, str]) -> str:
    key = str(int(float(number)))
    if key not in names:
        raise ValueError(f"expected a class among {sorted(names)}, got {number!r}. Add it to `names`.")
    return names[key]


def _encode_shares(numbers: Sequence[str], height: int, width: int) -> dict[str, Any] | None:
    """Encode an outline of x and y in shares of the image's size."""
    shares = np.array(numbers, dtype=np.float64)
    if len(shares) % 2 or len(shares) < 6:
        raise ValueError(f"expected a class and at least three points (x, y), got {len(shares)} numbers after it.")
    return encode_visible([(shares.reshape(-1, 2) * (width, height)).ravel().tolist()], height, width)


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
        except (ET.ParseError, LookupError) as error:  # the second of an unknown encoding
            raise ValueError(f"expected an XML file of CVAT, got {path!r} ({error}). Export it again.") from error

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
            root.clear()  # of what was read: files may be larger than the memory
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
    # The lengths of the runs along the rows of the box around the mask, that of 0 first.
    left, top, box_width, box_height = (int(float(shape[key])) for key in ("left", "top", "width", "height"))
    runs = np.array(shape["rle"].split(","), dtype=np.int64)
    if min(box_width, box_height) < 1 or box_width > width or box_height > height:
        raise ValueError(
            f"expected a mask inside an image of {width} x {height} pixels, got {box_width} x {box_height}."
        )
    if runs.min() < 0 or runs.max() > box_width * box_height or runs.sum() != box_width * box_height:
        raise ValueError(f"expected a mask of {box_width} x {box_height} pixels, got runs of {runs.sum()} pixels.")
    patch = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(box_height, box_width)
    return encode_patch(patch, left, top, height, width)


class LabelStudio(Labeled):
    """Label Studio's export of the format JSON. One row per image, one target per polygon, brush mask and ellipse.

    annotations     JSON: tasks with `data` and `annotations`
    images          directory of the images, which are found by the last part of their addresses

    Of several annotations of an image, the ground truth is taken, or else the last one that was made.
    """

    BUILDER_CONFIG_CLASS = ImagesConfig

    def annotation_files(self, data_dir):
        return [self.locate(data_dir, "annotations"), *list_images(self.locate(data_dir, "images"))]

    def read_records(self, data_dir):
        path = self.locate(data_dir, "annotations")
        tasks = read_json(path, self.config.encoding)
        if not isinstance(tasks, list) or not all(isinstance(task, dict) and "data" in task for task in tasks):
            raise ValueError(
                f"expected a list of tasks with `data` and `annotations` in {path!r}, got other content. Export the "
                "project from Label Studio in the format JSON (not JSON-MIN)."
            )
        records, num_others = [], 0
        for task in tasks:
            with errors_naming(f"{path!r}, task {task.get('id')}"):
                annotations = [made for made in task.get("annotations") or [] if not made.get("was_cancelled")]
                annotations.sort(key=lambda made: (bool(made.get("ground_truth")), str(made.get("created_at") or "")))
            num_others += max(len(annotations) - 1, 0)
            if annotations and annotations[-1].get("result"):
                records.append((task.get("id"), task["data"], annotations[-1]["result"]))
        if num_others:
            self.read_remarks.append(
                f"left out {num_others} annotations of images that have a later one or a ground truth"
            )
        return {self.config.split: records}

    def make_row(self, record):
        number, data, results = record
        with errors_naming(f"{self.locate(self.config.data_dir, 'annotations')!r}, task {number}"):
            image, regions = self._find_task_image(data, results)
            size = _region_size(regions)
            objects = []
            for region in regions:
                value = region["value"]
                labels = value.get(region["type"]) or []
                if not {"points", "rle", "radiusX"} & value.keys() or region["type"] in ("vectorlabels", "vector"):
                    self.pass_over(f"regions of the type {region['type']!r}")
                elif labels:
                    rle = _encode_region(value, *size)
                    objects += [(label, rle) for label in labels]
                elif region["type"].endswith("labels"):
                    self.pass_over("regions without a label")
            return self.make_labeled_row(image, str(number), objects)

    def annotated_size(self, record):
        _, data, results = record
        image, regions = self._find_task_image(data, results)
        return image, _region_size(regions)

    def _find_task_image(self, data: dict[str, Any], results: list[dict]) -> tuple[str, list[dict[str, Any]]]:
        """Return the path of the image of a task, and the results that are regions of it."""
        regions = [result for result in results if "original_width" in result]
        if any(region.get("image_rotation") for region in regions):
            raise ValueError(
                "expected regions of the image as it is, got an image that was turned in the tool. Turn it back."
            )
        names = {region.get("to_name") for region in regions}
        if len(names) > 1:
            raise ValueError(f"expected regions of one image in a task, got those of {sorted(map(str, names))}.")
        texts = {key: value for key, value in data.items() if isinstance(value, str) and value.strip()}
        names = {key: name for key, name in texts.items() if key == "image" or is_image(split_name(name)[-1])}
        if "image" not in names and len(names) != 1:
            raise ValueError(f"expected the address of one image in `data`, got {data!r:.200}. Call it 'image'.")
        name = names.get("image") or next(iter(names.values()))
        return self.find_image(self.locate(self.config.data_dir, "images"), name), regions


def _region_size(regions: Sequence[dict[str, Any]]) -> tuple[int, int] | None:
    sizes = {check_size(region["original_height"], region["original_width"]) for region in regions}
    if len(sizes) > 1:
        raise ValueError(f"expected regions of an image of one size, got the sizes {sorted(sizes)}.")
    return next(iter(sizes), None)


def _encode_region(value: dict[str, Any], height: int, width: int) -> dict[str, Any] | None:
    """Encode a region of Label Studio, whose lengths are percents of the image's width and height."""
    if "rle" in value:
        mask = decode_brush(value["rle"], height, width)
        return encode_patch(mask, 0, 0, height, width)
    if "points" in value:
        points = [[x * width / 100, y * height / 100] for x, y in value["points"]]
        return encode_visible([points], height, width)
    center = value["x"] * width / 100, value["y"] * height / 100
    radii = value["radiusX"] * width / 100, value["radiusY"] * height / 100
    return encode_ellipse(center, radii, value.get("rotation") or 0, height, width)


class Supervisely(Labeled):
    """Supervisely's format of images. One row per image, one target per polygon and bitmap.

    annotations     directory of a project or of one of its datasets: directories `ann` with a JSON per image, each
                    beside a directory `img`
    """

    BUILDER_CONFIG_CLASS = AnnotationFileConfig

    def _json_files(self, data_dir: str | None) -> list[str]:
        directory = self.locate(data_dir, "annotations")
        found = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(directory, followlinks=True)
            for name in names
            if os.path.basename(folder) == "ann" and name.endswith(".json")
        ]
        if not found:
            raise FileNotFoundError(f"source {self.source!r}: expected ann/*.json in {directory!r}, got none.")
        return sorted(found)

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
            return self.make_labeled_row(image, _stem(image), objects)

    def annotated_size(self, record):
        return _supervisely_image(record), _supervisely_size(read_json(record, self.config.encoding))


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
    # A small file may unpack to terabytes. No mask is larger than its pixels with four channels, and some headers.
    limit = 4 * height * (width + 1) + 10_000
    try:
        unpacked = zlib.decompressobj().decompress(content, limit)
        with PIL.Image.open(io.BytesIO(unpacked)) as image:
            if math.prod(image.size) > height * width:
                raise ValueError(f"expected a bitmap in an image of {width} x {height} pixels, got {image.size}.")
            image.load()
    except (OSError, SyntaxError, zlib.error) as error:
        raise ValueError(f"expected a bitmap as a packed PNG, got other data ({error}). Export it again.") from error
    pixels = np.asarray(image)
    if image.mode in ("RGBA", "LA"):
        pixels = pixels[..., -1]
    elif pixels.ndim == 3:
        pixels = pixels.max(axis=2)
    return encode_patch(pixels != 0, left, top, height, width)
