"""Callbacks: what a run logs, prediction sheets, and non-finite steps."""

import io
import json
import logging
import math
import resource
import signal
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import psutil
import pytest
import torch
from fixtures.rows import dataset, image_file, segmentation_row
from fixtures.tiny_training import (
    LISA_PARTS,
    MASKS_DUE,
    Items,
    amount,
    build_model,
    copy_state,
    make_trainer,
    sabotage,
    training_logs,
)
from tensorboardX.proto import event_pb2
from transformers import TrainerCallback
from workers.launching import launch

from lisa_hf import LisaProcessor
from lisa_hf.data.mixture import MixtureDataset
from lisa_hf.training import callbacks
from lisa_hf.training.callbacks import PredictionSheet, SelfCheck, StopOnSignal
from lisa_hf.training.checkpointing import find_fault
from lisa_hf.training.trainable import prepare_for_training


SOURCES = ["one", "two", "three"]


class ItemsOfThreeSources(Items):
    def __init__(self):
        super().__init__()
        for index, item in enumerate(self.items):
            item["source"] = SOURCES[index % 5 % 3]


@pytest.mark.parametrize("arguments", [{}, {"bf16": True}], ids=["float32", "autocast"])
def test_self_check_changes_nothing_or_stops_before_the_first_step(arguments, tmp_path, monkeypatch):
    weights = []
    for checks in (False, True):
        model, processor = build_model()
        torch.manual_seed(0)
        model = prepare_for_training(model, LISA_PARTS, lora_r=4, lora_dropout=0.5)
        trainer = make_trainer(model, processor, tmp_path, Items(), max_steps=2, **arguments)
        if checks:
            trainer.add_callback(SelfCheck(trainer))
        trainer.train()
        weights.append(copy_state(model))
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())

    monkeypatch.setattr(LisaProcessor, "normalize_pixels", lambda self, batch: None)
    with pytest.raises(ValueError, match="Self-check: .*`pixel_values`"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "packing", "num_workers"),
    [(8, 1, False, 0), (2, 4, True, 0), (3, 2, False, 2), (1, 3, True, 2)],
)
def test_counts_are_those_of_the_items_consumed(batch_size, accumulation, packing, num_workers, tiny, tmp_path):
    model, processor = tiny
    items, logging_steps = ItemsOfThreeSources(), 2
    trainer = make_trainer(
        prepare_for_training(model, LISA_PARTS, lora_r=4),
        processor,
        tmp_path,
        items,
        items,
        max_steps=6,
        logging_steps=logging_steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        dataloader_num_workers=num_workers,
        dataloader_drop_last=True,
        eval_strategy="steps",
        eval_steps=3,
    )
    trainer.data_collator.packing = packing
    trainer.train()

    # Trainer forgets the batches that do not fill a step of an epoch only if drop_last leaves them out.
    batches_per_epoch = len(items) // batch_size
    steps = []
    while len(steps) < 6:
        batches = [range(index * batch_size, (index + 1) * batch_size) for index in range(batches_per_epoch)]
        steps += [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
    logs = training_logs(trainer)
    assert len(logs) == 3
    for number, entry in enumerate(logs):
        batches = [batch for step in steps[number * 2 : number * 2 + logging_steps] for batch in step]
        indices = [index for batch in batches for index in batch]
        for name in SOURCES:
            assert entry.get(f"items/{name}", 0) == sum(items[index]["source"] == name for index in indices)
        assert amount(entry, "images", logging_steps) == pytest.approx(len(indices))
        masks = sum(sum(MASKS_DUE[index]) for index in indices)
        assert amount(entry, "masks", logging_steps) == pytest.approx(masks)
        collated = [trainer.data_collator([items[index] for index in batch]) for batch in batches]
        tokens = sum(batch["attention_mask"].sum().item() for batch in collated)
        assert amount(entry, "tokens", logging_steps) == pytest.approx(tokens)


def test_counts_of_a_resumed_run_go_on(tmp_path):
    def train(checkpoint=None):
        model, processor = build_model()
        trainer = make_trainer(
            prepare_for_training(model, LISA_PARTS, lora_r=4),
            processor,
            tmp_path,
            ItemsOfThreeSources(),
            max_steps=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train(checkpoint)
        return [
            {key: value for key, value in entry.items() if key.startswith("items/")}
            for entry in training_logs(trainer)
        ]

    counts = train()
    assert [sum(entry.values()) for entry in counts] == [4] * 5
    assert train(str(tmp_path / "checkpoint-2")) == counts


def test_sources_are_those_of_the_mixture(tiny, tmp_path):
    model, processor = tiny
    image = image_file(tmp_path / "image.png")
    rows = dataset(*[segmentation_row("shared", index, image) for index in range(4)])  # read in two ways
    mixture = MixtureDataset({"first": rows, "second": rows}, length=40, weights={"first": 3, "second": 1})
    trainer = make_trainer(model, processor, tmp_path, mixture, max_steps=5, logging_steps=5)
    trainer.train()
    (entry,) = training_logs(trainer)
    names = [mixture[index]["source"] for index in range(40)]
    assert {key: entry[key] for key in entry if key.startswith("items/")} == {
        "items/first": names.count("first"),
        "items/second": names.count("second"),
    }
    assert names.count("second") > 0


class Clock:
    """A clock that only advances for what is declared to take time, in seconds."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def slow(self, function, seconds: float):
        def slowed(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return slowed


def test_times_are_those_of_data_and_of_computing(tiny, tmp_path, monkeypatch):
    model, processor = tiny
    clock = Clock()
    monkeypatch.setattr(callbacks, "time", clock)
    trainer = make_trainer(
        model,
        processor,
        tmp_path,
        Items(),
        Items(1),
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.data_collator = clock.slow(trainer.data_collator, 1.0)
    trainer.training_step = clock.slow(trainer.training_step, 10.0)
    trainer.prediction_step = clock.slow(trainer.prediction_step, 100.0)
    trainer.save_model = clock.slow(trainer.save_model, 1000.0)
    trainer.train()
    for entry in training_logs(trainer):
        assert entry["data_wait_time"] == 2.0  # two batches per step
        assert entry["compute_time"] == 20.0
        assert entry["images_per_second"] == 8 / 22


def test_memory_is_the_peak_of_the_process(tiny, tmp_path):
    model, processor = tiny
    trainer = make_trainer(model, processor, tmp_path, Items(), max_steps=3)
    step, held = trainer.training_step, []

    def hungry(*args, **kwargs):
        if trainer.state.global_step == 1:
            # What earlier tests of this process have freed must be filled first.
            freed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - psutil.Process().memory_info().rss
            held.append(bytearray(b"1" * (500_000_000 + freed)))
        held.clear()
        return step(*args, **kwargs)

    trainer.training_step = hungry
    trainer.train()
    first, second, third = (entry["peak_memory_gb"] for entry in training_logs(trainer))
    assert first + 0.4 < second <= third < second + 0.4


@pytest.mark.parametrize(
    ("arguments", "first", "named"),
    [
        ({}, 1.0, {}),
        ({"part_learning_rates": {"mask_decoder": 0.5}}, 1.0, {"other": 1.0, "mask_decoder": 0.5}),
        ({"muon_learning_rate": 0.25}, 0.25, {"muon": 0.25, "adamw": 1.0}),
    ],
)
def test_learning_rates_are_those_that_a_step_was_made_with(arguments, first, named, tiny, tmp_path):
    model, processor = tiny
    trainer = make_trainer(
        prepare_for_training(model, LISA_PARTS, lora_r=4),
        processor,
        tmp_path,
        Items(),
        max_steps=4,
        optim="adamw_torch",
        learning_rate=1.0,
        lr_scheduler_type="linear",
        **arguments,
    )
    trainer.train()
    for entry, factor in zip(training_logs(trainer), (1, 0.75, 0.5, 0.25), strict=True):
        found = {key: value for key, value in entry.items() if key.startswith("learning_rate")}
        expected = {"learning_rate": first} | {f"learning_rate/{name}": rate for name, rate in named.items()}
        assert found == pytest.approx({name: factor * rate for name, rate in expected.items()})


def read_events(directory: Path):
    """The summaries of TensorBoard's event files: `(step, value)`."""
    for path in directory.rglob("events.out.tfevents.*"):
        records = path.read_bytes()
        while records:  # each: length (8 bytes), its checksum (4), the event, its checksum (4)
            (length,) = struct.unpack("<Q", records[:8])
            event = event_pb2.Event.FromString(records[12 : 12 + length])
            yield from ((event.step, value) for value in event.summary.value)
            records = records[16 + length :]


def test_trackers_get_what_the_log_has(tiny, tmp_path):
    model, processor = tiny
    trainer = make_trainer(
        model, processor, tmp_path, Items(), max_steps=2, report_to="tensorboard", per_device_train_batch_size=2
    )
    trainer.train()
    found = {(step, value.tag): value.simple_value for step, value in read_events(tmp_path)}
    entries = training_logs(trainer)
    assert [entry["step"] for entry in entries] == [1, 2]
    for entry in entries:
        for name in entry.keys() - {"step"}:
            assert found[entry["step"], f"train/{name}"] == pytest.approx(entry[name]), name


# ---- sheets of predictions ------------------------------------------------------------------------------------------


def test_each_evaluation_draws_the_same_images_and_changes_nothing(tmp_path):
    sheets, weights = {}, []
    for name in ("with", "without"):
        model, processor = build_model()
        torch.manual_seed(0)
        trainer = make_trainer(
            prepare_for_training(model, LISA_PARTS, lora_r=4, lora_dropout=0.5),
            processor,
            tmp_path / name,
            Items(),
            {"first": Items(3), "second": Items(2)},
            max_steps=2,
            learning_rate=5.0,
            eval_strategy="steps",
            eval_steps=1,
            eval_on_start=True,
            metric_for_best_model="first_giou",
            report_to="tensorboard",
        )
        if name == "with":
            trainer.add_callback(PredictionSheet(trainer, Items(3)))
        trainer.train()
        weights.append(copy_state(trainer.model))
    assert [key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])] == []

    for step in range(3):
        with PIL.Image.open(tmp_path / "with" / "predictions" / f"step-{step}.png") as sheet:
            sheets[step] = np.asarray(sheet)
    with PIL.Image.open(tmp_path / "with" / "predictions.png") as sheet:
        assert np.array_equal(np.asarray(sheet), sheets[2])
    reported = {
        step: np.asarray(PIL.Image.open(io.BytesIO(value.image.encoded_image_string)))
        for step, value in read_events(tmp_path / "with")
        if value.tag == "eval/predictions"
    }
    assert reported.keys() == sheets.keys()
    assert all(np.array_equal(reported[step], sheets[step]) for step in sheets)
    # The photo of the first cell is the same, and the answers are those of other weights.
    assert np.array_equal(sheets[0][36:256, 12:232], sheets[2][36:256, 12:232])
    assert not np.array_equal(sheets[0], sheets[2])


class SignalAtStep(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            signal.raise_signal(signal.SIGTERM)


def test_a_run_stopped_where_an_evaluation_is_due_equals_one_that_was_not(tmp_path):
    """It has dropout, so that the random states after the evaluation count."""
    runs = {}
    for name, stops in (("whole", []), ("stopped", [2, 3])):
        for stop in [*stops, None]:
            model, processor = build_model()
            torch.manual_seed(0)
            trainer = make_trainer(
                prepare_for_training(model, LISA_PARTS, lora_r=4, lora_dropout=0.5),
                processor,
                tmp_path / name,
                Items(),
                Items(2),
                max_steps=5,
                gradient_accumulation_steps=2,
                eval_strategy="steps",
                eval_steps=2,
                save_strategy="steps",
                save_steps=2,
                metric_for_best_model="giou",
            )
            trainer.add_callback(StopOnSignal(trainer))
            trainer.add_callback(SignalAtStep(stop))
            trainer.train(resume_from_checkpoint="auto")
            assert trainer.state.global_step == (stop or 5)
            assert stop != 2 or [entry["step"] for entry in trainer.state.log_history[:-1]] == [1, 2]
        state = trainer.state
        times = ("_second", "time", "_gb")
        logs = [{key: entry[key] for key in entry if not key.endswith(times)} for entry in state.log_history[:-1]]
        runs[name] = (logs, state.best_metric, state.best_global_step, copy_state(trainer.model))
    (*logs, weights), (*others, other_weights) = runs.values()
    assert logs == others and any("eval_giou" in entry for entry in logs[0])
    assert [key for key in weights if not torch.equal(weights[key], other_weights[key])] == []


def test_a_stop_within_an_epoch_is_no_end_of_the_epoch(tmp_path):
    steps = {}
    for stop in (1, 2, None):
        model, processor = build_model()
        batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        epochs = {"num_train_epochs": 2, "max_steps": -1, "eval_strategy": "epoch"}
        trainer = make_trainer(model, processor, tmp_path, Items(8), Items(1), **batches, **epochs)
        trainer.add_callback(StopOnSignal(trainer))
        trainer.add_callback(SignalAtStep(stop))
        trainer.train(resume_from_checkpoint="auto")
        steps[stop] = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.global_step == 4
    assert steps == {1: [], 2: [], None: [2, 4]}


def test_sheets_of_the_best_model_keep_their_step(tiny, tmp_path):
    model, processor = tiny
    steps = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(
        model, processor, tmp_path, Items(), Items(1), learning_rate=0.5, load_best_model_at_end=True, **steps
    )
    trainer.compute_metrics = lambda prediction: {"giou": 1 / trainer.state.global_step}
    trainer.add_callback(PredictionSheet(trainer, Items(1)))
    trainer.train()
    before = {path.name: path.read_bytes() for path in (tmp_path / "predictions").iterdir()}
    trainer.evaluate()
    after = {path.name: path.read_bytes() for path in (tmp_path / "predictions").iterdir()}
    assert after == before and before["step-1.png"] != before["step-2.png"]
    assert (tmp_path / "predictions.png").read_bytes() == before["step-1.png"]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_sheets_go_to_trackers_that_take_images(name, tiny, tmp_path, monkeypatch):
    model, processor = tiny
    logged = []
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(log=logged.append, Image=lambda image: image))
    trainer = make_trainer(model, processor, tmp_path, eval_dataset=Items(1))
    trainer.add_callback(PredictionSheet(trainer, Items(1)))
    trainer.args.report_to = [name]
    trainer.evaluate()
    (entry,) = logged
    assert entry["train/global_step"] == 0
    with PIL.Image.open(tmp_path / "predictions" / "step-0.png") as sheet:
        assert np.array_equal(np.asarray(entry["eval/predictions"]), np.asarray(sheet))


# ---- steps that are not finite --------------------------------------------------------------------------------------


def sabotaged_trainer(tmp_path, where, steps, **arguments):
    model, processor = build_model()
    model = prepare_for_training(model, LISA_PARTS, lora_r=4)
    sabotage(model, steps, where, micro_batches=2)
    settings = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    return make_trainer(model, processor, tmp_path, Items(), **settings | arguments)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("where", ["loss", "gradients"])
def test_non_finite_step_is_skipped_and_explained(where, max_grad_norm, tmp_path, caplog):
    trainer = sabotaged_trainer(tmp_path, where, {1}, max_grad_norm=max_grad_norm, save_strategy="steps", save_steps=1)
    with caplog.at_level(logging.WARNING, "lisa_hf.training.callbacks"):
        trainer.train()
    (record,) = (record for record in caplog.records if record.name == "lisa_hf.training.callbacks")
    message = record.getMessage()
    assert message.startswith("Step 2: non-finite ") and message.endswith("Skipped (1 of at most 10).")
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


def test_too_many_non_finite_steps_stop_with_a_checkpoint(tmp_path):
    trainer = sabotaged_trainer(tmp_path, "loss", {1, 2, 3}, max_nonfinite_steps=1, max_steps=10)
    start = copy_state(trainer.model)
    with pytest.raises(ValueError, match="Step 3: non-finite mask_bce_loss of .*at most 1 skipped steps") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert trainer.state.global_step == 3 and find_fault(tmp_path / "checkpoint-3") is None
    final = copy_state(trainer.model)
    assert all(weight.isfinite().all() for weight in final.values())
    assert any(not torch.equal(start[name], final[name]) for name in start)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow), "zero2"])
def test_all_processes_skip_the_step_of_one(engine, tmp_path):
    launch("tests/workers/nonfinite_worker.py", tmp_path / "results", engine, launcher=engine)
    first, second = (json.loads((tmp_path / f"results.{rank}").read_text()) for rank in range(2))
    assert first["num_skipped"] == second["num_skipped"] == 1 and second["messages"] == []
    (message,) = first["messages"]  # the first process speaks for the second
    assert message.startswith("Step 2: non-finite mask_bce_loss of image_6 of drawn, image_7 of drawn.")
    assert len(first["losses"]) == 4 and all(map(math.isfinite, first["losses"]))


def test_zero3_stops_at_once(tmp_path):
    launch("tests/workers/nonfinite_worker.py", tmp_path / "results", "zero3", launcher="zero3")
    for rank in range(2):
        result = json.loads((tmp_path / f"results.{rank}").read_text())
        assert "Step 2: non-finite mask_bce_loss of image_6 of drawn, image_7 of drawn. ZeRO-3" in result["error"]
        assert result["checkpoints"] == ["checkpoint-1"]
