"""Tell which original's format a checkpoint has: by its tensors to convert it, by its config to refuse it."""

import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .checkpoints import LISA_V0_FILES, close_files, read_index
from .lazy_tensors import LORA_FACTOR, LazyTensor


# RMSNorm scales are around 1 in a model, and their differences from the base's around 0 in a delta.
MAX_NORM_OF_DELTA = 0.2
MAX_LAYERS = 10_000  # more than any model has


def recognize_source(tensors: dict[str, LazyTensor]) -> str | None:
    """Return the source of tensors, as named in `recipes/convert_weights.py`; None if they belong to no original.

    Raises:
        ValueError: They belong to a model that makes masks in a different way.
    """
    if any(name.startswith("image_encoder.") for name in tensors):
        return "sam"
    if any(name.startswith("grounding_encoder.sam2_model.") for name in tensors):
        return "sa2va"
    if any(name.startswith("base_model.model.") or LORA_FACTOR.fullmatch(name) for name in tensors):
        return "lisa-train"
    if any(name.startswith("model.visual_model.") for name in tensors):
        return "lisa"
    if any(name.startswith("visual_model.") for name in tensors):
        return "lisa-v0"
    if any(name.startswith("model.grounding_encoder.") for name in tensors):
        return "glamm"
    if any(name.startswith("seg_head.") for name in tensors):
        raise ValueError(
            "--checkpoint: expected a model that prompts its mask decoder with one token per [SEG], got UniPixel, "
            "which makes two with another kind of head, and has modules for pointed-at objects. Use its code."
        )
    if not any(name.startswith("model.mm_projector.") for name in tensors):
        return None
    norm = tensors.get("model.norm.weight")
    is_delta = norm is not None and norm.load().float().abs().mean() < MAX_NORM_OF_DELTA
    close_files()
    return "llava-delta" if is_delta else "llava"


def raise_if_original_format(path: str) -> None:
    """Raise a `ValueError` with the conversion command if a directory, file or Hub id has an original format.

    Also if its configuration has more layers than any model or names code to download, or if its index names files
    outside of the directory.
    """
    local = Path(path)
    if local.is_file():
        source = "sam" if local.suffix == ".pth" else "lisa-train"
    elif (local / "latest").is_file() and not (local / "trainer_state.json").is_file():
        source = "lisa-train"  # a ZeRO checkpoint that is not Trainer's
    else:
        try:
            config, _ = PreTrainedConfig.get_config_dict(path)
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(f"There is no model in {path}, neither as a directory nor on the Hub: {reason}") from error
        _raise_if_hostile(config, path)
        for index in local.glob("*.index.json"):
            read_index(index)
        source = _source_of_config(config, local)
        if source is None:
            return
    download, checkpoint = "", path
    if not local.exists():
        download, checkpoint = f"hf download {path} --local-dir DIRECTORY && ", "DIRECTORY"
    base = {"llava-delta": " --base LLAMA", "lisa-train": " --base LLAVA"}.get(source, "")
    raise ValueError(
        f"{path}: expected a model in transformers' format, got an original one. Convert it with `{download}python "
        f"recipes/convert_weights.py {source} --checkpoint {checkpoint}{base} --output OUTPUT` and pass OUTPUT."
    )


def _raise_if_hostile(config: Any, path: str, name: str = "") -> None:
    """Raise a `ValueError` for what transformers would do without asking.

    It would build any number of layers, and download and run the code of an attention that is named by its Hub id.
    """
    if isinstance(config, dict):
        for key, value in config.items():
            _raise_if_hostile(value, path, name if "implementation" in name else key)  # one for each part
        return
    if isinstance(config, list):
        for value in config:
            _raise_if_hostile(value, path, name)
        return
    expected = None
    if re.search("layers|depth|blocks", name) and isinstance(config, int) and config > MAX_LAYERS:
        expected = f"at most {MAX_LAYERS}"
    elif "implementation" in name and "/" in str(config):
        expected = "an implementation in transformers, not code on the Hub,"
    if expected:
        raise ValueError(
            f"{path}: expected {expected} as {name} in config.json, got {config!r}. Change it, or download the model "
            "from a source that you trust."
        )


def _source_of_config(config: dict, local: Path) -> str | None:
    """Return the source, as `recipes/convert_weights.py` names it, of an original's `config.json`; None for others."""
    if config.get("model_type") == "sa2va_chat":
        return "sa2va"
    if "mm_vision_select_layer" not in config:
        return None
    if "GLaMMForCausalLM" in (config.get("architectures") or []):
        return "glamm"
    if "train_mask_decoder" in config:
        return "lisa"
    if (local / LISA_V0_FILES[0]).is_file():
        return "lisa-v0"
    return "llava-delta" if "delta" in local.name.lower() else "llava"
