"""How much training changed the language of a VLM: the perplexity of its earlier answers.

The VLM that a model was made from answers a few questions about images, greedily. The perplexity of these answers,
under this VLM and under the trained one, is the exponential of the mean negative log-likelihood of their tokens. Equal
numbers mean that the trained VLM would speak as before; they say nothing about masks.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, ProcessorMixin

from ..model.conversation_text import user_message


logger = logging.getLogger(__name__)

QUESTIONS = (
    "What is shown in this image?",
    "Describe the scene in two sentences.",
    "Which colors stand out, and where?",
    "Where might this picture have been taken?",
    "Name three things in this image, from left to right.",
    "Is anything in this picture unusual? Explain your answer.",
)


def compare_with_base(
    load: Callable[[str], tuple[nn.Module, ProcessorMixin]],
    name: str,
    base_name: str,
    images: Sequence[PIL.Image.Image],
) -> dict[str, Any]:
    """Measure the perplexity of a VLM's answers under the VLM and under the model trained from it.

    Args:
        load: Function that returns the VLM and processor for a name. One VLM is in memory at a time.
        name: Name of the trained model.
        base_name: Name of the VLM, or of a LISA, that it was trained from.
        images: Images to ask about.

    Returns:
        Content of `evaluation.json` under `text`: `base_model`, `num_answers`, `perplexity_of_base` and `perplexity`.

    Raises:
        ValueError: If the model cannot have been trained from this VLM.
    """
    base, base_processor = load(base_name)
    rows = answer_questions_as_text(base, base_processor, images)
    before, base_config = perplexity(base, rows), base.config
    del base
    vlm, processor = load(name)
    raise_if_another_vlm(vlm.config, processor, base_config, base_processor)
    return _report(name, base_name, rows, before, perplexity(vlm, rows))


def compare_without_adapter(
    model: PeftModel, processor: ProcessorMixin, name: str, images: Sequence[PIL.Image.Image]
) -> dict[str, Any]:
    """Measure the same for a LoRA run with its single model, whose adapter is disabled for the VLM's own answers.

    Args:
        model: A LISA with its adapter. Parts that were trained in full are disabled too.
        processor: Processor of its VLM.
        name: Name of the model.
        images: Images to ask about.
    """
    vlm = model.get_base_model().vlm
    with model.disable_adapter():
        rows = answer_questions_as_text(vlm, processor, images)
        before = perplexity(vlm, rows)
    return _report(name, f"{name} without its adapter", rows, before, perplexity(vlm, rows))


def _report(name: str, base_name: str, rows: list[dict], before: float, after: float) -> dict[str, Any]:
    message = "%d answers of %s about images have a perplexity of %.2f under it, and of %.2f under %s."
    logger.info(message, len(rows), base_name, before, after, name)
    return {"base_model": base_name, "num_answers": len(rows), "perplexity_of_base": before, "perplexity": after}


@torch.no_grad()
def answer_questions_as_text(
    vlm: nn.Module, processor: ProcessorMixin, images: Sequence[PIL.Image.Image], max_new_tokens: int = 64
) -> list[dict[str, torch.Tensor]]:
    """Answer all of `QUESTIONS` about each image, greedily.

    Args:
        vlm: A VLM that can generate.
        processor: Processor of the VLM, with a chat template.
        images: The images.
        max_new_tokens: Longest answer, in tokens.

    Returns:
        Inputs of `vlm.forward`, one row each: question and answer as `input_ids`, and the answer's tokens as `labels`,
        -100 elsewhere.
    """
    rows = []
    # An image token in an answer would mean a second image.
    suppressed = [*(vlm.generation_config.suppress_tokens or []), vlm.config.image_token_id]
    for image in images:
        for question in QUESTIONS:
            text = processor.apply_chat_template([user_message(question)], add_generation_prompt=True, tokenize=False)
            prompt = processor(images=[image], text=[text], return_tensors="pt").to(vlm.device, vlm.dtype)
            sequence = vlm.generate(
                **prompt, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, suppress_tokens=suppressed
            )
            length = prompt["input_ids"].shape[1]
            if sequence.shape[1] == length:  # it ended immediately
                continue
            labels = sequence.clone()
            labels[:, :length] = -100
            # Other inputs per token, such as token types, have the values for text.
            row = {name: _extend(value, length, sequence.shape[1]) for name, value in prompt.items()}
            mask = torch.ones_like(sequence)
            rows.append(row | {"input_ids": sequence, "attention_mask": mask, "labels": labels})
    return rows


@torch.no_grad()
def perplexity(vlm: nn.Module, rows: list[dict[str, torch.Tensor]]) -> float:
    """Return the perplexity of the answers in rows of [`answer_questions_as_text`] under a VLM, over all tokens.

    Raises:
        ValueError: If there are no answers.
    """
    total, count = 0.0, 0
    for row in rows:
        inputs = {
            name: value.to(vlm.device, vlm.dtype if value.is_floating_point() else value.dtype)
            for name, value in row.items()
            if name != "labels"
        }
        logits = vlm(**inputs).logits[:, :-1].float()  # [1, L - 1, V]
        labels = row["labels"][:, 1:].to(logits.device)  # [1, L - 1]
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        total, count = total + losses.item(), count + int((labels != -100).sum())
    if count == 0:
        raise ValueError("--base_model: expected a VLM that answers questions, got only empty answers. Name another.")
    return math.exp(total / count)


def raise_if_another_vlm(
    config: PreTrainedConfig, processor: ProcessorMixin, base_config: PreTrainedConfig, base_processor: ProcessorMixin
) -> None:
    """Raise a `ValueError` unless a VLM may have been trained from a base: same architecture, same tokens."""
    known, found = base_processor.tokenizer.get_vocab(), processor.tokenizer.get_vocab()
    differing = [token for token, number in known.items() if found.get(token) != number]
    if type(config) is not type(base_config) or differing:
        what = f"other tokens, such as {differing[0]!r}" if differing else f"a {base_config.model_type}"
        raise ValueError(
            f"--base_model: expected the {config.model_type} that the model was trained from, got {what}. Name it."
        )


def _extend(value: torch.Tensor, length: int, new_length: int) -> torch.Tensor:
    """Pad inputs per token `(1, length)` with zeros to `(1, new_length)`; leave others as they are."""
    if value.ndim != 2 or value.shape != (1, length):
        return value
    return nn.functional.pad(value, (0, new_length - length))
