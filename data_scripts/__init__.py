"""One `datasets` builder per data source. All of them make the rows of `lisa_hf.data.rows`."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib.util
import logging
import os
import sys
import traceback

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.exceptions import DatasetGenerationError

from lisa_hf.errors import nearest_name

from .class_masks import ClassMasks, CocoPanoptic
from .coco import CocoBuilder
from .coco_instances import CocoInstances
from .cvat import Cvat
from .hub import Hub
from .image_folder import ImageFolder
from .label_maps import Ade20k, CocoStuff, Mapillary
from .label_studio import LabelStudio
from .labelme import LabelMe
from .lisa_plus import LisaPlus
from .llava_instruct import LlavaInstruct
from .muse import Muse
from .paco_lvis import PacoLvis
from .pascal_part import PascalPart
from .reason_seg import ReasonSeg
from .refer_seg import (
    FpRefCoco,
    FpRefCocoG,
    FpRefCocoPlus,
    GRefCoco,
    RefClef,
    RefCoco,
    RefCocoG,
    RefCocoPlus,
    RobustRefCoco,
    RobustRefCocoG,
    RobustRefCocoPlus,
)
from .shapes import Shapes
from .source import SourceBuilder
from .supervisely import Supervisely
from .yolo import Yolo


logger = logging.getLogger(__name__)

SOURCES = {
    "shapes": Shapes,
    "ade20k": Ade20k,
    "cocostuff": CocoStuff,
    "mapillary": Mapillary,
    "paco_lvis": PacoLvis,
    "pascal_part": PascalPart,
    "refcoco": RefCoco,
    "refcoco+": RefCocoPlus,
    "refcocog": RefCocoG,
    "refclef": RefClef,
    "grefcoco": GRefCoco,
    "fprefcoco": FpRefCoco,
    "fprefcoco+": FpRefCocoPlus,
    "fprefcocog": FpRefCocoG,
    "R-refcoco": RobustRefCoco,
    "R-refcoco+": RobustRefCocoPlus,
    "R-refcocog": RobustRefCocoG,
    "llava_instruct": LlavaInstruct,
    "reason_seg": ReasonSeg,
    "muse": Muse,
    "lisa_plus": LisaPlus,
    # Your own data: a recipe chooses the name and sets one of these as `builder`.
    "coco_instances": CocoInstances,
    "labelme": LabelMe,
    "image_folder": ImageFolder,
    "yolo": Yolo,
    "cvat": Cvat,
    "label_studio": LabelStudio,
    "supervisely": Supervisely,
    "class_masks": ClassMasks,
    "coco_panoptic": CocoPanoptic,
    "hub": Hub,
}


def load_source(
    name: str,
    data_dir: str | None = None,
    split: str | None = "train",
    streaming: bool = False,
    builder: str | None = None,
    cache_dir: str | None = None,
    **options,
) -> Dataset | IterableDataset | DatasetDict | IterableDatasetDict:
    """Load one split of a source, or all of them, and log how many records were skipped or excluded.

    Args:
        name: Key of `SOURCES`, or any name if `builder` is set.
        data_dir: Directory of all datasets, in LISA's layout. Drawn sources do not need it.
        split: Name of a split, as in the docstring of the builder. Your own data has a single split of any name. None
            loads all splits.
        streaming: Whether to make rows as they are read, instead of preparing them once in the cache of `datasets`.
        builder: Key of `SOURCES` that reads a source with a custom name; or a class in your Python file, such as
            "my_builder.py:Boxes", whose code is run.
        cache_dir: Directory of prepared rows. Defaults to the cache of `datasets`.
        options: Fields of the builder's config.

    Returns:
        Rows of `lisa_hf.data.rows.FEATURES`: a `Dataset`, or an `IterableDataset` if streaming. With `split=None`, a
        `DatasetDict` or an `IterableDatasetDict`.

    Raises:
        ValueError: If the source or an option does not exist, or for bad data.
        FileNotFoundError: If the data does not exist.
    """
    with _naming_the_cache(name, str(cache_dir or datasets.config.HF_DATASETS_CACHE), builder):
        builder = make_builder(name, data_dir, split, builder, cache_dir, **options)
        if not streaming:
            builder.download_and_prepare()
    if streaming:
        rows = builder.as_streaming_dataset(split=split)
    else:
        if not any(found.num_examples for found in builder.info.splits.values()):
            remarks = "; ".join(["expected at least one row, got none", *builder.remarks()])
            raise ValueError(f"source {name!r}: {remarks}.")
        rows = builder.as_dataset(split=split)
        logger.info("%s: its rows are kept in %s until its files change.", name, builder.cache_dir)
    for remark in builder.remarks():
        logger.info("%s: %s.", name, remark)
    return rows


@contextlib.contextmanager
def _naming_the_cache(name: str, cache_dir: str, builder: str | None):
    """Say what a source was being prepared for, and what to do if its rows cannot be written there."""
    try:
        yield
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        is_full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        is_inside = str(getattr(cause, "filename", None)).startswith(cache_dir)
        if is_full or (is_inside and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS)):
            raise OSError(
                f"source {name!r}: expected to write its prepared rows to {cache_dir}, got {cause}. Make room or get "
                "the permission, or set HF_DATASETS_CACHE to another directory."
            ) from error
        if cause is error:
            raise
        raise ValueError(f"source {name!r}: cannot be prepared: {_describe(cause, builder or '')}") from error


def _describe(error: BaseException | None, builder: str) -> str:
    """Return the message of an error. If it is a bug of the user's own builder, say where."""
    if error is None or isinstance(error, OSError | ValueError):
        return str(error)
    file = os.path.abspath(os.path.expanduser(builder.rpartition(":")[0]))
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{type(error).__name__}: {error}" + (f" ({file}, line {lines[-1]})" if lines else "")


def make_builder(
    name: str,
    data_dir: str | None = None,
    split: str | None = "train",
    builder: str | None = None,
    cache_dir: str | None = None,
    **options,
) -> SourceBuilder:
    """Make the builder of a source. Arguments and errors are those of [`load_source`]."""
    if not isinstance(split, str | None):
        raise ValueError(f"source {name!r}: expected split as a name, got {split!r}.")
    builder_class = find_builder(name, builder)
    known = _option_types(builder_class)
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"source {name!r}: expected options among {sorted(known)}, got {option!r}.")
        kind = known[option]
        if kind in (bool, int, str) and not isinstance(value, kind):
            raise ValueError(f"source {name!r}: expected {option} as {kind.__name__}, got {value!r}.")
    if not builder_class.SOURCE:
        options |= {"config_name": name}
        options |= {"split": split or "train"} if "split" in known else {}
    options |= {"data_dir": data_dir, "cache_dir": cache_dir}
    made = builder_class(**options)
    if options.get("on_bad_row") == "skip":
        strict = builder_class(**options | {"on_bad_row": "raise"})
        # Rows that were prepared without skipping have nothing to skip: use them.
        return strict if os.path.isdir(strict.cache_dir) else made
    return made


def load_sources(
    sources: dict[str, dict],
    data_dir: str | None = None,
    max_rows: int | None = None,
    streaming: bool = False,
    on_bad_row: str = "raise",
    exclude_refer_val: bool = False,
) -> dict[str, Dataset | IterableDataset]:
    """Load the `sources` or `eval_sources` of a recipe.

    Args:
        sources: Options of [`load_source`] by the name of the source. A `weight` among them is ignored.
        data_dir: Directory of all datasets, in LISA's layout.
        max_rows: Number of rows to keep of each source, from the start. By default, all.
        streaming: Whether to stream the rows, see [`load_source`].
        on_bad_row: What to do with bad records, unless a source sets it, see [`~lisa_hf.data.rows.OnBadRow`].
        exclude_refer_val: Whether to exclude the COCO photos in a val or test split of the refer sources. The log says
            how many records of each source are excluded, and which sources have no COCO photos.
    """
    loaded = {}
    for name, options in complete_options(sources, on_bad_row, exclude_refer_val).items():
        rows = load_source(name, data_dir=data_dir, streaming=streaming, **options)
        if max_rows is not None:
            rows = rows.take(min(max_rows, len(rows)) if isinstance(rows, Dataset) else max_rows)
        loaded[name] = rows
    return loaded


def complete_options(
    sources: dict[str, dict], on_bad_row: str = "raise", exclude_refer_val: bool = False
) -> dict[str, dict]:
    """Return the options of [`load_source`] for each source: its own, plus those of the whole recipe."""
    completed, others = {}, []
    for name, options in sources.items():
        completed[name] = {"on_bad_row": on_bad_row, **options}
        completed[name].pop("weight", None)
        if issubclass(find_builder(name, options.get("builder")), CocoBuilder):
            completed[name].setdefault("exclude_refer_val", exclude_refer_val)
        else:
            others.append(name)
    if exclude_refer_val and others:
        logger.info(
            "exclude_refer_val does not change these sources, which have no COCO photos: %s.", ", ".join(others)
        )
    return completed


def find_builder(name: str, builder: str | None = None) -> type[SourceBuilder]:
    """Find the class that reads a source. Arguments and errors are those of [`load_source`]."""
    if not isinstance(builder, str | None):
        raise ValueError(f"source {name!r}: expected builder as a name, got {builder!r}.")
    file = f"{builder}:" if builder and builder.endswith(".py") else builder or ""  # without a class: see its error
    path, _, class_name = file.rpartition(":")
    if path.endswith(".py"):
        return _import_builder(os.path.abspath(os.path.expanduser(path)), class_name)
    if (builder or name) not in SOURCES:
        raise ValueError(
            f"expected a source among {', '.join(SOURCES)}, got {builder or name!r}. Did you mean "
            f"{nearest_name(builder or name, SOURCES)!r}? Your own data needs a `builder`."
        )
    return SOURCES[builder or name]


@functools.cache
def _import_builder(path: str, class_name: str) -> type[SourceBuilder]:
    """Import a builder from a Python file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"builder: expected a Python file, got {path!r}, which does not exist.")
    # In `sys.modules`, because the fingerprint of rows includes the source code of their builder.
    name = f"{os.path.basename(path)[:-3]}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(
            f"builder: expected a Python file that can be imported, got {path!r} ({type(error).__name__}: {error})."
        ) from error
    found = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, SourceBuilder) and value.__module__ == name
    }
    if class_name not in found:
        raise ValueError(
            f"builder: expected a subclass of data_scripts.source.SourceBuilder in {path!r}, got {class_name!r}. It "
            f"has {', '.join(found) or 'none'}."
        )
    return found[class_name]


def _option_types(builder_class: type) -> dict[str, type]:
    shared = {field.name for field in dataclasses.fields(datasets.BuilderConfig)}
    own = dataclasses.fields(builder_class.BUILDER_CONFIG_CLASS)
    return {field.name: field.type for field in own if field.name not in shared}
