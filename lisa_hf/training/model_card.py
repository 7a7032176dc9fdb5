"""Model card of a run, generated from its records: base models, data, training and metrics."""

import html
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from ..evaluation.benchmarks import EVALUATION, markdown_table
from ..evaluation.leakage import describe_seen_images
from ..evaluation.protocols import PROTOCOLS
from ..redaction import LOCAL, redact
from .run_record import find_run_record, list_stages


TEMPLATE = Path(__file__).with_name("model_card_template.md")
HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
LOGGED_PROTOCOLS = {"": "lisa", "generated_": "generated"}  # by prefix of their metrics in the log
BASES = ("vlm", "mask_model", "language_model", "model")  # arguments that name the models a run starts from
TRAINING_ARGUMENTS = (
    "learning_rate",
    "part_learning_rates",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
    "seed",
)
LORA_ARGUMENTS = ("lora_alpha", "lora_dropout", "lora_target_modules", "use_dora")
MODEL_ARGUMENTS = (
    "trainable",
    "lora_r",
    *LORA_ARGUMENTS,
    "load_in_8bit",
    "load_in_4bit",
    "ce_loss_weight",
    "mask_bce_loss_weight",
    "mask_dice_loss_weight",
    "mask_loss_points",
    "dtype",
)
DATA_ARGUMENTS = ("num_questions", "explanatory_probability", "max_length")


def write_model_card(directory: Path, checkpoint: Path, model_id: str, is_adapter: bool = False) -> None:
    """Write the README.md of a model.

    Args:
        directory: Directory of the model. Prediction sheets and benchmark results in it (`predictions*.png`,
            `evaluation.json`) are shown.
        checkpoint: Checkpoint that the model was made from; the run's records are in it or next to it.
        model_id: Id of the model's repository on the Hub, or the name of its directory.
        is_adapter: Whether the directory has only an adapter.

    Raises:
        ValueError: If the run has no record.
    """
    record = read_required_record(checkpoint)
    state = _read_json(checkpoint / "trainer_state.json")
    step, is_best = weights_step(checkpoint, record, state)
    results = evaluation_results(record, _metrics(checkpoint, state, step))
    stages = list_stages(record)
    data = [row for stage in stages for row in stage["data"]["train"]]
    bases = list({base["name"]: base for stage in stages for base in _bases(stage)}.values())
    evaluation = _read_json(directory / EVALUATION)
    benchmarks = {
        name if result["split"] in name else f"{name} ({result['split']})": result
        for name, result in evaluation.get("benchmarks", {}).items()
    }
    texts = dict(
        model_name=Path(model_id).name,
        bases=bases,
        results=results,
        data=list({json.dumps(row): row for row in data}.values()),
        data_notes=[stage["training_data"] for stage in stages if "training_data" in stage]
        + [
            describe_seen_images(name, evaluation["benchmarks"][name]["num_items"], seen)
            for name, seen in evaluation.get("train_overlap", {}).items()
            if seen and any(seen.values())
        ],
        not_train=sorted({(row["source"], row["split"]) for row in data if row["split"] != "train"}),
        hyperparameters=_hyperparameters(record, state, step if is_best else None),
        versions=record["versions"],
        git_commit=record["git_commit"],
    )
    card = ModelCard.from_template(
        _card_data(model_id, bases, [*results, *benchmark_results(benchmarks)], is_adapter),
        template_path=str(TEMPLATE),
        model_literal=json.dumps(model_id, ensure_ascii=False),
        is_adapter=is_adapter,
        benchmarks=markdown_table({escape(name): result for name, result in benchmarks.items()}) if benchmarks else "",
        protocols={
            name: PROTOCOLS[name].source
            for result in benchmarks.values()
            for name in result["protocols"]
            if name in PROTOCOLS  # it may be from another version
        },
        predictions=sorted(quote(path.name) for path in directory.glob("predictions*.png")),
        **escape(texts),
    )
    card.save(directory / "README.md")
    write_eval_results(directory)


def read_required_record(checkpoint: Path) -> dict:
    """Return the record of a checkpoint's run; raise a `ValueError` if there is none."""
    record = find_run_record(checkpoint)
    if record is None:
        raise ValueError(
            f"{checkpoint}: expected the run.json of its run in it or in the directory above, got none. Copy it "
            "there: the model card is made from it."
        )
    return record


def escape(value: Any) -> Any:
    """Return a value, or a structure of them, with its texts escaped for Markdown, on one line and without secrets.

    Names of sources, models and licenses may come from others' files: from the record of the model that a run started
    from, and from its card.
    """
    if isinstance(value, dict):
        return {escape(key): escape(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(escape, value))
    if not isinstance(value, str):
        return value
    text = html.escape(" ".join(redact(value).split()), quote=False)
    text = re.sub(r"([\\`*\[\]|!~])", r"\\\1", text)
    return re.sub(r"^([#+=-])", r"\\\1", text)


def evaluation_results(record: dict, metrics: dict[str, float]) -> list[dict]:
    """Return one row per evaluation source and protocol.

    Args:
        record: Record of the run.
        metrics: Metrics as the trainer logs them.

    Returns:
        Dicts of `source`, `split`, `protocol`, `giou`, `ciou`, `interval` (95%, of gIoU), all in percent, and
        `num_masks`.
    """
    sources = record["data"]["eval"]
    results = []
    for source in sources:
        prefix = f"eval_{source['source']}_" if len(sources) > 1 else "eval_"
        for logged, protocol in LOGGED_PROTOCOLS.items():
            if f"{prefix}{logged}giou" not in metrics:
                continue
            low, high = (metrics[f"{prefix}{logged}giou_{end}"] for end in ("low", "high"))
            results.append(
                {
                    "source": source["source"],
                    "split": source["split"],
                    "protocol": protocol,
                    "giou": round(100 * metrics[f"{prefix}{logged}giou"], 2),
                    "ciou": round(100 * metrics[f"{prefix}{logged}ciou"], 2),
                    "interval": f"{100 * low:.2f} to {100 * high:.2f}",
                    "num_masks": int(metrics[f"{prefix}num_masks"]),
                }
            )
    return results


def weights_step(checkpoint: Path, record: dict, state: dict) -> tuple[int | None, bool]:
    """Return the step of the weights, if known, and whether it is the best instead of the last one."""
    last, best = state.get("global_step"), state.get("best_global_step")
    is_final = not checkpoint.name.startswith("checkpoint-")
    is_best = bool(is_final and best and best != last and record["arguments"]["training"]["load_best_model_at_end"])
    return (best if is_best else last), is_best


def benchmark_results(benchmarks: dict[str, dict]) -> list[dict]:
    """Return `source`, `split`, `protocol` and, in percent, `giou` and `ciou` of benchmarks in `evaluation.json`."""
    return [
        {
            # The id of a Hub dataset; otherwise the source.
            "source": result.get("path", result["builder"]) if result["builder"] == "hub" else result["builder"],
            "split": result["split"],
            "protocol": protocol,
            "giou": round(100 * metrics["giou"], 2),
            "ciou": round(100 * metrics["ciou"], 2),
        }
        for result in benchmarks.values()
        for protocol, metrics in result["protocols"].items()
    ]


def write_eval_results(directory: Path) -> None:
    """Write `.eval_results/*.yaml` with the metrics in `evaluation.json`, which the Hub shows on the model's page.

    They are written for benchmarks that are Hub datasets, one file per protocol.

    Args:
        directory: Directory of the model.
    """
    evaluation = _read_json(directory / EVALUATION)
    for name, result in evaluation.get("benchmarks", {}).items():
        if result["builder"] != "hub":
            continue
        for protocol, metrics in result["protocols"].items():
            entry = EvalResultEntry(
                dataset_id=result["path"],
                task_id="default",
                value=round(100 * metrics["giou"], 2),
                dataset_revision=result.get("revision"),
                date=evaluation.get("environments", [{}])[-1].get("date"),
                notes=f"gIoU by the protocol {protocol}; cIoU {100 * metrics['ciou']:.2f}",
            )
            path = directory / ".eval_results" / f"{name}_{protocol}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False), encoding="utf-8")


def _metrics(checkpoint: Path, state: dict, step: int | None) -> dict[str, float]:
    """Return the metrics of exactly these weights: from the end of the run, or from their step."""
    if metrics := _read_json(checkpoint / "eval_results.json"):
        return metrics
    entries = [entry for entry in state.get("log_history", []) if entry["step"] == step]
    return {key: value for entry in entries for key, value in entry.items() if key.startswith("eval_")}


def _bases(record: dict) -> list[dict]:
    """Return the name, Hub id (or None) and license (or None) of the models that a run started from."""
    if "converted_from" in record:
        return [{"name": Path(record["converted_from"]).name, "hub_id": None, "license": None}]
    bases = []
    for argument in BASES:
        name = record["arguments"]["model"][argument]
        if name is None or (argument == "model" and record["continues"]):  # list its base models instead
            continue
        path = Path(record["directory"], name)
        is_local = path.exists() or name.startswith(LOCAL)  # on this machine, or on that of an earlier stage
        bases.append(
            {
                "name": path.name if is_local else name,
                "hub_id": name if not is_local and HUB_ID.fullmatch(name) else None,
                "license": _license(str(path / "README.md") if is_local else name),
            }
        )
    return bases


def _license(model: str) -> str | None:
    """Return the license in a model card, given by file or repository; None if missing or offline."""
    try:
        return ModelCard.load(model).data.license
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        return None


def _card_data(model_id: str, bases: list[dict], results: list[dict], is_adapter: bool) -> ModelCardData:
    licenses = {base["license"] for base in bases}
    is_one = len(licenses) == 1 and None not in licenses
    license_fields = {"license": licenses.pop()} if is_one else {"license": "other", "license_name": "see-below"}
    return ModelCardData(
        **(license_fields if bases else {}),
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="image-segmentation",
        tags=["lisa", "reasoning-segmentation", "image-text-to-text"],
        base_model=[base["hub_id"] for base in bases if base["hub_id"]] or None,
        model_name=Path(model_id).name,
        eval_results=[
            EvalResult(
                task_type="image-segmentation",
                task_name="reasoning segmentation",
                dataset_type=result["source"],
                dataset_name=result["source"],
                dataset_split=result["split"],
                metric_type=metric,
                metric_name=f"{name} ({result['protocol']})",
                metric_value=result[metric],
            )
            for result in results
            for metric, name in (("giou", "gIoU"), ("ciou", "cIoU"))
        ]
        or None,
    )


def _hyperparameters(record: dict, state: dict, best_step: int | None) -> dict:
    if "converted_from" in record:
        return {}
    arguments = record["arguments"]
    training = arguments["training"]
    batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    chosen = {"weights": f"step {best_step}, the best by {training['metric_for_best_model']}"} if best_step else {}
    chosen |= {
        "steps": state.get("global_step", training["max_steps"]),
        "epochs": round(state.get("epoch") or 0, 2),
        "images per step": batch * record["hardware"]["num_processes"],
        "processes": f"{record['hardware']['num_processes']} x {record['hardware']['device']}",
    }
    unused = LORA_ARGUMENTS if not arguments["model"]["lora_r"] else ()
    for group, names in (("training", TRAINING_ARGUMENTS), ("model", MODEL_ARGUMENTS), ("data", DATA_ARGUMENTS)):
        for name in names:
            value = arguments[group][name]
            if value is not None and value != {} and name not in unused:
                chosen[name] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return chosen


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
