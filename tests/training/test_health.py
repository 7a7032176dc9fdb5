"""Steps that are not finite, and figures that stay flat: who is named, and that healthy runs are left in peace."""

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from fixtures.tiny_training import LISA_PARTS, Items, build_model, copy_state, make_trainer, sabotage
from workers.launching import launch

from lisa_hf.training.callbacks import FlatFigures
from lisa_hf.training.checkpointing import find_fault
from lisa_hf.training.trainable import prepare_for_training


def sabotaged_trainer(tmp_path, where, steps, **arguments):
    model, processor = build_model()
    model = prepare_for_training(model, LISA_PARTS, lora_r=4)
    sabotage(model, steps, where, micro_batches=2)
    settings = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    return make_trainer(model, processor, tmp_path, Items(), **settings | arguments)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("where", ["loss", "gradients"])
def test_a_bad_step_is_left_out_and_explained(where, max_grad_norm, tmp_path, caplog):
    trainer = sabotaged_trainer(tmp_path, where, {1}, max_grad_norm=max_grad_norm, save_strategy="steps", save_steps=1)
    with caplog.at_level(logging.WARNING, "lisa_hf.training.callbacks"):
        trainer.train()
    (record,) = (record for record in caplog.records if record.name == "lisa_hf.training.callbacks")
    message = record.getMessage()
    assert message.startswith("Step 2: not finite: ") and message.endswith("Left out (1 of at most 10).")
    if where == "loss":
        assert "mask_bce_loss of image_4 of drawn, image_5 of drawn." in message  # the first of the two micro-batches
    else:
        assert "gradients of" in message and "mask_decoder" in message and "seg_projector" in message
    states = trainer.recorder.saved_states
    same = [name for name in states[1] if torch.equal(states[1][name], states[2][name])]
    assert same == list(states[1])
    assert all(weight.isfinite().all() for weight in states[4].values())
    assert any(not torch.equal(states[2][name], states[3][name]) for name in states[2])
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(torch.tensor([entry["loss"], entry["mask_bce_loss"]]).isfinite().all() for entry in logs)


def test_too_many_bad_steps_stop_with_a_checkpoint(tmp_path):
    trainer = sabotaged_trainer(tmp_path, "loss", {1, 2, 3}, max_nonfinite_steps=1, max_steps=10)
    start = copy_state(trainer.model)
    with pytest.raises(ValueError, match="step 3: not finite: mask_bce_loss of .*max_nonfinite_steps is 1") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert trainer.state.global_step == 3 and find_fault(tmp_path / "checkpoint-3") is None
    final = copy_state(trainer.model)
    assert all(weight.isfinite().all() for weight in final.values())
    assert any(not torch.equal(start[name], final[name]) for name in start)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow), "zero2"])
def test_all_processes_leave_out_the_step_of_one(engine, tmp_path):
    launch("tests/workers/health_worker.py", tmp_path / "results", engine, launcher=engine)
    first, second = (json.loads((tmp_path / f"results.{rank}").read_text()) for rank in range(2))
    assert first["left_out"] == second["left_out"] == 1 and second["messages"] == []
    (message,) = first["messages"]  # the first process speaks for the second
    assert message.startswith("Step 2: not finite: mask_bce_loss of image_6 of drawn, image_7 of drawn.")
    assert len(first["losses"]) == 4 and all(map(math.isfinite, first["losses"]))


def test_zero3_stops_at_once(tmp_path):
    launch("tests/workers/health_worker.py", tmp_path / "results", "zero3", launcher="zero3")
    for rank in range(2):
        result = json.loads((tmp_path / f"results.{rank}").read_text())
        assert "step 2: not finite: mask_bce_loss of image_6 of drawn, image_7 of drawn. ZeRO-3" in result["error"]
        assert result["checkpoints"] == ["checkpoint-1"]


# ---- figures that stay flat -----------------------------------------------------------------------------------------


def run_figures(tmp_path, parts=LISA_PARTS, mask_losses=(), ce_loss=1.0, gious=(), rates=(), **arguments) -> str:
    """What the callback says about a run with these logs and evaluations."""
    model, processor = build_model()
    model = prepare_for_training(model, parts, lora_r=4)
    trainer = make_trainer(model, processor, tmp_path, Items(), **arguments)
    optimizer = trainer.create_optimizer()
    callback, state = FlatFigures(), SimpleNamespace(global_step=0, is_world_process_zero=True)
    kwargs = {"args": trainer.args, "state": state, "control": None, "model": model, "optimizer": optimizer}
    for mask_loss in mask_losses:
        state.global_step += 20
        logs = {"mask_bce_loss": mask_loss / 2, "mask_dice_loss": mask_loss / 2, "ce_loss": ce_loss}
        callback.on_log(logs=logs, **kwargs)
    state.global_step = max(state.global_step, 1000)
    for giou in gious:
        callback.on_evaluate(metrics={"eval_giou": giou}, **kwargs)
    for rate in rates:
        callback.on_evaluate(metrics={"eval_generated_seg_rate": rate}, **kwargs)


NOISE = [0.1 * ((7 * index) % 5 - 2) for index in range(40)]
FLAT = [2.0 + noise for noise in NOISE]
FALLING = [2.0 - 0.02 * index + noise for index, noise in enumerate(NOISE)]


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"mask_losses": FLAT}, ["The mask loss has not fallen in 600 steps", "a mask model without its pretrained"]),
        ({"mask_losses": FLAT, "parts": ["mask_decoder"]}, ["seg_projector is frozen (trainable: name it)."]),
        ({"mask_losses": FLAT, "parts": ["seg_projector"]}, ["mask_decoder is frozen (trainable: name it)."]),
        ({"mask_losses": FLAT, "learning_rate": 0.0}, ["causes: all learning rates are 0."]),
        ({"mask_losses": [0.0] * 40}, ["causes: no training row has a mask"]),
        ({"mask_losses": FLAT, "ce_loss": 0.0}, ["causes: no answer is labelled"]),
        ({"mask_losses": FALLING, "gious": [0.04, 0.03, 0.07, 0.05]}, ["eval_giou stays at 0.040, 0.030, 0.070"]),
        ({"rates": [0.0, 0.1, 0.0, 0.0]}, ["Few answers have their [SEG]: eval_generated_seg_rate stays at"]),
    ],
)
def test_a_failing_run_is_told_once_and_why(run, expected, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "lisa_hf.training.callbacks"):
        run_figures(tmp_path, **run)
    (record,) = caplog.records
    assert all(text in record.getMessage() for text in expected)


@pytest.mark.parametrize(
    "run",
    [
        {"mask_losses": FALLING, "gious": [0.04, 0.2, 0.5], "rates": [0.0, 0.7, 1.0]},
        {"mask_losses": FLAT[:14]},  # too early to tell
        {"mask_losses": [3.0] * 3 + [1.0 + noise / 10 for noise in NOISE], "gious": [0.6, 0.6, 0.6]},  # done early
        {"gious": [0.03, 0.04]},
    ],
)
def test_a_healthy_run_is_left_in_peace(run, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "lisa_hf.training.callbacks"):
        run_figures(tmp_path, **run)
    assert not caplog.records


@pytest.mark.parametrize("learning_rate", [3e-3, 0.0])
def test_in_a_run(learning_rate, tmp_path, caplog):
    """The same training, with and without a learning rate."""
    model, processor = build_model()
    model = prepare_for_training(model, LISA_PARTS, lora_r=4)
    arguments = {"optim": "adamw_torch", "learning_rate": learning_rate, "max_steps": 40}
    trainer = make_trainer(model, processor, tmp_path, Items(2), per_device_train_batch_size=2, **arguments)
    trainer.add_callback(FlatFigures(min_steps=30, min_logs=30))
    with caplog.at_level(logging.WARNING, "lisa_hf.training.callbacks"):
        trainer.train()
    messages = [record.getMessage() for record in caplog.records if record.name == "lisa_hf.training.callbacks"]
    expected = "The mask loss has not fallen in 30 steps. Likely causes: all learning rates are 0."
    assert messages == ([] if learning_rate else [expected])
