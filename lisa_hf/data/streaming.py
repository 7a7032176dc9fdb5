"""Mixture of streamed rows, which are read on demand instead of being prepared first.

    sources = {name: load_source(name, data_dir, streaming=True) for name in ("ade20k", "refcoco", "reason_seg")}
    items = StreamingMixtureDataset(sources, rank=training_args.process_index, num_ranks=training_args.world_size)

It starts immediately and needs no disk space, but draws from a window of each source. If rows can be prepared, prefer
[`~mixture.MixtureDataset`].
"""

import json
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset

from .mixture import NO_ROWS, Mixture


STREAM_STATE = "stream_state"  # key of a batch


class StreamingMixtureDataset(Mixture, torch.utils.data.IterableDataset):
    """Endless items: draws a source by weight for each item, takes its next row, and draws questions about it.

    Every loader worker of every process is a *reader* with its own stream, which is a function of the seed, the number
    of readers and its index. A source is read in passes, each in a different order. A pass gives every row to exactly
    one reader: by whole shards if there are enough, else row by row, where each reader reads the entire source and
    keeps its share. When a source ends, its next pass begins, so the stream never ends.

    This dataset is the only place that splits the rows. An accelerate dispatcher or `IterableDatasetShard` around it
    would split them a second time and lose most of them; [`LisaTrainer`] prevents that.

    Resuming is exact at any item: with the state of each reader, which then rereads at most its windows, or without a
    state by recreating all skipped batches.

    Args:
        sources: Streamed rows by source name. Limits of `take` and `skip` are divided among the shards, as in
            `IterableDataset.shard`.
        rank: Index of this process.
        num_ranks: Number of processes.
        shuffle_buffer_size: Number of rows of each source that a reader buffers to draw the next one from. Rows from
            Parquet files include their images.
        kwargs: Arguments of [`Mixture`].

    Raises:
        ValueError: As in [`Mixture`], and if a source has no rows.
    """

    def __init__(
        self,
        sources: dict[str, IterableDataset],
        rank: int = 0,
        num_ranks: int = 1,
        shuffle_buffer_size: int = 100,
        **kwargs,
    ):
        for name, rows in sources.items():
            if not isinstance(rows, IterableDataset):
                raise ValueError(
                    f"Source {name!r}: expected a streamed IterableDataset, got {type(rows).__name__}. Use "
                    "MixtureDataset for prepared rows."
                )
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank: expected an index below num_ranks, got rank {rank} and num_ranks {num_ranks}.")
        if shuffle_buffer_size < 1:
            raise ValueError(f"shuffle_buffer_size: expected 1 row or more, got {shuffle_buffer_size}.")
        super().__init__(sources, **kwargs)
        self.shuffle_buffer_size = shuffle_buffer_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.rewind()

    def rewind(self):
        """Start every iteration at the first item, even if a state was loaded."""
        self.load_worker_states([None])

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this reader after its last item, as numbers that JSON can store.

        The state of a loader worker is in the worker, see [`CollateWithState`].
        """
        if not self._readers:
            return self._start()
        positions = {source.name: source.state_dict() for source in self._readers}
        return self._start() | {"num_items": self._num_items, "positions": positions}

    def load_state_dict(self, state_dict: dict[str, Any]):
        """Start every iteration after the item at which `state_dict` was called.

        Raises:
            ValueError: If the state belongs to other sources or another order of their rows. When iteration starts, if
                it belongs to another reader or another number of readers.
        """
        self.load_worker_states([state_dict])

    def load_worker_states(self, states: list[dict | None], next_worker: int = 0):
        """Start the loader workers of this process where earlier ones stopped.

        Args:
            states: State of each worker, None for a worker that had not made a batch.
            next_worker: Index of the worker whose batch comes first.

        Raises:
            ValueError: As [`load_state_dict`].
        """
        for state in filter(None, states):
            if list(state["num_shards"]) != self.names:
                raise ValueError(
                    f"expected a state for the sources {self.names}, got one for {list(state['num_shards'])}. Resume "
                    "with the same sources in the same order."
                )
            for what, value in self._order().items():
                if state[what] != value:
                    raise ValueError(
                        f"{what}: expected {state[what]}, as when the state was saved, got {value}. Resume with the "
                        "same data and seed."
                    )
        self._starts, self._first_worker = states, next_worker
        self._readers: list[_SourceReader] = []

    def _order(self) -> dict[str, Any]:
        """Return what the order of the rows depends on, apart from the reader."""
        num_shards = {name: rows.num_shards for name, rows in zip(self.names, self.sources)}
        return {"seed": self.seed, "shuffle_buffer_size": self.shuffle_buffer_size, "num_shards": num_shards}

    def _start(self) -> dict[str, Any]:
        """Return the initial state of an iteration of this reader."""
        reader, num_readers = self._reader()
        state = {"reader": [reader, num_readers], **self._order(), "num_items": 0, "positions": {}}
        return self._starts[reader % len(self._starts)] or state

    def __iter__(self) -> Iterator[dict[str, Any]]:
        reader, num_readers = self._reader()
        start = self._start()
        if start["reader"] != [reader, num_readers]:
            raise ValueError(
                f"expected the state of reader {reader} of {num_readers}, got that of {start['reader']}. Resume with "
                "the same number of processes and loader workers."
            )
        self._num_items = start["num_items"]
        self._readers = [
            _SourceReader(name, rows, self.seed, self.shuffle_buffer_size, reader, num_readers)
            for name, rows in zip(self.names, self.sources)
        ]
        for source in self._readers:
            if source.name in start["positions"]:
                source.load_state_dict(start["positions"][source.name])
        rows = [iter(source) for source in self._readers]
        while True:
            rng = np.random.default_rng([self.seed, reader, self._num_items])
            source = self.draw_source(rng)
            item = self.make_item(source, rows[source], rng)
            # Before `yield`: the state must count the item that the caller is about to get.
            self._num_items += 1
            yield item

    def _reader(self) -> tuple[int, int]:
        """Return the index of this reader and the number of readers."""
        worker = torch.utils.data.get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # A loader takes its first batch from its first worker, so that worker becomes the reader whose turn it is.
        worker_id = (worker_id + self._first_worker) % num_workers
        return self.rank * num_workers + worker_id, self.num_ranks * num_workers


class _SourceReader:
    """The rows of one source that one reader gets, pass after pass, with a state to resume from.

    A pass reads the shards in a random order, one after the other, into a window. Once the window is full, it is
    shuffled and half of it is yielded. This is the order of `IterableDataset.shuffle`, whose own state loses the
    content of its window. Here, a row has a *place*: the position of its shard in the pass, a piece of the shard and
    the index in this piece. The state has the places of the window, and the pieces that contain them are read again.

    Pieces come from `IterableDataset.reshard`: row groups of Parquet files, parts of the records of our builders. A
    shard that cannot be divided is one piece, which is reread from the start to find a place.
    """

    def __init__(self, name: str, rows: IterableDataset, seed: int, window_size: int, reader: int, num_readers: int):
        self.name, self.rows, self.seed, self.window_size = name, rows, seed, window_size
        self.reader, self.num_readers = reader, num_readers
        self._begin_pass(0)

    def _begin_pass(self, number: int):
        self.number = number
        # Take a different share in each pass: otherwise, a reader with a small share would repeat its rows more often.
        self.rank = (self.reader + number) % self.num_readers
        self.shards = self._draw_order()
        self.has_own_shards = len(self.shards) >= self.num_readers
        if self.has_own_shards:
            self.shards = self.shards[self.rank :: self.num_readers]
        self.num_given = 0  # rows of the window yielded so far, including those of other readers
        self.next_place = [0, 0, 0]
        self.window: list[tuple[list[int], dict]] = []  # places and rows, in the order in which they will be yielded
        self.num_due = 0  # rows of the window to yield before more are read
        seed = self.seed if number == 0 else np.random.default_rng(self.seed).integers(0, 1 << 63) - number
        self.rng = np.random.default_rng(seed)

    def _draw_order(self) -> list[int]:
        """Return the shards of the source in the order of this pass, as `datasets` draws it."""
        order = list(range(self.rows.num_shards))
        np.random.default_rng(self.seed).shuffle(order)
        if self.number == 0:
            return order
        again = list(range(len(order)))
        np.random.default_rng(self.number).shuffle(again)
        return [order[index] for index in again]

    def state_dict(self) -> dict[str, Any]:
        return {
            "pass": self.number,
            "num_given": self.num_given,
            "next_place": self.next_place,
            "window": [place for place, _ in self.window],
            "num_due": self.num_due,
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]):
        self._begin_pass(state["pass"])
        self.num_given, self.num_due = state["num_given"], state["num_due"]
        self.next_place = state["next_place"]
        self.window = self._read_again(state["window"])
        self.rng.bit_generator.state = state["rng"]

    def __iter__(self) -> Iterator[dict]:
        num_empty = 0  # consecutive passes without a row for this reader
        while num_empty < self.num_readers:
            num_empty += self.num_given == 0
            for row in self._shuffled():
                self.num_given += 1
                if self.has_own_shards or (self.num_given - 1) % self.num_readers == self.rank:
                    num_empty = 0
                    yield row
            self._begin_pass(self.number + 1)
        raise ValueError(NO_ROWS.format(self.name))

    def _shuffled(self) -> Iterator[dict]:
        """Yield the rows of this pass through the window."""
        unread = self._read(self.next_place)
        while True:
            while self.num_due:
                self.num_due -= 1
                yield self.window.pop(0)[1]
            self.window += islice(unread, self.window_size - len(self.window))
            if not self.window:
                return
            order = self.rng.permutation(len(self.window))
            is_full = len(self.window) == self.window_size  # otherwise the pass ends
            self.window = [self.window[index] for index in order]
            self.num_due = len(order) - (self.window_size // 2 if is_full else 0)

    def _read(self, place: list[int]) -> Iterator[tuple[list[int], dict]]:
        """Yield the rows of this pass in order, starting at a place, with their places."""
        shard, piece, first = place
        for shard in range(shard, len(self.shards)):
            pieces = self._pieces(shard)
            for piece in range(piece, pieces.num_shards):
                for number, row in enumerate(_rows(pieces, piece, first), start=first):
                    self.next_place = [shard, piece, number + 1]
                    yield [shard, piece, number], row
                first = 0
            piece = 0

    def _read_again(self, places: list[list[int]]) -> list[tuple[list[int], dict]]:
        """Return the rows at some places, with their places."""
        found = {}
        for (shard, piece), group in groupby(sorted(places), key=lambda place: place[:2]):
            numbers = [number for _, _, number in group]
            rows = _rows(self._pieces(shard), piece, numbers[0])
            found |= {(shard, piece, n): row for n, row in zip(range(numbers[0], numbers[-1] + 1), rows)}
        missing = [place for place in places if tuple(place) not in found]
        if missing:
            raise ValueError(
                f"Source {self.name!r}: expected the same rows as when the state was saved, got none at "
                f"{missing[0]} (shard, piece, row). Resume with the same data, or start over with "
                "`--ignore_data_skip true`."
            )
        return [(place, found[tuple(place)]) for place in places]

    def _pieces(self, shard: int) -> IterableDataset:
        """Return the shard at this position of the pass, resharded into its pieces."""
        return self.rows.shard(self.rows.num_shards, self.shards[shard]).reshard()


def _rows(pieces: IterableDataset, piece: int, first: int) -> Iterator[dict]:
    """Yield the rows of a piece of a shard from the `first` one on."""
    rows = pieces.shard(pieces.num_shards, piece)
    # `iter`, because `__iter__` would split the rows among the loader workers a second time.
    for batch in (rows.skip(first) if first else rows).iter(batch_size=1):
        yield {key: values[0] for key, values in batch.items()}


class CollateWithState:
    """Collator that adds `stream_state` to a batch: the state of the stream after its last item, as JSON.

    Args:
        dataset: Stream that the items come from. In a loader worker, this is the worker's copy.
        collate: Collator of the items to a dict.
    """

    def __init__(self, dataset: StreamingMixtureDataset, collate: Callable[[list], dict]):
        self.dataset = dataset
        self.collate = collate

    def __call__(self, items: list[dict]) -> dict:
        batch = self.collate(items)
        batch[STREAM_STATE] = json.dumps(self.dataset.state_dict())
        return batch
