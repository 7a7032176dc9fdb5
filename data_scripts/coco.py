"""Annotations in the COCO format, and the base of all sources on COCO photos, which can exclude evaluation photos.

    load_source("cocostuff", data_dir="dataset", exclude_refer_val=True)

excludes the photos that a referring benchmark evaluates on. The original declares `--exclude_val` for this, but does
not use it.
"""

import dataclasses
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

from lisa_hf.data.rows import make_row

from .segmentation import encode_visible
from .source import SourceBuilder, SourceConfig, errors_naming, join_inside, read_json


COCO_REFS = (
    *("refcoco/refs(unc).p", "refcoco+/refs(unc).p", "refcocog/refs(umd).p", "grefcoco/grefs(unc).json"),
    *(f"fprefcoco{end}/refs(berkeley_exclude_unified).p" for end in ("", "+", "g")),
    *(
        f"R-refcoco{end}/refs({split_by}_exclude_unified).p"
        for end, split_by in zip(("", "+", "g"), ("unc", "unc", "umd"))
    ),
)


class _PlainUnpickler(pickle._Unpickler):
    """Unpickle dicts, lists, tuples, sets, strings and numbers only. A pickle that imports code is rejected.

    This is the Python implementation: the C one is twice as fast, but takes gigabytes if a few bytes give a memo entry
    the index 2**31.
    """

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks to import {module}.{name}")


def read_refs(path: str) -> list[dict[str, Any]]:
    """Read the refs of a referring dataset from a pickle (`refs(*).p`) or a JSON file.

    Returns:
        Dicts of `image_id`, `ann_id` (int; in gRefCOCO a list of int, [-1] for none), `split`, and `sentences`, whose
        `sent` is an expression.
    """
    if path.endswith(".json"):
        return read_json(path)
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="utf-8").load()
    except Exception as error:  # Damaged pickles can raise almost anything.
        raise ValueError(
            f"expected a pickle of plain dicts, lists, strings and numbers, got {path!r} ({error}). Download it "
            "again, and only from a source that you trust."
        ) from error


def id_key(number: Any) -> str:
    """Return the same key for an id that one tool writes as a number and another as a string."""
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int | str):
        raise ValueError(f"expected ids that are numbers or text, got {number!r}.")
    return str(number).strip()


def index_by_id(entries: list[dict[str, Any]], what: str, key: str) -> dict[str, dict[str, Any]]:
    """Return entries by the key of their id. Entries with the same id must be equal in `key`.

    Raises:
        ValueError: If an id is used twice, as in files that were merged without renumbering.
    """
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        first = found.setdefault(id_key(entry["id"]), entry)
        if first.get(key) != entry.get(key):
            raise ValueError(
                f"expected {what} with unique ids, got the duplicate id {entry['id']!r} of {first.get(key)!r} "
                f"and {entry.get(key)!r}. Renumber them when you merge files."
            )
    return found


def read_instances(path: str, remarks: list[str], encoding: str | None = "cp1252") -> list[dict[str, Any]]:
    """Read annotations in the COCO format.

    Ids that are strings in one place and numbers in another are matched. Images listed under several ids with the same
    file are one record.

    Args:
        path: Path of the JSON file.
        remarks: List of remarks for the user, to which this function appends.
        encoding: See [`~text.read_text`].

    Returns:
        One record per annotated image: `image` as in the file, and `objects`, tuples of an annotation's category id,
        category name (None if it has none) and segmentation.

    Raises:
        ValueError: If different images or categories share an id, or polygons are not in pixels.
    """
    content = read_json(path, encoding)
    with errors_naming(path):
        for image in content["images"]:
            if "coco_url" in image:  # LVIS says nothing else of its photos
                image.setdefault("file_name", image["coco_url"])
        images = index_by_id(content["images"], "images", "file_name")
        categories = index_by_id(content["categories"], "categories", "name")
        first_of_file: dict[str, str] = {}
        for key, image in images.items():
            first_of_file.setdefault(str(image.get("file_name", key)), key)
        objects, num_joined, num_text = {key: [] for key in images}, 0, 0
        for annotation in content["annotations"]:
            category, key = id_key(annotation["category_id"]), id_key(annotation["image_id"])
            # An unknown image gives a bad record without name and size.
            image = images.get(key, {"id": annotation["image_id"]})
            named = categories.get(category, {"id": annotation["category_id"]})
            is_text = [isinstance(value, str) for value in (annotation["image_id"], annotation["category_id"])]
            num_text += is_text != [isinstance(entry["id"], str) for entry in (image, named)]
            first = first_of_file.get(str(image.get("file_name")), key)
            if first != key and _size_of(images[first]) == _size_of(image):
                key, num_joined = first, num_joined + 1
            objects.setdefault(key, []).append(
                (annotation["category_id"], named.get("name"), annotation.get("segmentation"))
            )
        if _looks_normalized(objects, images):
            raise ValueError(
                "expected polygons in pixels, got coordinates that are all between 0 and 1. Multiply them by the "
                "width and the height of their image."
            )
        if num_text:
            remarks.append(f"matched {num_text} annotations by ids that are strings in one place, numbers in another")
        if num_joined:
            remarks.append(f"joined {num_joined} annotations of images that are listed more than once")
        return [{"image": images.get(key, {"id": key}), "objects": found} for key, found in objects.items() if found]


def _size_of(image: dict[str, Any]) -> tuple:
    return image.get("height"), image.get("width")


def _looks_normalized(objects: dict[str, list[tuple]], images: dict[str, dict[str, Any]]) -> bool:
    """Return whether all polygons lie in the first pixel of images that have more."""
    has_fractions = False  # the rows of a mask are numbers from 0 to 1 too
    for key, found in objects.items():
        is_large = any(isinstance(side, int | float) and side > 2 for side in _size_of(images.get(key, {})))
        for *_, segmentation in found:
            for value in _numbers(segmentation) if isinstance(segmentation, list) else ():
                if not 0 <= value <= 1:
                    return False
                has_fractions = has_fractions or (is_large and 0 < value < 1)
    return has_fractions


def _numbers(polygons: Any) -> Iterator[float]:
    """Yield the numbers in nested lists and points with the keys x and y."""
    if isinstance(polygons, int | float):
        yield polygons
    elif isinstance(polygons, list | dict):
        for part in polygons.values() if isinstance(polygons, dict) else polygons:
            yield from _numbers(part)


def encode_objects(record: dict[str, Any], pass_over: Callable[[str], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the category name and RLE of every annotation that covers a pixel, from a record of [`read_instances`].

    Args:
        record: Record of one image.
        pass_over: [`SourceBuilder.pass_over`], called for the other annotations.
    """
    image = record["image"]
    if image.keys() == {"id"}:
        raise ValueError("expected an entry in `images` with this id, got none. Add it, or remove its annotations.")
    for category, name, segmentation in record["objects"]:
        if name is None:
            raise ValueError(f"expected a name for the category {category}, got none. Add it to `categories`.")
        rle = encode_visible(segmentation, image["height"], image["width"]) if segmentation else None
        if rle is None:
            pass_over("annotations without a pixel" if segmentation else "annotations without an outline")
        else:
            yield name, rle


def make_instances_row(
    record: dict[str, Any],
    path: str,
    directory: str,
    source: str,
    phrases_of: Callable[[str], list[str]],
    pass_over: Callable[[str], None],
) -> dict[str, Any] | None:
    """Make the row of a record of [`read_instances`], with one target per annotation; None if none is left.

    Args:
        record: Record of one image.
        path: Path of its file, for messages.
        directory: Directory of the images.
        source: Name of the source.
        phrases_of: Function that maps a category name to its phrases.
        pass_over: [`SourceBuilder.pass_over`], called for annotations without a pixel.
    """
    image = record["image"]
    with errors_naming(f"{path!r}, image {image['id']}"):
        targets = [{"phrases": phrases_of(name), "rle": rle} for name, rle in encode_objects(record, pass_over)]
        if not targets:
            return None
        return make_row(
            image=join_inside(directory, image["file_name"]),
            image_id=str(image["id"]),
            source=source,
            task="semantic",
            targets=targets,
        )


@dataclasses.dataclass
class CocoConfig(SourceConfig):
    """Options of sources on COCO photos.

    Args:
        exclude_refer_val: Whether to exclude the COCO photos in a val or test split of the refer sources in
            `data_dir`.
    """

    exclude_refer_val: bool = False


class CocoBuilder(SourceBuilder):
    """Base of the builders on COCO photos. Their `annotation_files` include `held_out_files`."""

    BUILDER_CONFIG_CLASS = CocoConfig

    def held_out_files(self, data_dir: str) -> list[str]:
        """Return the paths of the refs that list the photos to exclude; none without `exclude_refer_val`."""
        if not self.config.exclude_refer_val:
            return []
        if data_dir is None:
            raise ValueError("exclude_refer_val: expected `data_dir`, the directory that holds 'refer_seg', got None.")
        root = os.path.join(data_dir, "refer_seg")
        found = [path for path in (os.path.join(root, name) for name in COCO_REFS) if os.path.exists(path)]
        if not found:
            raise FileNotFoundError(
                f"exclude_refer_val: expected {' or '.join(COCO_REFS)} in {root!r}, got none. Download the refer data "
                "sets, or remove the option."
            )
        return found

    def photo(self, record: Any) -> str:
        """Return the file name of a record's COCO photo, or an empty string if a bad record has none."""
        raise NotImplementedError

    def write_records(self, records, remarks=()):
        paths = self.held_out_files(self.config.data_dir)
        if paths and "train" in records:
            held_out = set()
            for path in paths:
                refs = read_refs(path)
                with errors_naming(path):
                    held_out |= {f"{ref['image_id']:012d}" for ref in refs if ref["split"] != "train"}
            # File names end in the id: 000000000139.jpg, COCO_train2014_000000000139.jpg.
            kept = [r for r in records["train"] if os.path.splitext(self.photo(r))[0][-12:] not in held_out]
            sources = ", ".join(os.path.basename(os.path.dirname(path)) for path in paths)
            remark = (
                f"excluded {len(records['train']) - len(kept)} of {len(records['train'])} training records, because a "
                f"val or test split of {sources} shows their photo"
            )
            records, remarks = records | {"train": kept}, [*remarks, remark]
        super().write_records(records, remarks)
