"""LisaTrainer on one process: the loss of a step, what moves, the log, resuming, evaluation.

Two processes are in test_distributed.py.
"""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from fixtures.tiny_training import (
    LISA_PARTS,
    MASKS_DUE,
    Items,
    assert_gradients_equal,
    build_model,
    collate,
    copy_state,
    make_item,
    make_trainer,
    training_logs,
)
from safetensors.torch import load_file, save_file

from lisa_hf import LisaForConditionalGeneration
from lisa_hf.evaluation.metrics import intersection_and_union
from lisa_hf.model.generation_lisa import LisaGenerateOutput
from lisa_hf.training import engine_change
from lisa_hf.training.arguments import TRAINABLE_PARTS, LisaTrainingArguments
from lisa_hf.training.checkpointing import find_checkpoint
from lisa_hf.training.trainable import find_parts, prepare_for_training
from lisa_hf.training.trainer import LOSS_PARTS


# What no forward pass of this model uses: it reads the features before this norm.
UNUSED = "vlm.model.vision_tower.post_layernorm"


# ---- the loss of a step ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_batch():
    """Loss parts and gradients of the first eight items in one plain forward pass, normalized by the batch itself."""
    model, processor = build_model()
    model = prepare_for_training(model, TRAINABLE_PARTS, lora_r=0).train()
    output = model(**collate(processor, [Items()[index] for index in range(8)]))
    output.loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"loss": output.loss.item()} | {part: output[part].item() for part in LOSS_PARTS}, gradients


@pytest.mark.parametrize("cut", [8, 4, 2, 1])
def test_loss_and_gradients_do_not_depend_on_accumulation(cut, tiny, whole_batch, tmp_path):
    model, processor = tiny
    trainer = make_trainer(
        prepare_for_training(model, TRAINABLE_PARTS, lora_r=0),
        processor,
        tmp_path,
        Items(),
        per_device_train_batch_size=cut,
        gradient_accumulation_steps=8 // cut,
    )
    trainer.train()
    logged, gradients = whole_batch
    (entry,) = training_logs(trainer)
    assert {name: entry[name] for name in logged} == pytest.approx(logged, rel=1e-5)
    assert_gradients_equal(trainer.recorder.gradients[0], gradients)


def test_logged_parts_are_means_over_steps_and_sum_to_the_loss(tiny, tmp_path):
    model, processor = tiny
    model = prepare_for_training(model, LISA_PARTS, lora_r=0)
    initial = copy_state(model)
    every_step = make_trainer(model, processor, tmp_path, Items(), max_steps=4)
    every_step.train()
    model.load_state_dict(initial)
    every_other = make_trainer(model, processor, tmp_path, Items(), max_steps=4, logging_steps=2)
    every_other.train()
    for name in ("loss", *LOSS_PARTS):
        steps = [entry[name] for entry in training_logs(every_step)]
        means = [(first + second) / 2 for first, second in zip(steps[::2], steps[1::2])]
        assert [entry[name] for entry in training_logs(every_other)] == pytest.approx(means, rel=1e-5)
    for entry in training_logs(every_step) + training_logs(every_other):
        assert entry["loss"] == pytest.approx(sum(entry[part] for part in LOSS_PARTS), rel=1e-5)


@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(lora_r, reentrant, tmp_path):
    gradients, losses, passes = [], [], []
    for checkpointing in (False, True):
        model, processor = build_model()
        calls = []
        model.vlm.base_model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        parts = ["seg_projector", "mask_decoder"] if lora_r else TRAINABLE_PARTS
        trainer = make_trainer(
            prepare_for_training(model, parts, lora_r, lora_dropout=0.0),
            processor,
            tmp_path,
            Items(),
            activation_checkpointing=checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        trainer.train()
        gradients.append(trainer.recorder.gradients[0])
        losses.append(training_logs(trainer)[0]["loss"])
        passes.append(len(calls))
    assert passes == [1, 2]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert_gradients_equal(gradients[1], gradients[0])


@pytest.mark.parametrize(("dtype", "autocast"), [("float32", True), ("bfloat16", True), ("bfloat16", False)])
def test_bfloat16(dtype, autocast, tmp_path):
    losses = []
    for settings in ({}, {"bf16": autocast, "eval_strategy": "steps", "eval_steps": 2, "eval_generate": True}):
        model, processor = build_model()
        model = model.to(getattr(torch, dtype)) if settings else model
        model = prepare_for_training(model, LISA_PARTS, lora_r=4, lora_dropout=0.0)
        trainer = make_trainer(model, processor, tmp_path, Items(), Items(4), max_steps=2, **settings)
        trainer.train()
        losses.append([entry["loss"] for entry in training_logs(trainer)])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
    assert "eval_generated_giou" in trainer.state.log_history[-2]
    assert model.get_output_embeddings().weight.dtype == getattr(torch, dtype)


# ---- what moves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "lora_r"), [(LISA_PARTS, 4), (["seg_projector"], 4), (LISA_PARTS, 0), (TRAINABLE_PARTS, 0)]
)
def test_frozen_weights_stay_and_all_others_move(parts, lora_r, tiny, tmp_path):
    model, processor = tiny
    paths = [path for part in parts for path in find_parts(model)[part]]
    model = prepare_for_training(model, parts, lora_r)
    before = copy_state(model)
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    # The A matrices of LoRA have no gradient in the first step, while the B matrices are zero.
    trainer = make_trainer(model, processor, tmp_path, Items(), max_steps=2, optim="adamw_torch", weight_decay=0.1)
    trainer.train()
    after = copy_state(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in trainable if not name.startswith(UNUSED)}

    for name in trainable:
        plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        if ".lora_" in name:
            assert plain.startswith("vlm.model.language_model.layers.")
        else:
            assert any(plain.startswith(path + ".") for path in paths)
    assert any(".lora_" in name for name in trainable) == (lora_r > 0)
    assert not any(head in name for name in trainable for head in ("iou_prediction_head", "hypernetworks_mlps.1"))


def test_learning_rate_groups(tiny, tmp_path):
    model, processor = tiny
    model = prepare_for_training(model, LISA_PARTS, lora_r=4)
    arguments = {
        "learning_rate": 1.0,  # of no part
        "part_learning_rates": {"lora": 1e-3, "mask_decoder": 3e-2, "embeddings": 1e-2, "seg_projector": 0.0},
        "weight_decay": 0.1,
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    trainer = make_trainer(model, processor, tmp_path, Items(), **arguments)
    optimizer = trainer.create_optimizer()
    names = {id(weight): name for name, weight in model.named_parameters()}
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    grouped = [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(grouped) == sorted(trainable)
    for group in optimizer.param_groups:
        for name in (names[id(weight)] for weight in group["params"]):
            part = "lora" if ".lora_" in name else "mask_decoder" if "mask_decoder" in name else None
            part = part or ("seg_projector" if "seg_projector" in name else "embeddings")
            assert group["lr"] == arguments["part_learning_rates"][part]
            assert group["weight_decay"] == (0.0 if "bias" in name or "layer_norm" in name else 0.1)
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        *((1e-3, 0.1), (1e-2, 0.1), (3e-2, 0.1), (0.0, 0.1)),
        *((3e-2, 0.0), (0.0, 0.0)),
    }

    rates = [group["lr"] for group in optimizer.param_groups]
    start = copy_state(model)
    trainer.train()
    moved = {name.split(".")[2] for name, weight in copy_state(model).items() if not torch.equal(weight, start[name])}
    assert moved == {"vlm", "mask_model"}  # at rate 0 the projector stays
    schedule = [[factor * rate for rate in rates] for factor in (1, 0.75, 0.5, 0.25)]
    assert trainer.recorder.rates == [pytest.approx(step) for step in schedule]
    model, processor = build_model()
    resumed = make_trainer(prepare_for_training(model, LISA_PARTS, 4), processor, tmp_path, Items(), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.recorder.rates == [pytest.approx(step) for step in schedule[2:]]
    assert [group["weight_decay"] for group in resumed.optimizer.param_groups] == [
        group["weight_decay"] for group in optimizer.param_groups
    ]


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("lora_r", [0, 4])
def test_resume_restores_every_tensor_and_continues_the_same_curve(lora_r, num_workers, tmp_path):
    arguments = {
        # Four steps per epoch: the checkpoint lies inside the first one, and the run crosses into the second.
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "random",
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "optim": "adamw_torch",
        "learning_rate": 2e-3,
        "part_learning_rates": {"lora": 5e-3} if lora_r else {"mask_decoder": 5e-3},
        "lr_scheduler_type": "cosine",
        "dataloader_num_workers": num_workers,
    }

    def trainer(output_dir, weights_seed=None):
        model, processor = build_model()
        model = prepare_for_training(model, LISA_PARTS, lora_r, lora_dropout=0.2)
        if weights_seed is not None:
            # What is not restored cannot be right by chance. Frozen weights of a LoRA run are the base model's.
            torch.manual_seed(weights_seed)
            for weight in model.parameters():
                if weight.requires_grad or not lora_r:
                    torch.nn.init.normal_(weight)
        return make_trainer(model, processor, output_dir, Items(), **arguments)

    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "resumed", weights_seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))

    saved, restored = whole.recorder.saved_states[3], resumed.recorder.initial_state
    assert saved.keys() == restored.keys()
    assert [name for name in saved if not torch.equal(saved[name], restored[name])] == []
    for entry, expected in zip(training_logs(resumed)[3:], training_logs(whole)[3:], strict=True):
        for name in ("step", "loss", "grad_norm", "learning_rate", *LOSS_PARTS):
            assert entry[name] == expected[name], name
    final, expected = copy_state(resumed.model), copy_state(whole.model)
    assert [name for name in final if not torch.equal(final[name], expected[name])] == []


@pytest.mark.parametrize("lora_r", [0, 4])
def test_best_model_by_giou_is_loaded_and_remembered_across_a_resume(lora_r, tmp_path, caplog):
    arguments = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
    }

    def trainer(output_dir, scores):
        model, processor = build_model()
        model = prepare_for_training(model, LISA_PARTS, lora_r)
        made = make_trainer(model, processor, output_dir, Items(), Items(1), **arguments)
        scores = iter(scores)
        made.compute_metrics = lambda prediction: {"giou": next(scores)}
        return made

    first = trainer(tmp_path / "first", [0.9, 0.5, 0.7, 0.6])
    with caplog.at_level(logging.INFO, "lisa_hf.training.trainer"):
        first.train()
    assert "Loaded the best model, of step 1 (giou 0.9), instead of the last one, of step 4." in caplog.text
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    arguments["save_total_limit"] = 1
    resumed = trainer(tmp_path / "moved", [0.7, 0.6])
    resumed.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-2"))
    best = first.recorder.saved_states[1]
    for done in (first, resumed):
        assert done.state.best_metric == 0.9
        assert done.state.best_model_checkpoint == str(Path(done.args.output_dir, "checkpoint-1"))
        assert (done.weights_step, done.state.global_step) == (1, 4)
        loaded = copy_state(done.model)
        assert [name for name in best if not torch.equal(best[name], loaded[name])] == []
    last = first.recorder.saved_states[4]
    assert any(not torch.equal(best[name], last[name]) for name in best)


@pytest.mark.parametrize("saved", ["gone", "by another engine", "by another engine, weights are sharded"])
def test_best_model_that_trainer_would_pass_over(saved, tiny, tmp_path, monkeypatch, caplog):
    model, processor = tiny
    arguments = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "eval_strategy": "steps"}
    trainer = make_trainer(model, processor, tmp_path, Items(), Items(1), max_steps=2, eval_steps=1, **arguments)
    scores = iter([0.9, 0.5])

    def score(prediction):
        if trainer.state.global_step == 2 and saved == "gone":
            shutil.rmtree(tmp_path / "checkpoint-1")
        return {"giou": next(scores)}

    trainer.compute_metrics = score
    if saved != "gone":
        monkeypatch.setattr(engine_change, "running_engine", lambda trainer: engine_change.FSDP)
    if "sharded" in saved:
        monkeypatch.setattr(type(trainer.args), "shards_weights", True)
    with caplog.at_level(logging.WARNING, "lisa_hf.training.engine_change"):
        trainer.train()
    is_loaded = saved == "by another engine"
    weights, expected = copy_state(model), trainer.recorder.saved_states[1 if is_loaded else 2]
    assert [name for name in expected if not torch.equal(expected[name], weights[name])] == []
    assert trainer.weights_step == (1 if is_loaded else 2)
    assert trainer.state.best_global_step == (1 if is_loaded else None)
    assert ("the last one is evaluated and saved" in caplog.text) == (not is_loaded)


def test_best_model_by_giou_with_the_real_metric(tiny, tmp_path):
    model, processor = tiny
    trainer = make_trainer(
        model,
        processor,
        tmp_path,
        Items(),
        Items(4),
        max_steps=3,
        learning_rate=0.5,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
    )
    trainer.train()
    gious = [entry["eval_giou"] for entry in trainer.state.log_history if "eval_giou" in entry]
    assert len(gious) == 3
    assert trainer.state.best_metric == max(gious)
    assert (tmp_path / f"checkpoint-{1 + np.argmax(gious)}").is_dir()


def test_best_model_among_several_evaluation_sets(tiny, tmp_path):
    model, processor = tiny
    sets = {"near": Items(2), "far": Items(1)}
    arguments = {"eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match=r"evaluation set \(near, far\), got giou.*near_giou"):
        make_trainer(model, processor, tmp_path, Items(), sets, **arguments)
    trainer = make_trainer(
        model, processor, tmp_path, Items(), sets, metric_for_best_model="far_giou", learning_rate=0.5, **arguments
    )
    trainer.train()
    scores = {key: entry[key] for entry in trainer.state.log_history for key in entry if key.endswith("_giou")}
    assert scores.keys() == {"eval_near_giou", "eval_far_giou"}
    assert trainer.state.best_metric == scores["eval_far_giou"]


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_changes_nothing_about_training(tmp_path):
    weights = []
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_generate": True}):
        model, processor = build_model()
        torch.manual_seed(0)
        model = prepare_for_training(model, LISA_PARTS, lora_r=4, lora_dropout=0.5)
        trainer = make_trainer(
            model, processor, tmp_path, Items(), Items(3), max_steps=3, optim="adamw_torch", **evaluation
        )
        trainer.train()
        weights.append(copy_state(model))
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []


def test_evaluation_equals_counting_item_by_item(tiny, tmp_path):
    model, processor = tiny
    items = Items(7)
    trainer = make_trainer(model, processor, tmp_path, eval_dataset=items)
    metrics = trainer.evaluate()
    ious, intersections, unions = [], 0, 0
    for item in items:
        batch = collate(processor, [item])
        with torch.no_grad():
            (masks,) = model(**batch).pred_masks
        for mask, target in zip(masks, batch["mask_labels"][0], strict=True):
            intersection, union = intersection_and_union(mask > 0, target)
            ious.append((intersection / union).item())
            intersections, unions = intersections + intersection.item(), unions + union.item()
    assert len(ious) == metrics["eval_num_masks"] == sum(sum(due) for due in MASKS_DUE[:7])
    assert metrics["eval_num_questions"] == sum(len(due) for due in MASKS_DUE[:7])
    assert metrics["eval_giou"] == pytest.approx(np.mean(ious))
    assert metrics["eval_ciou"] == pytest.approx(intersections / unions)


def test_generated_answers_with_too_few_and_too_many_masks(tiny, tmp_path, monkeypatch):
    model, processor = tiny
    items = Items(0)
    items.items = [make_item(0, [1, 1, 0]), make_item(2, [2, 1])]
    seg_row_indices = torch.tensor([1, 1, 2, 3, 4])  # row 0 has none, 1 one too many, 2 one too many, 3 one too few

    def generate(self, input_ids, **kwargs):
        """Masks that cover the whole image, except the second one of row 1."""
        low_res_masks = torch.ones(len(seg_row_indices), 8, 8)
        low_res_masks[1] = -1
        return LisaGenerateOutput(
            sequences=input_ids,
            low_res_masks=low_res_masks,
            seg_row_indices=seg_row_indices.clone(),
            iou_scores=torch.ones(len(seg_row_indices)),
        )

    monkeypatch.setattr(LisaForConditionalGeneration, "generate", generate)
    trainer = make_trainer(model, processor, tmp_path, eval_dataset=items, eval_generate=True)
    metrics = trainer.evaluate()
    targets = [collate(processor, [item])["mask_labels"][0] for item in items]
    areas = [(target == 1).sum().item() for image in targets for target in image]
    sizes = [(target != 255).sum().item() for image in targets for target in image]
    given = [False, True, True, False, True]
    ious = [area / size if mask else 0.0 for area, size, mask in zip(areas, sizes, given)]
    unions = [size if mask else area for area, size, mask in zip(areas, sizes, given)]
    assert metrics["eval_generated_giou"] == pytest.approx(np.mean(ious))
    assert metrics["eval_generated_ciou"] == pytest.approx(
        sum(area for area, mask in zip(areas, given) if mask) / sum(unions)
    )
    assert metrics["eval_generated_seg_rate"] == 3 / 4
    assert metrics["eval_generated_false_seg_rate"] == 1.0


def test_skipped_rows_are_logged_and_not_accepted_in_evaluation(tiny, tmp_path):
    model, processor = tiny
    items = Items(8)
    items.items[1]["num_skipped"], items.items[6]["num_skipped"] = 2, 1
    trainer = make_trainer(model, processor, tmp_path, items, items, max_steps=2, per_device_train_batch_size=4)
    trainer.train()
    assert [entry["num_skipped_rows"] for entry in training_logs(trainer)] == [2, 3]
    with pytest.raises(ValueError, match="got 2 skipped ones"):
        trainer.evaluate()


@pytest.mark.parametrize(
    ("arguments", "num_gpus", "match"),
    [
        ({}, 2, "got 2 GPUs.*one process per GPU.*accelerate launch"),
        ({"average_tokens_across_devices": False}, 0, "average_tokens_across_devices: expected True"),
    ],
)
def test_settings_that_would_change_the_loss_are_refused(arguments, num_gpus, match, tiny, tmp_path, monkeypatch):
    model, processor = tiny
    monkeypatch.setattr(LisaTrainingArguments, "n_gpu", property(lambda self: num_gpus))
    with pytest.raises(ValueError, match=match):
        make_trainer(model, processor, tmp_path, Items(), **arguments)


def test_tied_weights_are_not_said_to_be_missing(tiny, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", lambda message, *args: warnings.append(message))
    trainer = make_trainer(*tiny, tmp_path, Items(), save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert not warnings
    path = tmp_path / "checkpoint-1" / "model.safetensors"
    weights = load_file(path)
    del weights["vlm.lm_head.weight"]
    save_file(weights, path)
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert len(warnings) == 1 and "vlm.lm_head.weight" in warnings[0]


def test_a_resumed_run_that_cannot_start_saves_nothing(tiny, tmp_path, monkeypatch):
    make_trainer(*tiny, tmp_path / "first", Items(), save_strategy="steps", save_steps=1, max_steps=1).train()
    trainer = make_trainer(*tiny, tmp_path / "second", Items(), save_strategy="steps", save_steps=1, max_steps=2)

    def fail(checkpoint):
        raise ValueError("loaded state dict contains a parameter group that doesn't match")

    monkeypatch.setattr(trainer, "_load_optimizer_and_scheduler", fail)
    with pytest.raises(ValueError, match="a parameter group"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))
    assert find_checkpoint(tmp_path / "second") is None


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_bad_data_that_end_a_run_lose_no_step(where, tmp_path):
    class ItemsWithBadOne(Items):
        is_bad = True

        def __getitem__(self, index: int) -> dict:
            if self.is_bad and index == len(self) - 1:
                raise ValueError("a bad row")
            return super().__getitem__(index)

    def trainer(output_dir):
        model, processor = build_model()
        sets = [ItemsWithBadOne(8), ItemsWithBadOne(2)]
        sets[where == "training"].is_bad = False
        settings = {"max_steps": 4, "per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 3}
        return make_trainer(model, processor, tmp_path / output_dir, *sets, save_strategy="no", **settings), sets

    stopped, _ = trainer("stopped")
    with pytest.raises(ValueError, match="a bad row"):
        stopped.train()
    step = 2 if where == "training" else 3  # batches are read one ahead
    assert find_checkpoint(tmp_path / "stopped") == str(tmp_path / "stopped" / f"checkpoint-{step}")
    runs = [trainer(output_dir) for output_dir in ("stopped", "whole")]
    for run, sets in runs:
        for items in sets:
            items.is_bad = False
        run.train(resume_from_checkpoint="auto")
    weights, expected = (copy_state(run.model) for run, _ in runs)
    assert [name for name in expected if not torch.equal(expected[name], weights[name])] == []


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("eval_accuracy", "expected one of loss, giou, .*, got eval_accuracy. Did you mean t_acc"),
        ("generated_giou", "got generated_giou. Set eval_generate"),
        ("first_gious", "got first_gious. Did you mean giou"),
    ],
)
def test_a_best_metric_that_no_evaluation_computes(metric, message, tiny, tmp_path):
    evaluation = {"first": Items(1)} if "first" in metric else Items(1)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": metric}
    with pytest.raises(ValueError, match=message):
        make_trainer(*tiny, tmp_path, Items(), evaluation, **settings)
    make_trainer(*tiny, tmp_path, Items(), Items(1), **(settings | {"metric_for_best_model": "eval_n_acc"}))


def test_fewer_items_than_a_whole_batch_are_no_end_of_training(tiny, tmp_path):
    trainer = make_trainer(*tiny, tmp_path, Items(3), per_device_train_batch_size=4, dataloader_drop_last=True)
    with pytest.raises(ValueError, match=r"whole batch \(4 for each process\), got 3 in total"):
        trainer.train()
