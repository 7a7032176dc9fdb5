"""What trains and what stays frozen: LoRA in the language model, whole parts beside it; merging LoRA."""

import re

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from .mask_backbone import UNTRAINED_DECODER_MODULES
from .modeling_lisa import LisaForConditionalGeneration


def find_parts(model: LisaForConditionalGeneration) -> dict[str, list[str]]:
    """Module paths of the parts that `trainable` can name.

    Names of the VLM's modules differ between families; its image encoder and language model are found through
    transformers, and the projector is what remains.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    backbone = model.vlm.base_model
    language_model, vision_tower = backbone.get_decoder(), backbone.get_encoder(modality="image")
    projector = [
        path
        for path, child in ((paths[id(child)], child) for child in backbone.children())
        if child is not language_model and child is not vision_tower and any(True for _ in child.parameters())
    ]
    embeddings = [paths[id(model.get_input_embeddings())], paths[id(model.get_output_embeddings())]]
    return {
        "seg_projector": ["seg_projector"],
        "mask_decoder": ["mask_model.mask_decoder"],
        "embeddings": embeddings,
        "vision_tower": [paths[id(vision_tower)]],
        "multi_modal_projector": projector,
        "mask_encoder": ["mask_model.vision_encoder"],
        "language_model": [paths[id(language_model)]],
    }


def prepare_for_training(
    model: LisaForConditionalGeneration,
    trainable: list[str],
    lora_r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    lora_target_modules: list[str] = ("q_proj", "v_proj"),
) -> LisaForConditionalGeneration | PeftModel:
    """Freezes everything but the named parts, and adds LoRA to the language model unless `lora_r` is 0.

    Args:
        trainable: parts that are trained in full, see [`find_parts`]. LISA: the projector, the mask decoder and the
            embeddings.
        lora_target_modules: linear layers of the language model, by the last part of their name.

    Returns:
        The model itself, or a `PeftModel` around it that saves adapters and fully trained parts.
    """
    parts = find_parts(model)
    model.requires_grad_(False)
    if lora_r == 0:
        for path in (path for part in trainable for path in parts[part]):
            model.get_submodule(path).requires_grad_(True)
    else:
        if "language_model" in trainable:
            raise ValueError(
                f"`trainable` names the language model and lora_r is {lora_r}: train it in full with lora_r 0, or "
                "with LoRA by leaving it out of `trainable`."
            )
        # Bare names such as q_proj would also match the vision tower and the mask decoder.
        (language_model,) = parts["language_model"]
        names = "|".join(map(re.escape, lora_target_modules))
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        config = LoraConfig(
            r=lora_r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=rf"{re.escape(language_model)}\..*\.({names})",
            modules_to_save=[path for part in trainable for path in _trained_modules(model, parts[part])],
            ensure_weight_tying=tied and "embeddings" in trainable,
        )
        try:
            model = get_peft_model(model, config)
        except ValueError as error:
            raise ValueError(
                f"LoRA found no layer of the language model named {', '.join(lora_target_modules)}: {error}"
            ) from error
    for module in _untrained_decoder_modules(model):
        module.requires_grad_(False)
    return model


def _trained_modules(model: nn.Module, paths: list[str]) -> list[str]:
    """The modules at the paths, or those within them, that train as a whole.

    PEFT saves a module whole, but under ZeRO-3 it gets only those weights from the Trainer that train.
    """
    untrained = set(_untrained_decoder_modules(model))
    trained = []
    for path in paths:
        module = model.get_submodule(path)
        if untrained.isdisjoint(module.modules()):
            trained.append(path)
        elif module not in untrained:
            children = [f"{path}.{name}" for name, child in module.named_children() if list(child.parameters())]
            trained += _trained_modules(model, children)
    return trained


def _untrained_decoder_modules(model: nn.Module) -> list[nn.Module]:
    pattern = "|".join(map(re.escape, UNTRAINED_DECODER_MODULES))
    path = re.compile(rf"(^|.*\.)mask_decoder\.(.*\.)?({pattern})$")
    return [module for name, module in model.named_modules() if path.match(name)]


def merge_lora(model: LisaForConditionalGeneration | PeftModel) -> LisaForConditionalGeneration:
    """The plain model with LoRA folded into its weights and the trained parts in place of the original ones."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def trainable_summary(model: PreTrainedModel | PeftModel) -> str:
    """One line per trained part: its name and how many parameters of it train; the last line is the total."""
    counts: dict[str, int] = {}
    total = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.")
            part = "LoRA" if ".lora_" in name else re.split(r"\.modules_to_save|\.layers\.|\.weight|\.bias", name)[0]
            part = ".".join(part.split(".")[:4])
            counts[part] = counts.get(part, 0) + parameter.numel()
    lines = [f"{part:<60}{count:>14,}" for part, count in counts.items()]
    trained = sum(counts.values())
    return "\n".join([*lines, f"{'trained of all':<60}{trained:>14,} of {total:,} ({trained / total:.2%})"])
