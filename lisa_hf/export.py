"""Export a finished or interrupted run to one directory that loads without this package, and push it to the Hub."""

import json
import logging
import shutil
from pathlib import Path

import torch
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from transformers import GenerationConfig, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import GENERATION_CONFIG_NAME, PROCESSOR_NAME

from .conversion.checkpoints import open_checkpoint
from .conversion.fsdp_checkpoints import is_fsdp_checkpoint
from .conversion.lazy_tensors import LazyTensor
from .conversion.saving import (
    MAX_SHARD_SIZE,
    build_without_weights,
    check_tensors,
    most_common_dtype,
    save_without_loading,
)
from .conversion.zero_checkpoints import is_zero_checkpoint, open_zero_checkpoint
from .data.image_keys import read_image_keys, write_image_keys
from .evaluation.benchmarks import EVALUATION, read_evaluation
from .model.configuration_lisa import LisaConfig
from .model.modeling_lisa import LisaForConditionalGeneration
from .model.processing_lisa import LisaProcessor
from .model.upstream_fixes import share_weights_files
from .redaction import LOCAL, hide_local_paths, redact
from .training.arguments import ModelArguments
from .training.build import build_config_and_processor, build_model
from .training.checkpointing import find_checkpoint
from .training.model_card import BASES, read_required_record, write_model_card
from .training.run_record import RUN_RECORD, find_run_record, list_stages
from .training.trainable import merge_lora, prepare_for_training
from .training.trainer import LisaTrainer


logger = logging.getLogger(__name__)


# ---- find the model of a run ----------------------------------------------------------------------------------------


def find_newest_model(run: Path) -> Path:
    """Return the directory of a run's newest complete model: its final one, or that of a checkpoint.

    Incomplete checkpoints, left by a process that was killed while saving, are skipped with a warning.

    Args:
        run: Output directory of a finished or unfinished run, or one checkpoint. A checkpoint is returned unchanged;
            only its weights have to be complete.

    Raises:
        ValueError: There is no complete model.
    """
    if not run.is_dir():
        raise ValueError(f"{run}: expected a run's output directory or a checkpoint, got no directory. Name another.")
    if run.name.startswith("checkpoint-"):
        open_weights(run)
        return run
    newest = find_checkpoint(str(run))
    if _has_whole_model(run):
        # Prefer the final model to the checkpoint of the same step: it may be the best one of the run.
        state = run / "trainer_state.json"
        final_step = json.loads(state.read_text())["global_step"] if state.is_file() else float("inf")
        if newest is None or int(newest.rpartition("-")[2]) <= final_step:
            try:
                open_weights(run)
                return run
            except ValueError as error:
                logger.warning("Skipped the final model: %s", error)
    if newest is None:
        raise ValueError(
            f"{run}: expected a model or a complete checkpoint-N in it, got neither. To export an incomplete "
            "checkpoint whose weights are complete, name the checkpoint itself."
        )
    return Path(newest)


def find_consolidated(run: Path) -> Path | None:
    """Return the checkpoint that the output of DeepSpeed's zero_to_fp32.py belongs to, or None for anything else.

    Args:
        run: File or directory with only weights, in the directory of its checkpoint.

    Raises:
        ValueError: It is not in a checkpoint.
    """
    is_weights = run.is_file() or (_has_weights(run) and not (run / PROCESSOR_NAME).is_file())
    if not is_weights:
        return None
    for directory in (run.resolve(), *run.resolve().parents):
        if directory.name.startswith("checkpoint-") and (directory / PROCESSOR_NAME).is_file():
            return directory
    raise ValueError(
        f"{run}: expected weights in the checkpoint that they were made from, which has their configuration, got them "
        "elsewhere. Move them into its directory: `python zero_to_fp32.py . consolidated` there makes them so."
    )


def open_weights(checkpoint: Path) -> dict[str, LazyTensor]:
    """Return all weights of a checkpoint by the names used in training, without reading their values.

    Raises:
        ValueError: A file is missing or truncated; the message names it.
    """
    if (checkpoint / ADAPTER_WEIGHTS).is_file():
        return open_checkpoint(checkpoint / ADAPTER_WEIGHTS)
    if is_zero_checkpoint(checkpoint) and not _has_whole_model(checkpoint):
        return open_zero_checkpoint(checkpoint)
    return open_checkpoint(checkpoint)


def _has_weights(directory: Path) -> bool:
    return any(file for pattern in ("pytorch_model*.bin", "model*.safetensors") for file in directory.glob(pattern))


def _has_whole_model(directory: Path) -> bool:
    return any(directory.glob("model.safetensors*")) or any(directory.glob("model-*-of-*.safetensors"))


# ---- restore the model ----------------------------------------------------------------------------------------------


def restore_model(
    checkpoint: Path, consolidated: Path | None = None
) -> tuple[LisaForConditionalGeneration, LisaProcessor]:
    """Load the model of a checkpoint, with LoRA merged and ZeRO shards consolidated, and its processor.

    Args:
        checkpoint: The checkpoint.
        consolidated: Output of DeepSpeed's zero_to_fp32.py to load the weights from: all weights, or the trained ones.

    Raises:
        ValueError: A file is missing or truncated, or the weights do not match the configuration.
    """
    processor = LisaProcessor.from_pretrained(checkpoint)
    if (checkpoint / ADAPTER_CONFIG).is_file():
        return merge_lora(restore_adapter(checkpoint, consolidated)), processor
    weights = open_checkpoint(consolidated) if consolidated else open_weights(checkpoint)
    config = LisaConfig.from_pretrained(checkpoint)
    if not consolidated and _has_whole_model(checkpoint):
        source = {"pretrained_model_name_or_path": checkpoint}
    elif consolidated and not _are_all(weights, config):
        return _load_trained(checkpoint, weights), processor
    else:
        source = {"pretrained_model_name_or_path": None, "state_dict": _load_all(weights)}
    model, info = LisaForConditionalGeneration.from_pretrained(
        **source, config=config, dtype=config.dtype, output_loading_info=True
    )
    wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise ValueError(
            f"{checkpoint}: expected the weights of its config.json, got {wrong}. Restore the config.json of the run."
        )
    return model, processor


def _are_all(weights: dict[str, LazyTensor], config: LisaConfig) -> bool:
    model = build_without_weights(LisaForConditionalGeneration, config)
    model.tie_weights()
    parameters = model.state_dict(keep_vars=True)
    given = {id(parameter) for name, parameter in parameters.items() if name in weights}
    return all(id(parameter) in given for parameter in parameters.values())


def _load_trained(checkpoint: Path, weights: dict[str, LazyTensor]) -> LisaForConditionalGeneration:
    """Load the trained weights of a run without LoRA into the model that the run started from."""
    base = restore_base(checkpoint)
    adaptation = ModelArguments(**find_run_record(checkpoint)["arguments"]["model"]).adaptation
    model = prepare_for_training(base, **adaptation)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    _load_all_of(trained, model, weights, checkpoint)
    return model


def restore_adapter(checkpoint: Path, consolidated: Path | None = None) -> PeftModel:
    """Load the trained adapter of a LoRA run on the base model that the run started from.

    Args:
        checkpoint: The checkpoint.
        consolidated: See [`restore_model`].

    Raises:
        ValueError: No record names the model that the run started from, or the weights do not match the adapter.
    """
    weights = open_checkpoint(consolidated) if consolidated else open_weights(checkpoint)
    base = restore_base(checkpoint)
    if not consolidated and (checkpoint / ADAPTER_WEIGHTS).is_file():
        return PeftModel.from_pretrained(base, checkpoint)
    model = get_peft_model(base, PeftConfig.from_pretrained(checkpoint))
    trained = {name for name, _ in model.named_parameters() if ".lora_" in name or ".modules_to_save." in name}
    if not consolidated and is_fsdp_checkpoint(checkpoint):  # named as in PEFT's files
        result = set_peft_model_state_dict(model, _load_all(weights))
        _raise_if_weights_differ(trained, result, checkpoint)
        return model
    # ZeRO shards: they hold every weight, under PEFT's names in memory.
    _load_all_of(trained, model, weights, checkpoint)
    return model


def _load_all_of(trained: set[str], model: torch.nn.Module, weights: dict[str, LazyTensor], checkpoint: Path) -> None:
    """Load weights, which must include the trained ones."""
    _raise_if_weights_differ(trained, model.load_state_dict(_load_all(weights), strict=False), checkpoint)


def _raise_if_weights_differ(trained: set[str], result, checkpoint: Path) -> None:
    missing = sorted(trained.intersection(result.missing_keys))
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{checkpoint}: expected the weights of the run's configuration, got {missing} missing and "
            f"{result.unexpected_keys} unexpected. Restore the files of the run."
        )


def restore_base(checkpoint: Path) -> LisaForConditionalGeneration:
    """Build the model that a run started from, according to its record; random weights use the run's seed.

    Raises:
        ValueError: There is no record.
    """
    record = find_run_record(checkpoint)
    if record is None:
        raise ValueError(
            f"{checkpoint} has only trained weights: expected the {RUN_RECORD} of its run next to it or in the "
            "directory above, which names its base model, got none. Copy it there."
        )
    arguments = dict(record["arguments"]["model"])
    # Paths are relative to the directory in which the run was started.
    for name in ("model", "vlm", "mask_model", "language_model", "tokenizer", "chat_template"):
        relative = Path(record["directory"], arguments[name] or "")
        if arguments[name] and relative.exists():
            arguments[name] = str(relative)
    if arguments["vlm_config"] is not None:
        arguments["tokenizer"] = str(checkpoint)  # a tokenizer trained on the data was saved only there
    set_seed(record["arguments"]["training"]["seed"])
    model_args = ModelArguments(**arguments)
    config, _ = build_config_and_processor(model_args)
    model = build_model(model_args, config, device_map="cpu")
    # LoRA was trained on quantized weights. Merging into those would round their sum a second time.
    return model.dequantize() if getattr(model, "is_quantized", False) else model


def gather_trained_model(trainer: LisaTrainer) -> LisaForConditionalGeneration | None:
    """Return the model at the end of training, with LoRA merged, on the main process; None on the others.

    Every process must call it.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_quantized = getattr(model, "is_quantized", False)
    if not is_quantized and not trainer.args.shards_weights:
        return merge_lora(model) if trainer.is_world_process_zero() else None
    # Weights are sharded or quantized, and the whole model may not fit in memory as well: merge through the disk.
    directory = Path(trainer.args.output_dir, "checkpoint-final")
    trainer.save_model(str(directory), _internal_call=True)
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return None
    unset_hf_deepspeed_config()  # With it, loading and generation would wait for the other processes.
    model, _ = restore_model(directory)
    shutil.rmtree(directory)
    return model.to(trainer.args.device)


def _load_all(weights: dict[str, LazyTensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.load() for name, tensor in weights.items()}


# ---- save and upload ------------------------------------------------------------------------------------------------


def export_model(
    checkpoint: Path, directory: Path, dtype: torch.dtype | None = None, consolidated: Path | None = None
) -> None:
    """Save the model of a checkpoint, with LoRA merged and shards consolidated, and its processor.

    Without LoRA, weights are copied from the checkpoint's files to the model's, a few at a time.

    Args:
        checkpoint: The checkpoint.
        directory: Directory to write to.
        dtype: Dtype of all weights; by default that of the run.
        consolidated: See [`restore_model`].

    Raises:
        ValueError: See [`restore_model`].
    """
    weights = None
    if not (checkpoint / ADAPTER_CONFIG).is_file():
        weights = open_checkpoint(consolidated) if consolidated else open_weights(checkpoint)
        config = LisaConfig.from_pretrained(checkpoint)
    if weights is None or (consolidated and not _are_all(weights, config)):
        return save_model(*restore_model(checkpoint, consolidated), directory, dtype)
    model = build_without_weights(LisaForConditionalGeneration, config)
    model.tie_weights()
    if (checkpoint / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    weights = _complete_tied(model, weights)
    try:
        check_tensors(model, weights)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error} Restore the config.json of the run.") from error
    saved = {name: tensor for name, tensor in weights.items() if name not in model.all_tied_weights_keys}
    save_without_loading(model, saved, directory, dtype or config.dtype or most_common_dtype(saved), MAX_SHARD_SIZE)
    LisaProcessor.from_pretrained(checkpoint).save_pretrained(directory)


def _complete_tied(model: LisaForConditionalGeneration, weights: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the weights, with those that have two names in the model under both."""
    parameters = model.state_dict(keep_vars=True)
    given = {id(parameters[name]): tensor for name, tensor in weights.items() if name in parameters}
    tied = {name: given[id(value)] for name, value in parameters.items() if id(value) in given}
    return tied | weights


def save_model(
    model: LisaForConditionalGeneration, processor: LisaProcessor, directory: Path, dtype: torch.dtype | None = None
) -> None:
    """Save a model in shards, its generation settings and code, and its processor.

    Args:
        model: Model to save, which is converted to `dtype` in place.
        processor: Processor to save.
        directory: Directory to write to.
        dtype: Dtype of all weights; by default the one of most values.
    """
    model.to(dtype or most_common_dtype(model.state_dict()))
    model.save_pretrained(directory, max_shard_size=MAX_SHARD_SIZE)
    processor.save_pretrained(directory)


def save_adapter(
    checkpoint: Path, directory: Path, dtype: torch.dtype | None = None, consolidated: Path | None = None
) -> None:
    """Save the adapter and the fully trained parts of a LoRA run, and the processor, without the base model.

    Raises:
        ValueError: The run was trained without LoRA.
    """
    if not (checkpoint / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{checkpoint}: expected the {ADAPTER_CONFIG} of a LoRA run, got none. Export without --adapter_only."
        )
    restore_adapter(checkpoint, consolidated).to(dtype).save_pretrained(directory)
    share_weights_files(directory)
    LisaProcessor.from_pretrained(checkpoint).save_pretrained(directory)


def check_records(checkpoint: Path, evaluation: Path | None = None) -> None:
    """Raise a `ValueError` unless [`save_records`] finds the run record and the evaluation that it needs."""
    read_required_record(checkpoint)
    if evaluation is not None:
        read_evaluation(evaluation)


def save_records(
    checkpoint: Path, directory: Path, model_id: str, is_adapter: bool = False, evaluation: Path | None = None
) -> None:
    """Copy the run record, metrics and prediction sheets of a run next to its model, and write the model card.

    What is copied holds no secrets, and no paths of this machine unless an adapter's base is found by them.

    Args:
        checkpoint: Directory that the model was restored from.
        directory: Directory to write to.
        model_id: Repository on the Hub, or name of the directory, for the card's example.
        is_adapter: Whether the directory holds an adapter without its base model.
        evaluation: Output directory of recipes/eval.py with metrics and sheets for the card.

    Raises:
        ValueError: See [`check_records`].
    """
    check_records(checkpoint, evaluation)
    if evaluation is not None:
        _copy_evaluation(evaluation, checkpoint, directory)
        for sheet in evaluation.glob("predictions*.png"):
            shutil.copy(sheet, directory)
    else:
        step = checkpoint.name.removeprefix("checkpoint-")
        for sheet in (checkpoint / "predictions.png", checkpoint.parent / "predictions" / f"step-{step}.png"):
            if sheet.is_file():
                shutil.copy(sheet, directory / "predictions.png")
    record = _shared_record(read_required_record(checkpoint), is_adapter)
    (directory / RUN_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if keys := read_image_keys(checkpoint):
        write_image_keys(directory, keys)
    write_model_card(directory, checkpoint, model_id, is_adapter)


def _shared_record(record: dict, is_adapter: bool) -> dict:
    """Return a run record as others may see it."""
    record = redact(record)
    local_bases = [
        (arguments, name)
        for stage in list_stages(record)
        if "converted_from" not in stage
        for arguments in [stage["arguments"]["model"]]
        for name in BASES
        if arguments[name] and Path(stage["directory"], arguments[name]).exists()
    ]
    if is_adapter and local_bases:
        logger.warning(
            "%s names the base of the adapter by the paths of this machine, where alone it can be loaded. To share "
            "it, export without --adapter_only.",
            RUN_RECORD,
        )
        return record
    for arguments, name in local_bases:  # a relative path looks like an id of the Hub
        arguments[name] = f"{LOCAL}/{Path(arguments[name]).name}"
    for stage in list_stages(record):
        stage |= {"directory": LOCAL} if "directory" in stage else {}
    return hide_local_paths(record)


def _copy_evaluation(evaluation: Path, checkpoint: Path, directory: Path) -> None:
    content = read_evaluation(evaluation)
    if Path(content["model"]).resolve() != checkpoint.resolve():
        message = "The card shows metrics of %s: check that it is the same model as %s."
        logger.warning(message, content["model"], checkpoint)
    content = hide_local_paths(redact(content))
    (directory / EVALUATION).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def push_to_hub(directory: Path, repo_id: str, private: bool = True) -> str:
    """Upload an exported directory to the Hub and return its URL. The repository is created if needed.

    After an interruption, a second call uploads only the missing files.
    """
    api = HfApi()
    url = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
    api.upload_folder(repo_id=url.repo_id, repo_type="model", folder_path=directory)
    return str(url)
