import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest


# Keep prepared data out of the user's cache. datasets reads the variable when it is imported.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="lisa_hf_tests_")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

from datasets import Image
from fixtures.paths import GOLDEN, TREE
from fixtures.tiny_training import build_model

from data_scripts import load_source


@pytest.fixture
def tiny():
    """A LLaVA + SAM LISA with random weights, the same for every test, and its processor."""
    return build_model()


@pytest.fixture
def golden():
    """What was recorded from the original's datasets on the golden tree."""
    return json.loads((GOLDEN / "datasets.json").read_text())


@pytest.fixture
def tree(tmp_path):
    """A copy of the golden tree that a test may damage."""
    return Path(shutil.copytree(TREE, tmp_path / "dataset"))


@pytest.fixture
def load(tmp_path):
    """`load_source` with a separate cache; images stay paths."""

    def load(name, data_dir=TREE, **kwargs):
        rows = load_source(name, str(data_dir), cache_dir=str(tmp_path / "cache"), **kwargs)
        return rows.cast_column("image", Image(decode=False))

    return load
