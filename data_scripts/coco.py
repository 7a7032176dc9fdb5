"""Annotations in the COCO format, and the base of all sources on COCO photos, which can exclude evaluation photos.

    load_source("cocostuff", data_dir="dataset", exclude_refer_val=True)

excludes the photos that a referring benchmark evaluates on. The original declares `--exclude_val` for this, without
using it.
"""

import dataclasses
import os
import pickle
from collections.abc import Callable
from typing import Any

from lisa_hf.data.rows import make_row

from .segmentation import encode_segmentation
from .source import SourceBuilder, SourceConfig, errors_naming, join_inside, read_json


COCO_REFS = ("refcoco/refs(unc).p", "refcoco+/refs(unc).p", "refcocog/refs(umd).p", "grefcoco/grefs(unc).json")


class _PlainUnpickler(pickle.Unpickler):
    """Unpickle dicts, lists, tuples, sets, strings and numbers only. A pickle that imports code is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks to import {module}.{name}")


def read_refs(path: str) -> list[dict[str, Any]]:
    """Read the refs of a referring data set from a pickle (`refs(*).p`) or a JSON file.

    Returns:
        Dicts of `image_id`, `ann_id` (int; in gRefCOCO a list of int, [-1] for none), `split`, and `sentences`, whose
        `sent` is an expression.
    """
    if path.endswith(".json"):
        return read_json(path)
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="utf-8").load()
    except Exception as error:  # Damaged pickles raise almost anything.
        raise ValueError(
            f"expected a pickle of plain dicts, lists, strings and numbers, got {path!r} ({error}). Download it "
            "again, and only from a source that you trust."
        ) from error


def read_instances(path: str, encoding: str | None = "cp1252") -> list[dict[str, Any]]:
    """Read annotations in the COCO format.

    Args:
        path: Path of the file.
        encoding: See [`~text.read_text`].

    Returns:
        One record per annotated image: `image` as in the file, and `objects`, tuples of an annotation's category id,
        category name (None if it has none) and segmentation.
    """
    content = read_json(path, encoding)
    with errors_naming(path):
        images = {image["id"]: image for image in content["images"]}
        names = {category["id"]: category.get("name") for category in content["categories"]}
        objects = {image_id: [] for image_id in images}
        for annotation in content["annotations"]:
            category = annotation["category_id"]
            # An unknown image gives a bad record, without its name and size.
            objects.setdefault(annotation["image_id"], []).append(
                (category, names.get(category), annotation.get("segmentation"))
            )
        return [
            {"image": images.get(image_id, {"id": image_id}), "objects": found}
            for image_id, found in objects.items()
            if found
        ]


def make_instances_row(
    record: dict[str, Any], path: str, directory: str, source: str, phrases_of: Callable[[str], list[str]]
) -> dict[str, Any]:
    """Make the row of a record of [`read_instances`], with one target per annotation.

    Args:
        record: Record of one image.
        path: Path of the file that holds it, for messages.
        directory: Directory of the images.
        source: Name of the source.
        phrases_of: Function from the name of a category to its phrases.
    """
    image = record["image"]
    with errors_naming(f"{path!r}, image {image['id']}"):
        targets = []
        for category, name, segmentation in record["objects"]:
            if name is None:
                raise ValueError(f"expected a name of the category {category}, got none. Add it to `categories`.")
            rle = encode_segmentation(segmentation, image["height"], image["width"])
            targets.append({"phrases": phrases_of(name), "rle": rle})
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
        """Return the paths of the refs that say which photos to exclude; none without `exclude_refer_val`."""
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
