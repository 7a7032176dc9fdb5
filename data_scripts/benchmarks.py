"""Benchmarks by name: splits of the sources, and Hub datasets in Seg-Zero's layout."""

from typing import Any


_REFER_SPLITS = {"": ("val", "testA", "testB"), "+": ("val", "testA", "testB"), "g": ("val", "test")}
SPLITS = {
    "reason_seg": ("val", "val_short", "val_long", "test", "test_short", "test_long"),
    "refcoco": ("val", "testA", "testB"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
    "refclef": ("val", "testA", "testB", "testC"),
    "grefcoco": ("val", "testA", "testB"),
    **{f"{name}refcoco{end}": splits for name in ("fp", "R-") for end, splits in _REFER_SPLITS.items()},
    "muse": ("val", "test_less", "test_many"),
}


def _hub(path: str, task: str = "reasoning", split: str = "test") -> tuple[str, dict[str, Any]]:
    """Return the builder and options of a Hub dataset with the columns image, text, mask and image_id."""
    options = {"path": path, "split": split, "task": task, "phrases_column": "text", "image_id_column": "image_id"}
    # ReasonSeg's texts are phrases or sentences, which these copies do not distinguish.
    return "hub", options | {"is_sentence": None if task == "reasoning" else False, "empty_masks": True}


# Name of a benchmark -> its builder and the builder's options.
BENCHMARKS = {f"{source}_{split}": (source, {"split": split}) for source, splits in SPLITS.items() for split in splits}
BENCHMARKS |= {f"Ricky06662/ReasonSeg_{split}": _hub(f"Ricky06662/ReasonSeg_{split}") for split in ("val", "test")}
BENCHMARKS |= {
    f"Ricky06662/{name}": _hub(f"Ricky06662/{name}", "referring")
    for name in (
        *("refcoco_val", "refcoco_testA", "refcocoplus_val", "refcocoplus_testA", "refcocog_val", "refcocog_test"),
        "grefcoco_val_all",
    )
}
BENCHMARKS |= {
    f"sj9909/{name}": _hub(f"sj9909/{name}")
    for name in (
        *("ReasonSeg_refine", "ReasonSegX_val", "ReasonSegX_test", "MUSE_val", "MUSE_test_few", "MUSE_test_many"),
        *("MMR_val", "MMR_test_mixed", "MMR_test_obj", "MMR_test_part"),
    )
}
