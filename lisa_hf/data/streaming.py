"""The mixture over rows that are read while they are needed, instead of being prepared first.

    sources = {name: load_source(name, data_dir, streaming=True) for name in ("ade20k", "refcoco", "reason_seg")}
    items = StreamingMixtureDataset(sources, rank=training_args.process_index, num_ranks=training_args.world_size)

It starts at once and needs no disk, but draws from a window of each source and resumes by reading again. If the rows
can be prepared, [`~mixture.MixtureDataset`] is the better choice.
"""

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from .mixture import Mixture


class StreamingMixtureDataset(Mixture, torch.utils.data.IterableDataset):
    """Items without end: for each one, a source drawn by weight, its next row, and questions drawn from the row.

    Every loader worker of every process is a *reader* with a stream of its own, which is a function of the seed, the
    number of readers and its own number. A source is read in passes, each in another order. A pass deals every row to
    exactly one reader, by whole shards if there are enough, else row by row, where each reader reads all of the source
    to keep its share of it. At the end of a source its next pass begins, so nothing ends at the smallest source.

    This data set is the one place that divides the rows: an accelerate dispatcher or `IterableDatasetShard` over it
    would divide them once more, and most were lost. [`LisaTrainer`] sees to that.

    Resuming is exact at any item. Trainer does it without the state below, by making the skipped batches again.
    The state takes the place of items that need not be made again: their rows are read, but not their images.

    Args:
        sources (`dict[str, datasets.IterableDataset]`): Streamed rows, by the name of their source.
        rank (`int`), num_ranks (`int`): The number of this process, from 0, and how many there are.
        shuffle_buffer_size (`int`): Rows of each source that a reader holds to draw the next one from. Rows of Parquet
            hold their images in it.
        kwargs: As in [`Mixture`], which also says what raises.

    Raises:
        ValueError: Moreover, if a source has no rows.
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
                    f"Source {name!r} is of the type {type(rows).__name__}, expected a streamed IterableDataset. For "
                    "prepared rows, use MixtureDataset."
                )
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must lie in [0, num_ranks), got rank {rank} and num_ranks {num_ranks}.")
        if shuffle_buffer_size < 1:
            raise ValueError(f"shuffle_buffer_size must be at least 1 row, got {shuffle_buffer_size}.")
        super().__init__(sources, **kwargs)
        # To read several shards at once takes threads, and `datasets` waits five seconds for the end of Parquet's.
        shuffle = {"seed": self.seed, "buffer_size": shuffle_buffer_size, "max_buffer_input_shards": 1}
        self.sources = [rows.shuffle(**shuffle) for rows in self.sources]
        self.rank = rank
        self.num_ranks = num_ranks
        self._start = {"num_items": 0, "positions": {name: {"pass": 0, "row": 0} for name in self.names}}
        self._state = self._start

    def state_dict(self) -> dict[str, Any]:
        """Where this reader is: behind the item that it gave last. Plain numbers, which JSON can hold.

        The state of a loader worker is in the worker.
        """
        return {"reader": list(self._reader()), **copy.deepcopy(self._state)}

    def load_state_dict(self, state_dict: dict[str, Any]):
        """Lets every iteration begin behind the item after which `state_dict` was taken.

        Raises:
            ValueError: If the state is that of other sources; by the iteration, if it is that of another reader or of
                another number of readers.
        """
        if list(state_dict["positions"]) != self.names:
            raise ValueError(
                f"Expected a state of the sources {self.names}, found one of {list(state_dict['positions'])}. Resume "
                "with the sources of before, in their order."
            )
        self._start = self._state = copy.deepcopy(state_dict)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        reader, num_readers = self._reader()
        state = self._state = copy.deepcopy(self._start)
        if state.pop("reader", [reader, num_readers]) != [reader, num_readers]:
            raise ValueError(
                f"Expected the state of reader {reader} of {num_readers}, found that of {self._start['reader']}. "
                "Resume with as many processes and loader workers as before."
            )
        rows = [self._read(name, source, state["positions"][name]) for name, source in zip(self.names, self.sources)]
        while True:
            rng = np.random.default_rng([self.seed, reader, state["num_items"]])
            source = self.draw_source(rng)
            item = self.make_item(source, rows[source], rng)
            state["num_items"] += 1
            yield item

    def _reader(self) -> tuple[int, int]:
        """Number of this reader, and how many there are."""
        worker = torch.utils.data.get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        return self.rank * num_workers + worker_id, self.num_ranks * num_workers

    def _read(self, name: str, rows: IterableDataset, position: dict[str, int]) -> Iterator[dict]:
        """This reader's rows of one source without end. `position` says where to begin, and is moved along."""
        reader, num_readers = self._reader()
        strategy = "shards" if rows.num_shards >= num_readers else "examples"
        num_empty = 0
        while num_empty < num_readers:
            # Another share in each pass: else a reader with fewer rows would repeat them more often than others.
            rank = (reader + position["pass"]) % num_readers
            share = split_dataset_by_node(rows, rank, num_readers, strategy)
            share.set_epoch(position["pass"])
            num_empty += position["row"] == 0
            # `iter`, because `__iter__` would divide the rows among loader workers once more.
            for batch in islice(share.iter(batch_size=1), position["row"], None):
                num_empty = 0
                position["row"] += 1
                yield {key: values[0] for key, values in batch.items()}
            position.update({"pass": position["pass"] + 1, "row": 0})
        raise ValueError(f"Source {name!r} has no rows. Check its data directory and split, or leave it out.")
