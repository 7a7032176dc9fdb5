"""What the builders share: rows of one format, clear errors, and a cache that notices when annotations change."""

import contextlib
import hashlib
import inspect
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
from pycocotools import mask as coco_mask

from lisa_hf import schema


NUM_SHARDS = 16


class SourceBuilder(datasets.GeneratorBasedBuilder):
    """Base of the builders: a subclass names its files in `annotation_files` and yields rows of `schema.FEATURES`.

    Its docstring holds the expected tree, with what the authors publish about rows and licence.
    """

    DOWNLOAD_PAGE = ""
    LICENCE = ""

    def __init__(self, data_dir: str | os.PathLike | None = None, **kwargs):
        if data_dir is not None:
            # The rows hold paths, and the cache outlives the working directory.
            data_dir = os.path.abspath(os.path.expanduser(data_dir))
        super().__init__(data_dir=data_dir, hash=self._fingerprint(data_dir), **kwargs)

    def annotation_files(self, data_dir: str | None) -> list[str]:
        """Paths of the files that decide the rows: if one of them changes, the rows are made anew.

        Raises:
            FileNotFoundError: If the data is not there.
        """
        raise NotImplementedError

    def find(self, data_dir: str | None, path: str) -> str:
        """Path of a file or directory below `data_dir`, of which it must be known that it exists."""
        if data_dir is None:
            raise ValueError(f"{type(self).__name__} needs `data_dir`, the directory that holds {path!r}.")
        found = os.path.join(data_dir, path)
        if not os.path.exists(found):
            raise FileNotFoundError(
                f"{type(self).__name__} looked for {found!r}, which does not exist. Check `data_dir`, or get the data "
                f"from {self.DOWNLOAD_PAGE} and arrange it like this:\n{inspect.getdoc(type(self))}"
            )
        return found

    def make_splits(self, records: dict[str, Sequence], **kwargs) -> list[datasets.SplitGenerator]:
        """The splits that have records; `_generate_examples` gets them as `records`, in shards, beside the `kwargs`.

        Raises:
            ValueError: If there is no record at all.
        """
        if not any(records.values()):
            raise ValueError(
                f"{type(self).__name__} found nothing to make rows of in {self.config.data_dir!r} "
                f"(splits: {sorted(records)}). Check that the files are complete, or get them from "
                f"{self.DOWNLOAD_PAGE}."
            )
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"records": split_into_shards(found), **kwargs})
            for split, found in records.items()
            if found
        ]

    def _fingerprint(self, data_dir: str | None) -> str:
        digest = hashlib.sha256()
        builders = [base for base in type(self).__mro__ if issubclass(base, SourceBuilder)]
        for module in dict.fromkeys([*map(inspect.getmodule, builders), schema]):
            digest.update(inspect.getsource(module).encode())
        for path in self.annotation_files(data_dir):
            status = os.stat(path)
            digest.update(f"{path}\n{status.st_size}\n{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description=inspect.getdoc(type(self)),
            features=schema.FEATURES,
            homepage=self.DOWNLOAD_PAGE,
            license=self.LICENCE,
        )


def split_into_shards(items: Sequence) -> list[list]:
    """Cuts items into at most `NUM_SHARDS` runs. As a list in `gen_kwargs` they are what workers and ranks divide."""
    size = -(-len(items) // NUM_SHARDS)
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def read_json(path: str) -> Any:
    """Reads a JSON file in UTF-8, or in cp1252 as some annotations were written on Windows."""
    try:
        try:
            return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            return json.loads(pathlib.Path(path).read_text(encoding="cp1252"))
    except ValueError as error:  # Both of wrong JSON and of bytes that neither encoding knows.
        raise ValueError(f"{path!r} is not a JSON file in UTF-8 or cp1252 ({error}). Download it again.") from error


@contextlib.contextmanager
def errors_naming(where: str) -> Iterator[None]:
    """Turns what wrong content raises into a ValueError that says where it is."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{where}: the key {error} is missing.") from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def join_inside(directory: str, name: str) -> str:
    """Path of a file that an annotation names, which must not lie outside of the directory."""
    parts = name.replace("\\", "/").split("/")
    if os.path.isabs(name) or ".." in parts or not parts[0]:
        raise ValueError(
            f"An annotation names the file {name!r}, which leads out of {directory!r}. Expected a relative path "
            "without '..'; do not use annotations from a source that you do not trust."
        )
    return os.path.join(directory, name)


def encode_segmentation(segmentation: dict | list, height: int, width: int) -> dict[str, Any]:
    """Turns a COCO segmentation into the compressed RLE of one mask.

    Args:
        segmentation: Polygons [[x0, y0, x1, y1, ...], ...] in pixels, of which the mask is the union, or an RLE with
            compressed (str) or uncompressed (list of int) counts.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
    """
    if isinstance(segmentation, list):
        # pycocotools takes four numbers for a box.
        if not segmentation or any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
            lengths = [len(polygon) for polygon in segmentation]
            raise ValueError(f"Expected polygons of at least three points (x, y), but found {lengths} numbers.")
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        return {"size": [height, width], "counts": rle["counts"]}
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"Expected a mask of {[height, width]}, but found one of {list(segmentation['size'])}.")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = {"size": [height, width], "counts": counts.encode()}
    schema.decode_mask(rle)  # Raises if the counts describe a mask of another size.
    return {"size": [height, width], "counts": rle["counts"]}
