"""Photos of the phone-photo benchmark: rotated and upright ones are the same pictures with the same masks."""

import sys

import numpy as np
import pytest
from fixtures.paths import ROOT

from data_scripts import load_sources
from lisa_hf.data.mixture import EvaluationDataset


@pytest.fixture
def phone_photos(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "benchmarks"))
    yield pytest.importorskip("phone_photos")
    sys.modules.pop("phone_photos")


def test_turned_and_upright_photos_are_the_same(phone_photos, tmp_path):
    found = {}
    for arm in phone_photos.ARMS:
        phone_photos.write_arm(tmp_path, arm, 20, 0, large=False)
        options = {
            name: options | {"cache_dir": str(tmp_path / "cache")}
            for name, options in phone_photos.sources(tmp_path, arm, "train").items()
        }
        found[arm] = [item for rows in load_sources(options).values() for item in EvaluationDataset(rows)]
    assert len(found["upright"]) == len(found["turned"]) == 20
    for upright, turned in zip(found["upright"], found["turned"]):
        assert [question.masks for question in upright["questions"]] == [
            question.masks for question in turned["questions"]
        ]
        pixels = [np.asarray(item["image"]).astype(int) for item in (upright, turned)]
        difference = np.abs(pixels[0] - pixels[1])
        # JPEG's blocks are cut elsewhere; photos with 16 bits are stored without loss.
        assert difference.mean() < 1 if upright["image_id"] not in ("02", "07", "3") else not difference.any()
    sizes = {tuple(item["original_size"]) for item in found["turned"]}
    assert sizes == {(120, 160), (160, 120)}
