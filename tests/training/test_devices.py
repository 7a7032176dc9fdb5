"""Training and evaluation on an accelerator, and how often the host waits for it.

No accelerator is needed: tensors claim to be on one, see `fixtures.claimed_devices`.
"""

import torch
from accelerate.state import AcceleratorState, PartialState
from fixtures.claimed_devices import ClaimedDevices
from fixtures.tiny_training import Items, build_model, make_trainer, training_logs
from transformers import TrainerCallback

from lisa_hf.training.trainable import prepare_for_training


DEVICE = torch.device("cuda:0")
PARTS = ["seg_projector", "mask_decoder", "mask_encoder", "language_model"]


class CountWaits(TrainerCallback):
    """Count the waits of a step of `lisa_hf` and all that it calls, from its batches to its end."""

    def __init__(self, devices: ClaimedDevices):
        self.devices, self.steps = devices, []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(dict(self.devices.waits))
        self.devices.waits.clear()


def train(output_dir, monkeypatch, devices: ClaimedDevices | None = None) -> tuple[list[dict], dict, list[dict]]:
    """Return the log of three steps, the metrics after them, and the waits of each step."""
    model, processor = build_model()
    model = prepare_for_training(model, PARTS, lora_r=0)
    options = {"optim": "adamw_torch", "max_grad_norm": 1.0, "activation_checkpointing": True, "eval_generate": True}
    options |= {"max_steps": 3, "logging_steps": 3, "per_device_train_batch_size": 4}
    trainer = make_trainer(model, processor, output_dir, Items(), Items(4), **options)
    trainer.data_collator.packing = trainer.data_collator.compact = True
    counter = CountWaits(devices)
    if devices:
        monkeypatch.setitem(trainer.args.__dict__, "_setup_devices", DEVICE)
        for state in (PartialState, AcceleratorState):
            monkeypatch.setitem(state._shared_state, "device", DEVICE)
        model.to(DEVICE)
        trainer.add_callback(counter)
    trainer.train()
    metrics = trainer.evaluate()
    return training_logs(trainer), metrics, counter.steps


def test_equal_training_and_few_waits(tmp_path, monkeypatch):
    expected, expected_metrics, _ = train(tmp_path, monkeypatch)
    with ClaimedDevices() as devices:
        found, metrics, steps = train(tmp_path, monkeypatch, devices)
    for name in ("loss", "grad_norm", "ce_loss", "mask_bce_loss", "mask_dice_loss"):
        assert [entry[name] for entry in found] == [entry[name] for entry in expected]
    counts = [name for name in metrics if "per_second" not in name and "runtime" not in name]
    assert {name: metrics[name] for name in counts} == {name: expected_metrics[name] for name in counts}
    # Each wait drains the queue of kernels. The last step also logs; the first one also moves the model.
    waits = steps[1]
    assert sum(waits.values()) <= 11, waits
