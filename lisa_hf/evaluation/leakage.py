"""Images of a benchmark that a model was trained on."""

from pathlib import Path

import numpy as np

from ..data.image_keys import content_key, name_key
from ..data.images import read_file
from ..data.mixture import EvaluationDataset


def count_seen_images(train_images: dict[str, np.ndarray], dataset: EvaluationDataset) -> dict[str, int]:
    """Count the rows of a benchmark whose image is among the training images, by training source.

    Args:
        train_images: Keys of the training images by source, see [`~image_keys.read_image_keys`].
        dataset: The benchmark. Its files are read, if they are there, to compare them by content too.
    """
    known = {name: set(keys.tolist()) for name, keys in train_images.items()}
    seen = dict.fromkeys(train_images, 0)
    for image in dataset.rows.select_columns("image"):
        keys = _keys(image)
        for name, found in known.items():
            seen[name] += not keys.isdisjoint(found)
    return seen


def _keys(row: dict) -> set[int]:
    path = row["image"]["path"]
    keys = {name_key(path)} if path else set()
    if row["image"]["bytes"] is not None or Path(path).is_file():
        keys.add(content_key(read_file(row)))
    return keys


def describe_seen_images(benchmark: str, num_images: int, seen: dict[str, int] | None, note: str = "") -> str:
    """Say in a sentence how many images of a benchmark a model was trained on.

    Args:
        benchmark: Name of the benchmark.
        num_images: Number of its images.
        seen: Numbers by training source, see [`count_seen_images`]; None if the training images are not known.
        note: What is known of the training data otherwise.
    """
    sources = ", ".join(f"{name} {count}" for name, count in (seen or {}).items() if count)
    if seen is None:
        known = f"Which images of {benchmark} the model was trained on is not known: no record of them came with it."
    elif not sources:
        known = f"None of the {num_images} images of {benchmark} is in the training data ({', '.join(seen)})."
    else:
        known = (
            f"The model was trained on images of {benchmark}, which has {num_images}: {sources}. Its metrics cannot "
            "be compared with those of models that have not seen them."
        )
    return f"{known} {note}".strip()
