"""One `datasets` builder per source of training data, all with the rows of `lisa_hf.schema`."""

from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError

from .label_maps import Ade20k, CocoStuff, Mapillary
from .llava_instruct import LlavaInstruct
from .paco_lvis import PacoLvis
from .pascal_part import PascalPart
from .reason_seg import ReasonSeg
from .refer_seg import GRefCoco, RefClef, RefCoco, RefCocoG, RefCocoPlus
from .shapes import Shapes


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
}


def load_source(
    name: str, data_dir: str | None = None, split: str = "train", streaming: bool = False, **config_kwargs
) -> Dataset | IterableDataset:
    """Loads one split of one source.

    Args:
        name: A key of `SOURCES`.
        data_dir: The directory that holds all data sets in LISA's layout. Drawn sources do without.
        split: A split of the source; its builder names them.
        streaming: Make the rows while they are read, instead of preparing them once in the cache of `datasets`.
        config_kwargs: Fields of the source's `BuilderConfig`, or `cache_dir`.

    Returns:
        Rows with `lisa_hf.schema.FEATURES`; a `Dataset`, or an `IterableDataset` if streaming.
    """
    if name not in SOURCES:
        raise ValueError(f"A source is one of {sorted(SOURCES)}, but found {name!r}.")
    builder = SOURCES[name](data_dir=data_dir, **config_kwargs)
    if streaming:
        return builder.as_streaming_dataset(split=split)
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        raise ValueError(f"The source {name!r} cannot be prepared: {error.__cause__}") from error
    return builder.as_dataset(split=split)


def load_sources(
    sources: dict[str, dict], data_dir: str | None = None, max_rows: int | None = None
) -> dict[str, Dataset]:
    """Loads the sources of a recipe's `sources` or `eval_sources`, by name; a `weight` among the options is skipped.

    Args:
        sources: Options of [`load_source`] by the name of the source.
        data_dir: As in [`load_source`].
        max_rows: Keep so many first rows of each source.
    """
    loaded = {}
    for name, options in sources.items():
        options = {key: value for key, value in options.items() if key != "weight"}
        rows = load_source(name, data_dir=data_dir, **options)
        loaded[name] = rows if max_rows is None else rows.select(range(min(max_rows, len(rows))))
    return loaded
