"""Find out what the processor of any VLM makes of images and texts: vision inputs, and additions to the text."""

import copy
from dataclasses import dataclass
from functools import lru_cache

import PIL.Image
import torch
from transformers import ProcessorMixin


TYPE_IDS = "token_type_ids"  # how the names of all type ids end
TEXT_INPUT_NAMES = ("input_ids", "attention_mask", "labels")


@dataclass
class TextLayout:
    """What a VLM's own processor does to a text, besides replacing the image token.

    Args:
        prefix: Text that it writes before the prompt.
        prompt_suffix: Text that it writes between the prompt and an answer (PaliGemma: a line break).
        type_ids_mark_answers: Whether `token_type_ids` are 1 from the first answer on (PaliGemma). Otherwise they are
            1 on image tokens.
        takes_nested_images: Whether it takes a list of images per text. Otherwise it takes one list of all images.
    """

    prefix: str
    prompt_suffix: str
    type_ids_mark_answers: bool
    takes_nested_images: bool


class _TextRecorder:
    """Tokenizer that keeps the texts of its last call: those of a processor, with the tokens of their images."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.texts = []

    def __call__(self, text=None, **kwargs):
        self.texts = [text] if isinstance(text, str) else list(text)
        return self.tokenizer(text, **kwargs)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def call_vlm_processor(
    vlm_processor: ProcessorMixin, images: list[PIL.Image.Image], text: str, takes_nested_images: bool, **kwargs
) -> tuple[dict, list[str]]:
    """Call a VLM's processor with the same text about each of B images.

    Args:
        text: Text with the image token once.
        takes_nested_images: See [`TextLayout`].
        kwargs: Arguments of the processor.

    Returns:
        Its outputs, and its B texts, with the tokens of their images.
    """
    processor = copy.copy(vlm_processor)
    processor.tokenizer = _TextRecorder(vlm_processor.tokenizer)
    try:
        outputs = processor(
            images=[[image] for image in images] if takes_nested_images else list(images),
            text=[text] * len(images),
            padding=True,
            return_tensors="pt",
            **kwargs,
        )
    except ValueError:
        if len(images) == 1:
            raise
        # Some split images into different numbers of crops, which cannot be stacked (PerceptionLM).
        calls = [call_vlm_processor(vlm_processor, [image], text, takes_nested_images, **kwargs) for image in images]
        texts = [text for _, (text,) in calls]
        return {name: _concatenate([outputs[name] for outputs, _ in calls]) for name in calls[0][0]}, texts
    return dict(outputs), processor.tokenizer.texts


def split_expanded_text(expanded: str, text: str, image_token: str) -> tuple[str, str, str]:
    """Return what a VLM's processor wrote before a text, for its image token, and after the text."""
    before, after = text.split(image_token)
    start, end = expanded.find(before), expanded.rfind(after)
    if start < 0 or end < start + len(before):
        raise ValueError(
            f"expected a VLM whose processor replaces {image_token} and keeps the text around it, got {expanded!r} "
            f"for {text!r}. Choose another VLM, or pass a `chat_template` whose texts it keeps."
        )
    return expanded[:start], expanded[start + len(before) : end], expanded[end + len(after) :]


@lru_cache
def find_text_layout(vlm_processor: ProcessorMixin, prompt: str, image_token: str) -> TextLayout:
    """Find out what a VLM's processor does to texts, by giving it a question about one image.

    Args:
        prompt: Question in the chat template, with the image token once.

    Raises:
        ValueError: If the prompt has no image token, or the processor does not keep the text around it.
    """
    if prompt.count(image_token) != 1:
        raise ValueError(
            f"expected a chat template that writes the image token {image_token} once for an image, got {prompt!r} "
            "for a question about one. Pass another `chat_template`."
        )
    images = [PIL.Image.linear_gradient("L").convert("RGB").resize((160, 120))]
    try:
        outputs, texts = call_vlm_processor(vlm_processor, images, prompt, takes_nested_images=True)
        takes_nested_images = True
    except ValueError:  # GOT-OCR 2 takes a list of images per text for the pages of one document
        try:
            outputs, texts = call_vlm_processor(vlm_processor, images, prompt, takes_nested_images=False)
        except ValueError as error:  # Fuyu
            raise ValueError(
                f"expected a VLM whose processor takes a text with the image token {image_token} once and an image, "
                f"got {type(vlm_processor).__name__}: {error}. Choose another VLM."
            ) from error
        takes_nested_images = False
    if len(texts) != 1:  # ShieldGemma 2 makes a text per policy
        raise ValueError(
            f"expected a VLM whose processor keeps one text per text, got {len(texts)} for one from "
            f"{type(vlm_processor).__name__}. Choose another VLM."
        )
    prefix, _, prompt_suffix = split_expanded_text(texts[0], prompt, image_token)
    return TextLayout(
        prefix=prefix,
        prompt_suffix=prompt_suffix,
        type_ids_mark_answers=TYPE_IDS in outputs and not outputs[TYPE_IDS].any(),
        takes_nested_images=takes_nested_images,
    )


def is_vision_input(name: str) -> bool:
    return name not in TEXT_INPUT_NAMES and not name.endswith(TYPE_IDS)


def _concatenate(values: list[torch.Tensor] | list[list]) -> torch.Tensor | list:
    """Concatenate the values of images, tensors along the first axis in which they differ."""
    if isinstance(values[0], list):
        return [item for value in values for item in value]
    sizes = zip(*(value.shape for value in values))
    return torch.cat(values, dim=next((axis for axis, lengths in enumerate(sizes) if len(set(lengths)) > 1), 0))
