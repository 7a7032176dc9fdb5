"""Loader workers of a mixture: epochs, memory, two processes with two workers."""

import itertools
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from fixtures.paths import REAL_SAMPLES, ROOT, STORIES
from fixtures.rows import comparable, image_file, segmentation_row
from torch.utils.data import DataLoader

from lisa_hf.data.mixture import MixtureDataset
from lisa_hf.data.rows import FEATURES


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_workers_hear_of_a_new_epoch(sources, num_workers):
    data = MixtureDataset(sources, length=6, seed=3)
    expected = [comparable(item) for item in MixtureDataset(sources, length=12, seed=3)]
    loader = DataLoader(
        data, batch_size=2, num_workers=num_workers, collate_fn=list, persistent_workers=num_workers > 0
    )
    found = []
    for epoch in range(2):
        data.set_epoch(epoch)
        found += [comparable(item) for batch in loader for item in batch]
    assert found == expected


def anonymous_memory(_):
    """Bytes of this process that no file backs."""
    with open("/proc/self/smaps_rollup") as lines:
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous"))


def test_a_loader_worker_does_not_grow_with_the_annotations(tmp_path):
    image = image_file(tmp_path / "image.png")
    row = segmentation_row("classes", 0, image, explanation="x" * 50_000)
    memory, message = {}, {}
    for num_rows in (20, 2000):  # 1 and 100 MB
        cache_dir = str(tmp_path / str(num_rows))
        rows = Dataset.from_generator(lambda: itertools.repeat(row, num_rows), FEATURES, cache_dir=cache_dir)
        data = MixtureDataset({"classes": rows}, length=400)
        message[num_rows] = len(pickle.dumps(data))
        loader = DataLoader(data, batch_size=100, num_workers=1, collate_fn=anonymous_memory)
        *_, memory[num_rows] = loader
    assert message[2000] < message[20] + 1000 < 50_000  # what goes to a worker that is spawned
    assert memory[2000] < memory[20] + 30e6


# The names of LISA's training sets, with all of which it is drawn 9 : 3 : 3 : 1.
LISA_SOURCES = (
    *("ade20k", "cocostuff", "pascal_part", "paco_lvis", "mapillary"),
    *("refclef", "refcoco", "refcoco+", "refcocog"),
    *("llava_instruct", "reason_seg"),
)


@pytest.mark.slow
@pytest.mark.skipif(not (REAL_SAMPLES.is_dir() and STORIES.is_dir()), reason="needs the real samples and stories260K")
@pytest.mark.parametrize("streaming", [False, True])
def test_fifty_steps_over_the_whole_mixture_with_two_processes_and_two_workers(streaming, tmp_path):
    arguments = {
        "config": ROOT / "recipes" / "configs" / "real_samples.yaml",
        "data_dir": REAL_SAMPLES,
        "language_model": STORIES,
        "tokenizer": STORIES / "tokenizer.model",
        "output_dir": tmp_path / "run",
        "sources": json.dumps(dict.fromkeys(LISA_SOURCES)),
        "max_steps": 50,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 2,
        "use_cpu": True,
        "streaming": streaming,
    }
    environment = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [*launcher, str(ROOT / "recipes" / "train.py"), *(f"--{name}={value}" for name, value in arguments.items())],
        cwd=tmp_path,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    assert process.returncode == 0, process.stdout[-5000:]
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    losses = [entry["loss"] for entry in logs]
    assert state["global_step"] == 50 and np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    # The photo of one conversation is not there.
    assert 0 < logs[-1]["num_skipped_rows"] < 50
