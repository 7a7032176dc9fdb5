"""One way to call any of transformers' VLMs: an image is encoded once and its features go to each row about it."""

import inspect

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling


def split_vision_inputs(vlm: nn.Module, kwargs: dict, image_indices: torch.Tensor) -> tuple[dict, dict]:
    """Separates the VLM's per-image vision inputs from its per-row text inputs, by the former's signature."""
    names = set(inspect.signature(vlm.base_model.get_image_features).parameters)
    vision = {key: value for key, value in kwargs.items() if key in names and value is not None}
    text = {key: value for key, value in kwargs.items() if key not in names and value is not None}
    if "image_grid_thw" in vision:  # the positions of Qwen's M-RoPE follow the grid of each row's image
        text["image_grid_thw"] = vision["image_grid_thw"][image_indices]
    return vision, text


def encode_vlm_images(
    vlm: nn.Module,
    input_ids: torch.Tensor,
    image_indices: torch.Tensor,
    vision_inputs: dict,
    vision_features: list[torch.Tensor] | None = None,
) -> dict:
    """Runs the VLM's vision tower once per image and hands each row the features of its image.

    Args:
        input_ids: `(N, L)`; the number of image tokens of a row is the length of its image's features.
        image_indices: `(N,)` int64, row to image.
        vision_features: instead of `vision_inputs`, what `get_image_features` made of them: one tensor per image,
            `(tokens, hidden_size)` where it gives a list of them, else `(crops, tokens, hidden_size)`.

    Returns:
        The `mm_encoder_outputs` argument of transformers' VLMs.
    """
    if vision_features is not None:
        num_images = len(vision_features)
        features = [features.to(vlm.dtype) for features in vision_features]
        is_list = features[0].dim() == 2
        output = BaseModelOutputWithPooling(pooler_output=features if is_list else torch.cat(features))
    else:
        num_images = len(vision_inputs.get("image_grid_thw", vision_inputs["pixel_values"]))
        output = vlm.base_model.get_image_features(**vision_inputs, return_dict=True)
    lengths = (input_ids == vlm.config.image_token_id).sum(1)
    image_lengths = lengths.new_zeros(num_images).scatter_(0, image_indices, lengths).tolist()

    def per_row(features):
        # A list has one (tokens, width) per image; a tensor is (crops, tokens, width), as beam search needs it.
        is_list = isinstance(features, (list, tuple))
        features = torch.cat(list(features)) if is_list else features
        num_features = features.shape[:-1].numel()
        if num_features != sum(image_lengths):
            raise ValueError(
                f"{num_images} images give {num_features} vision features, but their rows hold {image_lengths} "
                "image tokens. Each row needs the image tokens of its one image, and each image at least one row."
            )
        pieces = features.split([length * len(features) // num_features for length in image_lengths])
        rows = [pieces[index] for index in image_indices.tolist()]
        return rows if is_list else torch.cat(rows)

    rows = BaseModelOutputWithPooling(pooler_output=per_row(output.pooler_output))
    if getattr(output, "deepstack_features", None) is not None:  # Qwen3-VL adds features inside the language model
        rows.deepstack_features = [per_row(features) for features in output.deepstack_features]
    return {"image": rows}
