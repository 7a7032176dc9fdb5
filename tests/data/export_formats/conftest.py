"""A directory with a photo, and the rows that an export in it gives."""

import datasets
import numpy as np
import PIL.Image
import pytest
from fixtures.tool_exports import HEIGHT, WIDTH

from data_scripts import load_source, make_builder
from lisa_hf.data.mixture import EvaluationDataset


@pytest.fixture
def root(tmp_path):
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "photos" / "a.jpg")
    return tmp_path


@pytest.fixture
def load(root):
    def load(builder, **options):
        options |= {"builder": builder, "cache_dir": str(root / "cache")}
        rows = load_source("mine", str(root), **options).cast_column("image", datasets.Image(decode=False))
        load.remarks = make_builder("mine", str(root), **options).remarks()
        EvaluationDataset(rows)[0]  # its photo is found, and has the size of the masks
        assert list(load_source("mine", str(root), streaming=True, **options).decode(False)) == list(rows)
        return rows

    return load
