"""What a resumed run reports about its arguments, compared with the record of the checkpoint."""

import json
import re

import pytest
from accelerate import Accelerator
from fixtures.rows import dataset, image_file, segmentation_row

from lisa_hf.data.mixture import MixtureDataset
from lisa_hf.training.argument_changes import compare_with_checkpoint
from lisa_hf.training.arguments import DataArguments, LisaTrainingArguments, ModelArguments
from lisa_hf.training.run_record import write_run_record


MODEL = {"model": "somebody/lisa", "trainable": ["seg_projector"]}
DATA = {"sources": {"reason_seg": 3, "shapes": 1}}
TRAINING = {"max_steps": 10, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "seed": 1}


@pytest.fixture
def compare(tmp_path):
    image = image_file(tmp_path / "image.png")
    rows = {name: dataset(*[segmentation_row(name, 0, image)] * 3) for name in ("reason_seg", "shapes")}

    def build(model=MODEL, data=DATA, rows=rows, **training):
        training_args = LisaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **(TRAINING | training))
        data_args = DataArguments(**data)
        chosen = {name: rows[name] for name in data_args.sources}
        mixture = MixtureDataset(chosen, 8, weights=data_args.weights)
        return ModelArguments(**model), data_args, training_args, mixture

    def record(**arguments):
        arguments = build(**arguments)
        Accelerator(cpu=True)  # as the trainer of a run has made one
        write_run_record(*arguments, {})

    record()

    def compare(changed_rows=None, **changes):
        return compare_with_checkpoint(
            str(tmp_path / "checkpoint-2"), *build(**changes, rows=rows | (changed_rows or {}))
        )

    compare.record = record
    compare.more_rows = dataset(*[segmentation_row("shapes", 0, image)] * 4)
    return compare


def test_nothing_is_told_where_nothing_that_counts_has_changed(compare):
    assert compare() == []
    # The same images in a step, cut in another way
    assert compare(per_device_train_batch_size=6, gradient_accumulation_steps=1) == []
    assert compare(logging_steps=3, num_train_epochs=7, optim="adamw_torch") == []


def test_what_trains_in_another_order_is_the_same(compare):
    parts = {"trainable": ["mask_decoder", "seg_projector"], "lora_target_modules": ["q_proj", "v_proj"]}
    compare.record(model=MODEL | parts)
    assert compare(model=MODEL | {name: values[::-1] for name, values in parts.items()}) == []


def test_options_of_lora_do_not_count_without_lora(compare):
    compare.record(model=MODEL | {"lora_r": 0})
    assert compare(model=MODEL | {"lora_r": 0, "lora_alpha": 32, "lora_target_modules": ["k_proj"]}) == []


def test_a_record_of_an_older_version_is_compared_where_it_can_be(compare, tmp_path):
    record = json.loads((tmp_path / "run.json").read_text())
    del record["arguments"]["training"]["part_learning_rates"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    (sentence,) = compare(part_learning_rates={"lora": 1e-4}, seed=2)
    assert sentence.startswith("seed 1 -> 2")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"per_device_train_batch_size": 4}, r"images per step 6 -> 12 .* so some items are skipped\."),
        ({"gradient_accumulation_steps": 1}, r"images per step 6 -> 2 .* so some items repeat\."),
        ({"learning_rate": 1e-4}, r"learning_rate 5e-05 -> 0.0001: has no effect"),
        (
            {"max_steps": 20, "warmup_steps": 2},
            r"max_steps 10 -> 20, warmup_steps 0 -> 2: changes the learning-rate schedule",
        ),
        ({"max_steps": -1}, r"max_steps 10 -> -1: changes"),
        ({"seed": 2}, r"seed 1 -> 2: draws different items"),
        ({"model": MODEL | {"model": "other"}}, r"model somebody/lisa -> other: provides the weights"),
        ({"model": MODEL | {"ce_loss_weight": 2.0}}, r"ce_loss_weight None -> 2.0: applies from now on\."),
        ({"data": {"sources": {"reason_seg": 1, "shapes": 1}}}, r"weight of reason_seg 0.75 -> 0.5, weight of shapes"),
        ({"data": {"sources": {"shapes": 1}}}, r"source reason_seg removed, weight of shapes 0.25 -> 1.0: the next"),
    ],
)
def test_what_has_changed_and_what_it_means(changes, expected, compare):
    (sentence,) = compare(**changes)
    assert re.match(expected, sentence), sentence


def test_other_rows(compare):
    (sentence,) = compare(changed_rows={"shapes": compare.more_rows})
    assert sentence.startswith("num_rows of shapes 3 -> 4: ")
    (sentence,) = compare(changed_rows={"shapes": compare.more_rows.select(range(3))})
    assert sentence.startswith("changed rows of shapes")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": MODEL | {"trainable": ["mask_decoder"]}}, r"trainable \['seg_projector'\] -> \['mask_decoder'\]"),
        ({"model": MODEL | {"lora_alpha": 32}}, "lora_alpha 16 -> 32"),
        ({"optim": "adafactor"}, "optim adamw_torch -> adafactor"),
        ({"muon_learning_rate": 0.01}, "optim adamw_torch -> muon"),
        ({"part_learning_rates": {"lora": 1e-4}}, r"parts with a learning rate \[\] -> \['lora'\]"),
    ],
)
def test_what_the_checkpoint_does_not_fit(changes, expected, compare):
    with pytest.raises(ValueError, match=f"got others: {expected}.* Resume with the earlier ones"):
        compare(**changes)
