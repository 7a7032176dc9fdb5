"""The plan of a run: operations equal those of a real step, and the table follows from the cluster's numbers."""

import re

import plan
import pytest
from fixtures.paths import ROOT
from fixtures.recipes import write_config
from torch.utils.flop_counter import FlopCounterMode

from lisa_hf import LisaDataCollator
from lisa_hf.model.packing import resolve_packing
from lisa_hf.training.arguments import parse_arguments
from lisa_hf.training.build import build_config_and_processor, build_model
from lisa_hf.training.memory_estimate import example_batch
from lisa_hf.training.trainable import prepare_for_training


GIGA = plan.Model(flops=10**15, weight_bytes=16 * 10**9, gradient_bytes=10**9, memory={"DDP": 0, "ZeRO-3": 0})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_of_a_real_step(checkpointing, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", output_dir="run", lora_r=4, activation_checkpointing=checkpointing)
    arguments = parse_arguments(["--config", str(config)])
    counted = plan.measure_model(*arguments, num_gpus=4)
    model_args, data_args, args = arguments
    lisa_config, processor = build_config_and_processor(model_args)
    model = prepare_for_training(build_model(model_args, lisa_config), **model_args.adaptation)
    collator = LisaDataCollator(processor, packing=resolve_packing(model.config, data_args.packing))
    batch = example_batch(collator, args.per_device_train_batch_size, data_args.num_questions)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=args.activation_checkpointing_kwargs)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    # With fake tensors, torch stops recomputing a few operations earlier.
    assert counted.flops == pytest.approx(counter.get_total_flops(), rel=0.003 if checkpointing else 0)
    weights = [(p.nbytes, p.requires_grad) for p in model.parameters()]
    assert counted.weight_bytes == sum(size for size, _ in weights)
    assert counted.gradient_bytes == sum(size for size, trained in weights if trained)
    assert counted.memory.keys() == plan.ENGINES.keys() and all(counted.memory.values())


def test_seconds_follow_from_the_cluster():
    node = plan.Cluster(gpus_per_node=4, peak_tflops=1000, mfu=0.5, node_bandwidth=100, network_bandwidth=10)
    # 10^15 operations at 0.5 * 10^15 per second, twice a step; 3/4 of twice 10^9 bytes at 10^11 per second.
    assert plan.step_seconds(GIGA, "DDP", node, 2) == pytest.approx((4.0, 0.015))
    # Three quarters of the gradients and twice the weights, twice a step.
    assert plan.step_seconds(GIGA, "ZeRO-3", node, 2) == pytest.approx((4.0, 0.75 * 2 * 33e9 / 100e9))
    assert plan.step_seconds(GIGA, "FSDP2", node, 2) == plan.step_seconds(GIGA, "ZeRO-3", node, 2)
    node.nodes = 2
    assert plan.step_seconds(GIGA, "DDP", node, 1) == pytest.approx((2.0, 7 / 8 * 2e9 / 10e9))
    alone = plan.Cluster(gpus_per_node=1)
    assert plan.step_seconds(GIGA, "DDP", alone, 1)[1] == 0


def test_the_fastest_engine_that_fits(tmp_path, monkeypatch):
    config = ["--config", str(write_config(tmp_path / "tiny.yaml", output_dir="run", max_steps=86400))]
    memory = {"DDP": 90 * 2**30, "ZeRO-2": 50 * 2**30, "ZeRO-3": 20 * 2**30}
    model = plan.Model(flops=10**12, weight_bytes=10**9, gradient_bytes=0, memory=memory)
    monkeypatch.setattr(plan, "measure_model", lambda *_: model)
    cluster = plan.Cluster(gpus_per_node=2, peak_tflops=1, mfu=1.0, node_bandwidth=1)
    table = plan.report(cluster, config)
    assert "86400 steps of 4 images on 2 GPUs" in table
    assert "| DDP | 90.0 | no | 1.00 | 0.00 | 4.0 | 1.00 | 48 |" in table
    assert "| ZeRO-3 | 20.0 | yes | 1.00 | 1.00 | 2.0 | 2.00 | 96 |" in table
    assert table.endswith("ZeRO-2 is the fastest of those that fit.")
    cluster.gpu_memory = 10
    assert "None fits" in plan.report(cluster, config)
    with pytest.raises(ValueError, match="max_steps: expected the number of steps"):
        plan.report(cluster, [*config, "--max_steps", "-1", "--num_train_epochs", "1"])


def test_every_measured_step_is_compared():
    page = (ROOT / "docs" / "cost.md").read_text()
    steps = plan.measured_steps(page)
    assert steps[:3] == [
        ("mid, original's arithmetic", 697.8, 10.83),
        ("mid, this code", 286.6, 3.92),
        ("mid, with a warm feature cache", 157.3, 2.42),
    ]
    # Fifteen sizes with three variants, four photo sizes with one more.
    assert len(steps) == 3 + 15 * 3 + 4
    assert ("small, image size, megapixels: 12, losses on sampled points", 40.9, 0.655) in steps
    table = plan.check(page)
    assert "| mid, this code | 286.6 | 3.92 | 3.92 | +0% |" in table
    assert "| small, image size, megapixels: 12, this code | 40.9 | 3.9 | 0.56 | -86% |" in table
    assert re.search(r"52 steps, median error \d+%, at 73.1 GFLOP/s", table)
