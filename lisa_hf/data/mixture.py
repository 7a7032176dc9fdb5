"""Several data sets of rows as one data set of training items, and rows as evaluation items.

Both are map-style: item k is a pure function of the rows, the arguments and k, so the Trainer's own samplers shard,
shuffle and resume them, and the number of loader workers changes nothing. An item is one image with its questions:
`{"image": PIL image (RGB, upright), "original_size": [H, W] of its file, "features": its entry in a feature cache or
None, "image_id", "source", "questions": list of Question, "ignore": Mask or None, "num_skipped": int}`. An image with
features is not decoded before someone needs its pixels, see [`load_image`]; that of a large photo may be smaller
than its file, see [`reduce_decoding`].
"""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from ..errors import nearest_name
from .images import _where, load_row_image, undecoded
from .masks import Mask
from .prompts import Question, evaluation_questions, sample_questions


logger = logging.getLogger(__name__)

# How often LISA draws each kind of task, relative to the others.
TASK_RATES = {"semantic": 9.0, "referring": 3.0, "vqa": 3.0, "reasoning": 1.0}

ON_BAD_ROW = ("skip", "raise")
# How many rows of one source an item may draw before it gives up: enough for a source of which half is unusable.
MAX_DRAWS = 100
# The share of bad rows that a source may have, and how many of its rows must have been drawn to judge it.
MAX_BAD_SHARE = 0.01
MIN_DRAWS = 100


def default_weights(sources: dict[str, Dataset | IterableDataset]) -> dict[str, float]:
    """LISA's weights: semantic, referring, VQA and reasoning 9 : 3 : 3 : 1, the sources of a kind equally often.

    Kinds without a source are left out, and the others keep their proportions.

    Args:
        sources: Rows of `lisa_hf.data.rows.FEATURES` by the name of their source. Its kind is the task of its first
            row.

    Raises:
        ValueError: If a source has no rows.
    """
    tasks = {}
    for name, rows in sources.items():
        # Without its image, which need not be readable.
        first = next(iter(rows.select_columns("task")), None)
        if first is None:
            raise ValueError(f"Source {name!r} has no rows. Check its data directory and split, or leave it out.")
        tasks[name] = first["task"]
    num_sources = Counter(tasks.values())
    return {name: TASK_RATES[task] / num_sources[task] for name, task in tasks.items()}


class Mixture:
    """What the map-style and the streaming mixture share: sources, their weights, and how a row becomes an item.

    A row that cannot be used (its image is missing or unreadable, a mask is damaged or of another size than the image)
    is redrawn from the same source, so that the weights hold whatever is broken; so is a row that gives no question.

    Args:
        sources (`dict[str, datasets.Dataset]` or `dict[str, datasets.IterableDataset]`): Rows of
            `lisa_hf.data.rows.FEATURES` by the name of their source.
        weights (`dict[str, float]`, *optional*): Relative frequency of every source; [`default_weights`] by default.
        seed (`int`): Non-negative; another seed is another sequence of items.
        num_questions (`int`), explanatory_probability (`float`), merge_instances (`bool`): As in
            [`~prompts.sample_questions`].
        on_bad_row (`str`): "skip" redraws a row that cannot be used and counts it in the item's `num_skipped`;
            "raise" stops at the first one. A row that gives no question is redrawn, and not counted, in both.
        min_decoded_edge (`int`, *optional*): As in [`reduce_decoding`]; by default photos are decoded in full.

    Raises:
        ValueError: For arguments that contradict each other; by an item, for the first bad row with
            `on_bad_row="raise"`, else when `MAX_DRAWS` rows of one source in a row could not be used, or when more
            than 1 % of a source is bad. That is judged after `MIN_DRAWS` rows of the source, by each loader worker
            on what it has drawn itself, with three standard deviations of allowance for chance.
    """

    def __init__(
        self,
        sources: dict[str, Dataset] | dict[str, IterableDataset],
        weights: dict[str, float] | None = None,
        seed: int = 0,
        num_questions: int = 3,
        explanatory_probability: float = 0.1,
        merge_instances: bool = True,
        on_bad_row: str = "skip",
        min_decoded_edge: int | None = None,
    ):
        if not sources:
            raise ValueError("A mixture needs at least one source, got none.")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}.")
        if num_questions < 1:
            raise ValueError(f"num_questions must be at least 1, got {num_questions}.")
        if not 0 <= explanatory_probability <= 1:
            raise ValueError(f"explanatory_probability must lie in [0, 1], got {explanatory_probability}.")
        if on_bad_row not in ON_BAD_ROW:
            raise ValueError(f"on_bad_row must be one of {ON_BAD_ROW}, got {on_bad_row!r}.")
        if min_decoded_edge is not None and min_decoded_edge < 1:
            raise ValueError(f"min_decoded_edge must be at least 1 pixel, got {min_decoded_edge}.")
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
        self.feature_cache = None  # a `FeatureCache`: made of the rows and a model, it comes later than the mixture

    def draw_source(self, rng: np.random.Generator) -> int:
        """Index of a source, drawn by weight."""
        return int(rng.choice(len(self.names), p=self.probabilities))

    def make_item(self, source: int, rows: Iterator[dict], rng: np.random.Generator) -> dict[str, Any]:
        """The item of the first of `rows` that can be used, all of the source with this index."""
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
                error = ValueError(f"{_where(row)}: {bad_row}")
                if self.on_bad_row == "raise":
                    raise error from bad_row
                logger.warning("Skipped: %s", error)
                num_skipped += 1
                self._count_bad(source, error)
                continue
            if questions:
                return {**item, "source": self.names[source]}
        raise ValueError(
            f"Source {self.names[source]!r}: none of {MAX_DRAWS} drawn rows could be used, {num_skipped} bad and the "
            f"others without a target. Check its data directory. The last bad row: {error}"
        ) from error

    def _count_bad(self, source: int, error: ValueError):
        self.num_bad[source] += 1
        num_drawn, num_bad = self.num_drawn[source], self.num_bad[source]
        expected = MAX_BAD_SHARE * num_drawn
        # Without the allowance, chance would stop a source that is just good enough sooner or later.
        if num_drawn >= MIN_DRAWS and num_bad > expected + 3 * expected**0.5:
            raise ValueError(
                f"Source {self.names[source]!r}: {num_bad} of {num_drawn} drawn rows are bad, more than "
                f"{MAX_BAD_SHARE:.0%}. Restore its files, remove their annotations, or leave the source out. "
                f"The last bad row: {error}"
            ) from error


class MixtureDataset(Mixture, torch.utils.data.Dataset):
    """Item k: a source drawn by weight, a row of it drawn uniformly, and questions drawn from the row.

    The items are random draws already: read them in sequence, and item k is what step k sees on any machine. The rows
    stay in the Arrow files of their data sets, so a loader worker is as small for many rows as for few.

    Args:
        sources (`dict[str, datasets.Dataset]`): Prepared rows, by the name of their source.
        length (`int`): The number of items.
        kwargs: As in [`Mixture`], which also says what raises.
    """

    def __init__(self, sources: dict[str, Dataset], length: int, **kwargs):
        for name, rows in sources.items():
            if not isinstance(rows, Dataset):
                raise ValueError(
                    f"Source {name!r} is of the type {type(rows).__name__}, expected a prepared Dataset, whose rows "
                    "have numbers. For streamed rows, use StreamingMixtureDataset."
                )
            if len(rows) == 0:
                raise ValueError(f"Source {name!r} has no rows. Check its data directory and split, or leave it out.")
        if length < 1:
            raise ValueError(f"length must be at least 1 item, got {length}.")
        super().__init__(sources, **kwargs)
        self.length = length
        # In shared memory, where persistent loader workers hear of a new epoch.
        self._first = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int):
        """Moves on to items `epoch * length` and following, so that no epoch repeats another's. Trainer calls it."""
        self._first.fill_(epoch * self.length)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"Item {index} of a mixture of {self.length} items.")
        rng = np.random.default_rng([self.seed, int(self._first) + index])
        source = self.draw_source(rng)
        return self.make_item(source, _drawn_rows(self.sources[source], rng), rng)


class EvaluationDataset(torch.utils.data.Dataset):
    """Item k: row k with its evaluation questions. A bad row raises, because a score over fewer rows is another score.

    Args:
        rows (`datasets.Dataset`): Rows of `lisa_hf.data.rows.FEATURES`.
        merge_instances, all_texts (`bool`): As in [`~prompts.evaluation_questions`].

    Raises:
        ValueError: By an item, if its row gives no question or cannot be used.
    """

    def __init__(self, rows: Dataset, merge_instances: bool = True, all_texts: bool = False):
        self.rows = undecoded(rows)
        self.merge_instances = merge_instances
        self.all_texts = all_texts

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self.rows):
            raise IndexError(f"Item {index} of {len(self.rows)} evaluation rows.")
        row = self.rows[int(index)]
        try:
            image = load_row_image(row)
            questions = self.questions(row)
            item = _make_item(row, image, questions, num_skipped=0)
            if not questions:
                raise ValueError("it has no target, so there is nothing to ask. Filter such rows out.")
        except ValueError as error:
            raise ValueError(f"{_where(row)}: {error}") from error
        return item

    def questions(self, row: dict) -> list[Question]:
        """The questions about one of `rows`; its image is not looked at."""
        return evaluation_questions(row, self.merge_instances, self.all_texts)


def _make_item(row: dict, image: dict, questions: list[Question], num_skipped: int) -> dict[str, Any]:
    return {
        **image,
        "image_id": row["image_id"],
        "source": row["source"],
        "questions": questions,
        "ignore": None if row["ignore"] is None else Mask.from_rle(row["ignore"]),
        "num_skipped": num_skipped,
    }


def _drawn_rows(rows: Dataset, rng: np.random.Generator) -> Iterator[dict]:
    while True:
        yield rows[int(rng.integers(len(rows)))]


def _probabilities(names: list[str], weights: dict[str, float]) -> np.ndarray:
    """Normalised weights in the order of the names, shape (len(names),)."""
    for name in weights:
        if name not in names:
            raise ValueError(
                f"expected weights of the sources {names}, got one of an unknown source {name!r}. Did you mean "
                f"{nearest_name(name, names)!r}?"
            )
    missing = [name for name in names if name not in weights]
    if missing:
        raise ValueError(f"weights must name every source, but {missing} have none. Give 0 to leave a source out.")
    values = np.array([weights[name] for name in names], dtype=np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.sum() == 0:
        raise ValueError(f"weights must be finite, not negative and not all 0, got {weights}.")
    return values / values.sum()
