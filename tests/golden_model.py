"""The original at a tiny size: its recorded numbers (tests/golden), and its weights and texts in our model."""

import json
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaTokenizer

from lisa_hf import LisaConfig, LisaForConditionalGeneration, LisaProcessor
from lisa_hf.conversion.lisa import convert_lisa_state_dict, lisa_config, lisa_processor


GOLDEN = Path(__file__).parent / "golden"
CHAT_TEMPLATES = Path(__file__).parent.parent / "lisa_hf" / "chat_templates"
TOLERANCE = 5e-5  # relative; measured: at most 1e-5, all of it rounding
NUM_EXTRA_IMAGE_TOKENS = 255  # the original counts the image as one token, this project as its 256
ORIGINAL_IMAGE_TOKEN = -200


def relative_error(actual, expected) -> float:
    """Largest difference, over the largest magnitude expected."""
    actual, expected = torch.as_tensor(actual).detach().double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def assert_close(actual, expected, what: str, tolerance: float = TOLERANCE) -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.1e} > {tolerance:.0e}"


def load_json(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def load_case(name: str) -> tuple[dict, dict]:
    return load_json(name), load_file(GOLDEN / f"{name}.safetensors")


@cache
def golden_images() -> tuple[dict, dict]:
    return load_case("images")


def golden_image(index: int) -> Image.Image:
    return Image.fromarray(golden_images()[1][f"image_{index}_uint8_rgb"].numpy())


def original_state_dict() -> dict:
    return load_file(GOLDEN / "model_state.safetensors")


@cache
def converted_config() -> LisaConfig:
    meta = load_json("model_config")
    vision_config = CLIPVisionConfig.from_pretrained(GOLDEN / "clip_tiny")
    return lisa_config(meta["lisa_config"], original_state_dict(), vision_config, meta["seg_token_idx"])


def converted_model() -> LisaForConditionalGeneration:
    model = LisaForConditionalGeneration(converted_config())
    model.load_state_dict(convert_lisa_state_dict(original_state_dict()))
    return model.eval()


@cache
def converted_processor(template: str = "llava_v1", use_mm_start_end: bool = True) -> LisaProcessor:
    chat_template = (CHAT_TEMPLATES / f"{template}.jinja").read_text()
    if not use_mm_start_end:
        chat_template = chat_template.replace("<im_start>", "").replace("<im_end>", "")
    tokenizer = LlamaTokenizer.from_pretrained(GOLDEN / "tokenizer")
    clip_image_processor = CLIPImageProcessorPil.from_pretrained(GOLDEN / "clip_tiny")
    return lisa_processor(converted_config(), tokenizer, clip_image_processor, chat_template)


def as_messages(turns: list[str]) -> list[dict]:
    """Chat messages of the original's alternating turns, in whose first text `<image>` stands."""
    messages = []
    for index, text in enumerate(turns):
        content = [{"type": "text", "text": text.removeprefix("<image>\n").removesuffix("\n<image>")}]
        if text.startswith("<image>\n"):
            content.insert(0, {"type": "image"})
        elif text.endswith("\n<image>"):
            content.append({"type": "image"})
        messages.append({"role": ("user", "assistant")[index % 2], "content": content})
    return messages


def as_turns(conversation: str) -> list[str]:
    """The alternating turns of a conversation in the text of `llava_v1`."""
    turns = []
    for exchange in conversation.split("USER: ")[1:]:
        question, answer = exchange.split(" ASSISTANT:")
        turns += [question.replace("<im_start><image><im_end>", "<image>"), answer.removesuffix("</s>").strip(" ")]
    return turns


def collapse_image(values: list[int], ids: list[int], image_token_id: int, placeholder: int) -> list[int]:
    """Puts one placeholder where `ids` has its run of image tokens."""
    start, count = ids.index(image_token_id), ids.count(image_token_id)
    assert ids[start : start + count] == [image_token_id] * count and count == NUM_EXTRA_IMAGE_TOKENS + 1
    return values[:start] + [placeholder] + values[start + count :]
