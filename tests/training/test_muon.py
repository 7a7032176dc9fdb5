"""Muon and AdamW as one optimizer: who updates what, schedules, and exact resuming."""

import copy

import pytest
import torch
from fixtures.tiny_training import build_model, make_item, make_trainer
from torch.optim import AdamW

from lisa_hf.from_scratch.muon import MuonAdamW, use_muon


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    model, processor = build_model()
    items = [make_item(index, [1, 1]) for index in range(4)]
    return make_trainer(
        model,
        processor,
        tmp_path_factory.mktemp("run"),
        items,
        optim="adamw_torch",
        muon_learning_rate=0.02,
        learning_rate=1e-3,
        weight_decay=0.1,
        max_steps=4,
    )


def test_muon_takes_the_inner_matrices(trainer):
    model = trainer.model
    trainer.optimizer = None
    optimizer = trainer.create_optimizer()
    names = {parameter: name for name, parameter in model.named_parameters()}
    muon = {names[parameter] for group in optimizer.muon.param_groups for parameter in group["params"]}
    adamw = {names[parameter] for group in optimizer.adamw.param_groups for parameter in group["params"]}
    assert muon | adamw == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not muon & adamw
    assert "seg_projector.linear_1.weight" in muon and "seg_projector.linear_1.bias" in adamw
    assert any("q_proj.weight" in name for name in muon)
    assert not any("embed" in name or "lm_head" in name or "norm" in name for name in muon)
    assert {group["lr"] for group in optimizer.muon.param_groups} == {0.02}
    assert {group["lr"] for group in optimizer.adamw.param_groups} == {1e-3}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}


def test_a_schedule_moves_both_learning_rates(trainer):
    trainer.optimizer = None
    optimizer = trainer.create_optimizer()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert optimizer.muon.param_groups[0]["lr"] == pytest.approx(0.01)
    assert optimizer.adamw.param_groups[0]["lr"] == pytest.approx(5e-4)
    assert scheduler.get_last_lr()[0] == pytest.approx(0.01)


def test_resuming_is_exact():
    torch.manual_seed(0)
    gradients = [torch.randn(6, 4) for _ in range(6)], [torch.randn(6) for _ in range(6)]

    def start() -> tuple[torch.nn.Linear, MuonAdamW]:
        torch.manual_seed(1)
        layer = torch.nn.Linear(4, 6)
        layer.get_output_embeddings = lambda: None
        return layer, use_muon(AdamW(layer.parameters(), lr=0.1), layer, 0.02)

    def run(layer, optimizer, steps):
        for step in steps:
            layer.weight.grad, layer.bias.grad = gradients[0][step].clone(), gradients[1][step].clone()
            optimizer.step()
            optimizer.zero_grad()
            assert layer.weight.grad is None and layer.bias.grad is None

    whole, optimizer = start()
    run(whole, optimizer, range(6))
    first, optimizer = start()
    run(first, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    second, resumed = start()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(state)
    run(second, resumed, range(3, 6))
    assert torch.equal(second.weight, whole.weight) and torch.equal(second.bias, whole.bias)
    assert not torch.equal(first.weight, whole.weight)
