"""Several processes (DDP on gloo) give what one process gives: loss, gradients, weights and metrics."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch
from distributed_worker import TRAINING_RUNS
from tiny_training import assert_gradients_equal

from lisa_hf.trainer import LOSS_PARTS


ROOT = Path(__file__).parents[1]
CUTS = [(name, cut) for name, settings in TRAINING_RUNS.items() for cut in settings["cuts"]]


@pytest.fixture(scope="module")
def one():
    return distributed_worker.run(1)


def launch(num_processes: int, path: Path) -> dict:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [*launcher, distributed_worker.__file__, str(path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout[-5000:]
    return torch.load(path, weights_only=False)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(2, tmp_path_factory.mktemp("two") / "results.pt")


@pytest.mark.parametrize(("name", "cut"), CUTS)
def test_training(name, cut, one, two):
    expected, found = one[name], two[name, cut]
    assert len(expected["logs"]) == len(expected["gradients"]) == 4
    for entry, reference in zip(found["logs"], expected["logs"], strict=True):
        for key in ("loss", "grad_norm", *LOSS_PARTS):
            assert entry[key] == pytest.approx(reference[key], rel=1e-5), key
        assert entry["loss"] == pytest.approx(sum(entry[part] for part in LOSS_PARTS), rel=1e-5)
        assert entry.get("num_skipped_rows") == reference.get("num_skipped_rows")
    for gradients, reference in zip(found["gradients"], expected["gradients"], strict=True):
        assert_gradients_equal(gradients, reference)
    assert expected["logs"][-1]["num_skipped_rows"] == 2 * (1 + 2)  # two epochs
    for key, weight in expected["weights"].items():
        assert (found["weights"][key] - weight).abs().max() <= 1e-5, key


def test_metrics_of_an_uneven_set(one, two):
    def figures(metrics):
        # The loss is a mean over batches, and batches differ; seconds differ anyway.
        return {key: value for key, value in metrics.items() if not key.endswith(("loss", "time", "second"))}

    assert figures(one["metrics"]) == figures(two["metrics"])
    items = distributed_worker.Items(distributed_worker.NUM_EVAL_ITEMS)
    assert two["metrics"]["eval_num_questions"] == sum(len(item["questions"]) for item in items)
    # The case proves something only if some answers have a [SEG] and others have none.
    assert 0 < two["metrics"]["eval_generated_seg_rate"] < 1
    assert 0 < two["metrics"]["eval_generated_giou"] < 1


def test_benchmarks_to_the_last_bit(one, two, tmp_path):
    expected = one["benchmarks"]
    assert two["benchmarks"] == expected
    assert launch(3, tmp_path / "results.pt")["benchmarks"] == expected

    results, questions = expected[distributed_worker.NUM_EVAL_ITEMS]
    assert [results[name]["num_items"] for name in ("", "_short", "_long")] == [7, 3, 4]
    counts = {name: figures["num_questions"] for name, figures in results[""]["protocols"].items()}
    assert counts == {"lisa": 7, "generated": 7, "all_texts": 13, "generated_all_texts": 13}
    assert 0 < results[""]["protocols"]["generated"]["seg_rate"] < 1
    assert results[""]["protocols"]["lisa"].keys() >= {"giou_low", "ciou_high", "p@0.5", "n_acc", "t_acc"}
    assert len(questions) == 12 and list(questions.values())[0].startswith("rank 1 of 13, IoU ")
    # Fewer images than processes, and none of the same kind twice.
    results, _ = expected[2]
    assert {name: result["num_items"] for name, result in results.items()} == {"": 2, "_short": 1, "_long": 1}
    assert results["_long"]["protocols"].keys() == {"lisa", "generated"}
