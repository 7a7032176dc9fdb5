"""What the sources on COCO photos share: training without the photos that a referring benchmark evaluates on.

    load_source("cocostuff", data_dir="dataset", exclude_refer_val=True)

The original declares `--exclude_val` for this and does not use it.
"""

import dataclasses
import logging
import os
import pickle
from typing import Any

import datasets

from .source import SourceBuilder, errors_naming, read_json


logger = logging.getLogger(__name__)

COCO_REFS = ("refcoco/refs(unc).p", "refcoco+/refs(unc).p", "refcocog/refs(umd).p", "grefcoco/grefs(unc).json")


class _PlainUnpickler(pickle.Unpickler):
    """Builds dicts, lists, tuples, sets, strings and numbers only: a pickle that names code is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks to import {module}.{name}")


def read_refs(path: str) -> list[dict[str, Any]]:
    """Reads the refs of a referring data set, a pickle (`refs(*).p`) or JSON.

    Returns:
        Dicts of `image_id`, `ann_id` (int, or list of int in gRefCOCO, [-1] for none), `split` and `sentences`, each
        with the expression as `sent`.
    """
    if path.endswith(".json"):
        return read_json(path)
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="utf-8").load()
    except Exception as error:  # Damaged pickles raise almost anything.
        raise ValueError(
            f"{path!r} is not a pickle of plain dicts, lists, strings and numbers ({error}). Download it again, and "
            "only from a source that you trust."
        ) from error


@dataclasses.dataclass
class CocoConfig(datasets.BuilderConfig):
    """Whether training leaves out the COCO photos in a val or test split of the refer sources in `data_dir`."""

    exclude_refer_val: bool = False


class CocoBuilder(SourceBuilder):
    """Base of the builders on COCO photos: their `annotation_files` include `held_out_files`."""

    BUILDER_CONFIG_CLASS = CocoConfig

    def __init__(self, data_dir=None, exclude_refer_val=False, **kwargs):
        # Which files decide the rows is asked before there is a config.
        self.exclude_refer_val = exclude_refer_val
        super().__init__(data_dir=data_dir, exclude_refer_val=exclude_refer_val, **kwargs)

    def held_out_files(self, data_dir: str) -> list[str]:
        """Paths of the refs that say which photos to leave out; none unless `exclude_refer_val`."""
        if not self.exclude_refer_val:
            return []
        root = os.path.join(data_dir, "refer_seg")
        found = [path for path in (os.path.join(root, name) for name in COCO_REFS) if os.path.exists(path)]
        if not found:
            raise FileNotFoundError(
                f"`exclude_refer_val` looked for {' or '.join(COCO_REFS)} in {root!r}, but found none. Get the refer "
                "data sets, or leave the option out."
            )
        return found

    def photo(self, record: Any) -> str:
        """File name of the COCO photo of a record."""
        raise NotImplementedError

    def make_splits(self, records, **kwargs):
        paths = self.held_out_files(self.config.data_dir)
        if paths and "train" in records:
            held_out = set()
            for path in paths:
                refs = read_refs(path)
                with errors_naming(path):
                    held_out |= {f"{ref['image_id']:012d}" for ref in refs if ref["split"] != "train"}
            # COCO's names end in the number: 000000000139.jpg, COCO_train2014_000000000139.jpg.
            kept = [r for r in records["train"] if os.path.splitext(self.photo(r))[0][-12:] not in held_out]
            logger.warning(
                "%s: left out %d of %d training records, because a val or test split of %s shows their photo.",
                type(self).__name__,
                len(records["train"]) - len(kept),
                len(records["train"]),
                ", ".join(os.path.basename(os.path.dirname(path)) for path in paths),
            )
            records = records | {"train": kept}
        return super().make_splits(records, **kwargs)
