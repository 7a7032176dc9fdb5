"""The memory estimate against the bytes of all tensors after a step, and the allocator's peak."""

import json
import logging

import models as benchmark
import pytest
import torch
from fixtures.tiny_models import idefics3_sam, save_quantizable
from fixtures.tiny_training import LISA_PARTS, Items, build_model, collate, make_trainer
from torch.profiler import ProfilerActivity, profile
from workers.launching import launch
from workers.memory_worker import tensor_bytes

from lisa_hf.training import build
from lisa_hf.training.activation_memory import activation_bytes
from lisa_hf.training.arguments import TRAINABLE_PARTS, DataArguments, LisaTrainingArguments, ModelArguments
from lisa_hf.training.memory_estimate import Engine, estimate_memory, report_memory
from lisa_hf.training.trainable import prepare_for_training


RUNS = {
    "full": ({"trainable": list(TRAINABLE_PARTS), "lora_r": 0}, {"weight_decay": 0.1}),
    "lora": ({"trainable": LISA_PARTS, "lora_r": 4}, {}),
    "lora_tied": ({"trainable": LISA_PARTS, "lora_r": 4}, {}),
    "dora": ({"trainable": ["seg_projector"], "lora_r": 4, "use_dora": True}, {"part_learning_rates": {"lora": 1e-3}}),
    "bfloat16": ({"trainable": LISA_PARTS, "lora_r": 4, "dtype": "bfloat16"}, {"bf16": True}),
    "muon": ({"trainable": list(TRAINABLE_PARTS), "lora_r": 0}, {"muon_learning_rate": 0.01, "optim": "adamw_torch"}),
    "adafactor": ({"trainable": LISA_PARTS, "lora_r": 4}, {"optim": "adafactor"}),
    "sgd": ({"trainable": LISA_PARTS, "lora_r": 4}, {"optim": "sgd"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_bytes_are_those_of_the_tensors(name, tmp_path):
    model_arguments, arguments = RUNS[name]
    model_args = ModelArguments(model="none", **model_arguments)
    model, processor = build_model(tie_word_embeddings=name == "lora_tied")
    empty = prepare_for_training(build.build_model(model_args, model.config, empty=True), **model_args.adaptation)
    assert all(parameter.is_meta for parameter in empty.parameters())
    model = prepare_for_training(model.to(getattr(torch, model_args.dtype or "float32")), **model_args.adaptation)
    trainer = make_trainer(model, processor, tmp_path, Items(), **{"optim": "adamw_torch_fused", **arguments})
    batch = collate(processor, [Items()[0]])
    (estimate,) = estimate_memory(empty, model_args, trainer.args, batch, [Engine()])
    trainer.train()
    assert estimate.weights == tensor_bytes([*model.parameters(), *model.buffers()])
    assert estimate.gradients == tensor_bytes(list(trainer.recorder.gradients[0].values()))
    assert estimate.optimizer == tensor_bytes(trainer.optimizer.state_dict())
    assert (estimate.optimizer == 0) == (name == "sgd") and estimate.communication == estimate.host == 0


@pytest.mark.parametrize("bits", ["4bit", "4bit_single", "8bit"])
def test_bytes_of_quantized_weights(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    save_quantizable(tmp_path)
    model_args = ModelArguments(
        model=str(tmp_path / "model"), bnb_4bit_use_double_quant=bits == "4bit", **{f"load_in_{bits[:4]}": True}
    )
    config, processor = build.build_config_and_processor(model_args)
    model = prepare_for_training(build.build_model(model_args, config), **model_args.adaptation)
    empty = prepare_for_training(build.build_model(model_args, config, empty=True), **model_args.adaptation)
    args = LisaTrainingArguments(str(tmp_path), use_cpu=True)
    (estimate,) = estimate_memory(empty, model_args, args, collate(processor, [Items()[0]]), [Engine()])
    scales = []
    for weight in model.parameters():
        if state := getattr(weight, "quant_state", None):
            scales += [state.absmax, state.code, state.offset]
            scales += [state.state2.absmax, state.state2.code] if state.nested else []
        scales.append(getattr(weight, "SCB", None))
    assert estimate.weights == tensor_bytes([*model.parameters(), *model.buffers(), *scales])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert estimate.gradients == tensor_bytes(trained)
    assert estimate.optimizer == 2 * tensor_bytes(trained) + 4 * len(trained)  # two moments, and a counter each


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_bytes_of_sharded_states(engine, tmp_path):
    """Three processes divide few weights without a remainder."""
    launcher = "ddp" if engine == "fsdp2" else engine  # accelerate would take FSDP on CPUs for DDP
    launch("tests/workers/memory_worker.py", tmp_path / "results", engine, launcher=launcher, num_processes=3)
    for rank in range(3):
        for run in json.loads((tmp_path / f"results.{rank}").read_text()):  # in float32 and, with ZeRO, bfloat16
            assert {name: run["estimate"][name] for name in run["found"]} == run["found"]


def measured_peak(model, batch) -> int:
    """Return the peak bytes of the allocator during a step, without weights and their gradients."""
    model(**batch).loss.backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(**batch).loss.backward()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("has_checkpointing", [False, True])
@pytest.mark.parametrize("size", ["tiny", pytest.param("mid", marks=pytest.mark.slow)])
def test_activations_are_those_that_the_allocator_counts(size, has_checkpointing, tmp_path):
    model = benchmark.build_model(benchmark.SIZES[size], "cpu", torch.float32)
    batch = benchmark.make_batch(benchmark.SIZES[size], "cpu", torch.float32)
    if has_checkpointing:
        model.get_base_model().activation_checkpointing_enable()
    found = measured_peak(model, batch)
    model.zero_grad()
    args = LisaTrainingArguments(str(tmp_path), use_cpu=True, activation_checkpointing=has_checkpointing)
    assert activation_bytes(model, args, batch) == pytest.approx(found, rel=0.02)


def test_values_that_decide_about_shapes_are_looked_at(tmp_path):
    """Idefics3 and its kind drop the crops that are padding, which fake pixels would not show."""
    model, processor = idefics3_sam()
    data_args, args = DataArguments(max_length=200), LisaTrainingArguments(str(tmp_path), use_cpu=True)
    assert "activations " in report_memory(model.config, processor, ModelArguments(model="none"), data_args, args)


def fail(self, **inputs):
    return next(self.parameters()) * torch.ones(7919)  # fake tensors log a trace of such an error


def test_report_names_its_batch_and_warns_if_it_does_not_fit(tmp_path, monkeypatch, caplog):
    model, processor = build_model()
    model_args = ModelArguments(model="none")
    data_args = DataArguments(max_length=120, num_questions=2)
    args = LisaTrainingArguments(str(tmp_path), per_device_train_batch_size=2, use_cpu=True)
    report = report_memory(model.config, processor, model_args, data_args, args)
    assert "weights 0.5 MiB" in report and "for 2 images of 640 x 480 at a time" in report
    length = int(report.split("rows of ")[1].split()[0])
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", fail)  # as an operation that fake tensors lack
        unmeasured = report_memory(model.config, processor, model_args, data_args, args)
    assert "Traceback" not in caplog.text
    assert "without activations, which" in unmeasured and "weights 0.5 MiB, gradients" in unmeasured
    assert "with 2 rows" in report and 120 < length < 2 * 120  # packed: two questions share their prefix
    separate = DataArguments(max_length=120, num_questions=2, packing=False)
    assert "4 rows of 120 tokens" in report_memory(model.config, processor, model_args, separate, args)
    assert not caplog.records

    monkeypatch.setattr(LisaTrainingArguments, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**30))
    with caplog.at_level(logging.WARNING, "lisa_hf.training.memory_estimate"):
        report_memory(model.config, processor, model_args, data_args, args)
    (record,) = caplog.records
    message = record.getMessage()
    assert "1.0 MiB are free" in message and "activation_checkpointing: true" in message and "zero2" not in message
