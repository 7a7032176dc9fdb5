"""Run the pieces of a job on an engine: processes on this machine, a Ray cluster, or a Spark cluster.

A piece is a number, and its result may depend on nothing else: the engine, the number of workers and repeated runs of
a piece make no difference. Ray and Spark rerun a piece if its worker dies.
"""

import os
import pickle
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from datasets import Dataset
from tqdm import tqdm


Engine = Literal["datasets", "ray", "spark"]
# For a piece whose worker died.
MAX_TRIES = 4


def map_pieces(
    function: Callable[[int], Any],
    num_pieces: int,
    engine: Engine = "datasets",
    num_workers: int = 1,
    description: str | None = None,
) -> list[Any]:
    """Call a function with the number of every piece; return the results in the order of the pieces.

    Args:
        function: Picklable function.
        num_pieces: Number of pieces.
        engine: Engine to run on. "datasets" uses processes on this machine, or this process for one worker. "ray" uses
            the cluster in the environment variable `RAY_ADDRESS`, "spark" that of `spark-submit`; both start one on
            this machine if there is none.
        num_workers: Number of pieces to run at once. On a Spark cluster, its settings decide.
        description: Title of the progress bar.

    Raises:
        ValueError: If the engine is unknown or not installed, or there are no workers.
        Exception: The first exception of the function. The other pieces may or may not have run.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine: expected one of {', '.join(get_args(Engine))}, got {engine!r}.")
    if num_workers < 1:
        raise ValueError(f"num_workers: expected 1 or more, got {num_workers}.")
    if num_pieces == 0:
        return []
    run = {"datasets": _run_with_datasets, "ray": _run_with_ray, "spark": _run_with_spark}[engine]
    try:
        return run(partial(_outcome, function), num_pieces, num_workers, description)
    except ModuleNotFoundError as error:
        if error.name not in ("ray", "pyspark"):
            raise
        raise ValueError(
            f"engine: expected {error.name} to be installed for {engine!r}. Run `pip install -e '.[{engine}]'`."
        ) from error


def _outcome(function: Callable[[int], Any], piece: int) -> bytes:
    """Return the pickled result of a piece, or its error, which engines would wrap in a long traceback."""
    try:
        result = function(piece)
    except (OSError, ValueError) as error:
        result = error
    return pickle.dumps(result)


def _result(outcome: bytes) -> Any:
    result = pickle.loads(outcome)
    if isinstance(result, Exception):
        raise result
    return result


def _run_with_datasets(run: Callable[[int], bytes], num_pieces: int, num_workers: int, description: str | None):
    def run_row(row: dict) -> dict:
        outcome = run(row["piece"])
        _result(outcome)  # an error ends the other processes
        return {"outcome": outcome}

    try:
        rows = Dataset.from_dict({"piece": range(num_pieces)}).map(
            run_row,
            num_proc=num_workers if min(num_workers, num_pieces) > 1 else None,
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint="pieces",  # instead of a hash of the function and all that it holds
            desc=description,
        )
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise OSError(
            "a worker died. Most often the host's memory is full: lower --num_workers, and run the same command again."
        ) from error
    return [_result(outcome) for outcome in rows["outcome"]]


def _run_with_ray(run: Callable[[int], bytes], num_pieces: int, num_workers: int, description: str | None):
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        ray.init(address) if address else ray.init("local", num_cpus=num_workers, include_dashboard=False)

    @ray.remote(max_retries=MAX_TRIES - 1)
    def run_piece(run: Callable[[int], bytes], piece: int) -> bytes:
        return run(piece)

    shared = ray.put(run)  # once for all pieces
    waiting, running, results = list(reversed(range(num_pieces))), {}, [None] * num_pieces
    with tqdm(total=num_pieces, desc=description) as progress:
        while waiting or running:
            while waiting and len(running) < num_workers:
                piece = waiting.pop()
                running[run_piece.remote(shared, piece)] = piece
            (done,), _ = ray.wait(list(running))
            results[running.pop(done)] = _result(ray.get(done))
            progress.update()
    return results


def _run_with_spark(run: Callable[[int], bytes], num_pieces: int, num_workers: int, description: str | None):
    from pyspark import SparkConf, SparkContext

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    conf = SparkConf().setAppName(description or "lisa_hf")
    conf.setIfMissing("spark.master", f"local[{num_workers},{MAX_TRIES}]")
    pieces = SparkContext.getOrCreate(conf).parallelize(range(num_pieces), num_pieces)
    return [_result(outcome) for outcome in pieces.map(run).collect()]
