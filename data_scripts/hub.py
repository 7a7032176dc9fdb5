"""Rows from any Hub dataset, or from Parquet files, by column names.

    sources:
      captions: {builder: hub, path: user/captions, image_column: photo, mask_column: label, phrases_column: caption}
      chat: {builder: hub, path: chat/*.parquet, messages_column: messages}
      converted: {builder: hub, path: parquet/ade20k}

A dataset that already has the columns of `lisa_hf.data.rows`, as `recipes/prepare_data.py convert` writes them, is
used unchanged.
"""

import dataclasses
import functools
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any, Literal

import datasets
import numpy as np
from fsspec.core import url_to_fs

from lisa_hf.data.masks import encode_mask
from lisa_hf.data.rows import FEATURES, count_masks, make_row
from lisa_hf.model.processing_lisa import SEG_TOKEN

from .orientation import read_orientation
from .own_data import OwnData, OwnDataConfig, open_file
from .parquet import check_finished
from .segmentation import encode_visible, read_mask
from .source import errors_naming, is_inside


# Possible start of a path inside an archive: zip://photos/a.jpg::photos.zip
ARCHIVES = ("zip://", "tar://", "gzip://", "bz2://", "xz://", "zstd://", "lz4://")
# The characters of compressed counts, as pycocotools writes them.
RLE_COUNTS = re.compile(rb"[0-o]*")
URLS = ("http://", "https://", "hf://")


@dataclasses.dataclass
class HubConfig(OwnDataConfig):
    """Options of a dataset on the Hub.

    Args:
        path: Hub id, a directory that `datasets.load_dataset` can read, or a glob pattern of Parquet files, which may
            be an fsspec URL.
        subset: Name of the dataset's configuration, if it has several.
        revision: Branch, tag or commit on the Hub. Once rows are prepared, changes to a branch go unnoticed.
        image_column: Column with the images, as files or paths.
        mask_column: Column with the masks: single-channel images (0 for the background), rows of pixels, COCO RLE (its
            counts alone are enough) or polygons, or one of these as JSON text.
        phrases_column: Column with the phrases that describe the mask, a text or a list of interchangeable texts.
        messages_column: Column with conversations, lists of `role` and `content`, instead of masks and phrases.
        image_id_column: Column with the image ids. By default, rows are numbered.
        task: Task of the rows, see [`~lisa_hf.data.rows.make_row`].
        is_sentence: Whether the phrases are complete questions. None: those that end with a period or a question mark.
        empty_masks: Whether a phrase with an empty mask refers to nothing. Otherwise, it is skipped.
        allow_urls: Whether to read images and masks from URLs in the rows, on any server. Otherwise, rows may only
            name files in `data_dir` and of the dataset itself.
    """

    path: str = ""
    subset: str | None = None
    revision: str | None = None
    image_column: str = "image"
    mask_column: str = "mask"
    phrases_column: str = "phrases"
    messages_column: str | None = None
    image_id_column: str | None = None
    task: Literal["semantic", "referring", "reasoning"] = "referring"
    is_sentence: bool | None = False
    empty_masks: bool = False
    allow_urls: bool = False


class Hub(OwnData):
    """A Hub dataset, or Parquet files. One row per record, with a target or a conversation."""

    BUILDER_CONFIG_CLASS = HubConfig
    _divided: tuple[int, datasets.IterableDataset] | None = None

    def annotation_files(self, data_dir):
        if not self.config.path:
            raise ValueError(
                f"source {self.source!r}: expected the option `path`, the dataset's id or files, got none."
            )
        path = self._local_path(data_dir)
        directory, is_pattern, files = path.rpartition("/data/")
        if is_pattern:
            check_finished(directory, files.partition("-*")[0])
        if "://" in path:
            return []
        check_finished(path, self.config.split)
        return sorted(
            name for name in glob.glob(path) + glob.glob(f"{path}/**", recursive=True) if os.path.isfile(name)
        )

    def _fingerprint(self, data_dir: str | None) -> str:
        digest = super()._fingerprint(data_dir)
        if "://" not in self.config.path:
            return digest
        fs, pattern = url_to_fs(self.config.path)
        files = [digest]
        for path in sorted(fs.glob(pattern)):
            info = fs.info(path)
            # fsspec assumes that files on web servers never change, and derives their key from the URL.
            files += [fs.ukey(path), *(str(info.get(name)) for name in ("ETag", "Last-Modified", "size"))]
        return hashlib.sha256(" ".join(files).encode()).hexdigest()[:16]

    def _local_path(self, data_dir: str | None) -> str:
        if "://" in self.config.path:
            return self.config.path
        return os.path.abspath(os.path.join(data_dir or "", os.path.expanduser(self.config.path)))

    @functools.cached_property
    def _rows(self) -> datasets.IterableDataset:
        """The dataset as a stream with undecoded images."""
        config, path = self.config, self._local_path(self.config.data_dir)
        if path.endswith(".parquet"):
            arguments = {"path": "parquet", "data_files": path}
        else:
            arguments = {"path": path if os.path.isdir(path) else config.path, "name": config.subset}
        rows = datasets.load_dataset(**arguments, split=config.split, revision=config.revision, streaming=True)
        rows = rows if rows.features else rows._resolve_features()  # of CSV and JSON, from their first rows
        names = [config.image_column, config.messages_column or config.mask_column]
        names += [] if config.messages_column else [config.phrases_column]
        names += [config.image_id_column] if config.image_id_column else []
        if FEATURES.keys() <= set(rows.column_names):
            rows, names = rows.select_columns(list(FEATURES)), ["image"]
        for name in names:
            if name not in rows.column_names:
                raise ValueError(
                    f"source {self.source!r}: expected the column {name!r} in {config.path!r}, got "
                    f"{rows.column_names}. Name its columns with image_column, mask_column, phrases_column, "
                    "messages_column or image_id_column."
                )
        images = [names[0], *(name for name in names if isinstance(rows.features[name], datasets.Image))]
        for name in images:
            rows = rows.cast_column(name, datasets.Image(decode=False))
        masks = rows.features.get(config.mask_column)  # of conversations
        if isinstance(masks, datasets.List) and isinstance(masks.feature, datasets.Image):
            rows = rows.cast_column(config.mask_column, datasets.List(datasets.Image(decode=False)))
        return rows

    def _split_generators(self, dl_manager):
        rows = self._rows
        splits = rows.info.splits or {}
        num_records = splits[self.config.split].num_examples if self.config.split in splits else None
        facts = {"split": self.config.split, "num_records": num_records, "num_shards": rows.num_shards}
        shards = list(range(rows.num_shards))
        return [datasets.SplitGenerator(name=self.config.split, gen_kwargs={"shards": shards, **facts})]

    def read_shard(self, shard: int | tuple[int, int]) -> Iterator[tuple[str, dict[str, Any]]]:
        shard, *piece = [shard] if isinstance(shard, int) else shard
        try:
            if piece:
                pieces = self._pieces(shard)
                rows = pieces.shard(pieces.num_shards, *piece)
            else:
                rows = self._rows.shard(self._rows.num_shards, shard)
            name = ".".join(map(str, [shard, *piece]))
            # `iter`, because `__iter__` would split the rows among the loader workers a second time.
            for index, batch in enumerate(rows.iter(batch_size=1)):
                yield f"{name}-{index}", {key: values[0] for key, values in batch.items()}
        except (NotImplementedError, TypeError) as error:  # a column that cannot be read as images
            raise ValueError(
                f"source {self.source!r}: expected the column {self.config.image_column!r} of {self.config.path!r} to "
                f"contain images, and others texts and masks, got other values ({error}). Name the right columns."
            ) from error

    def cut_shard(self, shard: int) -> list[int | tuple[int, int]]:
        # A row without an id gets its number in the shard, which a piece does not know.
        if not (self.config.image_id_column or FEATURES.keys() <= set(self._rows.column_names)):
            return [shard]
        return [(shard, piece) for piece in range(self._pieces(shard).num_shards)]

    def _pieces(self, shard: int) -> datasets.IterableDataset:
        """Return a shard split into its row groups, if any. Caches the last result, because it reads the file."""
        if self._divided is None or self._divided[0] != shard:
            self._divided = shard, self._rows.shard(self._rows.num_shards, shard).reshard()
        return self._divided[1]

    def make_row(self, record):
        name, row = record
        config = self.config
        with errors_naming(f"{config.path!r}, row {name} (shard-row)"):
            if FEATURES.keys() <= row.keys():
                return row | {"image": row["image"] and self._find_file(row["image"])}
            if row[config.image_column] is None:
                raise ValueError(f"expected an image in the column {config.image_column!r}, got none. Remove the row.")
            image = self._find_file(row[config.image_column])
            name = str(row[config.image_id_column]) if config.image_id_column else name
            if config.messages_column:
                return self._make_conversation(image, name, row)
            phrases = row[config.phrases_column]
            rle, ignore = self._read_mask(image, row[config.mask_column])
            if rle is None:
                self.pass_over("masks without a pixel")
                return None
            phrases = phrases if isinstance(phrases, list) else [phrases]
            is_sentence = config.is_sentence
            if is_sentence is None:
                is_sentence = all(str(phrase).rstrip().endswith((".", "?")) for phrase in phrases)
            targets = [{"phrases": phrases, "rle": rle}]
            return self._make_row(image, name, config.task, targets=targets, ignore=ignore, is_sentence=is_sentence)

    def _make_conversation(self, image: dict[str, Any], name: str, row: dict[str, Any]) -> dict[str, Any]:
        """Make a row of messages; with a column of masks, one mask per `[SEG]` of the answers."""
        messages = row[self.config.messages_column]
        num_masks = count_masks(messages, f"Row {name!r}")
        if self.config.mask_column not in row:
            if num_masks:
                raise ValueError(
                    f"expected masks for the {num_masks} {SEG_TOKEN} of its answers, got no column "
                    f"{self.config.mask_column!r}. Name theirs with `mask_column`."
                )
            return self._make_row(image, name, task="vqa", messages=messages)
        rles = [self._read_mask(image, mask)[0] for mask in row[self.config.mask_column] or []]
        if None in rles:
            raise ValueError(f"expected masks with pixels, one per [SEG], got {rles.count(None)} empty ones.")
        return self._make_row(image, name, "conversation", targets=[{"rle": rle} for rle in rles], messages=messages)

    def _read_mask(self, image: dict[str, Any], mask: Any) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Return the RLE of a mask (None if it is empty) and that of its ignored pixels."""
        if mask is None:
            raise ValueError(f"expected a mask in the column {self.config.mask_column!r}, got none. Remove the row.")
        if isinstance(mask, str):
            mask = _read_text(mask)
        if isinstance(mask, list) and mask and isinstance(mask[0], dict) and "bytes" in mask[0]:
            raise ValueError(
                f"expected one mask, got a list of {len(mask)} images. Make a row of each, or conversations with "
                f"{SEG_TOKEN}."
            )
        if isinstance(mask, bytes) and not RLE_COUNTS.fullmatch(mask):
            mask = {"bytes": mask, "path": None}  # an image file
        if isinstance(mask, str | bytes | list) or "counts" in mask:
            pixels = _read_pixels(mask)
            with open_file(image) as file:
                declared = mask["size"] if isinstance(mask, dict) else None if pixels is None else pixels.shape
                _, size = self.find_space(*read_orientation(file), declared)
            if isinstance(mask, str | bytes):
                mask = {"size": list(size), "counts": mask}
            rle = encode_visible(mask, *size) if pixels is None else encode_mask(pixels) if pixels.any() else None
            return encode_mask(np.zeros(size, dtype=bool)) if rle is None and self.config.empty_masks else rle, None
        with open_file(self._find_file(mask)) as file:
            pixels, void = read_mask(file)
        return encode_mask(pixels), None if void is None else encode_mask(void)

    def _make_row(self, image: dict[str, Any], name: str, task: str, **columns: Any) -> dict[str, Any]:
        # Prefer the content to the path, which may be inside an archive.
        return self.turn_upright(make_row(image["bytes"] or image["path"], name, self.source, task, **columns))

    def _find_file(self, image: dict[str, Any]) -> dict[str, Any]:
        """Return an image, after checking that its path, if it has no content, is one that rows may name.

        The paths in rows come from others: they must not read this machine's files or contact its servers.
        """
        path = image["path"]
        if image["bytes"] or path is None:
            return image
        *archived, location = path.split("::")
        is_remote = "://" in location
        if ".." in path.replace("\\", "/").split("/") or not all(part.startswith(ARCHIVES) for part in archived):
            found = None
        elif is_remote:
            # Files of the dataset itself: hf://datasets/user/name@revision/photos/a.jpg
            own = tuple(f"hf://datasets/{self.config.path}{end}" for end in "@/")
            found = location if location.startswith(URLS if self.config.allow_urls else own) else None
        else:
            candidates = [os.path.join(root, location) for root in self._roots()]  # of an absolute path: itself
            inside = [path for path, root in zip(candidates, self._roots()) if is_inside(path, root)]
            found = next(filter(os.path.exists, inside), inside[0] if inside else None)
        if found is None:
            raise ValueError(
                f"expected an image in the row, or a file in {' or '.join(self._roots()) or 'the dataset'}, got "
                f"{path!r}. "
                + ("Set `allow_urls: true` if you trust all URLs in these rows." if is_remote else "Move it there.")
            )
        return {"bytes": None, "path": "::".join([*archived, found])}

    def _roots(self) -> list[str]:
        """Return the directories whose files rows may name: `data_dir` and the dataset's."""
        path = self._local_path(self.config.data_dir)
        # Without `dirname`, which `datasets` patches in builder modules: its version drops the last directory.
        own = path if os.path.isdir(path) else path.partition("*")[0].rpartition(os.sep)[0]
        return list(dict.fromkeys([*filter(None, [self.config.data_dir]), *([own] if os.path.isdir(own) else [])]))


def _read_text(mask: str) -> Any:
    """Return the value of JSON text; other text, the counts of an RLE, is returned unchanged."""
    try:
        found = json.loads(mask)
    except ValueError:
        return mask
    return found if isinstance(found, dict | list) else mask


def _read_pixels(mask: Any) -> np.ndarray | None:
    """Return a mask given as rows of booleans, shape `(H, W)`, bool; None if it has another form."""
    if not (isinstance(mask, list) and mask and isinstance(mask[0], list) and mask[0]):
        return None
    return np.array(mask, dtype=bool) if isinstance(mask[0][0], bool) else None
