"""Find and remove what the builders keep in the cache of `datasets`: prepared rows, and records beside them.

Rows are kept under a fingerprint of the files that they were made from, so those of changed files stay behind.
"""

import glob
import shutil
from collections.abc import Collection
from pathlib import Path

import datasets

from .source import OWNER, read_json


def clean_cache(sources: Collection[str] = (), cache_dir: str | None = None) -> dict[str, int]:
    """Remove what the builders keep. Files of other programs stay. No source may be in use.

    Args:
        sources: Names of sources. By default, all.
        cache_dir: As in [`load_source`].

    Returns:
        Number of bytes that were removed of each source.
    """
    root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
    removed: dict[str, int] = {}
    # Builder, source and options, version, fingerprint: as `datasets` arranges them.
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
