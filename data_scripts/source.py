"""Base class of the builders, which caches records and rows, and helpers that read files and name them in errors."""

import collections
import contextlib
import dataclasses
import hashlib
import inspect
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
from filelock import FileLock

from lisa_hf.data import masks, rows
from lisa_hf.data.rows import FEATURES, OnBadRow, check_on_bad_row
from lisa_hf.files import atomic_file

from .orientation import read_orientation
from .segmentation import check_size
from .text import read_text


logger = logging.getLogger(__name__)

NUM_SHARDS = 16
# Size of the pieces of a shard. A resumed stream rereads its piece.
PIECE_BYTES = 2**16
# Maximum number of record batches of prepared rows. Each takes 12 KB in every process that opens them, so with batches
# of 100 rows, the default of `datasets`, ten million rows would take a gigabyte.
MAX_BATCHES = 1000
MAX_BAD_SHARE = 0.01
# A small source may have this many bad records, as long as they are at most a fifth: 20 photos are a dataset too.
FEW_BAD_RECORDS = 3
MIN_RECORDS = 100
REMARKS = "remarks.json"
BAD_RECORDS = "bad_records.json"
MAX_NAMED = 10  # bad records whose errors are kept, per split
# Marks a directory as ours in the cache of `datasets`, see `cache.py`.
OWNER = "lisa_hf_source.json"


@dataclasses.dataclass
class SourceConfig(datasets.BuilderConfig):
    """Options of every source.

    Args:
        on_bad_row: What to do with a record that does not give a valid row, see [`~lisa_hf.data.rows.OnBadRow`]. More
            than `MAX_BAD_SHARE` of bad records, if more than a few, always raise an error, and so does an unreadable
            file.
    """

    on_bad_row: OnBadRow = "raise"

    def __post_init__(self):
        super().__post_init__()
        check_on_bad_row(self.on_bad_row)


class SourceBuilder(datasets.GeneratorBasedBuilder):
    """Base of the builders. A subclass lists its annotation files, reads their records, and makes a row from each.

    A record is what the annotations say about one row, as JSON values. The first process on a machine reads the
    records and writes them next to the cache, in shards. Rows are made from the shards record by record, both when
    they are prepared and in the workers of a stream, so memory does not grow with the annotations.

    The docstring of a subclass has the expected directory tree and the numbers published by the authors.
    """

    BUILDER_CONFIG_CLASS = SourceConfig
    # Name of the source in its rows. If empty, it is the user's name for it, `config.name`.
    SOURCE = ""
    DOWNLOAD_PAGE = ""
    LICENSE = ""

    def __init__(
        self,
        data_dir: str | os.PathLike | None = None,
        config_name: str | None = None,
        cache_dir: str | None = None,
        **options,
    ):
        if data_dir is not None:
            # Rows contain paths, and the cache may be used from other working directories.
            data_dir = os.path.abspath(os.path.expanduser(data_dir))
        # An explicit default must not change the cache directory.
        defaults = {field.name: field.default for field in dataclasses.fields(self.BUILDER_CONFIG_CLASS)}
        options = {name: value for name, value in options.items() if value != defaults.get(name, dataclasses.MISSING)}
        # `_fingerprint` needs the options before `datasets` makes its config from them.
        self.config = self.BUILDER_CONFIG_CLASS(name=config_name or "default", data_dir=data_dir, **options)
        super().__init__(
            cache_dir=cache_dir,
            config_name=config_name,
            data_dir=data_dir,
            hash=self._fingerprint(data_dir),
            **options,
        )
        self.records_dir = f"{self.cache_dir}.records"
        # By split: positions of the bad records that this process has seen, and the number of records it has read from
        # each shard. Positions, because a second epoch of a stream sees the same records again.
        self.bad_records = collections.defaultdict(set)
        self.num_read = collections.defaultdict(collections.Counter)
        self.bad_errors: dict[str, list[str]] = collections.defaultdict(list)
        # Remarks of `read_records` for the user.
        self.read_remarks: list[str] = []
        # What `make_row` has counted in its record; and by split and remark, the count at each position.
        self._counted: collections.Counter[str] = collections.Counter()
        self.counted = collections.defaultdict(dict)

    def annotation_files(self, data_dir: str | None) -> list[str]:
        """Return the paths of the files that rows are made from.

        If their list changes, or the size or modification time of one of them, the rows are prepared again.

        Raises:
            FileNotFoundError: If the data does not exist.
        """
        raise NotImplementedError

    def read_records(self, data_dir: str | None) -> dict[str, Sequence]:
        """Read the records of every split.

        Raises:
            ValueError: If a file is damaged as a whole. Bad records are left to `make_row`.
        """
        raise NotImplementedError

    def make_row(self, record: Any) -> dict[str, Any] | None:
        """Make the row of a record, or return None if there is nothing to ask about.

        Raises:
            ValueError: If the record is bad. The message names the file and the record.
        """
        raise NotImplementedError

    def pass_over(self, what: str):
        """Count an annotation in the record of `make_row` that is not bad, but has no mask to ask for.

        Args:
            what: Noun for such annotations, in the plural.
        """
        self.count(f"skipped {{}} {what}")

    def count(self, remark: str):
        """Count an occurrence of a remark about the records of `make_row`; "{}" in it becomes the count."""
        self._counted[remark] += 1

    def final_remarks(self) -> list[str]:
        """Return remarks about all rows, once they are prepared by this process."""
        return []

    @property
    def source(self) -> str:
        """Return the name of the source in its rows."""
        return self.SOURCE or self.config.name

    def remarks(self) -> list[str]:
        """Return remarks about skipped and excluded records, once the rows are prepared or their stream is open."""
        remarks = []
        for directory in (self.records_dir, self.cache_dir):
            path = os.path.join(directory, REMARKS)
            remarks += read_json(path) if os.path.exists(path) else []
        return remarks

    def skipped_records(self) -> dict[str, list[str]]:
        """Return the errors of the first records that were skipped, by split, once the rows are prepared."""
        path = os.path.join(self.cache_dir, BAD_RECORDS)
        return read_json(path) if os.path.exists(path) else {}

    def download_and_prepare(self, *args, **kwargs):
        super().download_and_prepare(*args, **kwargs)
        # Remarks are stored, for whoever opens the prepared rows later.
        counts = {split: len(bad) for split, bad in self.bad_records.items() if bad}
        remarks = [f"skipped {count} bad records of the split {split!r}" for split, count in counts.items()]
        for (split, remark), found in sorted(self.counted.items()):
            # Braces may also come from the annotations.
            remarks.append(f"{remark.replace('{}', str(sum(found.values())), 1)} in the split {split!r}")
        remarks += self.final_remarks() if self.num_read else []  # only for rows that this call has prepared
        if remarks:
            write_json(os.path.join(self.cache_dir, REMARKS), remarks)
        if self.bad_errors:
            write_json(os.path.join(self.cache_dir, BAD_RECORDS), self.bad_errors)
        if not os.path.exists(owner := os.path.join(self.cache_dir, OWNER)):
            write_json(owner, {"source": self.source})

    def find(self, data_dir: str | None, path: str) -> str:
        """Return the path of a file or directory below `data_dir`, which must exist."""
        if data_dir is None:
            raise ValueError(
                f"{type(self).__name__}: expected `data_dir`, the directory that holds {path!r}, got None."
            )
        found = os.path.join(data_dir, path)
        if not os.path.exists(found):
            error = FileNotFoundError(
                f"{type(self).__name__}: expected {found!r}, which does not exist. Check `data_dir`, or download the "
                f"data from {self.DOWNLOAD_PAGE} and arrange it as in docs/data_sources.md."
            )
            error.add_note(inspect.getdoc(type(self)))  # shown in a stack trace only, not in the one line of a recipe
            raise error
        return found

    def write_records(self, records: dict[str, Sequence], remarks: Sequence[str] = ()):
        """Write the records as shards into `records_dir`, all or nothing.

        Args:
            records: Records by split.
            remarks: Remarks about excluded records, for the user.

        Raises:
            ValueError: If there are no records.
        """
        if not any(records.values()):
            raise ValueError(
                f"{type(self).__name__}: expected records in {self.config.data_dir!r}, got none (splits: "
                f"{sorted(records)}{''.join(f'; {remark}' for remark in remarks)}). Check that the files are complete"
                + (f", or download them from {self.DOWNLOAD_PAGE}." if self.DOWNLOAD_PAGE else ".")
            )
        with tempfile.TemporaryDirectory(dir=os.path.dirname(self.records_dir)) as directory:
            directory = os.path.join(directory, "records")
            for split, found in records.items():
                os.makedirs(os.path.join(directory, split))
                for index, shard in enumerate(split_into_shards(found)):
                    with open(os.path.join(directory, split, f"{index:02d}.jsonl"), "w", encoding="utf-8") as file:
                        file.writelines(f"{json.dumps(record)}\n" for record in shard)
            num_records = {split: len(found) for split, found in records.items() if found}
            write_json(os.path.join(directory, "num_records.json"), num_records)
            write_json(os.path.join(directory, REMARKS), list(remarks))
            write_json(os.path.join(directory, OWNER), {"source": self.source})
            os.replace(directory, self.records_dir)

    def _split_generators(self, dl_manager):
        os.makedirs(os.path.dirname(self.records_dir), exist_ok=True)
        with FileLock(f"{self.records_dir}.lock"):
            if not os.path.isdir(self.records_dir):
                records = self.read_records(self.config.data_dir)
                self.write_records(records, self.read_remarks)
        splits = read_json(os.path.join(self.records_dir, "num_records.json"))
        self._writer_batch_size = max(100, *(-(-number // MAX_BATCHES) for number in splits.values()))
        generators = []
        for split, num_records in splits.items():
            shards = sorted(str(path) for path in pathlib.Path(self.records_dir, split).iterdir())
            facts = {"split": split, "num_records": num_records, "num_shards": len(shards)}
            generators.append(datasets.SplitGenerator(name=split, gen_kwargs={"shards": shards, **facts}))
        return generators

    def read_shard(self, shard: Any) -> Iterator[Any]:
        """Read the records of one of the shards of `_split_generators`, or of one of its pieces."""
        path, start, stop = (shard, 0, None) if isinstance(shard, str) else shard
        with open(path, "rb") as file:
            if start:
                # A piece has the lines that begin in it.
                file.seek(start - 1)
                start += len(file.readline()) - 1
            for line in file:
                if stop is not None and start >= stop:
                    break
                start += len(line)
                yield json.loads(line)

    def cut_shard(self, shard: Any) -> list[Any]:
        """Split a shard into pieces that `read_shard` can read, with the same records in the same order."""
        starts = range(0, max(1, os.path.getsize(shard)), PIECE_BYTES)
        return [(shard, start, start + PIECE_BYTES) for start in starts]

    def _generate_more_gen_kwargs(self, shards, split, num_records, num_shards):
        # Called by `IterableDataset.reshard`, with one shard at a time.
        pieces = [piece for shard in shards for piece in self.cut_shard(shard)]
        num_shards += len(pieces) - len(shards)
        yield {"shards": pieces, "split": split, "num_records": num_records, "num_shards": num_shards}

    def _generate_examples(self, shards, split, num_records, num_shards):
        bad, num_read = self.bad_records[split], self.num_read[split]
        num_bad = len(bad)
        for shard in shards:
            for index, record in enumerate(self.read_shard(shard)):
                num_read[shard] = max(num_read[shard], index + 1)
                self._counted.clear()
                try:
                    row = self.make_row(record)
                except ValueError as error:
                    if self.config.on_bad_row == "raise":
                        raise
                    logger.warning("Skipped: %s", error)
                    bad.add((shard, index))
                    if len(self.bad_errors[split]) < MAX_NAMED:
                        self.bad_errors[split].append(str(error))
                    if num_records is not None:
                        self._check_bad_share(split, num_records, error)
                    continue
                for remark, number in self._counted.items():
                    self.counted[split, remark][shard, index] = number
                if row is not None:
                    yield f"{shard}, {index}", row
        if len(bad) > num_bad:
            # A reader of a few shards may never see 1% of all records, so it judges the records that it has read, with
            # a tolerance of three standard deviations.
            total, is_part = num_read.total(), len(shards) < num_shards
            if not is_part or total >= MIN_RECORDS:
                allowance = 3 * (MAX_BAD_SHARE * total) ** 0.5 if is_part else 0
                self._check_bad_share(split, total, "see the log", allowance)
            logger.warning("%s: skipped %d bad records of the split %r so far.", self.source, len(bad), split)

    def find_bad_records(self, number: int = MAX_NAMED) -> list[str]:
        """Return the errors of the first `number` bad records. The list is empty if no records have been read."""
        errors = []
        for shard in sorted(pathlib.Path(self.records_dir).glob("*/*.jsonl")):
            for record in self.read_shard(str(shard)):
                try:
                    self.make_row(record)
                except ValueError as error:
                    errors.append(str(error))
                    if len(errors) == number:
                        return errors
        return errors

    def _check_bad_share(self, split: str, num_records: int, last: object, allowance: float = 0):
        num_bad = len(self.bad_records[split])
        floor = min(FEW_BAD_RECORDS, num_records // 5)
        if num_bad > max(MAX_BAD_SHARE * num_records + allowance, floor):
            raise ValueError(
                f"{self.source}: expected at most {MAX_BAD_SHARE:.0%} of bad records, or {FEW_BAD_RECORDS}, got at "
                f"least {num_bad} of {num_records} in the split {split!r}. Repair or remove them. The last one: {last}"
            )

    def _fingerprint(self, data_dir: str | None) -> str:
        digest = hashlib.sha256(type(self).__name__.encode())
        builders = [base for base in type(self).__mro__ if issubclass(base, SourceBuilder)]
        for module in dict.fromkeys([*map(inspect.getmodule, [*builders, read_orientation, check_size]), masks, rows]):
            digest.update(inspect.getsource(module).encode())
        for path in self.annotation_files(data_dir):
            status = os.stat(path)
            digest.update(f"{path}\n{status.st_size}\n{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description=inspect.getdoc(type(self)),
            features=FEATURES,
            homepage=self.DOWNLOAD_PAGE,
            license=self.LICENSE,
        )


def split_into_shards(items: Sequence) -> list[Sequence]:
    """Split items into at most `NUM_SHARDS` contiguous shards, which are distributed among workers and ranks."""
    size = -(-len(items) // NUM_SHARDS)
    return [items[start : start + size] for start in range(0, len(items), size)] if size else []


def read_json(path: str, encoding: str | None = "cp1252") -> Any:
    """Read a JSON file.

    Args:
        path: Path of the file.
        encoding: See [`read_text`]. Some published annotations were written on Windows, in cp1252.
    """
    content = read_text(path, encoding)
    try:
        return json.loads(content)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"expected a JSON file, got {path!r} ({error}). Download it again.") from error


def write_json(path: str, content: Any):
    with atomic_file(pathlib.Path(path)) as incomplete, open(incomplete, "w", encoding="utf-8") as file:
        json.dump(content, file)


@contextlib.contextmanager
def errors_naming(where: str) -> Iterator[None]:
    """Turn errors caused by wrong content into a `ValueError` that says where it is."""
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"{where}: expected the key {error}, which is missing. Export it again, or add it."
        ) from error
    except (AttributeError, IndexError, OverflowError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and "expected" in str(error):
            raise ValueError(f"{where}: {error}") from error
        raise ValueError(
            f"{where}: expected content in its format, got something else ({error}). Export it again, or remove it."
        ) from error


def join_inside(directory: str, name: str) -> str:
    """Return the path of a file that an annotation names, which must lie inside the directory."""
    parts = name.replace("\\", "/").split("/")
    if os.path.isabs(name) or ".." in parts or not parts[0]:
        raise ValueError(
            f"expected a relative path without '..', got the file {name!r}, which is outside {directory!r}. Do not "
            "use annotations from a source that you do not trust."
        )
    return os.path.join(directory, name)


def is_inside(path: str, directory: str) -> bool:
    """Return whether a path is inside a directory. Links are not followed: they are the user's own."""
    directory = os.path.abspath(directory)
    return os.path.commonpath([os.path.abspath(path), directory]) == directory


def read_image_size(path: str) -> tuple[int, int]:
    """Read the height and width in pixels of an image, upright by its EXIF orientation, from the file's header."""
    return read_orientation(path)[1]["display"]
