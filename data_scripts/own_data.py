"""Base of the builders for your own data, whose files a recipe names: one module per format, such as `labelme.py`.

    sources:
      parts: {builder: coco_instances, annotations: parts/train.json, images: parts/photos, weight: 3}
      rooms: {builder: labelme, annotations: rooms}
      damage: {builder: image_folder, questions: damage/train.jsonl, images: damage/photos, masks: damage/masks}

You choose the key, which becomes the source of the rows. Paths are relative to `data_dir`, if it is set. Each of these
sources has a single split. For another split, add a source with other files, for example in `eval_sources`.
"""

import collections
import dataclasses
import functools
import io
import itertools
import os
import unicodedata
from collections.abc import Sequence
from typing import IO, Any, get_args

from datasets.utils.file_utils import xopen

from lisa_hf.data.rows import make_row

from .file_names import find_image
from .orientation import Size, Space, count_spaces, decide_space, fitting_spaces, read_orientation, turn_mask
from .source import SourceBuilder, SourceConfig, read_json, write_json


ORIENTATION = "orientation.json"
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")


@dataclasses.dataclass
class OwnDataConfig(SourceConfig):
    """Options of your own data.

    Args:
        split: Name of its only split.
        orientation: Whether annotations of photos with an EXIF orientation refer to the pixels as stored ("stored") or
            as viewers rotate them ("display"). By default, and if only one fits, the sizes decide.
        encoding: Python's name for the encoding of annotation files that are not in Unicode. By default, it is
            detected.
    """

    split: str = "train"
    orientation: Space | None = None
    encoding: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.orientation not in (None, *get_args(Space)):
            raise ValueError(f"orientation: expected 'stored' or 'display', got {self.orientation!r}.")


class OwnData(SourceBuilder):
    """Base of the builders that find their files by options, and rotate masks with their photos."""

    BUILDER_CONFIG_CLASS = OwnDataConfig
    # Options that name directories.
    DIRECTORIES: tuple[str, ...] = ("images", "masks", "instances")

    def annotated_size(self, record: Any) -> tuple[str | IO[bytes], Size | None]:
        """Return the path or open file of a record's image, and the size (height, width) in its annotation.

        The size is None if the annotation has none.

        Raises:
            Exception: Of any kind, if the record is bad.
        """
        raise NotImplementedError

    def find_image(self, directory: str, name: str) -> str:
        """Return the path of the image that an annotation names, see [`~file_names.find_image`]."""
        path, is_guess = find_image(directory, name, self.hash or "")
        if is_guess:
            self.count("found {} images by the last part of their path or URL")
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
        """Return the space of annotations that fit both, or None if it is unknown."""
        path = os.path.join(self.records_dir, ORIENTATION)
        return self.config.orientation or (read_json(path) if os.path.exists(path) else None)

    def find_space(self, orientation: int, sizes: dict[Space, Size], size: Sequence[int] | None) -> tuple[int, Size]:
        """Return the EXIF orientation by which a mask must be rotated, 1 for none, and the size of the annotation.

        Args:
            orientation: EXIF orientation of the image, from [`read_orientation`].
            sizes: Height and width of the image by space, from [`read_orientation`].
            size: Height and width in the annotation. None if it has none.

        Raises:
            ValueError: If the annotation fits the photo both as stored and as displayed, and nothing tells which it
                is.
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
                f"expected to know how the photo was rotated when it was annotated, got the EXIF orientation "
                f"{orientation} and an annotation that fits it as stored and as displayed. Set `orientation: display` "
                "if your tool rotates photos like viewers do, else `orientation: stored`, and look at a preview."
            )
        return (orientation if space == "stored" else 1), sizes[space or "stored"]

    def turn_upright(self, row: dict[str, Any]) -> dict[str, Any]:
        """Rotate the masks of a row as viewers rotate its photo. Every later reader sees both upright."""
        masks = [target["rle"] for target in row["targets"]]
        if not masks:
            return row
        try:
            with open_file(row["image"]) as image:
                orientation, sizes = read_orientation(image)
        except (OSError, ValueError):
            orientation = 1
        if orientation == 1:
            return row  # a missing or broken image, or one of another size, is detected when it is decoded
        turn, _ = self.find_space(orientation, sizes, masks[0]["size"])
        targets = [target | {"rle": turn_mask(target["rle"], turn)} for target in row["targets"]]
        return row | {"targets": targets, "ignore": row["ignore"] and turn_mask(row["ignore"], turn)}

    def locate(self, data_dir: str | None, option: str) -> str:
        """Return the path given by an option.

        Raises:
            ValueError: If the option is not set, or names an archive, or a file instead of a directory.
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
        if path.lower().endswith(ARCHIVES) and os.path.isfile(path):
            raise ValueError(
                f"source {self.source!r}: expected `{option}` to be unpacked, got the archive {path!r}. Unpack it "
                "and name what is inside."
            )
        if option in self.DIRECTORIES and not os.path.isdir(path):
            raise ValueError(
                f"source {self.source!r}: expected `{option}` to be a directory, got the file {path!r}. Name the "
                "directory that it is in."
            )
        return path


@dataclasses.dataclass
class LabeledConfig(OwnDataConfig):
    """Options of annotations that name each object by its class label.

    Args:
        names: Interchangeable phrases by label: {"Rust_Patch": ["rust", "the corroded part"]}. The phrase of any other
            label is the label itself, with spaces for underscores. An empty list drops the label.
        templates: Complete questions about a phrase, such as "Where is {name}?", to ask instead of LISA's about
            classes. With "{name}" alone, `names` contains the questions.
    """

    names: dict[str, list[str]] | None = None
    templates: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.names is not None and not isinstance(self.names, dict):
            raise ValueError(f"names: expected lists of phrases by label, got {self.names!r}.")
        for label, phrases in (self.names or {}).items():
            if not isinstance(label, str):
                raise ValueError(
                    f"names: expected labels as text, got {label!r}. Put numbers, and words that YAML reads "
                    "otherwise, such as yes, no and null, in quotes."
                )
            if phrases != [] and not _is_texts(phrases):
                raise ValueError(f"names: expected a list of phrases for {label!r}, got {phrases!r}.")
        templates = self.templates
        if templates is not None and not (_is_texts(templates) and all("{name}" in text for text in templates)):
            raise ValueError(f"templates: expected a list of questions that contain '{{name}}', got {templates!r}.")


class Labeled(OwnData):
    """Base of the builders whose annotations name each object by its class label."""

    BUILDER_CONFIG_CLASS = LabeledConfig

    def make_labeled_row(
        self,
        image: str | bytes,
        image_id: str,
        objects: Sequence[tuple[Any, dict[str, Any] | None]],
        ignore: dict[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Make the row of an image, with one target per object. None if no object covers a pixel.

        Args:
            image: See [`~lisa_hf.data.rows.make_row`].
            image_id: As `image`.
            objects: Label and RLE of every object. Objects with an RLE of None are skipped.
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
        """Return the interchangeable phrases, or complete questions, of a label; none if `names` drops it."""
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
        remarks = [f"no annotation has the labels {unknown} of the option `names`"] if unknown else []
        alike = collections.defaultdict(list)
        for label in sorted(self.met_labels):
            alike[unicodedata.normalize("NFC", label).casefold()].append(label)
        for labels in alike.values():
            if any(self.phrases(label) != self.phrases(labels[0]) for label in labels):
                asked = " and ".join(map(repr, labels))
                remarks.append(f"asks for {asked} as different things; if they are one, give them the same `names`")
        return remarks


def _is_texts(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) and v.strip() for v in values)


@dataclasses.dataclass
class AnnotationFileConfig(LabeledConfig):
    """Options of an export with one annotation file or directory.

    Args:
        annotations: Path of the file or directory.
    """

    annotations: str = ""


@dataclasses.dataclass
class ImagesConfig(AnnotationFileConfig):
    """Options of an export with one annotation file and separate images.

    Args:
        images: Directory of the images.
    """

    images: str = ""


def open_file(image: dict[str, Any]) -> IO[bytes]:
    """Open the file of an undecoded image, which may be in an archive or on a server."""
    return io.BytesIO(image["bytes"]) if image["bytes"] else xopen(image["path"], "rb")
