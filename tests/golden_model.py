"""The original at a tiny size: its recorded numbers (tests/golden), and its weights and texts in our model."""

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from lisa_hf import LisaConfig, LisaForConditionalGeneration, LisaProcessor
from lisa_hf.conversion.checkpoints import open_checkpoint
from lisa_hf.conversion.lisa import convert_lisa


GOLDEN = Path(__file__).parent / "golden"
COMMAND = Path(__file__).parent.parent / "recipes" / "convert_weights.py"
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


def training_state_dict() -> dict:
    """What `zero_to_fp32.py` makes of a training run: all weights, the CLIP tower's too, LoRA beside its weights."""
    state_dict = {f"base_model.model.{name}": tensor for name, tensor in original_state_dict().items()}
    return state_dict | load_file(GOLDEN / "lora_weights.safetensors")


def original_config() -> dict:
    """Content of the original's config.json."""
    return load_json("model_config")["lisa_config"] | {"architectures": ["LlavaLlamaForCausalLM"]}


def write_shards(state_dict: dict, directory: Path, num_shards: int = 2) -> None:
    """Writes `pytorch_model-*.bin` and their index, as transformers 4.31 does."""
    directory.mkdir(parents=True, exist_ok=True)
    names = list(state_dict)
    weight_map = {}
    for shard in range(num_shards):
        filename = f"pytorch_model-{shard + 1:05}-of-{num_shards:05}.bin"
        part = names[shard * len(names) // num_shards : (shard + 1) * len(names) // num_shards]
        torch.save({name: state_dict[name].clone() for name in part}, directory / filename)
        weight_map |= dict.fromkeys(part, filename)
    size = sum(tensor.nbytes for tensor in state_dict.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_tokenizer(directory: Path, added_tokens: dict[str, int]) -> None:
    """Writes the slow tokenizer's files, as transformers 4.31 does after `add_tokens`."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in (GOLDEN / "tokenizer").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    if added_tokens:
        (directory / "added_tokens.json").write_text(json.dumps(added_tokens))


def write_original_lisa(directory: Path, **config) -> None:
    """The directory that LISA's merge script writes, which leaves the CLIP tower out."""
    state_dict = {name: tensor for name, tensor in original_state_dict().items() if "vision_tower" not in name}
    write_shards(state_dict, directory)
    (directory / "config.json").write_text(json.dumps(original_config() | config))
    ids = load_json("model_config")
    write_tokenizer(
        directory,
        {"[SEG]": ids["seg_token_idx"], "<im_start>": ids["im_start_idx"], "<im_end>": ids["im_end_idx"]},
    )


def run_command(*arguments, check: bool = True) -> subprocess.CompletedProcess:
    """`recipes/convert_weights.py` as a user runs it."""
    process = subprocess.run(
        [sys.executable, COMMAND, *map(str, arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or process.returncode == 0, process.stderr
    return process


@cache
def _temporary_directory() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="golden-")


@cache
def original_directory(use_mm_start_end: bool = True) -> Path:
    directory = Path(_temporary_directory().name) / f"original-{use_mm_start_end}"
    write_original_lisa(directory, mm_use_im_start_end=use_mm_start_end)
    return directory


@cache
def converted_directory() -> Path:
    """The original's directory, converted by the command in a process of its own."""
    output = Path(_temporary_directory().name) / "converted"
    run_command(
        *("lisa", "--checkpoint", original_directory(), "--vision-tower", GOLDEN / "clip_tiny", "--output", output)
    )
    return output


@cache
def converted_config() -> LisaConfig:
    return LisaConfig.from_pretrained(converted_directory())


def converted_model() -> LisaForConditionalGeneration:
    return AutoModel.from_pretrained(converted_directory())


@cache
def converted_processor(template: str = "llava_v1", use_mm_start_end: bool = True) -> LisaProcessor:
    if (template, use_mm_start_end) == ("llava_v1", True):
        return AutoProcessor.from_pretrained(converted_directory())
    directory = original_directory(use_mm_start_end)
    return convert_lisa(open_checkpoint(directory), directory, str(GOLDEN / "clip_tiny"), template).processor


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
