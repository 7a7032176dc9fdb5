"""Files and directories that appear completely or not at all, even if a process is killed while writing."""

import os
import shutil
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which is renamed to `path` on success and removed on failure."""
    # Other processes may write the same file, also some of other machines with the same id.
    incomplete = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.incomplete")
    try:
        yield incomplete
        os.replace(incomplete, path)
    except BaseException:
        incomplete.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Yield a new directory to write to, which is renamed to `directory` on success and removed on failure.

    SIGTERM counts as a failure and exits with code 143. Call it from the main thread, which alone can handle signals.

    Raises:
        ValueError: `directory` exists and is not an empty directory.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(
            f"Expected a new or empty directory, got {directory}, which exists and is not empty. Name another, or "
            "remove it."
        )
    incomplete = directory.with_name(f"{directory.name}.incomplete")
    if incomplete.exists():  # left by a killed process
        shutil.rmtree(incomplete)
    incomplete.mkdir(parents=True)
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield incomplete
        incomplete.rename(directory)
    except BaseException:
        shutil.rmtree(incomplete)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
