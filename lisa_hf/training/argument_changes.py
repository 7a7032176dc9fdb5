"""Describe in sentences what a resumed run does differently from the one that saved the checkpoint."""

import json
from pathlib import Path
from typing import Any

from ..data.mixture import Mixture
from .arguments import DataArguments, LisaTrainingArguments, ModelArguments
from .run_record import describe_arguments, describe_mixture, find_run_record


# Arguments that must not change for the weights and the optimizer's states of a checkpoint to fit.
FIXED = (
    *("vlm_config", "mask_config", "trainable", "lora_r", "lora_alpha", "lora_target_modules", "use_dora"),
    *("optim", "parts with a learning rate"),
)
LORA_OPTIONS = ("lora_alpha", "lora_dropout", "lora_target_modules", "use_dora")
# Other arguments, by the effect of a new value on a resumed run.
MEANINGS = {
    "has no effect, because the optimizer keeps the values in the checkpoint": (
        *("learning_rate", "part_learning_rates", "muon_learning_rate", "weight_decay"),
        *("adam_beta1", "adam_beta2", "adam_epsilon"),
    ),
    "changes the learning-rate schedule of the coming steps": (
        *("max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    ),
    "draws different items, so earlier ones may repeat": ("seed", "data_seed", "num_train_items", "streaming"),
    "provides the weights that are not in the checkpoint": ("model", "vlm", "mask_model", "language_model"),
    "applies from now on": (
        *("tokenizer", "chat_template", "thinking", "image_processor_kwargs", "lora_dropout", "load_in_8bit"),
        *("load_in_4bit", "dtype", "ce_loss_weight", "mask_bce_loss_weight", "mask_dice_loss_weight"),
        *("mask_loss_points", "num_questions", "explanatory_probability", "max_length", "on_bad_row"),
        *("min_decoded_edge", "max_grad_norm", "bf16", "fp16"),
    ),
}


def compare_with_checkpoint(
    checkpoint: str,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: LisaTrainingArguments,
    train_dataset: Mixture,
) -> list[str]:
    """Compare a run that is about to be resumed with the record of its checkpoint, if there is one.

    Args:
        checkpoint: Directory of the checkpoint.
        model_args: The model's arguments.
        data_args: The data's arguments.
        training_args: The trainer's arguments.
        train_dataset: The mixture.

    Returns:
        Sentences that describe each difference and its effect.

    Raises:
        ValueError: If the weights or the optimizer's states of the checkpoint no longer fit.
    """
    record = find_run_record(Path(checkpoint))
    if record is None or "arguments" not in record:
        return []
    before = _comparable(record["arguments"], record["hardware"]["num_processes"])
    now = _comparable(describe_arguments(model_args, data_args, training_args), training_args.world_size)
    if changes := _changes(before, now, FIXED):
        raise ValueError(
            f"resume_from_checkpoint: expected the arguments that fit the weights and the optimizer in {checkpoint}, "
            f"got others: {', '.join(changes)}. Resume with the earlier ones, or export the checkpoint and start a "
            "new run with it as `model`."
        )
    sentences = []
    if changes := _changes(before, now, ["images per step"]):
        meaning = "applies from now on"
        if not data_args.streaming:
            what = "are skipped" if now["images per step"] > before["images per step"] else "repeat"
            meaning = f"the position in the data is counted in steps of the new size, so some items {what}"
        sentences.append(
            f"{changes[0]} (per_device_train_batch_size x gradient_accumulation_steps x processes): {meaning}."
        )
    for meaning, names in MEANINGS.items():
        if changes := _changes(before, now, names):
            sentences.append(f"{', '.join(changes)}: {meaning}.")
    changes = _data_changes(record["data"]["train"], describe_mixture(data_args, train_dataset))
    if changes:
        sentences.append(f"{', '.join(changes)}: the next items are drawn from the new rows.")
    return sentences


def _comparable(arguments: dict[str, dict], num_processes: int) -> dict[str, Any]:
    """Return the arguments of a record by name, and facts derived from several of them."""
    # Current arguments have values that JSON writes differently.
    arguments = json.loads(json.dumps(arguments["model"] | arguments["data"] | arguments["training"]))
    if arguments["max_steps"] > 0:
        del arguments["num_train_epochs"]
    if arguments["lora_r"] == 0:
        arguments = {name: value for name, value in arguments.items() if name not in LORA_OPTIONS}
    for name in ("trainable", "lora_target_modules"):  # in any order
        if arguments.get(name):
            arguments[name] = sorted(arguments[name])
    is_muon = arguments.get("muon_learning_rate") is not None
    arguments["optim"] = "muon" if is_muon else arguments["optim"].removesuffix("_fused")
    if "part_learning_rates" in arguments:
        arguments["parts with a learning rate"] = sorted(arguments["part_learning_rates"])
    images = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    return arguments | {"images per step": images * num_processes}


def _changes(before: dict[str, Any], now: dict[str, Any], names) -> list[str]:
    """Describe which values with these names differ; names that an older record lacks are skipped."""
    return [
        f"{name} {_shorten(before[name])} -> {_shorten(now[name])}"
        for name in names
        if name in before and name in now and before[name] != now[name]
    ]


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:40]} ... {text[-40:]}"


def _data_changes(before: list[dict], now: list[dict]) -> list[str]:
    """Describe what differs among the sources of two records."""
    before, now = ({source["source"]: source for source in sources} for sources in (before, now))
    changes = [f"source {name} removed" for name in before if name not in now]
    for name, source in now.items():
        if name not in before:
            changes.append(f"source {name} added")
            continue
        facts = [key for key in source if None not in (source[key], before[name][key])]  # streams have no num_rows
        names = [key for key in facts if key != "fingerprint" and source[key] != before[name][key]]
        changes += [f"{key} of {name} {before[name][key]} -> {source[key]}" for key in names]
        if not names and "fingerprint" in facts and source["fingerprint"] != before[name]["fingerprint"]:
            changes.append(f"changed rows of {name} (other files or options)")
    return changes
