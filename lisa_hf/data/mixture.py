"""Datasets of training and evaluation items, made from the rows of one or more sources.

Both are map-style. Item k is a pure function of the rows, the arguments and k, so Trainer's own samplers can shard,
shuffle and resume, and the number of loader workers makes no difference. An item is one image with its questions:

    image           PIL image, decoded and upright unless it has cached features; a large photo may be reduced
    original_size   [H, W] of the image file, see `reduce_decoding`
    cached_features the image's entry in a `FeatureCache`, or None
    image_id        name of the image within its source
    source          name of the source
    questions       list of `Question`
    ignore          `Mask` of the pixels to ignore, or None
    num_skipped     number of bad rows that were drawn before this one
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from ..errors import check_name
from .feature_cache import FeatureCache
from .images import load_row_image, undecoded
from .masks import Mask
from .prompts import Question, evaluation_questions, sample_questions
from .rows import OnBadRow, check_on_bad_row, describe_row


logger = logging.getLogger(__name__)

# Relative frequencies of the tasks in LISA, which has no conversations with masks.
TASK_RATES = {"semantic": 9.0, "referring": 3.0, "vqa": 3.0, "reasoning": 1.0, "conversation": 3.0}

# Rows of one source to draw for an item before giving up. Even if half of a source is unusable, this is never reached.
MAX_DRAWS = 100
# Largest share of bad rows in a source, and the number of its rows to draw before judging it.
MAX_BAD_SHARE = 0.01
MIN_DRAWS = 100
# A small source may have this many bad rows, up to this share, as in `data_scripts.source`.
FEW_BAD_ROWS = 3
MAX_FEW_SHARE = 0.2

NO_ROWS = "Source {!r}: expected at least one row, got none. Check its data directory and split, or leave it out."


def default_weights(sources: dict[str, Dataset | IterableDataset]) -> dict[str, float]:
    """Return LISA's weights: semantic, referring, VQA and reasoning 9 : 3 : 3 : 1, shared equally by a task's sources.

    Conversations with masks get the same weight as VQA.

    If a task has no source, the others keep their proportions.

    Args:
        sources: Rows of `lisa_hf.data.rows.FEATURES` by source name. The first row determines a source's task.

    Raises:
        ValueError: If a source has no rows.
    """
    tasks = {}
    for name, rows in sources.items():
        # Without the image, which may be unreadable.
        first = next(iter(rows.select_columns("task")), None)
        if first is None:
            raise ValueError(NO_ROWS.format(name))
        tasks[name] = first["task"]
    num_sources = Counter(tasks.values())
    return {name: TASK_RATES[task] / num_sources[task] for name, task in tasks.items()}


class Mixture:
    """Base of the map-style and the streaming mixture: sources, their weights, and how a row becomes an item.

    A row is bad if its image is missing or unreadable, or if a mask is damaged or does not have the image's size. A
    bad row, or one that gives no question, is replaced with another row of the same source, so the weights hold.

    Args:
        sources: Rows of `lisa_hf.data.rows.FEATURES` by the name of their source.
        weights: Relative frequency of every source. Defaults to [`default_weights`].
        seed: Non-negative seed of all random draws.
        num_questions: Maximum number of questions about an image, see [`~prompts.sample_questions`].
        explanatory_probability: Probability of an answer without a mask, see [`~prompts.sample_questions`].
        merge_instances: Whether a phrase refers to all targets that have it, see [`~prompts.sample_questions`].
        on_bad_row: What to do with a bad row, see [`~rows.OnBadRow`]. Skipped rows are counted in the `num_skipped` of
            the next item. A row that gives no question is not bad.
        min_decoded_edge: Minimum length of the longer edge, in pixels, when a large JPEG is decoded, see
            [`~images.reduce_decoding`]. By default, photos are decoded in full.
        feature_cache: Features of the sources' images. It must be built before the first item is made.

    Raises:
        ValueError: If the arguments contradict each other. When items are made: at the first bad row with
            `on_bad_row="raise"`, if `MAX_DRAWS` consecutive rows cannot be used, or if more than 1% of a source and
            more than three rows are bad, or more than a fifth. Each loader worker judges a source by the rows that it
            has drawn itself, after `MIN_DRAWS` rows and with a tolerance of three standard deviations.
    """

    def __init__(
        self,
        sources: dict[str, Dataset] | dict[str, IterableDataset],
        weights: dict[str, float] | None = None,
        seed: int = 0,
        num_questions: int = 3,
        explanatory_probability: float = 0.1,
        merge_instances: bool = True,
        on_bad_row: OnBadRow = "raise",
        min_decoded_edge: int | None = None,
        feature_cache: FeatureCache | None = None,
    ):
        if not sources:
            raise ValueError("sources: expected at least one, got none.")
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}.")
        if num_questions < 1:
            raise ValueError(f"num_questions: expected 1 or more, got {num_questions}.")
        if not 0 <= explanatory_probability <= 1:
            raise ValueError(f"explanatory_probability: expected a number in [0, 1], got {explanatory_probability}.")
        check_on_bad_row(on_bad_row)
        if min_decoded_edge is not None and min_decoded_edge < 1:
            raise ValueError(f"min_decoded_edge: expected 1 pixel or more, got {min_decoded_edge}.")
        self.names = list(sources)
        self.sources = [undecoded(rows) for rows in sources.values()]
        self.probabilities = _probabilities(self.names, default_weights(sources) if weights is None else weights)
        self.seed = seed
        self.num_questions = num_questions
        self.explanatory_probability = explanatory_probability
        self.merge_instances = merge_instances
        self.on_bad_row = on_bad_row
        self.min_decoded_edge = min_decoded_edge
        self.num_drawn, self.num_bad = [0] * len(sources), [0] * len(sources)
        self.bad_rows: list[set[str]] = [set() for _ in sources]  # the first ones
        self.feature_cache = feature_cache

    def draw_source(self, rng: np.random.Generator) -> int:
        """Draw the index of a source by weight."""
        return int(rng.choice(len(self.names), p=self.probabilities))

    def make_item(self, source: int, rows: Iterator[dict], rng: np.random.Generator) -> dict[str, Any]:
        """Make an item from the first usable one of `rows`, which all belong to the source with this index."""
        num_skipped = 0
        error = None
        for _ in range(MAX_DRAWS):
            row = next(rows)
            self.num_drawn[source] += 1
            try:
                image = load_row_image(row, self.feature_cache, self.min_decoded_edge)
                questions = sample_questions(
                    row, rng, self.num_questions, self.explanatory_probability, self.merge_instances
                )
                item = _make_item(row, image, questions, num_skipped)
            except ValueError as bad_row:
                error = ValueError(f"{describe_row(row)}: {bad_row}")
                if self.on_bad_row == "raise":
                    raise error from bad_row
                logger.warning("Skipped: %s", error)
                num_skipped += 1
                self._count_bad(source, describe_row(row), error)
                continue
            if questions:
                return {**item, "source": self.names[source]}
        raise ValueError(
            f"Source {self.names[source]!r}: expected a usable row among {MAX_DRAWS}, got {num_skipped} bad rows and "
            f"{MAX_DRAWS - num_skipped} without a target. Check its data directory. The last bad row: {error}"
        ) from error

    def _count_bad(self, source: int, row: str, error: ValueError):
        self.num_bad[source] += 1
        if len(self.bad_rows[source]) <= FEW_BAD_ROWS:
            self.bad_rows[source].add(row)
        is_few = len(self.bad_rows[source]) <= FEW_BAD_ROWS
        num_drawn, num_bad = self.num_drawn[source], self.num_bad[source]
        expected = max(MAX_BAD_SHARE, MAX_FEW_SHARE * is_few) * num_drawn
        # Without a tolerance, chance would sooner or later stop a source that is just good enough.
        if num_drawn >= MIN_DRAWS and num_bad > expected + 3 * expected**0.5:
            raise ValueError(
                f"Source {self.names[source]!r}: expected at most {MAX_BAD_SHARE:.0%} of bad rows, or "
                f"{FEW_BAD_ROWS}, got {num_bad} of {num_drawn} drawn rows. Restore its files, remove their "
                f"annotations, or omit the source. The last bad row: {error}"
            ) from error


class MixtureDataset(Mixture, torch.utils.data.Dataset):
    """Map-style mixture: draws a source by weight for each item, one of its rows uniformly, and questions about it.

    Items are random draws already, so they are read in order: item k is what step k sees on any machine. Rows stay in
    the Arrow files of their datasets, so the memory of a loader worker does not grow with their number.

    Args:
        sources: Prepared rows by the name of their source.
        length: Number of items per epoch.
        kwargs: Arguments of [`Mixture`].
    """

    def __init__(self, sources: dict[str, Dataset], length: int, **kwargs):
        for name, rows in sources.items():
            if not isinstance(rows, Dataset):
                raise ValueError(
                    f"Source {name!r}: expected a prepared Dataset, got {type(rows).__name__}. Use "
                    "StreamingMixtureDataset for streamed rows."
                )
            if len(rows) == 0:
                raise ValueError(NO_ROWS.format(name))
        if length < 1:
            raise ValueError(f"length: expected 1 item or more, got {length}.")
        super().__init__(sources, **kwargs)
        self.length = length
        # In shared memory, so that persistent loader workers see a new epoch.
        self._first = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int):
        """Move to the items from `epoch * length`, so that epochs do not repeat. Called by Trainer."""
        self._first.fill_(epoch * self.length)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"expected an index below {self.length}, got {index}.")
        rng = np.random.default_rng([self.seed, int(self._first) + index])
        source = self.draw_source(rng)
        return self.make_item(source, _draw_rows(self.sources[source], rng), rng)

    def drawn_rows(self, num_items: int) -> dict[str, Dataset]:
        """Return the rows that the first items of all epochs draw, by source, without those in place of bad rows."""
        drawn: list[set[int]] = [set() for _ in self.sources]
        for item in range(num_items):
            rng = np.random.default_rng([self.seed, item])
            source = self.draw_source(rng)
            drawn[source].add(_draw_index(self.sources[source], rng))
        chosen = zip(self.names, self.sources, drawn)
        return {name: rows.select(sorted(indices)) for name, rows, indices in chosen if indices}


class EvaluationDataset(torch.utils.data.Dataset):
    """Evaluation items: item k is row k with its evaluation questions.

    A bad row always raises an error, because a score over fewer rows is a different score.

    Args:
        rows: Rows of `lisa_hf.data.rows.FEATURES`.
        merge_instances: Whether a phrase refers to all targets that have it, see [`~prompts.evaluation_questions`].
        texts: Which texts to ask, see [`~prompts.evaluation_questions`].

    Raises:
        ValueError: When an item is made, if its row is bad or gives no question.
    """

    def __init__(self, rows: Dataset, merge_instances: bool = True, texts: Collection[str] = ("first",)):
        self.rows = undecoded(rows)
        self.merge_instances = merge_instances
        self.texts = texts
        # Numbers, because the memory of loader workers would grow with a list of ids.
        self._occurrences = np.empty(len(rows), dtype=np.int32)
        seen: Counter[str] = Counter()
        for index, image_id in enumerate(self.rows["image_id"]):
            seen[image_id] += 1
            self._occurrences[index] = seen[image_id]

    @property
    def image_ids(self) -> list[str]:
        """Ids of the rows' images. Repeated ids are numbered, as in "cat", "cat#2"."""
        return [self._number(image_id, index) for index, image_id in enumerate(self.rows["image_id"])]

    def _number(self, image_id: str, index: int) -> str:
        occurrence = self._occurrences[index]
        return image_id if occurrence == 1 else f"{image_id}#{occurrence}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self.rows):
            raise IndexError(f"expected an index below {len(self.rows)}, got {index}.")
        row = self.rows[int(index)]
        try:
            image = load_row_image(row)
            questions = self.questions(row)
            item = _make_item(row, image, questions, num_skipped=0)
            item["image_id"] = self._number(row["image_id"], index)
            if not questions:
                raise ValueError("expected a target to ask about, got none. Filter such rows out.")
        except ValueError as error:
            raise ValueError(f"{describe_row(row)}: {error}") from error
        return item

    def questions(self, row: dict) -> list[Question]:
        """Return the questions about a row, without reading its image."""
        return evaluation_questions(row, self.merge_instances, self.texts)


def _make_item(row: dict, image: dict, questions: list[Question], num_skipped: int) -> dict[str, Any]:
    return {
        **image,
        "image_id": row["image_id"],
        "source": row["source"],
        "questions": questions,
        "ignore": None if row["ignore"] is None else Mask.from_rle(row["ignore"]),
        "num_skipped": num_skipped,
    }


def _draw_rows(rows: Dataset, rng: np.random.Generator) -> Iterator[dict]:
    while True:
        yield rows[_draw_index(rows, rng)]


def _draw_index(rows: Dataset, rng: np.random.Generator) -> int:
    return int(rng.integers(len(rows)))


def _probabilities(names: list[str], weights: dict[str, float]) -> np.ndarray:
    """Return the normalized weights in the order of the names, shape `(len(names),)`."""
    for name in weights:
        check_name("weights", name, names)
    missing = [name for name in names if name not in weights]
    if missing:
        raise ValueError(f"weights: expected one for every source, got none for {missing}. Use 0 to exclude a source.")
    values = np.array([weights[name] for name in names], dtype=np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.sum() == 0:
        raise ValueError(f"weights: expected finite numbers of 0 or more that are not all 0, got {weights}.")
    return values / values.sum()
