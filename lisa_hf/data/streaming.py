"""Mixture of streamed rows, which are read as they are needed instead of being prepared first.

    sources = {name: load_source(name, data_dir, streaming=True) for name in ("ade20k", "refcoco", "reason_seg")}
    items = StreamingMixtureDataset(sources, rank=training_args.process_index, num_ranks=training_args.world_size)

It starts at once and needs no disk space, but draws from a window of each source and resumes by reading again. Where
rows can be prepared, [`~mixture.MixtureDataset`] is the better choice.
"""

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from .mixture import NO_ROWS, Mixture


class StreamingMixtureDataset(Mixture, torch.utils.data.IterableDataset):
    """Endless items: draws a source by weight for each item, takes its next row, and draws questions about it.

    Every loader worker of every process is a *reader* with a stream of its own, which is a function of the seed, the
    number of readers and its index. A source is read in passes, each in another order. A pass gives every row to
    exactly one reader: by whole shards if there are enough, else row by row, where each reader reads the entire source
    to keep its share. When a source ends, its next pass begins, so the smallest source ends nothing.

    This dataset is the only place that splits the rows. An accelerate dispatcher or `IterableDatasetShard` around it
    would split them a second time and lose most of them; [`LisaTrainer`] prevents that.

    Resuming is exact at any item. Trainer makes the skipped batches again and needs no state. With the state of this
    dataset, the rows are read again without their images, and no items are made.

    Args:
        sources: Streamed rows by the name of their source.
        rank: Index of this process.
        num_ranks: Number of processes.
        shuffle_buffer_size: Number of rows of each source that a reader holds to draw the next one from. Rows of
            Parquet files hold their images in it.
        kwargs: Arguments of [`Mixture`].

    Raises:
        ValueError: Where [`Mixture`] does, and if a source has no rows.
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
        # Reading several shards at once takes threads, and `datasets` waits five seconds for those of Parquet to end.
        shuffle = {"seed": self.seed, "buffer_size": shuffle_buffer_size, "max_buffer_input_shards": 1}
        self.sources = [rows.shuffle(**shuffle) for rows in self.sources]
        self.rank = rank
        self.num_ranks = num_ranks
        self._start = {"num_items": 0, "positions": {name: {"pass": 0, "row": 0} for name in self.names}}
        self._state = self._start

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this reader after its last item, in plain numbers that JSON can hold.

        The state of a loader worker is in the worker.
        """
        return {"reader": list(self._reader()), **copy.deepcopy(self._state)}

    def load_state_dict(self, state_dict: dict[str, Any]):
        """Make every iteration begin after the item at which `state_dict` was taken.

        Raises:
            ValueError: If the state belongs to other sources. When iteration begins, if it belongs to another reader
                or to another number of readers.
        """
        if list(state_dict["positions"]) != self.names:
            raise ValueError(
                f"expected a state of the sources {self.names}, got one of {list(state_dict['positions'])}. Resume "
                "with the same sources in the same order."
            )
        self._start = self._state = copy.deepcopy(state_dict)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        reader, num_readers = self._reader()
        state = self._state = copy.deepcopy(self._start)
        if state.pop("reader", [reader, num_readers]) != [reader, num_readers]:
            raise ValueError(
                f"expected the state of reader {reader} of {num_readers}, got that of {self._start['reader']}. Resume "
                "with the same number of processes and loader workers."
            )
        rows = [self._read(name, source, state["positions"][name]) for name, source in zip(self.names, self.sources)]
        while True:
            rng = np.random.default_rng([self.seed, reader, state["num_items"]])
            source = self.draw_source(rng)
            item = self.make_item(source, rows[source], rng)
            # Before `yield`: the state must count the item that the caller is about to get.
            state["num_items"] += 1
            yield item

    def _reader(self) -> tuple[int, int]:
        """Return the index of this reader and the number of readers."""
        worker = torch.utils.data.get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        return self.rank * num_workers + worker_id, self.num_ranks * num_workers

    def _read(self, name: str, rows: IterableDataset, position: dict[str, int]) -> Iterator[dict]:
        """Yield this reader's rows of one source endlessly, from `position`, which is updated."""
        reader, num_readers = self._reader()
        strategy = "shards" if rows.num_shards >= num_readers else "examples"
        num_empty = 0  # passes in succession without a row for this reader
        while num_empty < num_readers:
            # Take another share in each pass: otherwise, a reader of a small share would repeat its rows more often.
            rank = (reader + position["pass"]) % num_readers
            share = split_dataset_by_node(rows, rank, num_readers, strategy)
            share.set_epoch(position["pass"])
            num_empty += position["row"] == 0
            # `iter`, because `__iter__` would split the rows among the loader workers a second time.
            for batch in islice(share.iter(batch_size=1), position["row"], None):
                num_empty = 0
                position["row"] += 1
                yield {key: values[0] for key, values in batch.items()}
            position.update({"pass": position["pass"] + 1, "row": 0})
        raise ValueError(NO_ROWS.format(name))
