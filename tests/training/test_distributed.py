"""Several processes give the same loss, gradients, weights and metrics as one, with every engine."""

import numpy as np
import pytest
import torch
from fixtures.tiny_training import ENGINES, amount, assert_gradients_equal
from workers import distributed_worker
from workers.distributed_worker import TRAINING_RUNS
from workers.launching import launch

from lisa_hf.evaluation.benchmarks import questions_to_draw
from lisa_hf.evaluation.protocols import PROTOCOLS
from lisa_hf.training.trainer import LOSS_PARTS


CUTS = [(name, cut) for name, settings in TRAINING_RUNS.items() for cut in settings["cuts"]]
WRAPPERS = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPPeftModel",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}
NUM_STEPS = 4


def run_in_processes(directory, num_processes: int, num_steps: int = NUM_STEPS) -> dict:
    path = directory / "results.pt"
    launch(distributed_worker.__file__, path, num_steps, num_processes=num_processes)
    return torch.load(path, weights_only=False)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return distributed_worker.run(1, NUM_STEPS, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_in_processes(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Evaluations alone count, which Trainer starts under ZeRO-2 as part of a training only."""
    return run_in_processes(tmp_path_factory.mktemp("three"), 3, num_steps=1)


@pytest.mark.parametrize(("name", "cut"), CUTS)
def test_training(name, cut, one, two):
    expected, found = one[name], two[name, cut]
    assert len(expected["logs"]) == len(expected["gradients"]) == 4
    for entry, reference in zip(found["logs"], expected["logs"], strict=True):
        for key in ("loss", "grad_norm", *LOSS_PARTS):
            assert entry[key] == pytest.approx(reference[key], rel=1e-5), key
        assert entry["loss"] == pytest.approx(sum(entry[part] for part in LOSS_PARTS), rel=1e-5)
        assert entry.get("num_skipped_rows") == reference.get("num_skipped_rows")
        assert entry["items/drawn"] == reference["items/drawn"] == 8
        for key in ("images", "tokens", "masks"):
            assert amount(entry, key, 1) == pytest.approx(amount(reference, key, 1)), key
    for gradients, reference in zip(found["gradients"], expected["gradients"], strict=True):
        assert_gradients_equal(gradients, reference)
    assert expected["logs"][-1]["num_skipped_rows"] == 2 * (1 + 2)  # two epochs
    for key, weight in expected["weights"].items():
        assert (found["weights"][key] - weight).abs().max() <= 1e-5, key


def figures(entry: dict) -> dict:
    """What cannot depend on the number of processes: not the seconds, and not the mean loss over unequal batches."""
    return {key: value for key, value in entry.items() if not key.endswith(("_loss", "time", "_second"))}


def split(logs: list[dict]) -> tuple[list[dict], list[dict]]:
    """The losses of the steps, and the figures before the first one; the last entry sums up."""
    return [entry for entry in logs if "loss" in entry], [entry for entry in logs[:-1] if "loss" not in entry]


def assert_same_curve(found: dict, expected: dict, num_steps: int):
    found, expected = split(found["logs"])[0], split(expected["logs"])[0]
    masks = [entry["mask_bce_loss"] for entry in expected]
    assert len(masks) == num_steps and masks[2] == 0 < masks[1]
    for entry, reference in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm", *LOSS_PARTS):
            assert entry[key] == pytest.approx(reference[key], rel=1e-5), (key, entry["step"])


def assert_same_figures(found: dict, expected: dict):
    """Figures of an uneven evaluation set and of one without a mask, from given and from generated answers."""
    found, expected = split(found["logs"])[1], split(expected["logs"])[1]
    assert [figures(entry) for entry in found] == [figures(entry) for entry in expected]
    uneven, maskless = expected
    assert 0 < uneven["eval_uneven_generated_seg_rate"] < 1
    assert maskless["eval_maskless_num_questions"] == 4 and maskless["eval_maskless_num_masks"] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_agree(engine, one, two, three):
    assert two[engine]["wrapper"] == three[engine]["wrapper"] == WRAPPERS[engine]
    assert_same_curve(two[engine], one["ddp"], NUM_STEPS)
    assert_same_figures(two[engine], one["ddp"])
    assert_same_figures(three[engine], one["ddp"])
    whole = one["ddp"]["num_held_weights"]
    held = two[engine]["num_held_weights"] / whole
    assert held < 0.6 if engine in ("fsdp2", "zero3") else held == 1
    (sheet,), (expected,) = two[engine]["sheets"], one["ddp"]["sheets"]
    assert np.array_equal(sheet, expected)


def assert_same_metrics(found: dict, expected: dict):
    assert figures(found) == figures(expected)
    items = distributed_worker.Items(distributed_worker.NUM_EVAL_ITEMS)
    assert found["eval_num_questions"] == sum(len(item["questions"]) for item in items)
    # The case proves something only if some answers have a [SEG] and others have none.
    assert 0 < found["eval_generated_seg_rate"] < 1
    assert 0 < found["eval_generated_giou"] < 1


def test_evaluation_to_the_last_bit(one, two, three):
    assert_same_metrics(two["metrics"], one["metrics"])
    assert_same_metrics(three["metrics"], one["metrics"])
    expected = one["benchmarks"]
    assert two["benchmarks"] == three["benchmarks"] == expected

    results, scores, _ = expected[distributed_worker.NUM_EVAL_ITEMS]
    assert [results[name]["num_items"] for name in ("", "_short", "_long")] == [7, 3, 4]
    counts = {name: figures["num_questions"] for name, figures in results[""]["protocols"].items()}
    all_texts = {"all_texts": 13, "generated_all_texts": 13}
    assert counts == dict.fromkeys(PROTOCOLS, 7) | all_texts
    assert 0 < results[""]["protocols"]["generated"]["seg_rate"] < 1
    assert results[""]["protocols"]["lisa"].keys() >= {"giou_low", "ciou_high", "p@0.5", "n_acc", "t_acc"}
    titles = questions_to_draw(scores["generated_all_texts"])
    assert len(titles) == 12 and list(titles.values())[0].startswith("rank 1 of 13, IoU ")
    # Fewer images than processes, and none of the same kind twice.
    results, _, _ = expected[2]
    assert {name: result["num_items"] for name, result in results.items()} == {"": 2, "_short": 1, "_long": 1}
    assert results["_long"]["protocols"].keys() == PROTOCOLS.keys() - all_texts.keys()


@pytest.mark.slow
def test_engines_agree_over_twenty_steps(tmp_path):
    expected, found = distributed_worker.run(1, 20, tmp_path / "one"), run_in_processes(tmp_path, 2, 20)
    for engine in ENGINES:
        assert_same_curve(found[engine], expected["ddp"], 20)
        assert_same_figures(found[engine], expected["ddp"])
