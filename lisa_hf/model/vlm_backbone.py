"""One way to call any of transformers' VLMs: an image is encoded once, and each row about it receives its features."""

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


# Fields of an image encoder's output that no language model reads beside its features. They would only take memory.
INTERNAL_FIELDS = ("last_hidden_state", "hidden_states", "attentions")


def unsupported_reason(vlm: nn.Module) -> str | None:
    """Return why a VLM cannot be called with features of images that are encoded once, or None if it can."""
    forward = inspect.signature(vlm.forward).parameters
    if "mm_encoder_outputs" not in forward:
        return "its forward takes no precomputed features (`mm_encoder_outputs`)"
    if not isinstance(vlm, GenerationMixin):
        return "it does not answer token by token"
    if not any(hasattr(module, "get_image_features") for module in vlm.modules()):
        return "it encodes no images (`get_image_features`), only videos"
    if any(name.endswith("input_ids") for name in inspect.signature(image_encoder(vlm).get_image_features).parameters):
        return "its features of an image depend on the question"
    if forward.get("pixel_values") and forward["pixel_values"].default is inspect.Parameter.empty:
        return "its `generate` always encodes pixels itself"
    return None


def image_encoder(vlm: nn.Module) -> nn.Module:
    """Return the module of a VLM that has `get_image_features`: usually its base model, else the first one inside."""
    return next(module for module in (vlm.base_model, *vlm.modules()) if hasattr(module, "get_image_features"))


def vocabulary_projection(vlm: nn.Module) -> nn.Module:
    """Return the module of a VLM that projects states to the vocabulary: its own, or that of a model inside."""
    heads = (module.get_output_embeddings() for module in vlm.modules() if hasattr(module, "get_output_embeddings"))
    return next((head for head in heads if head is not None), None)


@contextmanager
def record_states(vlm: nn.Module, kept: torch.Tensor | None = None) -> Iterator[list[torch.Tensor]]:
    """Record what enters a VLM's vocabulary projection, whether in its forward or in its `generate`.

    These are the states that predict tokens: whatever the VLM does to its last layer's output is done, and its scale,
    cap or padding of the logits comes after.

    Args:
        kept: Positions that are projected, `(N, L)` bool, so that the VLM's logits are `(1, T, V)`; by default all.

    Yields:
        A list that grows by the states of each call, `(N, L, hidden_size)`.
    """
    states = []

    def record(_, inputs):
        states.append(inputs[0])
        return None if kept is None else (inputs[0][kept][None], *inputs[1:])

    handle = vocabulary_projection(vlm).register_forward_pre_hook(record)
    try:
        yield states
    finally:
        handle.remove()


def vision_inputs_of(vlm: nn.Module, kwargs: dict) -> dict:
    """Return those inputs of a VLM that its `get_image_features` takes, without values of None."""
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
    accepted = {name for model in (vlm, vlm.base_model) for name in inspect.signature(model.forward).parameters}
    vision = vision_inputs_of(vlm, kwargs)
    text = {name: value for name, value in kwargs.items() if name not in vision and value is not None}
    for name, value in vision.items():
        # Sizes and grids, which are integers, also go to the rows: M-RoPE computes a row's positions from its image's.
        is_size = isinstance(value, torch.Tensor) and not value.is_floating_point() and "pixel" not in name
        if not (is_size and value.dim() and name in accepted):
            continue
        if len(value) == num_images:
            text[name] = value[image_indices]
            continue
        num_crops = _crops_per_image(vlm, input_ids, image_indices, num_images)
        if sum(num_crops) == len(value):
            crops = value.split(num_crops)
            text[name] = torch.cat([crops[index] for index in image_indices.tolist()])
    return vision, text


def _crops_per_image(vlm: nn.Module, input_ids, image_indices, num_images: int) -> list[int]:
    """Return the number of crops of each image: each crop has its own run of image tokens in a row."""
    is_image = (input_ids == vlm.config.image_token_id).long()  # [N, L]
    num_runs = (F.pad(is_image, (1, 0)).diff(dim=1) == 1).sum(1)  # [N]
    return num_runs.new_zeros(num_images).scatter_(0, image_indices, num_runs).tolist()


def encode_vlm_images(
    vlm: nn.Module,
    input_ids: torch.Tensor,
    image_indices: torch.Tensor,
    num_images: int,
    vision_inputs: dict,
    vision_features: list[torch.Tensor] | None = None,
) -> dict:
    """Run the VLM's vision tower once per image and repeat the features for each row about the image.

    Args:
        input_ids: Token ids, `(N, L)`. A row has as many image tokens as its image has features.
        image_indices: The image of each row, `(N,)` int64.
        num_images: The number of images, B.
        vision_inputs: Arguments of the VLM's `get_image_features`, for B images.
        vision_features: Output of `get_image_features` that replaces `vision_inputs`, one tensor per image:
            `(tokens, hidden_size)` for a VLM that gives a list of them, else `(crops, tokens, hidden_size)`.

    Returns:
        The `mm_encoder_outputs` argument of transformers' VLMs.

    Raises:
        ValueError: The rows have more or fewer image tokens than there are features.
    """
    # 1. One set of features per image.
    if vision_features is not None:
        features = [features.to(vlm.dtype) for features in vision_features]
        is_list = features[0].dim() == 2
        output = BaseModelOutputWithPooling(pooler_output=features if is_list else torch.cat(features))
    else:
        output = image_encoder(vlm).get_image_features(**vision_inputs, return_dict=True)

    # 2. The number of image tokens of each image, read from any of its rows.
    row_lengths = (input_ids == vlm.config.image_token_id).sum(1)  # [N]
    image_lengths = row_lengths.new_zeros(num_images).scatter_(0, image_indices, row_lengths).tolist()

    # 3. The output for each row's image.
    return {"image": map_token_fields(output, lambda field: _repeat_for_rows(field, image_lengths, image_indices))}


def map_token_fields(output: ModelOutput, function) -> ModelOutput:
    """Return a copy of an image encoder's output in which `function` has replaced what has an entry per image token.

    These are the features, which the language model finds in `pooler_output` or, without one, in `last_hidden_state`,
    and `deepstack_features`, which enter its layers: one set per layer, or pairs of a layer's number and a set. All
    other fields stay, except for `INTERNAL_FIELDS`.
    """
    # Some models set fields that their output's class does not declare.
    fields = {name: value for name, value in vars(output).items() if value is not None}
    deepstack = fields.get("deepstack_features")
    features = "pooler_output" if "pooler_output" in fields or deepstack is not None else "last_hidden_state"

    copied = type(output)(**dict.fromkeys(field.name for field in dataclasses.fields(output)))
    for name, value in fields.items():
        if name == features:
            setattr(copied, name, function(value))
        elif name == "deepstack_features":
            pairs = [isinstance(entry, tuple) and isinstance(entry[0], int) for entry in value]
            values = [(entry[0], function(entry[1])) if pair else function(entry) for entry, pair in zip(value, pairs)]
            setattr(copied, name, values)
        elif name not in INTERNAL_FIELDS:
            setattr(copied, name, value)
    return copied


def _repeat_for_rows(features, image_lengths: list[int], image_indices: torch.Tensor):
    """Return the features of each row's image.

    Args:
        features: Features of all images: a list of tensors `(tokens, hidden_size)`, one per image or per crop, or a
            tensor `(crops, tokens, hidden_size)` with any number of crops per image.
        image_lengths: The number of image tokens of each image.
        image_indices: The image of each row, `(N,)` int64.

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
    rows = [pieces[index] for index in image_indices.tolist()]
    return rows if is_list else torch.cat(rows)
