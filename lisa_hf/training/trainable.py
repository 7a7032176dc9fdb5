"""What is trained: LoRA in the language model, parts in full, their learning rates, and the table of all parts."""

import logging
import re
from contextlib import nullcontext

import PIL.Image
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..model.mask_backbone import UNTRAINED_DECODER_MODULES, UNTRAINED_VIDEO_DECODER_MODULES
from ..model.modeling_lisa import LisaForConditionalGeneration
from ..model.processing_lisa import LisaProcessor
from ..model.vlm_backbone import image_encoder, map_token_fields, vision_inputs_of, vision_tower
from .arguments import TRAINABLE_PARTS, LisaTrainingArguments
from .zero import shard_peft_copies


logger = logging.getLogger(__name__)

REST = "never trained"  # the mask model's prompt encoder, and modules of a VLM that are not for images
# Prefixes of such modules: audio and video towers and embeddings, and models that generate images.
_NOT_FOR_IMAGES = ("audio", "embed_audio", "video", "generation_", "vqmodel")


def find_parts(model: LisaForConditionalGeneration) -> dict[str, list[str]]:
    """Return the module paths of each part that `trainable` can name.

    Module names differ between VLM families: transformers knows the image encoder and the language model, and the
    projector is what remains, or the image encoder's last layer in Qwen and others. A VLM may lack a part: Gemma 4
    Unified projects pixel patches, and Emu3 and Chameleon turn images into tokens, through which no gradient flows.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    backbone = model.vlm.base_model
    language_model, tower = backbone.get_decoder(), vision_tower(model.vlm)
    projector = [
        paths[id(child)]
        for name, child in backbone.named_children()
        if language_model is not backbone  # Chameleon: all children are layers of the language model
        and child is not language_model
        and child is not tower
        and not name.startswith(_NOT_FOR_IMAGES)
        and any(True for _ in child.parameters())
    ]
    if not projector and tower is not None:
        projector = [paths[id(child)] for name, child in tower.named_children() if "merger" in name]
    return {
        "seg_projector": ["seg_projector"],
        "mask_decoder": ["mask_model.mask_decoder"],
        "embeddings": [paths[id(model.get_input_embeddings())], paths[id(model.get_output_embeddings())]],
        "multi_modal_projector": projector,  # before the vision tower, which contains it in Qwen
        "vision_tower": [] if tower is None else [paths[id(tower)]],
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
    """Freeze everything except the named parts, and add LoRA to the language model unless `lora_r` is 0.

    Args:
        model: Model that is changed in place.
        trainable: Parts that are trained in full, see [`find_parts`]. LISA trains the projector, the mask decoder and
            the embeddings.
        lora_r: Rank of LoRA.
        lora_alpha: Numerator of LoRA's scale, lora_alpha / lora_r.
        lora_dropout: Dropout probability of LoRA's input.
        lora_target_modules: Linear layers of the language model, by the last part of their name.
        use_dora: Whether to train the magnitude of each weight's columns separately from their direction (DoRA, arXiv
            2402.09353).

    Returns:
        The model itself, or a `PeftModel` around it that saves the adapter and the parts trained in full.

    Raises:
        ValueError: If the model lacks one of the parts, or the layers that `lora_target_modules` names.
    """
    parts = find_parts(model)
    missing = [part for part in trainable if not parts[part]]
    if missing:
        raise ValueError(
            f"trainable: expected parts of {type(model.vlm).__name__}, which are "
            f"{', '.join(part for part, paths in parts.items() if paths)}, got {', '.join(missing)}. Remove what it "
            "does not have."
        )
    if lora_r and "language_model" in trainable:
        raise ValueError(
            f"trainable: expected no language_model with LoRA, got it with lora_r {lora_r}. Train it in full with "
            "lora_r 0, or with LoRA by removing it from `trainable`."
        )
    untrained = _untrained_decoder_modules(model) + _untrained_vision_modules(model)
    model.requires_grad_(False)
    paths = [path for part in trainable for path in parts[part]]
    if lora_r:
        # A projector inside a trained vision tower is saved with it.
        paths = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
        # A bare name such as q_proj would also match the vision tower and the mask decoder.
        (language_model,) = parts["language_model"]
        names = "|".join(map(re.escape, lora_target_modules))
        config = LoraConfig(
            r=lora_r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_dora=use_dora,
            target_modules=rf"{re.escape(language_model)}\..*\.({names})",
            modules_to_save=_trained_modules(model, paths, untrained),
            ensure_weight_tying="embeddings" in trainable and _has_tied_embeddings(model),
        )
        model = _add_lora(model, config, language_model, lora_target_modules)
    else:
        for path in paths:
            model.get_submodule(path).requires_grad_(True)
    # A trained weight that never gets a gradient is an error under DDP.
    for module in untrained:
        module.requires_grad_(False)
    return model


def _has_tied_embeddings(model: LisaForConditionalGeneration) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def _add_lora(
    model: LisaForConditionalGeneration, config: LoraConfig, language_model: str, layer_names: list[str]
) -> PeftModel:
    """Add LoRA. If the language model at the given path has no layers with these names, the error lists its layers."""
    try:
        # One copy of tied weights takes its shape from the other, so both stay whole until all copies are made.
        with nullcontext() if _has_tied_embeddings(model) else shard_peft_copies():
            return get_peft_model(model, config)
    except ValueError as error:
        modules = model.get_submodule(language_model).named_modules()
        layers = dict.fromkeys(name.split(".")[-1] for name, layer in modules if isinstance(layer, nn.Linear))
        raise ValueError(
            f"lora_target_modules: expected layers of the language model, which are {', '.join(layers)}, got "
            f"{', '.join(layer_names)}: {error}"
        ) from error


def _trained_modules(model: nn.Module, paths: list[str], untrained: list[nn.Module]) -> list[str]:
    """Return the paths, replaced by those of their children if a module is only partly trained.

    PEFT saves whole modules, but under ZeRO-3 Trainer gathers only trained weights. PEFT accepts no module lists, such
    as Granite 4 Vision's projectors.
    """
    trained = []
    for path in paths:
        module = model.get_submodule(path)
        if set(untrained).isdisjoint(module.modules()) and not isinstance(module, nn.ModuleList):
            trained.append(path)
        elif module not in untrained:
            children = [f"{path}.{name}" for name, child in module.named_children() if list(child.parameters())]
            trained += _trained_modules(model, children, untrained)
    return trained


def _untrained_decoder_modules(model: LisaForConditionalGeneration) -> list[nn.Module]:
    names = UNTRAINED_VIDEO_DECODER_MODULES if model.config.video_mask_decoding else UNTRAINED_DECODER_MODULES
    pattern = "|".join(map(re.escape, names))
    path = re.compile(rf"(^|.*\.)mask_decoder\.(.*\.)?({pattern})$")
    return [module for name, module in model.named_modules() if path.match(name)]


def _untrained_vision_modules(model: LisaForConditionalGeneration) -> list[nn.Module]:
    """Return the modules of the image encoder that get no gradient, because the VLM uses states from before them."""
    tower = vision_tower(model.vlm)
    children = {} if tower is None else dict(tower.named_children())
    # VLMs use CLIP's and SigLIP's patch states, never SigLIP's attention pooling of them.
    untrained = [children["head"]] if "head" in children else []
    feature_layers = getattr(model.config.vlm_config, "vision_feature_layer", None)
    if feature_layers is None or "encoder" not in children:
        return untrained
    # VLMs like LLaVA use the states of one or several layers.
    layers = next(child for child in children["encoder"].children() if isinstance(child, nn.ModuleList))
    feature_layers = [feature_layers] if isinstance(feature_layers, int) else feature_layers
    # Index 0 of the hidden states is the input of the first layer.
    num_used = max(layer if layer >= 0 else len(layers) + 1 + layer for layer in feature_layers)
    unused_layers = list(layers[num_used:])
    # Even the last layer's states come before CLIP's and SigLIP's last norm, but after InternVL's.
    names = ("post_layernorm", "layernorm") if unused_layers else ("post_layernorm",)
    return untrained + unused_layers + [children[name] for name in names if name in children]


def allow_unused_weights(
    model: LisaForConditionalGeneration | PeftModel, processor: LisaProcessor, args: LisaTrainingArguments
) -> None:
    """Make DDP look for weights without a gradient in each step, if the VLM has such weights and they are trained."""
    if args.world_size == 1 or args.shards_weights:
        return
    if names := find_unused_weights(model.to(args.device), processor):
        args.ddp_find_unused_parameters = True
        if args.should_log:
            logger.warning(
                "%d weights of the VLM's image side, such as %s, get no gradient from some images. Each step looks "
                "for them (ddp_find_unused_parameters).",
                len(names),
                names[0],
            )


def find_unused_weights(model: LisaForConditionalGeneration | PeftModel, processor: LisaProcessor) -> list[str]:
    """Name the trained weights of the VLM's image side that get no gradient from a small image or from a photo.

    DDP fails on such weights unless it looks for them. Some are never used (HunyuanVL's `image_sep`), some only with
    other image sizes (DeepSeek-OCR 2).

    Args:
        model: Model from [`prepare_for_training`].
        processor: Processor of the model.
    """
    parts = parameter_parts(model)
    weights = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and {"vision_tower", "multi_modal_projector"}.intersection(parts[name])
    }
    was_training = model.training
    model.eval()  # without dropout, which would draw random numbers
    unused = set()
    for size in ((64, 64), (1024, 768)) if weights else ():
        image_inputs = processor.preprocess_images(PIL.Image.new("RGB", size, "red"))
        inputs = {
            name: value.to(model.device, model.vlm.dtype if value.is_floating_point() else None)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in vision_inputs_of(model.vlm, image_inputs.inputs).items()
        }
        output = image_encoder(model.vlm).get_image_features(**inputs, return_dict=True)
        features = []
        map_token_fields(output, lambda value: features.extend(value if isinstance(value, (list, tuple)) else [value]))
        total = sum(feature.float().sum() for feature in features)
        gradients = torch.autograd.grad(total, weights.values(), allow_unused=True)
        unused.update(name for name, gradient in zip(weights, gradients) if gradient is None)
    model.train(was_training)
    return [name for name in weights if name in unused]


def merge_lora(model: LisaForConditionalGeneration | PeftModel) -> LisaForConditionalGeneration:
    """Return the plain model, with LoRA merged into its weights and trained parts in place of the original ones."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def parameter_parts(model: LisaForConditionalGeneration | PeftModel) -> dict[str, list[str]]:
    """Return the parts of each parameter by name: `["lora"]`, or those of [`find_parts`] that contain it.

    A part inside another comes first: the input embeddings in the language model, Qwen's projector in the vision
    tower. Modules that never train, such as the mask model's prompt encoder, belong to none.
    """
    parts = find_parts(model.get_base_model() if isinstance(model, PeftModel) else model)
    parts_of = {}
    for name, _ in model.named_parameters():
        # PEFT inserts these into the paths of the model.
        path = re.sub(r"^base_model\.model\.|\.modules_to_save\.default|\.original_module", "", name)
        found = [part for part, paths in parts.items() if any(path.startswith(f"{start}.") for start in paths)]
        parts_of[name] = ["lora"] if ".lora_" in name else found
    return parts_of


def split_parameter_groups(
    optimizer: torch.optim.Optimizer, model: LisaForConditionalGeneration | PeftModel, args: LisaTrainingArguments
) -> None:
    """Split the optimizer's parameter groups by part and give each one its learning rate, in place."""
    rates, rate_names = _learning_rates(model, args)
    part_of = {parameter: rate_names[name] for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:  # Trainer's: with weight decay and without
        for part in dict.fromkeys(part_of[parameter] for parameter in group["params"]):
            params = [parameter for parameter in group["params"] if part_of[parameter] == part]
            groups.append({**group, "name": part, "params": params, "lr": rates[part]})
    optimizer.param_groups[:] = groups


def _learning_rates(
    model: LisaForConditionalGeneration | PeftModel, args: LisaTrainingArguments
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the learning rates by part, and the part whose rate applies to each parameter, "other" by default."""
    rates = {"other": args.learning_rate, **args.part_learning_rates}
    names = {
        name: next((part for part in parts if part in args.part_learning_rates), "other")
        for name, parts in parameter_parts(model).items()
    }
    return rates, names


def trainable_summary(model: LisaForConditionalGeneration | PeftModel, args: LisaTrainingArguments) -> str:
    """Return a table of the parts: numbers of trained and of all parameters, dtypes and learning rates."""
    parts, (rates, rate_names) = parameter_parts(model), _learning_rates(model, args)
    # Sum over the parameters of each part
    rows = {
        part: {"trained": 0, "all": 0, "dtypes": set(), "rates": set()} for part in ("lora", *TRAINABLE_PARTS, REST)
    }
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # frozen, while PEFT trains a copy
            continue
        row = rows[(parts[name] or [REST])[0]]
        quantized = getattr(parameter, "quant_state", None)
        # ZeRO-3 leaves an empty tensor for a sharded weight; bitsandbytes packs two 4-bit weights into a byte.
        size = quantized.shape.numel() if quantized else getattr(parameter, "ds_numel", parameter.numel())
        row["all"] += size
        row["dtypes"].add("4-bit" if quantized else str(parameter.dtype).removeprefix("torch."))
        if parameter.requires_grad:
            row["trained"] += size
            row["rates"].add(f"{rates[rate_names[name]]:g}")
    # Format the table
    table = [("part", "trained", "of", "dtype", "learning rate")]
    for part, row in rows.items():
        if row["all"]:
            counts = f"{row['trained']:,}", f"{row['all']:,}"
            table.append((part, *counts, ", ".join(sorted(row["dtypes"])), ", ".join(sorted(row["rates"]))))
    trained, total = (sum(row[key] for row in rows.values()) for key in ("trained", "all"))
    table.append(("sum", f"{trained:,}", f"{total:,}", "", f"{trained / total:.2%} of the model trains"))
    lines = [f"{part:<22}{trained:>15}{total:>16}  {dtype:<20}{rate}" for part, trained, total, dtype, rate in table]
    if args.muon_learning_rate is not None:
        lines.append(f"Muon trains the matrices of parts in full, with learning rate {args.muon_learning_rate:g}.")
    return "\n".join(lines)
