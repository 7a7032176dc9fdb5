"""ZeRO-3 builds the same model in shards as one process builds whole."""

import pytest
import torch
from workers import sharded_loading_worker
from workers.launching import launch
from workers.sharded_loading_worker import CASES

from lisa_hf.training.trainer import LOSS_PARTS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharded")
    sharded_loading_worker.save_models(directory)
    launch(sharded_loading_worker.__file__, directory / "results.pt")
    expected = sharded_loading_worker.train(directory, 1, CASES["halves"], {})
    return torch.load(directory / "results.pt") | {"expected_losses": expected}


@pytest.mark.parametrize("name", CASES)
def test_weights_and_buffers_equal_those_of_a_whole_model_exactly(name, results):
    found = results[name]
    assert found["different"] == found["left_over"] == [] and found["num_weights"] > 200
    assert found["trained"][0] == found["trained"][1] and any(found["trained"][0])
    assert found["tied"] == [CASES[name]["tied"]] * 2
    assert found["tables"][0] == found["tables"][1]  # sizes of parts, although empty tensors are left of their weights
    assert found["held"] == pytest.approx(0.5, abs=0.02)


def test_losses_equal_those_of_a_whole_model(results):
    assert len(results["losses"]) == 4
    for entry, reference in zip(results["losses"], results["expected_losses"], strict=True):
        for key in ("loss", "grad_norm", *LOSS_PARTS):
            assert entry[key] == pytest.approx(reference[key], rel=1e-5), key
