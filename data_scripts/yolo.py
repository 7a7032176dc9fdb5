"""Outlines in the layout of YOLO (Ultralytics, Roboflow).

sources:
  rust: {builder: yolo, annotations: rust/data.yaml}
"""

import glob
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import yaml

from .file_names import OUTSIDE, find_image, is_image, list_images
from .orientation import read_orientation
from .own_data import ImagesConfig, Labeled
from .segmentation import encode_visible
from .source import errors_naming, is_inside
from .text import read_text


class Yolo(Labeled):
    """Segmentation in the layout of YOLO (Ultralytics, Roboflow). One row per image, one target per outline.

    annotations     data.yaml with `names`, and directories or lists of images under the keys train, val and test; or
                    the directory of data.yaml or classes.txt. Without these keys, all images in it are used.
    split           which of these keys; default: train. `validation` means val
    images          directory of the images, if they are separate from the labels

    The path of a label file is that of its image with `labels` instead of `images`, or next to the image if there is
    no such directory. Each line has a class number and an outline, x and y as fractions of the width and height.
    """

    BUILDER_CONFIG_CLASS = ImagesConfig

    def annotation_files(self, data_dir):
        pairs = self._pairs(data_dir)
        return [self._find_description(data_dir), *(path for pair in pairs for path in pair if os.path.exists(path))]

    def read_records(self, data_dir):
        names, pairs = self._names(data_dir), self._pairs(data_dir)
        records = [(image, label, names) for image, label in pairs if os.path.exists(label)]
        if len(records) < len(pairs):
            self.read_remarks.append(f"skipped {len(pairs) - len(records)} images without a label file")
        orphans = [] if self.config.images else _labels_without_image(pairs)
        if orphans:
            self.read_remarks.append(
                f"skipped {len(orphans)} label files without an image in a known format, such as {orphans[0]!r}"
            )
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
                numbers = _parse_numbers(line)
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
        for name in names.values():
            if isinstance(name, bool) or not isinstance(name, str | int | float):
                raise ValueError(
                    f"expected strings as `names` of the classes in {path!r}, got {name!r}. Quote words that YAML "
                    "reads as something else, such as yes, no and null."
                )
        return {str(number): str(name) for number, name in names.items()}

    def _images(self, data_dir: str | None) -> list[str]:
        """Return the paths of the images of the split, all inside the directory of the description."""
        path, content = self._find_description(data_dir), self._describe(data_dir)
        directory = os.path.dirname(path)
        split = "val" if self.config.split == "validation" and "validation" not in content else self.config.split
        entries = content.get(split)
        if entries is None and not {"train", "val", "test"} & content.keys():
            entries = "images" if os.path.isdir(os.path.join(directory, "images")) else "."
        if entries is None:
            found = [key for key in ("train", "val", "test") if content.get(key)]
            raise ValueError(f"expected the split {split!r} in {path!r}, got {found}. Set `split` to one of these.")
        entries = [entries] if isinstance(entries, str) else entries
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise ValueError(f"expected paths of the split {self.config.split!r} in {path!r}, got {entries!r:.100}.")
        # Exports contain paths of the machine that made them, and many have a superfluous "..", which YOLO tolerates
        # too.
        roots = [os.path.join(directory, str(content.get("path") or "")), directory]
        images = []
        for entry in entries:
            found = _first_inside(directory, [os.path.join(root, name) for root in roots for name in _variants(entry)])
            if found is None:
                raise FileNotFoundError(
                    f"source {self.source!r}: expected {entry!r} of {path!r} in {directory!r}, got nothing. Keep "
                    "the images next to the file that lists them, and use paths relative to it."
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
    """Yield a path, and the path without leading "..", "." and "data": CVAT writes data/images/a.jpg for images/a.jpg.

    For a path of another machine, also yield its tails, longest first. The last part alone, such as "images", could
    also belong to another split.
    """
    parts = path.replace("\\", "/").split("/")
    yield "/".join(parts)
    if OUTSIDE.match(path):
        yield from ("/".join(parts[start:]) for start in range(1, len(parts) - 1))
        return
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
    """Return the path of an image's label file: with `labels` for `images`, or else next to the image."""
    before, images, after = image.rpartition(f"{os.sep}images{os.sep}")
    path = f"{before}{os.sep}labels{os.sep}{after}"
    path = path if images and os.path.isdir(os.path.dirname(path)) else image
    return f"{os.path.splitext(path)[0]}.txt"


def _labels_without_image(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return the paths of label files, in the directories of the pairs, that belong to no image."""
    found = []
    for labels, images in {os.path.dirname(label): os.path.dirname(image) for image, label in pairs}.items():
        if labels != images and os.path.isdir(images):  # text files next to images may be anything
            stems = {_stem(name) for name in os.listdir(images) if is_image(name)} | {"classes"}
            texts = sorted(glob.glob(f"{glob.escape(labels)}/*.txt"))
            found += [path for path in texts if _stem(path) not in stems]
    return found


def _parse_numbers(line: str) -> list[float]:
    try:
        return [float(number) for number in line.split()]
    except ValueError as error:
        raise ValueError(
            f"expected a class number and the x and y of an outline, separated by spaces, got {line!r:.100} "
            f"({error}). Export it as YOLO segmentation."
        ) from error


def _class_name(number: float, names: dict[str, str]) -> str:
    key = f"{number:.0f}" if number.is_integer() else str(number)
    if key not in names:
        raise ValueError(f"expected a class among {sorted(names)}, got {key}. Add it to `names`.")
    return names[key]


def _encode_shares(numbers: Sequence[float], height: int, width: int) -> dict[str, Any] | None:
    """Encode an outline with x and y as fractions of the image size."""
    shares = np.array(numbers, dtype=np.float64)
    if len(shares) % 2 or len(shares) < 6:
        raise ValueError(f"expected a class and at least three points (x, y), got {len(shares)} numbers after it.")
    far = shares[~((shares >= -1) & (shares <= 2))]  # NaN too
    if far.size:
        raise ValueError(
            f"expected x and y as fractions of the image's width and height, from 0 to 1, got {far[0]}. Divide pixels "
            "by the width and height."
        )
    return encode_visible([(shares.reshape(-1, 2) * (width, height)).ravel().tolist()], height, width)
