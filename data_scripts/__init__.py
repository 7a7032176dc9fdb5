"""One `datasets` builder per source of training data, all with the rows of `lisa_hf.data.rows`."""

import dataclasses
import logging
import os

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.exceptions import DatasetGenerationError

from lisa_hf.errors import nearest_name

from .coco import CocoBuilder
from .hub import Hub
from .label_maps import Ade20k, CocoStuff, Mapillary
from .llava_instruct import LlavaInstruct
from .own_data import CocoInstances, ImageFolder, LabelMe
from .paco_lvis import PacoLvis
from .pascal_part import PascalPart
from .reason_seg import ReasonSeg
from .refer_seg import GRefCoco, RefClef, RefCoco, RefCocoG, RefCocoPlus
from .shapes import Shapes
from .source import SourceBuilder


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
    "llava_instruct": LlavaInstruct,
    "reason_seg": ReasonSeg,
    # Data of your own, which a recipe gives a name and a `builder`.
    "coco_instances": CocoInstances,
    "labelme": LabelMe,
    "image_folder": ImageFolder,
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
    """Loads one split of one source, or all of them.

    What is missing from its rows, because it was skipped or left out, goes to the log.

    Args:
        name: A key of `SOURCES`, or any name if there is a `builder`.
        data_dir: The directory that holds all data sets in LISA's layout. Drawn sources do without.
        split: A split of the source; its builder names them. Data of your own have one split, by any name. None: all
            splits, as a dict by their names.
        streaming: Make the rows while they are read, instead of preparing them once in the cache of `datasets`.
        builder: A key of `SOURCES`: what reads data of your own, or a source that is used in two ways.
        cache_dir: Where prepared rows are kept; default: the cache of `datasets`.
        options: Fields of the source's `BuilderConfig`.

    Returns:
        Rows with `lisa_hf.data.rows.FEATURES`; a `Dataset`, or an `IterableDataset` if streaming; with `split=None` a
        `DatasetDict` or an `IterableDatasetDict` of them.

    Raises:
        ValueError: For a source or an option that does not exist, and for bad data.
        FileNotFoundError: If the data is not there.
    """
    builder = make_builder(name, data_dir, split, builder, cache_dir, **options)
    if streaming:
        rows = builder.as_streaming_dataset(split=split)
    else:
        try:
            builder.download_and_prepare()
        except DatasetGenerationError as error:
            raise ValueError(f"The source {name!r} cannot be prepared: {error.__cause__}") from error
        rows = builder.as_dataset(split=split)
    for remark in builder.remarks():
        logger.info("%s: %s.", name, remark)
    return rows


def make_builder(
    name: str,
    data_dir: str | None = None,
    split: str | None = "train",
    builder: str | None = None,
    cache_dir: str | None = None,
    **options,
) -> SourceBuilder:
    """The builder behind [`load_source`], which has the same arguments and raises the same for wrong ones."""
    builder_class = _find_builder(name, builder)
    known = _option_types(builder_class)
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"The source {name!r} has no option {option!r}; its options are {sorted(known)}.")
        kind = known[option]
        if kind in (bool, int) and not isinstance(value, kind):
            raise ValueError(f"The option {option!r} of the source {name!r} is {kind.__name__}, got {value!r}.")
    if not builder_class.SOURCE:
        options |= {"config_name": name, "split": split or "train"}
    options |= {"data_dir": data_dir, "cache_dir": cache_dir}
    made = builder_class(**options)
    if options.get("on_bad_row") == "skip":
        strict = builder_class(**options | {"on_bad_row": "raise"})
        # What was prepared without skipping has nothing to skip.
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
    """Loads the sources of a recipe's `sources` or `eval_sources`, by name; a `weight` among the options is skipped.

    Args:
        sources: Options of [`load_source`] by the name of the source.
        data_dir, streaming: As in [`load_source`].
        max_rows: Keep so many first rows of each source.
        on_bad_row: What to do about records of which no row can be made, "skip" or "raise".
        exclude_refer_val: Train without the COCO photos in a val or test split of the refer sources. The log says how
            many records that leaves out of each source, and which sources have no such photos.
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
    """Options of [`load_source`] for each of a recipe's sources: its own, then those of the whole recipe."""
    completed, others = {}, []
    for name, options in sources.items():
        completed[name] = {"on_bad_row": on_bad_row, **options}
        completed[name].pop("weight", None)
        if issubclass(_find_builder(name, options.get("builder")), CocoBuilder):
            completed[name].setdefault("exclude_refer_val", exclude_refer_val)
        else:
            others.append(name)
    if exclude_refer_val and others:
        logger.info(
            "exclude_refer_val leaves these as they are, because they name no COCO photos: %s.", ", ".join(others)
        )
    return completed


def _find_builder(name: str, builder: str | None) -> type:
    if (builder or name) not in SOURCES:
        raise ValueError(
            f"expected a source among {', '.join(SOURCES)}, got {builder or name!r}. Did you mean "
            f"{nearest_name(builder or name, SOURCES)!r}? Your own data needs a `builder`."
        )
    return SOURCES[builder or name]


def _option_types(builder_class: type) -> dict[str, type]:
    shared = {field.name for field in dataclasses.fields(datasets.BuilderConfig)}
    own = dataclasses.fields(builder_class.BUILDER_CONFIG_CLASS)
    return {field.name: field.type for field in own if field.name not in shared}
