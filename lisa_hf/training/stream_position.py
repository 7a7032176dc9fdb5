"""Position in a stream, kept with each batch and saved with each checkpoint, so that resuming recreates no batches."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from ..data.streaming import STREAM_STATE, StreamingMixtureDataset


logger = logging.getLogger(__name__)


class StreamPosition:
    """Position of this process's loader workers in a stream, according to the batches used in training.

    Workers are ahead of training, so each batch carries the state of its worker, see [`~streaming.CollateWithState`].

    Args:
        dataset: The stream.
        num_workers: Number of loader workers.
    """

    def __init__(self, dataset: StreamingMixtureDataset, num_workers: int):
        self.dataset, self.num_workers = dataset, max(1, num_workers)
        self._rewind()

    def _rewind(self):
        self.dataset.rewind()
        self.states: list[dict | None] = [None] * self.num_workers
        self.next_worker = 0

    def advance(self, batches: list[dict]):
        """Record the batches of a step, and remove their states from them."""
        for batch in batches:
            state = json.loads(batch.pop(STREAM_STATE))
            worker = state["reader"][0] % self.num_workers
            self.states[worker] = state
            self.next_worker = (worker + 1) % self.num_workers

    def save(self, checkpoint: Path):
        """Write the states of this process's workers into a checkpoint."""
        state = {"next_worker": self.next_worker, "workers": self.states}
        self._file(checkpoint).write_text(json.dumps(state), encoding="utf-8")

    @contextmanager
    def resume(self, checkpoint: str | None) -> Iterator[None]:
        """Start training in this context where a checkpoint was saved, or at the first item if there is none.

        If a checkpoint has no states, or those of another stream, Trainer recreates the batches and skips them.
        """
        self._rewind()
        if checkpoint is None or not self._file(Path(checkpoint)).exists():
            yield
            return
        saved = json.loads(self._file(Path(checkpoint)).read_text(encoding="utf-8"))
        try:
            self._load(**saved)
        except ValueError as error:
            logger.warning(
                "%s was saved with another stream, so batches are recreated and skipped, and rows of the current pass "
                "may repeat or be missed: %s",
                checkpoint,
                error,
            )
            yield
            return
        with mock.patch("transformers.trainer.skip_first_batches", lambda loader, num_batches: loader):
            yield

    def _load(self, workers: list[dict | None], next_worker: int):
        (num_readers,) = {state["reader"][1] for state in workers if state}
        saved = f"{num_readers // len(workers)} processes with {len(workers)} loader workers each"
        found = f"{self.dataset.num_ranks} processes with {self.num_workers} loader workers each"
        if saved != found:
            raise ValueError(f"expected {saved}, got {found}. Resume with the same numbers.")
        self.dataset.load_worker_states(workers, next_worker)
        self.states, self.next_worker = workers, next_worker

    def _file(self, checkpoint: Path) -> Path:
        return checkpoint / f"stream_state_{self.dataset.rank}.json"
