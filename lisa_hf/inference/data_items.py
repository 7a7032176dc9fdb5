"""The data of a recipe for display: numbered items, found by source, image, or lack of a mask."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..data.images import load_row_image, undecoded
from ..data.masks import Mask
from ..data.mixture import EvaluationDataset
from ..data.prompts import Question, sample_questions
from ..model.processing_lisa import SEG_TOKEN


MAX_EMPTY_COUNTS = 8  # bytes in the RLE of an empty mask: a run of at most 2**30 zeros, and empty runs


@dataclass
class Message:
    """A message about an image.

    Args:
        role: "user" or "assistant".
        text: The text.
        mask_numbers: Index of each `[SEG]`'s mask among those of the picture.
        reasoning: Thoughts before the answer.
        title: Author of the answer, if there are several.
    """

    role: str
    text: str
    mask_numbers: list[int] = field(default_factory=list)
    reasoning: str = ""
    title: str = ""


@dataclass
class Item:
    """Everything to show about one image.

    Args:
        title: Lines that identify the image.
        image: The image, upright; None if it cannot be shown.
        pictures: Masks over the image, by title of the picture.
        ignore: Pixels that are ignored in all masks, or None.
        messages: Questions and answers.
        error: Reason why the image cannot be shown.
    """

    title: list[str]
    image: PIL.Image.Image | None = None
    pictures: dict[str, list[Mask]] = field(default_factory=dict)
    ignore: Mask | None = None
    messages: list[Message] = field(default_factory=list)
    error: str = ""


class DataItems:
    """The rows of all sources of a recipe, numbered from 0, each with all of its questions.

    Rows are only read when they are shown or searched, so any number of rows is available immediately.

    Args:
        train_rows: Rows of `lisa_hf.data.rows.FEATURES` by source name. They show all questions that training may
            draw, each with one of the templates and phrases, the same ones every time.
        eval_datasets: Evaluation items by source name, with the questions that evaluation asks.
    """

    pictures = ("Masks",)
    group_label = "Source"

    def __init__(self, train_rows: dict[str, Dataset], eval_datasets: dict[str, EvaluationDataset]):
        self.eval_datasets = {f"{name} (evaluation)": dataset for name, dataset in eval_datasets.items()}
        self.rows = {name: undecoded(rows) for name, rows in train_rows.items()}
        self.rows |= {name: dataset.rows for name, dataset in self.eval_datasets.items()}
        self.groups = list(self.rows)
        self._starts = np.cumsum([0, *map(len, self.rows.values())])
        self._without_mask = lru_cache(maxsize=None)(self._find_without_mask)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def find(self, group: str | None = None, image_id: str = "", without_mask: bool = False) -> np.ndarray:
        """Return the numbers of items, ascending.

        Args:
            group: Name of a source. By default, all.
            image_id: Part of the image's name; case does not matter.
            without_mask: Whether to omit items with a non-empty mask.
        """
        found = []
        for name, start in zip(self.groups, self._starts):
            if group in (None, name):
                is_found = np.ones(len(self.rows[name]), dtype=bool)
                if image_id:
                    names = _column(self.rows[name], "image_id")
                    is_found &= pc.match_substring(names, image_id, ignore_case=True).to_numpy()
                if without_mask:
                    is_found &= self._without_mask(name)
                found.append(start + is_found.nonzero()[0])
        return np.concatenate(found)

    def __getitem__(self, number: int) -> Item:
        """Read an item. If its image or mask is bad, it has the reason why it cannot be shown."""
        source = int(np.searchsorted(self._starts, number, side="right")) - 1
        name, index = self.groups[source], int(number - self._starts[source])
        row = self.rows[name][index]
        title = [f"{name}, row {index}, {row['task']}", f"Image {row['image_id']}"]
        if row["image"] and row["image"]["path"]:
            title.append(row["image"]["path"])
        if row["explanation"]:
            title.append(f"Explanation: {row['explanation']}")
        item = Item(title)
        try:
            item.image = load_row_image(row)["image"]
            questions = self._questions(name, index, row)
            item.pictures["Masks"] = masks = _distinct([mask for question in questions for mask in question.masks])
            item.ignore = None if row["ignore"] is None else Mask.from_rle(row["ignore"])
            item.messages = [message for question in questions for message in _messages(question, masks)]
        except ValueError as error:
            item.image, item.error = None, str(error)
        return item

    def _questions(self, source: str, index: int, row: dict) -> list[Question]:
        if source in self.eval_datasets:
            return self.eval_datasets[source].questions(row)
        num_phrases = sum(len(target["phrases"]) for target in row["targets"])
        return sample_questions(row, np.random.default_rng(index), num_phrases, explanatory_probability=0)

    def _find_without_mask(self, source: str) -> np.ndarray:
        """Return which rows of a source have no non-empty mask, `(N,)` bool."""
        targets = _column(self.rows[source], "targets")
        return np.concatenate([_without_mask(chunk) for chunk in targets.chunks])


def _column(rows: Dataset, name: str) -> pa.ChunkedArray:
    return rows.select_columns(name).with_format("arrow")[:][name]


def _without_mask(targets: pa.ListArray) -> np.ndarray:
    """Return which lists of targets have no non-empty mask, `(N,)` bool."""
    row_of_target = pc.list_parent_indices(targets).to_numpy()
    rles = targets.flatten().field("rle")
    # Long counts always have a pixel and need not be read; many short ones are equal.
    is_short = pc.less_equal(pc.binary_length(rles.field("counts")), MAX_EMPTY_COUNTS)
    short = rles.filter(is_short)
    has_pixel = ~is_short.to_numpy(zero_copy_only=False)
    has_pixel[~has_pixel] = [
        _has_pixel(tuple(size), counts)
        for size, counts in zip(short.field("size").to_pylist(), short.field("counts").to_pylist())
    ]
    without_mask = np.ones(len(targets), dtype=bool)
    without_mask[row_of_target[has_pixel]] = False
    return without_mask


@lru_cache(maxsize=10_000)
def _has_pixel(size: tuple[int, int], counts: bytes) -> bool:
    run_ends = Mask.from_rle({"size": size, "counts": counts}).run_ends
    return bool(np.diff(run_ends)[::2].any())  # the second run is the first one of ones


def _distinct(masks: list[Mask]) -> list[Mask]:
    """Return each mask once, even if several questions are about it."""
    return [mask for number, mask in enumerate(masks) if mask not in masks[:number]]


def _messages(question: Question, masks: list[Mask]) -> Iterator[Message]:
    """Yield the messages of a question that are not its context."""
    numbers = iter([masks.index(mask) for mask in question.masks])
    for message in question.messages:
        if not message.get("is_context"):
            text = message["content"][-1]["text"].strip()
            is_answer = message["role"] == "assistant"
            mask_numbers = (
                [next(numbers) for _ in range(text.count(SEG_TOKEN))] if is_answer and question.masks else []
            )
            yield Message(message["role"], text, mask_numbers, message.get("reasoning_content") or "")
