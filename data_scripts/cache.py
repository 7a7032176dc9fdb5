"""Find and remove what the builders store in the cache of `datasets`: prepared rows, and records next to them.

Rows are stored under a fingerprint of their source files, so the rows of old versions of files remain.
"""

import glob
import shutil
from collections.abc import Collection
from pathlib import Path

import datasets

from .source import OWNER, read_json


def clean_cache(sources: Collection[str] = (), cache_dir: str | None = None) -> dict[str, int]:
    """Remove what the builders store. Files of other programs stay. No source may be in use.

    Args:
        sources: Names of sources. By default, all.
        cache_dir: As in [`load_source`].

    Returns:
        Number of bytes removed for each source.
    """
    root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
    removed: dict[str, int] = {}
    # Builder, source and options, version, fingerprint: the layout of `datasets`.
    for marker in sorted(root.glob(f"*/*/*/*/{OWNER}")):
        source = read_json(str(marker))["source"]
        if sources and source not in sources:
            continue
        directory = marker.parent
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        removed[source] = removed.get(source, 0) + size
        shutil.rmtree(directory)
        rows = directory.with_name(directory.name.removesuffix(".records"))
        locks = [*rows.parent.glob(f"{rows.name}*.lock"), root / f"{str(rows.absolute()).replace('/', '_')}.lock"]
        for lock in locks:
            lock.unlink(missing_ok=True)
        for left in rows.parent.glob(f"{glob.escape(rows.name)}.incomplete*"):  # by a process that was killed
            shutil.rmtree(left)
        for parent in list(directory.parents)[:3]:
            if any(parent.iterdir()):
                break
            parent.rmdir()
    return removed
