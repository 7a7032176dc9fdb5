"""From what a training run left behind, finished or not, to one directory that anyone loads."""

import json
import logging
import shutil
from pathlib import Path

import torch
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .conversion.checkpoints import LazyTensor, is_zero_checkpoint, open_checkpoint, open_zero_checkpoint
from .conversion.saving import MAX_SHARD_SIZE, most_common_dtype
from .model.configuration_lisa import LisaConfig
from .model.modeling_lisa import LisaForConditionalGeneration
from .model.processing_lisa import LisaProcessor
from .training.arguments import ModelArguments
from .training.build import build_config_and_processor, build_model
from .training.checkpointing import find_checkpoint as find_complete_checkpoint
from .training.model_card import EVALUATION, write_model_card
from .training.run_record import RUN_RECORD, find_run_record
from .training.trainable import merge_lora
from .training.trainer import LisaTrainer


logger = logging.getLogger(__name__)

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


# ---- what a run left ------------------------------------------------------------------------------------------------


def find_checkpoint(run: Path) -> Path:
    """The newest complete model of a run.

    Args:
        run: the output directory of a run, finished or not, or one checkpoint, which is then taken as it is: of its
            files, only the weights must be there and whole.

    Returns:
        `run` itself, or one of its checkpoints. A newer one that is not complete (see `checkpointing.py`), because the
        run was interrupted while it saved, is passed over with a warning.

    Raises:
        ValueError: nothing complete is there.
    """
    if not run.is_dir():
        raise ValueError(
            f"{run}: expected the output directory of a training run, or a checkpoint; it is no directory"
        )
    if run.name.startswith("checkpoint-"):
        open_weights(run)
        return run
    newest = find_complete_checkpoint(str(run))
    if _holds_model(run):
        # The final model comes before the checkpoint of its step: it may be that of the best one.
        state = run / "trainer_state.json"
        final_step = json.loads(state.read_text())["global_step"] if state.is_file() else float("inf")
        if newest is None or int(newest.rpartition("-")[2]) <= final_step:
            try:
                open_weights(run)
                return run
            except ValueError as error:
                logger.warning("Passed over the final model: %s", error)
    if newest is None:
        raise ValueError(
            f"{run}: expected a model or a complete checkpoint-N in it, found none. Of a checkpoint that is named "
            "itself, nothing but the weights must be complete."
        )
    return Path(newest)


def open_weights(checkpoint: Path) -> dict[str, LazyTensor]:
    """All weights of a checkpoint in the names under which they were trained; none is read yet.

    Raises:
        ValueError: a file is missing or truncated, and which one.
    """
    if (checkpoint / ADAPTER_WEIGHTS).is_file():
        return open_checkpoint(checkpoint / ADAPTER_WEIGHTS)
    if is_zero_checkpoint(checkpoint) and not _holds_model(checkpoint):
        return open_zero_checkpoint(checkpoint)
    return open_checkpoint(checkpoint)


def _holds_model(directory: Path) -> bool:
    return any(directory.glob("model.safetensors*")) or any(directory.glob("model-*-of-*.safetensors"))


# ---- the model ------------------------------------------------------------------------------------------------------


def restore_model(checkpoint: Path) -> tuple[LisaForConditionalGeneration, LisaProcessor]:
    """The model of a checkpoint, with LoRA merged and ZeRO's parts put together, and its processor.

    Raises:
        ValueError: a file is missing or truncated, or the weights are not those of the model.
    """
    processor = LisaProcessor.from_pretrained(checkpoint)
    if (checkpoint / ADAPTER_CONFIG).is_file():
        return merge_lora(restore_adapter(checkpoint)), processor
    weights = open_weights(checkpoint)
    config = LisaConfig.from_pretrained(checkpoint)
    if _holds_model(checkpoint):
        source = {"pretrained_model_name_or_path": checkpoint}
    else:
        source = {
            "pretrained_model_name_or_path": None,
            "state_dict": {name: tensor.load() for name, tensor in weights.items()},
        }
    model, info = LisaForConditionalGeneration.from_pretrained(
        **source, config=config, dtype=config.dtype, output_loading_info=True
    )
    wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise ValueError(f"{checkpoint}: the weights are not those of its config.json: {wrong}.")
    return model, processor


def restore_adapter(checkpoint: Path) -> PeftModel:
    """The trained adapter of a LoRA run on the model that the run began with, which is made again as it was then.

    Raises:
        ValueError: nothing tells what the run began with, or the weights are not those of the adapter.
    """
    weights = open_weights(checkpoint)
    base = build_base(checkpoint)
    if (checkpoint / ADAPTER_WEIGHTS).is_file():
        return PeftModel.from_pretrained(base, checkpoint)
    model = get_peft_model(base, PeftConfig.from_pretrained(checkpoint))
    result = model.load_state_dict({name: tensor.load() for name, tensor in weights.items()}, strict=False)
    missing = [name for name in result.missing_keys if ".lora_" in name]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{checkpoint}: the weights are not those of its {ADAPTER_CONFIG}: missing {missing}, unexpected "
            f"{result.unexpected_keys}."
        )
    return model


def build_base(checkpoint: Path) -> LisaForConditionalGeneration:
    """The model that a run began with, from its record; random weights are drawn with the run's seed again."""
    record = find_run_record(checkpoint)
    if record is None:
        raise ValueError(
            f"{checkpoint} is a LoRA adapter, and what it belongs to stands in the {RUN_RECORD} of its run: expected "
            "one beside it or in the directory above, found none. Copy it there."
        )
    arguments = dict(record["arguments"]["model"])
    for name in ("model", "vlm", "mask_model", "language_model", "tokenizer", "chat_template"):
        relative = Path(record["directory"], arguments[name] or "")
        if arguments[name] and relative.exists():
            arguments[name] = str(relative)
    if arguments["vlm_config"] is not None:
        arguments["tokenizer"] = str(checkpoint)  # one that was made from the data is there alone
    set_seed(record["arguments"]["training"]["seed"])
    model_args = ModelArguments(**arguments)
    config, _ = build_config_and_processor(model_args)
    model = build_model(model_args, config, device_map="cpu")
    # LoRA was trained beside the rounded weights; in few bits, their sum would be rounded once more.
    return model.dequantize() if getattr(model, "is_quantized", False) else model


def trained_model(trainer: LisaTrainer) -> LisaForConditionalGeneration | None:
    """The model at the end of a training, LoRA merged, on the main process; None on the others. All must call it."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_quantized = getattr(model, "is_quantized", False)
    if not is_quantized and not trainer.is_fsdp_enabled and (plugin is None or plugin.zero_stage != 3):
        return merge_lora(model) if trainer.is_world_process_zero() else None
    # Each process holds a piece of every weight, or all of them in few bits, and the whole need not fit beside it: it
    # is put together on disk.
    directory = Path(trainer.args.output_dir, "checkpoint-final")
    trainer.save_model(str(directory), _internal_call=True)
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return None
    unset_hf_deepspeed_config()  # else loading and generating would wait for the other processes
    model, _ = restore_model(directory)
    shutil.rmtree(directory)
    return model.to(trainer.args.device)


# ---- out ------------------------------------------------------------------------------------------------------------


def save_model(
    model: LisaForConditionalGeneration, processor: LisaProcessor, directory: Path, dtype: torch.dtype | None = None
) -> None:
    """Writes a model in shards, its generation settings and code, and its processor.

    Args:
        dtype: of all weights; by default the one that most of the numbers have.
    """
    model.to(dtype or most_common_dtype(model.state_dict()))
    model.save_pretrained(directory, max_shard_size=MAX_SHARD_SIZE)
    processor.save_pretrained(directory)


def save_adapter(checkpoint: Path, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the adapter and the fully trained parts of a LoRA run, and the processor, without what they belong to.

    Raises:
        ValueError: the run was not one with LoRA.
    """
    if not (checkpoint / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{checkpoint} is not the checkpoint of a run with LoRA: expected {ADAPTER_CONFIG} in it.")
    restore_adapter(checkpoint).to(dtype).save_pretrained(directory)
    LisaProcessor.from_pretrained(checkpoint).save_pretrained(directory)


def save_records(
    checkpoint: Path, directory: Path, model_id: str, is_adapter: bool = False, evaluation: Path | None = None
) -> None:
    """Copies the record, the figures and the sheets of predictions of a run beside its model; writes the model card.

    Args:
        model_id: of the repository on the Hub, or the name of the directory.
        evaluation: output directory of recipes/eval.py, whose figures and sheets the card shows too.

    Raises:
        ValueError: `evaluation` holds no figures, or the run has no record.
    """
    sources = list(checkpoint.glob("predictions*.png"))
    if evaluation is not None:
        if not (evaluation / EVALUATION).is_file():
            raise ValueError(f"{evaluation}: expected the {EVALUATION} that recipes/eval.py writes, found none.")
        sources = [evaluation / EVALUATION, *evaluation.glob("predictions*.png")]
    for source in sources:
        shutil.copy(source, directory)
    if record := find_run_record(checkpoint):
        (directory / RUN_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    write_model_card(directory, checkpoint, model_id, is_adapter)


def push_to_hub(directory: Path, repo_id: str, private: bool = True) -> str:
    """Uploads an exported directory to the Hub, where the repository is made if need be; returns its address.

    Called again after an interruption, it sends only what did not arrive.
    """
    api = HfApi()
    url = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
    api.upload_folder(repo_id=url.repo_id, repo_type="model", folder_path=directory)
    return str(url)
