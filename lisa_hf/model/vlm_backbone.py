"""One way to call any of transformers' VLMs: an image is encoded once, and each row about it receives its features."""

import inspect

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling


def split_vision_inputs(vlm: nn.Module, kwargs: dict, image_indices: torch.Tensor) -> tuple[dict, dict]:
    """Separate the VLM's vision inputs, one entry per image, from its text inputs, one per row.

    Args:
        kwargs: Inputs of the VLM. Those that its `get_image_features` takes are vision inputs.
        image_indices: The image of each row, `(N,)` int64.

    Returns:
        Vision inputs and text inputs, both without values of None.
    """
    names = set(inspect.signature(vlm.base_model.get_image_features).parameters)
    given = {key: value for key, value in kwargs.items() if value is not None}
    vision = {key: value for key, value in given.items() if key in names}
    text = {key: value for key, value in given.items() if key not in names}
    if "image_grid_thw" in vision:  # M-RoPE computes the positions of a row from the grid of its image
        text["image_grid_thw"] = vision["image_grid_thw"][image_indices]  # [N, 3]
    return vision, text


def encode_vlm_images(
    vlm: nn.Module,
    input_ids: torch.Tensor,
    image_indices: torch.Tensor,
    vision_inputs: dict,
    vision_features: list[torch.Tensor] | None = None,
) -> dict:
    """Run the VLM's vision tower once per image and repeat the features for each row about the image.

    Args:
        input_ids: Token ids, `(N, L)`. A row has as many image tokens as its image has features.
        image_indices: The image of each row, `(N,)` int64.
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
        num_images = len(vision_features)
        features = [features.to(vlm.dtype) for features in vision_features]
        is_list = features[0].dim() == 2
        output = BaseModelOutputWithPooling(pooler_output=features if is_list else torch.cat(features))
    else:
        num_images = len(vision_inputs.get("image_grid_thw", vision_inputs["pixel_values"]))
        output = vlm.base_model.get_image_features(**vision_inputs, return_dict=True)

    # 2. The number of image tokens of each image, read from any of its rows.
    row_lengths = (input_ids == vlm.config.image_token_id).sum(1)  # [N]
    image_lengths = row_lengths.new_zeros(num_images).scatter_(0, image_indices, row_lengths).tolist()

    # 3. Features of each row's image: a list has one (tokens, width) per image, a tensor (crops, tokens, width) with
    # any number of crops per image. A tensor must stay one, because beam search repeats its rows.
    def per_row(features):
        is_list = isinstance(features, (list, tuple))
        features = torch.cat(list(features)) if is_list else features
        num_features = features.shape[:-1].numel()
        if num_features != sum(image_lengths):
            raise ValueError(
                f"expected as many image tokens as vision features, got {image_lengths} tokens in the rows about "
                f"{num_images} images and {num_features} features. Give each row the image tokens of its one image, "
                "and each image at least one row."
            )
        # Tokens of an image to rows of the tensor: its tokens in a list, its crops otherwise.
        pieces = features.split([length * len(features) // num_features for length in image_lengths])
        rows = [pieces[index] for index in image_indices.tolist()]
        return rows if is_list else torch.cat(rows)

    rows = BaseModelOutputWithPooling(pooler_output=per_row(output.pooler_output))
    if getattr(output, "deepstack_features", None) is not None:  # Qwen3-VL adds features inside the language model
        rows.deepstack_features = [per_row(features) for features in output.deepstack_features]
    return {"image": rows}
