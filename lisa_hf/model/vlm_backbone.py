"""One way to call any of transformers' VLMs: an image is encoded once, and each row about it gets its features."""

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


# Fields of an image encoder's output that no language model reads. They would only take memory.
INTERNAL_FIELDS = ("last_hidden_state", "hidden_states", "attentions")
# Fields with one entry per image token. Others are assumed to be the same for all images.
TOKEN_FIELDS = ("pooler_output", "last_hidden_state", "deepstack_features")


def raise_if_not_vlm(config: PreTrainedConfig) -> None:
    """Raise a `ValueError` if transformers has no image-text-to-text model for a configuration."""
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"expected a vision-language model that transformers loads with AutoModelForImageTextToText, got "
            f"'{config.model_type}'. Choose one, for example LLaVA, Gemma 3 or Qwen3-VL."
        )


def unsupported_reason(vlm: nn.Module) -> str | None:
    """Return why a VLM cannot be called with features of images encoded once, or None if it can."""
    forward = inspect.signature(vlm.forward).parameters
    if "mm_encoder_outputs" not in forward:
        return "its forward takes no precomputed features (`mm_encoder_outputs`)"
    if not isinstance(vlm, GenerationMixin):
        return "it does not answer token by token"
    if not any(hasattr(module, "get_image_features") for module in vlm.modules()):
        return "it encodes no images (`get_image_features`), only videos"
    if any(name.endswith("input_ids") for name in inspect.signature(image_encoder(vlm).get_image_features).parameters):
        return "its image features depend on the question"
    if forward.get("pixel_values") and forward["pixel_values"].default is inspect.Parameter.empty:
        return "its `generate` always encodes pixels itself"
    return None


def image_encoder(vlm: nn.Module) -> nn.Module:
    """Return the module of a VLM that has `get_image_features`: usually its base model, else the first one inside."""
    return next(module for module in (vlm.base_model, *vlm.modules()) if hasattr(module, "get_image_features"))


def vision_tower(vlm: nn.Module) -> nn.Module | None:
    """Return the VLM's image encoder, if it has one: otherwise, transformers returns the backbone itself."""
    backbone = vlm.base_model
    encoder = backbone.get_encoder(modality="image")
    return None if encoder is backbone else encoder


def vocabulary_projection(vlm: nn.Module) -> nn.Module:
    """Return the module of a VLM that projects states to the vocabulary: its own, or that of a model inside."""
    heads = (module.get_output_embeddings() for module in vlm.modules() if hasattr(module, "get_output_embeddings"))
    return next((head for head in heads if head is not None), None)


@contextmanager
def record_states(
    vlm: nn.Module, kept: tuple[torch.Tensor, torch.Tensor] | None = None, where: str = "projection"
) -> Iterator[list[torch.Tensor]]:
    """Record the inputs of a VLM's vocabulary projection, in its forward or its `generate`.

    These are the states that predict tokens: everything that the VLM does to its last layer's output has been done,
    and scaling, capping or padding of the logits comes after.

    Args:
        kept: Rows and positions that are projected, `(T,)` each, so that the VLM's logits are `(1, T, V)`; by default
            all.
        where: "projection" for what enters the vocabulary projection; "before_norm" or "after_norm" for what enters or
            leaves the language model's last norm instead.

    Yields:
        A list to which the states of each call are appended, `(N, L, hidden_size)`.
    """
    states = []

    def record(_, inputs):
        states.append(inputs[0])

    def record_output(_, inputs, output):
        states.append(output)

    def keep(_, inputs):
        if kept is not None:
            rows, positions = (index.to(inputs[0].device) for index in kept)
            inputs = (inputs[0][rows, positions][None], *inputs[1:])
        return inputs

    projection = vocabulary_projection(vlm)
    if where == "after_norm":
        recorder = last_norm(vlm).register_forward_hook(record_output)
    else:
        module = last_norm(vlm) if where == "before_norm" else projection
        recorder = module.register_forward_pre_hook(record)
    keeper = projection.register_forward_pre_hook(keep)  # after the recorder, which sees all positions
    try:
        yield states
    finally:
        recorder.remove()
        keeper.remove()


def last_norm(vlm: nn.Module) -> nn.Module:
    """Return the norm after the last layer of a VLM's language model, as in Llama, Qwen and others.

    Raises:
        ValueError: The language model has no module of this name.
    """
    norm = getattr(vlm.get_decoder(), "norm", None)
    if norm is None:
        raise ValueError(
            f"seg_state: expected a language model with a `norm` for 'own_before_norm', got {type(vlm).__name__} "
            "without. Choose 'own' or 'predicting'."
        )
    return norm


def vision_inputs_of(vlm: nn.Module, kwargs: dict) -> dict:
    """Return the inputs of a VLM that its `get_image_features` takes, without values of None."""
    names = inspect.signature(image_encoder(vlm).get_image_features).parameters
    return {name: value for name, value in kwargs.items() if name in names and value is not None}


def split_vision_inputs(
    vlm: nn.Module, kwargs: dict, input_ids: torch.Tensor, image_indices: torch.Tensor, num_images: int
) -> tuple[dict, dict]:
    """Separate the VLM's vision inputs, one entry per image or crop, from its text inputs, one per row.

    Args:
        kwargs: Inputs of the VLM. Those that its `get_image_features` takes are vision inputs.
        input_ids: Token ids, `(N, L)`.
        image_indices: The image of each row, `(N,)` int64.
        num_images: The number of images, B.

    Returns:
        Vision inputs and text inputs, both without values of None.
    """
    vision = vision_inputs_of(vlm, kwargs)
    text = {name: value for name, value in kwargs.items() if name not in vision and value is not None}
    for name, per_image in sizes_per_image(vlm, vision, input_ids, image_indices, num_images).items():
        text[name] = torch.cat([per_image[index] for index in image_indices.tolist()])
    return vision, text


def sizes_per_image(
    vlm: nn.Module, vision_inputs: dict, input_ids: torch.Tensor, image_indices: torch.Tensor, num_images: int
) -> dict[str, tuple[torch.Tensor, ...]]:
    """Return the sizes and grids of images that a VLM's rows need, for example to compute M-RoPE positions.

    Args:
        vision_inputs: Arguments of `get_image_features`. Sizes are the integer ones that `forward` takes too.
        input_ids, image_indices, num_images: See [`split_vision_inputs`].

    Returns:
        B tensors per input: the entries of each image, one or one per crop.
    """
    accepted = {name for model in (vlm, vlm.base_model) for name in inspect.signature(model.forward).parameters}
    sizes = {}
    for name, value in vision_inputs.items():
        is_size = isinstance(value, torch.Tensor) and value.dim() > 0 and not value.is_floating_point()
        if not is_size or name not in accepted or "pixel" in name:
            continue
        if len(value) == num_images:
            sizes[name] = value.split(1)
            continue
        # Each crop has its own run of image tokens in a row.
        is_image = (input_ids == vlm.config.image_token_id).long()  # [N, L]
        num_runs = (F.pad(is_image, (1, 0)).diff(dim=1) == 1).sum(1)  # [N]
        num_crops = num_runs.new_zeros(num_images).scatter_(0, image_indices, num_runs).tolist()
        if sum(num_crops) == len(value):
            sizes[name] = value.split(num_crops)
    return sizes


def encode_vlm_images(
    vlm: nn.Module,
    input_ids: torch.Tensor,
    image_indices: torch.Tensor,
    num_images: int,
    vision_inputs: dict,
    vision_features: list[torch.Tensor | dict] | None = None,
) -> dict:
    """Run the VLM's vision tower once per image and repeat the features for each row about the image.

    Args:
        input_ids: Token ids, `(N, L)`. A row has as many image tokens as its image has features.
        image_indices: The image of each row, `(N,)` int64.
        num_images: The number of images, B.
        vision_inputs: Arguments of the VLM's `get_image_features`, for B images.
        vision_features: Outputs of `get_image_features` that replace `vision_inputs`, one per image: a dict of its
            fields, or only its features, `(tokens, hidden_size)` for a VLM that gives a list of them, else
            `(crops, tokens, hidden_size)`.

    Returns:
        The `mm_encoder_outputs` argument of transformers' VLMs.

    Raises:
        ValueError: The rows have more or fewer image tokens than there are features.
    """
    # 1. One set of features per image.
    if vision_features is not None:
        output = _join_outputs(vision_features, vlm.dtype)
    else:
        output = image_encoder(vlm).get_image_features(**vision_inputs, return_dict=True)

    # 2. The number of image tokens of each image, read from any of its rows.
    row_lengths = (input_ids == vlm.config.image_token_id).sum(1)  # [N]
    rows, row_lengths = torch.stack([image_indices, row_lengths]).tolist()
    lengths = dict(zip(rows, row_lengths))
    image_lengths = [lengths.get(image, 0) for image in range(num_images)]

    # 3. The output for each row's image.
    return {"image": map_token_fields(output, lambda features: _select_images(features, image_lengths, rows))}


def encode_images_apart(vlm: nn.Module, input_ids: torch.Tensor, vision_inputs: dict) -> list[torch.Tensor | dict]:
    """Run the VLM's vision tower once per image and return its output for each image separately.

    Args:
        input_ids: Token ids of B rows, each about the next image, `(B, L)`.
        vision_inputs: Arguments of the VLM's `get_image_features`, for B images.

    Returns:
        B outputs, as `vision_features` of [`encode_vlm_images`].
    """
    output = image_encoder(vlm).get_image_features(**vision_inputs, return_dict=True)
    lengths = (input_ids == vlm.config.image_token_id).sum(1).tolist()
    per_image = [
        map_token_fields(output, lambda features, image=image: _select_images(features, lengths, [image]))
        for image in range(len(lengths))
    ]
    # The VLM's forward expects the fields of its own output, even those that are None.
    common = vars(BaseModelOutputWithPooling())
    outputs = [
        {name: value for name, value in vars(fields).items() if value is not None or name not in common}
        for fields in per_image
    ]

    def features_alone(fields: dict):
        """Return the features if there is nothing else and their dimensions tell whether the VLM returns a list."""
        features = fields.get("pooler_output")
        is_list = isinstance(features, list)
        features = features[0] if is_list else features
        return features if len(fields) == 1 and features is not None and (features.dim() == 2) == is_list else fields

    return list(map(features_alone, outputs))


def _join_outputs(outputs: list[torch.Tensor | dict], dtype: torch.dtype) -> BaseModelOutputWithPooling:
    """Combine the outputs of `get_image_features` for B single images, see [`encode_vlm_images`]."""

    def join(values: list):
        if isinstance(values[0], torch.Tensor):
            return torch.cat(values).to(dtype)
        return [part.to(dtype) for value in values for part in value]

    # Two-dimensional features without other fields are from a VLM that returns a list of them.
    outputs = [
        {"pooler_output": [fields] if fields.dim() == 2 else fields} if isinstance(fields, torch.Tensor) else fields
        for fields in outputs
    ]
    joined = BaseModelOutputWithPooling()
    for name, first in outputs[0].items():
        values = [fields[name] for fields in outputs]
        if first is None:
            setattr(joined, name, None)
        elif name in ("pooler_output", "last_hidden_state"):
            setattr(joined, name, join(values))
        elif name == "deepstack_features":  # per layer, of each image
            layers = [
                (layer[0][0], join([features for _, features in layer])) if _is_pair(layer[0]) else join(layer)
                for layer in zip(*values)
            ]
            setattr(joined, name, layers)
        else:  # the same for all images, such as Ovis2's features of the tokens around an image
            is_float = isinstance(first, torch.Tensor) and first.is_floating_point()
            setattr(joined, name, first.to(dtype) if is_float else first)
    return joined


def _is_pair(entry) -> bool:
    """Return whether an entry of `deepstack_features` is the number of a layer and its features."""
    return isinstance(entry, (list, tuple)) and isinstance(entry[0], int)


def map_token_fields(output: ModelOutput, function) -> ModelOutput:
    """Return a copy of an image encoder's output with `function` applied to what has an entry per image token.

    These are the features, which the language model finds in `pooler_output` or, without one, in `last_hidden_state`,
    and `deepstack_features`, which enter its layers: one set per layer, or pairs of a layer's number and a set. All
    other fields stay, except for `INTERNAL_FIELDS`.
    """
    # Some models set fields that their output's class does not declare.
    fields = vars(output)
    is_pooled = any(fields.get(name) is not None for name in ("pooler_output", "deepstack_features"))
    features = "pooler_output" if is_pooled else "last_hidden_state"

    copied = type(output)(**dict.fromkeys(field.name for field in dataclasses.fields(output)))
    for name, value in fields.items():
        if value is None:
            setattr(copied, name, None)
        elif name == features:
            setattr(copied, name, function(value))
        elif name == "deepstack_features":
            values = [(entry[0], function(entry[1])) if _is_pair(entry) else function(entry) for entry in value]
            setattr(copied, name, values)
        elif name not in INTERNAL_FIELDS:
            setattr(copied, name, value)
    return copied


def _select_images(features, image_lengths: list[int], images: list[int]):
    """Return the features of selected images in order; an image may be selected more than once.

    Args:
        features: Features of all images: a list of tensors `(tokens, hidden_size)`, one per image or per crop, or a
            tensor `(crops, tokens, hidden_size)` with any number of crops per image.
        image_lengths: The number of image tokens of each image.
        images: Indices of N images.

    Returns:
        A list of N tensors, or a tensor: beam search repeats the rows of a tensor, so it must stay one.
    """
    is_list = isinstance(features, (list, tuple))
    features = torch.cat(list(features)) if is_list else features
    num_features = features.shape[:-1].numel()
    if num_features != sum(image_lengths):
        raise ValueError(
            f"expected as many image tokens as vision features, got {image_lengths} tokens in the rows about "
            f"{len(image_lengths)} images and {num_features} features. Give each row the image tokens of its one "
            "image, and each image at least one row."
        )
    # Tokens of an image to rows of the tensor: its tokens in a list, its crops otherwise.
    pieces = features.split([length * len(features) // num_features for length in image_lengths])
    rows = [pieces[image] for image in images]
    return rows if is_list else torch.cat(rows)
