"""What trains and what stays frozen: LoRA in the language model, whole parts beside it; merging LoRA."""

import re

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..model.mask_backbone import UNTRAINED_DECODER_MODULES
from ..model.modeling_lisa import LisaForConditionalGeneration
from .arguments import TRAINABLE_PARTS, LisaTrainingArguments


REST = "prompt encoder"  # of the mask model: no part, since it never trains


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
    use_dora: bool = False,
) -> LisaForConditionalGeneration | PeftModel:
    """Freezes everything but the named parts, and adds LoRA to the language model unless `lora_r` is 0.

    Args:
        trainable: parts that are trained in full, see [`find_parts`]. LISA: the projector, the mask decoder and the
            embeddings.
        lora_target_modules: linear layers of the language model, by the last part of their name.
        use_dora: train the length of each weight's columns apart from their direction (arXiv 2402.09353).

    Returns:
        The model itself, or a `PeftModel` around it that saves adapters and fully trained parts.
    """
    parts = find_parts(model)
    untrained = _untrained_decoder_modules(model) + _untrained_vision_modules(model)
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
            use_dora=use_dora,
            target_modules=rf"{re.escape(language_model)}\..*\.({names})",
            modules_to_save=[path for part in trainable for path in _trained_modules(model, parts[part], untrained)],
            ensure_weight_tying=tied and "embeddings" in trainable,
        )
        try:
            model = get_peft_model(model, config)
        except ValueError as error:
            raise ValueError(
                f"LoRA found no layer of the language model named {', '.join(lora_target_modules)}: {error}"
            ) from error
    for module in untrained:
        module.requires_grad_(False)
    return model


def _trained_modules(model: nn.Module, paths: list[str], untrained: list[nn.Module]) -> list[str]:
    """The modules at the paths, or those within them, that train as a whole.

    PEFT saves a module whole, but under ZeRO-3 it gets only those weights from the Trainer that train.
    """
    trained = []
    for path in paths:
        module = model.get_submodule(path)
        if set(untrained).isdisjoint(module.modules()):
            trained.append(path)
        elif module not in untrained:
            children = [f"{path}.{name}" for name, child in module.named_children() if list(child.parameters())]
            trained += _trained_modules(model, children, untrained)
    return trained


def _untrained_decoder_modules(model: nn.Module) -> list[nn.Module]:
    pattern = "|".join(map(re.escape, UNTRAINED_DECODER_MODULES))
    path = re.compile(rf"(^|.*\.)mask_decoder\.(.*\.)?({pattern})$")
    return [module for name, module in model.named_modules() if path.match(name)]


def _untrained_vision_modules(model: LisaForConditionalGeneration) -> list[nn.Module]:
    """What lies behind the last layer that LLaVA takes from its CLIP or SigLIP, and gets no gradient."""
    feature_layers = getattr(model.config.vlm_config, "vision_feature_layer", None)
    vision_tower = model.vlm.base_model.get_encoder(modality="image")
    if feature_layers is None or not hasattr(vision_tower, "encoder"):
        return []
    layers = vision_tower.encoder.layers
    feature_layers = [feature_layers] if isinstance(feature_layers, int) else feature_layers
    num_used = max(layer if layer >= 0 else len(layers) + 1 + layer for layer in feature_layers)
    untrained = list(layers[num_used:])
    # CLIP's last states are those before its last norm, SigLIP's those after it.
    if untrained or vision_tower.config.model_type == "clip_vision_model":
        untrained.append(vision_tower.post_layernorm)
    return untrained + [child for name, child in vision_tower.named_children() if name == "head"]


def merge_lora(model: LisaForConditionalGeneration | PeftModel) -> LisaForConditionalGeneration:
    """The plain model with LoRA folded into its weights and the trained parts in place of the original ones."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def parameter_parts(model: LisaForConditionalGeneration | PeftModel) -> dict[str, list[str]]:
    """The parts that each parameter, by its name, belongs to: `["lora"]`, or those of [`find_parts`] that hold it.

    The input embeddings belong to two of them, and the prompt encoder of the mask model to none.
    """
    parts = find_parts(model.get_base_model() if isinstance(model, PeftModel) else model)
    belongs = {}
    for name, _ in model.named_parameters():
        path = re.sub(r"^base_model\.model\.|\.modules_to_save\.default|\.original_module", "", name)
        found = [part for part, paths in parts.items() if any(path.startswith(f"{start}.") for start in paths)]
        belongs[name] = ["lora"] if ".lora_" in name else found
    return belongs


def rate_names(
    model: LisaForConditionalGeneration | PeftModel, part_learning_rates: dict[str, float]
) -> dict[str, str]:
    """For each parameter, by its name, the part in `part_learning_rates` that it belongs to, or "other"."""
    parts = parameter_parts(model).items()
    return {name: next((part for part in found if part in part_learning_rates), "other") for name, found in parts}


def split_parameter_groups(
    optimizer: torch.optim.Optimizer, model: LisaForConditionalGeneration | PeftModel, args: LisaTrainingArguments
) -> None:
    """Split the optimizer's parameter groups by part and give each one its learning rate, in place."""
    rates = {"other": args.learning_rate, **args.part_learning_rates}
    names = rate_names(model, args.part_learning_rates)
    part_of = {parameter: names[name] for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:  # Trainer's: with weight decay and without
        for part in dict.fromkeys(part_of[parameter] for parameter in group["params"]):
            params = [parameter for parameter in group["params"] if part_of[parameter] == part]
            groups.append({**group, "name": part, "params": params, "lr": rates[part]})
    optimizer.param_groups[:] = groups


def trainable_summary(model: LisaForConditionalGeneration | PeftModel, args: LisaTrainingArguments) -> str:
    """A table of the parts: how many parameters train, of how many, held in which types, and how fast they learn."""
    rates = {"other": args.learning_rate, **args.part_learning_rates}
    parts, names = parameter_parts(model), rate_names(model, args.part_learning_rates)
    rows = {
        part: {"trained": 0, "all": 0, "dtypes": set(), "rates": set()} for part in ("lora", *TRAINABLE_PARTS, REST)
    }
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # what PEFT keeps of a part while it trains a copy
            continue
        row = rows[(parts[name] or [REST])[0]]
        row["all"] += num_elements(parameter)
        row["dtypes"].add("4-bit" if is_4bit(parameter) else str(parameter.dtype).removeprefix("torch."))
        if parameter.requires_grad:
            row["trained"] += parameter.numel()
            row["rates"].add(f"{rates[names[name]]:g}")
    table = [("part", "trained", "of", "dtype", "learning rate")]
    for part, row in rows.items():
        if row["all"]:
            numbers = f"{row['trained']:,}", f"{row['all']:,}"
            table.append((part, *numbers, ", ".join(sorted(row["dtypes"])), ", ".join(sorted(row["rates"]))))
    trained, total = (sum(row[key] for row in rows.values()) for key in ("trained", "all"))
    table.append(("sum", f"{trained:,}", f"{total:,}", "", f"{trained / total:.2%} of the model trains"))
    lines = [f"{part:<22}{trained:>15}{total:>16}  {dtype:<20}{rate}" for part, trained, total, dtype, rate in table]
    if args.muon_learning_rate is not None:
        lines.append(
            f"Muon moves the weight matrices that train in full, with learning rate {args.muon_learning_rate:g}."
        )
    return "\n".join(lines)


def is_4bit(parameter: nn.Parameter) -> bool:
    """Whether bitsandbytes holds two numbers in each byte of it."""
    return hasattr(parameter, "quant_state")


def num_elements(parameter: nn.Parameter) -> int:
    """How many numbers it stands for."""
    return parameter.quant_state.shape.numel() if is_4bit(parameter) else parameter.numel()
