"""Converting to Parquet on each engine: equal bytes, workers that die, and storage that loses what is written."""

import functools
import hashlib
import os
import shutil
import signal
import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from data_scripts import load_source
from data_scripts.duplicates import KnownImages
from data_scripts.engines import map_pieces
from data_scripts.parquet import write_card, write_parquet
from lisa_hf.data.images import undecoded


SHAPES = {"num_train_scenes": 24, "num_validation_scenes": 1, "image_size": 32}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return load_source("shapes", cache_dir=str(tmp_path_factory.mktemp("cache")), **SHAPES)


@pytest.fixture(scope="module")
def engine(request):
    """The name of an engine that can run here."""
    name = request.param
    if name == "spark":
        pytest.importorskip("pyspark")
        if not (shutil.which("java") or os.environ.get("JAVA_HOME")):
            pytest.skip("Spark needs Java")
    if name == "ray":
        ray = pytest.importorskip("ray")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            patch.delenv("RAY_ADDRESS", raising=False)
            yield name
            ray.shutdown()
    else:
        yield name
    if name == "spark":
        from pyspark import SparkContext

        SparkContext.getOrCreate().stop()


on_each_engine = pytest.mark.parametrize(
    "engine", ["datasets", "ray", pytest.param("spark", marks=pytest.mark.slow)], indirect=True
)
# One worker of Ray in the fast test: each takes seconds to import the libraries.
NUM_WORKERS = {"datasets": 2, "ray": 1, "spark": 2}


def digests(directory: Path) -> dict[str, str]:
    """Return the digest of each file in a directory by its name."""
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@on_each_engine
def test_each_engine_gives_equal_files_and_the_first_error(engine, rows, tmp_path):
    write_parquet(rows, tmp_path / "one", "train", max_shard_size="4KB")
    write_parquet(rows, tmp_path / "two", "train", NUM_WORKERS[engine], "4KB", engine=engine)
    assert digests(tmp_path / "two") == digests(tmp_path / "one") and len(digests(tmp_path / "one")) > 3

    def fail(piece):
        raise ValueError(f"piece {piece} is bad")

    with pytest.raises(ValueError) as error:
        map_pieces(fail, 1, engine, NUM_WORKERS[engine])
    assert str(error.value) == "piece 0 is bad"


def known_images_that_kill(marker: Path) -> KnownImages:
    """Return images to exclude, none, which kill the first worker that looks for them."""

    class Deadly(KnownImages):  # in here, because workers cannot import this module
        def filter(self, table):
            if not os.path.exists(marker):
                Path(marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().filter(table)

    return Deadly()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "spark"], indirect=True)
def test_a_shard_of_a_worker_that_dies_is_written_again(engine, rows, tmp_path):
    excluded = known_images_that_kill(tmp_path / "died")
    write_parquet(rows, tmp_path / "two", "train", 2, "4KB", engine=engine, excluded=excluded)
    write_parquet(rows, tmp_path / "one", "train", max_shard_size="4KB", excluded=KnownImages())
    assert (tmp_path / "died").exists()
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


def test_a_process_that_dies_is_one_line_and_the_conversion_goes_on(rows, tmp_path):
    options = {"max_shard_size": "4KB", "excluded": known_images_that_kill(tmp_path / "died")}
    with pytest.raises(OSError, match="a worker died. Most often"):
        write_parquet(rows, tmp_path / "two", "train", 2, **options)
    assert not digests(tmp_path / "two/data")
    write_parquet(rows, tmp_path / "two", "train", 2, **options)
    write_parquet(rows, tmp_path / "one", "train", max_shard_size="4KB", excluded=KnownImages())
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


@pytest.mark.parametrize(
    "engine, num_workers, message",
    [
        ("ray", 1, r"expected ray to be installed for 'ray'. Run `pip install -e '.\[ray\]'`"),
        ("spark", 1, "expected pyspark to be installed"),
        ("dask", 1, "expected one of datasets, ray, spark, got 'dask'"),
        ("datasets", 0, "num_workers: expected 1 or more, got 0"),
    ],
)
def test_an_engine_that_cannot_run_is_one_line(engine, num_workers, message, monkeypatch):
    for name in ("ray", "pyspark"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=message):
        map_pieces(abs, 1, engine, num_workers)


# Storage


class FaultyFileSystem(MemoryFileSystem):
    """A file system in memory that fails, or loses half of a file without a word."""

    protocol = "faulty"
    store: dict = {}
    pseudo_dirs = [""]
    faults: list = []  # of the next files of a shard, in their order: None, "raise" or "lose"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("faulty://", "memory://"))

    def _open(self, path, mode="rb", **kwargs):
        file = super()._open(path, mode, **kwargs)
        fault = self.faults.pop(0) if "w" in mode and ".parquet" in path and self.faults else None
        if fault == "raise":
            file.write = functools.partial(self.fail, file)
        elif fault == "lose":
            file.close = functools.partial(self.lose, file)
        return file

    @staticmethod
    def fail(file, data):
        MemoryFile.write(file, data[: len(data) // 2])
        raise OSError("the disk is full")

    @staticmethod
    def lose(file):
        file.truncate(file.tell() // 2)
        MemoryFile.close(file)


@pytest.fixture
def faulty():
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.store.clear()
    yield FaultyFileSystem()
    FaultyFileSystem.store.clear()
    FaultyFileSystem.faults = []


@pytest.mark.parametrize("fault, message", [("raise", "the disk is full"), ("lose", "the storage lost")])
def test_what_storage_loses_is_never_read(faulty, rows, tmp_path, fault, message):
    write_parquet(rows, tmp_path / "local/shapes", "train", max_shard_size="4KB")
    num_shards = len(digests(tmp_path / "local"))
    for faults in ([fault], [None, None, fault]):
        faulty.faults = faults
        with pytest.raises(OSError, match=message):
            write_parquet(rows, "faulty://out/shapes", "train", max_shard_size="4KB")
        assert not faulty.find("/out/shapes/data")
    write_parquet(rows, "faulty://out/shapes", "train", max_shard_size="4KB")
    names = faulty.find("/out/shapes")
    assert len(names) == num_shards and not faulty.exists("/out/shapes/.incomplete")
    for name in names:
        assert faulty.cat_file(name) == (tmp_path / "local" / name.removeprefix("/out/")).read_bytes()


def test_rows_in_an_object_store_stream_and_train_like_the_local_ones(faulty, rows, tmp_path):
    write_parquet(rows, tmp_path / "local/shapes", "train", max_shard_size="8KB")
    write_parquet(rows, "faulty://out/shapes", "train", max_shard_size="8KB")
    write_card("faulty://out", {})
    write_card(tmp_path / "local", {})
    assert faulty.cat_file("/out/README.md") == (tmp_path / "local/README.md").read_bytes()
    path = "faulty://out/shapes/data/train-*.parquet"
    options = {"builder": "hub", "cache_dir": str(tmp_path / "cache")}
    expected = list(undecoded(load_source("mine", path=str(tmp_path / "local/shapes"), **options)))
    assert list(undecoded(load_source("mine", path=path, streaming=True, **options))) == expected
    assert list(undecoded(load_source("mine", path=path, **options))) == expected
    write_parquet(rows.take(9), "faulty://out/shapes", "train", overwrite=True)
    assert list(undecoded(load_source("mine", path=path, **options))) == expected[:9]


def test_shards_that_are_being_moved_are_not_read(rows, tmp_path, monkeypatch):
    def move_two(move, paths, targets, **_):
        for path, target in list(zip(paths, targets))[:2]:
            move(path, target)
        raise KeyboardInterrupt

    options = {"max_shard_size": "4KB", "overwrite": True}
    directory = tmp_path / "out/shapes"
    write_parquet(rows.take(9), directory, "train", **options)
    with monkeypatch.context() as patch:
        patch.setattr("data_scripts.parquet.thread_map", move_two)
        with pytest.raises(KeyboardInterrupt):
            write_parquet(rows, directory, "train", **options)
    # Another split whose name begins alike is neither mistaken for this one nor touched.
    other = directory / ".incomplete" / "train-unseen-00000-of-00001.parquet"
    other.touch()
    for read in (
        lambda: write_card(tmp_path / "out", {}),
        lambda: load_source("mine", builder="hub", path=str(directory), cache_dir=str(tmp_path / "cache")),
        lambda: load_source("mine", builder="hub", path=f"{directory}/data/train-*.parquet", cache_dir=str(tmp_path)),
        lambda: load_source("mine", builder="hub", path=f"file://{directory}/data/train-*.parquet", streaming=True),
    ):
        with pytest.raises(ValueError, match=r"shards of the split 'train', got 2. Run the conversion again"):
            read()
    write_parquet(rows, directory, "train", **options)
    assert [path.name for path in (directory / ".incomplete").iterdir()] == [other.name]
    other.unlink()
    found = load_source("mine", builder="hub", path=str(directory), cache_dir=str(tmp_path / "cache"))
    assert found["image_id"] == rows["image_id"]


@pytest.mark.slow
def test_an_s3_server_gets_and_gives_the_same_bytes(rows, tmp_path, monkeypatch):
    """Needs `pip install moto[server] s3fs`."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    settings = {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "ENDPOINT_URL": f"http://{host}:{port}"}
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    fs = fsspec.filesystem("s3")
    fs.mkdir("bucket")
    remote = write_parquet(rows, "s3://bucket/shapes", "train", num_workers=2, max_shard_size="5KB").paths
    local = write_parquet(rows, tmp_path / "shapes", "train", max_shard_size="5KB").paths
    assert len(remote) > 2 and [fs.cat_file(path) for path in remote] == [Path(path).read_bytes() for path in local]
    files = fs.find("bucket", detail=True)
    write_parquet(rows, "s3://bucket/shapes", "train", max_shard_size="5KB")
    assert fs.find("bucket", detail=True, refresh=True) == files  # also the times, and nothing else was left
    for streaming in (False, True):
        path = "s3://bucket/shapes/data/train-*.parquet"
        loaded = load_source("a", builder="hub", path=path, streaming=streaming, cache_dir=str(tmp_path / "cache"))
        assert [row["targets"] for row in undecoded(loaded)] == list(rows["targets"])
    server.stop()
