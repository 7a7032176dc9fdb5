"""Prepare the data sources of a recipe: download, check, preview, or convert them to Parquet; clean the cache.

    python recipes/prepare_data.py download ade20k refcoco --data_dir dataset
    python recipes/prepare_data.py check --config recipes/configs/lisa_7b.yaml --data_dir dataset
    python recipes/prepare_data.py preview refcoco --data_dir dataset
    python recipes/prepare_data.py convert refcoco reason_seg --data_dir dataset --output_dir parquet
    python recipes/prepare_data.py clean

Each command takes source names, or a recipe with `--config` for its training and evaluation sources. `clean` removes
the prepared rows of the named sources, or of all; they are prepared again when needed.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
from huggingface_hub import HfApi

from data_scripts import SOURCES, complete_options, find_builder, load_source
from data_scripts.benchmarks import BENCHMARKS
from data_scripts.cache import clean_cache
from data_scripts.check import check_source
from data_scripts.download import MANUAL_STEPS, WEB_FILES, download
from data_scripts.duplicates import KnownImages
from data_scripts.engines import Engine
from data_scripts.parquet import check_card, write_card, write_parquet
from lisa_hf.errors import check_name, report_user_errors
from lisa_hf.evaluation.visualization import preview_sheet
from lisa_hf.training.arguments import parse_data_arguments


EVALUATION_SPLITS = ("val", "test")  # prefixes of their names


def find_sources(args: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Return the names and options of the given sources, or of those in the recipe, which may also set `data_dir`."""
    if bool(args.sources) == bool(args.config):
        raise ValueError("expected source names, or --config with a recipe that has sources")
    if args.config:
        data_args = parse_data_arguments(args.config)
        args.data_dir = args.data_dir or data_args.data_dir
        # As in training, which may skip bad records; evaluation must not.
        training = complete_options(data_args.sources, data_args.on_bad_row, data_args.exclude_refer_val)
        found = [*training.items(), *data_args.eval_sources.items()]
    else:
        found = [(name, {}) for name in args.sources]
    if not found:
        raise ValueError(f"--config: expected sources or eval_sources in {args.config}, found none")
    for name, options in found:
        if args.command != "download" or (options.get("builder") or name) not in WEB_FILES:
            find_builder(name, options.get("builder"))
    return found


def run_download(args: argparse.Namespace):
    names = list(dict.fromkeys(options.get("builder") or name for name, options in find_sources(args)))
    if args.data_dir is None:
        raise ValueError("--data_dir: expected the directory to download into")
    # Print manual steps first: they can be done during the download.
    for name in (name for name in names if name in MANUAL_STEPS):
        step = MANUAL_STEPS[name].format(data_dir=Path(args.data_dir).absolute())
        print(f"{name}: needs a manual step. See {SOURCES[name].DOWNLOAD_PAGE}\n  {step}")
    download([name for name in names if name in WEB_FILES], args.data_dir, args.num_threads)


def run_clean(args: argparse.Namespace):
    names = [name for name, _ in find_sources(args)] if args.config else args.sources
    removed = clean_cache(names)
    for name, size in removed.items():
        print(f"{name}: removed {size / 2**20:.1f} MiB")
    print(f"Removed the prepared rows of {len(removed)} sources from {datasets.config.HF_DATASETS_CACHE}.")


def run_check(args: argparse.Namespace):
    reports = []
    for name, options in find_sources(args):
        reports.append(check_source(name, args.data_dir, **options))
        print(reports[-1], end="\n\n", flush=True)
    missing = [report.name for report in reports if not report.is_ready]
    print(f"Ready: {len(reports) - len(missing)} of {len(reports)}. Not ready: {', '.join(missing) or 'none'}.")
    sys.exit(1 if missing else 0)


def run_preview(args: argparse.Namespace):
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    sources = find_sources(args)
    paths = [output_dir / f"{name}_{options.get('split', 'train')}.png" for name, options in sources]
    if (old := [path for path in paths if path.exists()]) and not args.overwrite:
        raise ValueError(
            f"--output_dir: expected no earlier sheet, got {old[0]}. Name another, or replace it with --overwrite."
        )
    for (name, options), path in zip(sources, paths):
        rows = load_source(name, args.data_dir, **options).cast_column("image", datasets.Image(decode=False))
        # Choose evenly spaced rows, because neighbors are often similar.
        chosen = rows.select(np.linspace(0, len(rows) - 1, min(args.num_rows, len(rows)), dtype=int))
        preview_sheet(chosen).save(path)
        print(f"{name}: {len(chosen)} of {len(rows)} rows in {path.resolve()}")


def read_excluded(args: argparse.Namespace) -> KnownImages:
    """Read the images of `--exclude_images_of`: benchmarks, or evaluation sources of the recipe."""
    known = BENCHMARKS
    if args.config:
        known = known | {
            name: (options.get("builder") or name, options)
            for name, options in parse_data_arguments(args.config).eval_sources.items()
        }
    excluded = KnownImages()
    for name in args.exclude_images_of:
        check_name("--exclude_images_of", name, known)
        builder, options = known[name]
        rows = load_source(name, args.data_dir, **options | {"builder": builder})
        excluded.add(name, rows, args.engine, args.num_workers)
    return excluded


def run_convert(args: argparse.Namespace):
    if args.push_to_hub and "://" in args.output_dir:
        raise ValueError(f"--push_to_hub: expected a local --output_dir, got {args.output_dir}.")
    if not args.overwrite:
        check_card(args.output_dir)
    sources = find_sources(args)
    excluded = read_excluded(args)
    for name, options in sources:
        loaded = load_source(name, args.data_dir, **{"split": None} | options)
        splits = loaded if isinstance(loaded, datasets.DatasetDict) else {options["split"]: loaded}
        for split, rows in splits.items():
            directory = f"{args.output_dir}/{name}"
            is_training = not split.startswith(EVALUATION_SPLITS)
            written = write_parquet(
                *(rows, directory, split, args.num_workers, args.max_shard_size, args.overwrite, args.engine),
                excluded=excluded if is_training and excluded.names else None,
            )
            print(f"{name} {split}: {written.num_rows} rows in {len(written.paths)} files")
            for other, number in sorted(written.num_excluded.items()):
                print(f"{name} {split}: excluded {number} rows with images of {other}")
        if args.deduplicate:
            for split, rows in splits.items():
                if not split.startswith(EVALUATION_SPLITS):
                    excluded.add(f"{name} {split}", rows, args.engine, args.num_workers)
    write_card(args.output_dir, {name: builder.LICENSE for name, builder in SOURCES.items()})
    if "://" in args.output_dir:
        data_files = f"{args.output_dir}/{name}/data/{split}-*.parquet"
        print(f'load_dataset("parquet", data_files="{data_files}", split="train", streaming=True)')
    else:
        print(f'load_dataset("{args.output_dir}", "{name}", split="{split}", streaming=True)')
    if args.push_to_hub:
        api = HfApi()
        # Private, because most of these licenses forbid redistributing the photos.
        api.create_repo(repo_id=args.push_to_hub, repo_type="dataset", private=True, exist_ok=True)
        files = "*/data/*.parquet"
        api.upload_folder(
            repo_id=args.push_to_hub,
            repo_type="dataset",
            folder_path=args.output_dir,
            allow_patterns=[files, "README.md"],
            delete_patterns=files,  # files of an earlier upload that are not in the folder
        )


def parse_arguments() -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("sources", nargs="*", metavar="SOURCE", help=f"one of {', '.join(SOURCES)}")
    common.add_argument("--config", help="use the sources of this recipe (YAML)")
    common.add_argument("--data_dir", help="directory of all datasets in LISA's layout (default: the recipe's)")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("download", parents=[common], help="download files with direct links (resumable)")
    command.add_argument("--num_threads", type=int, default=4, help="number of files to download at once")
    command.set_defaults(run=run_download)
    command = commands.add_parser(
        "check", parents=[common], help="report missing files, bad records and images; status 1 if any"
    )
    command.set_defaults(run=run_check)
    command = commands.add_parser("preview", parents=[common], help="draw sheets of rows with their phrases and masks")
    command.add_argument("--output_dir", default="outputs/preview", help="directory of the sheets, one PNG per source")
    command.add_argument("--num_rows", type=int, default=8, help="number of rows per sheet")
    command.add_argument("--overwrite", action="store_true", help="replace earlier sheets")
    command.set_defaults(run=run_preview)
    command = commands.add_parser("convert", parents=[common], help="write Parquet with embedded images (resumable)")
    command.add_argument(
        "--output_dir", required=True, help="output directory or fsspec URL, with one subdirectory per source"
    )
    command.add_argument("--engine", choices=get_args(Engine), default="datasets", help="engine that runs the workers")
    command.add_argument("--num_workers", type=int, default=4, help="number of files to write at once")
    command.add_argument(
        "--exclude_images_of",
        nargs="+",
        default=[],
        metavar="BENCHMARK",
        help="exclude training rows whose image is in these benchmarks, or evaluation sources of the recipe",
    )
    command.add_argument(
        "--deduplicate",
        action="store_true",
        help="exclude training rows whose image is in an earlier source",
    )
    command.add_argument("--max_shard_size", default="500MB", help="approximate maximum file size")
    command.add_argument("--overwrite", action="store_true", help="replace shards of other rows and the README.md")
    command.add_argument("--push_to_hub", metavar="NAME", help="also upload to this private dataset on the Hub")
    command.set_defaults(run=run_convert)

    command = commands.add_parser(
        "clean", parents=[common], help="remove prepared rows of these sources, or of all, from the cache"
    )
    command.set_defaults(run=run_clean)
    return parser.parse_args()


def main():
    args = parse_arguments()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("data_scripts").setLevel(logging.INFO)
    with report_user_errors():
        args.run(args)


if __name__ == "__main__":
    main()
