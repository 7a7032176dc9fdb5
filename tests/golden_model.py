"""The original at a tiny size: its recorded numbers (tests/golden), and its weights and texts in our model."""

import json
import logging
import os
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from lisa_hf import LisaConfig, LisaForConditionalGeneration, LisaProcessor
from lisa_hf.conversion import convert_state_dict


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


def run_command(*arguments) -> None:
    """`recipes/convert_weights.py` as a user runs it."""
    process = subprocess.run(
        [sys.executable, COMMAND, *map(str, arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr


def convert(*arguments) -> None:
    """`recipes/convert_weights.py` in this process, which is faster."""
    logger = logging.getLogger("lisa_hf")
    level, path = logger.level, list(sys.path)
    try:
        with mock.patch.object(sys, "argv", [str(COMMAND), *map(str, arguments)]):
            runpy.run_path(str(COMMAND), run_name="__main__")
    finally:
        logger.setLevel(level)
        sys.path[:] = path


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
def converted_processor() -> LisaProcessor:
    return AutoProcessor.from_pretrained(converted_directory())


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


def collapse_row(ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row, with the image as the original's single token."""
    image_token_id = converted_config().vlm_config.image_token_id
    return (
        collapse_image(ids, ids, image_token_id, ORIGINAL_IMAGE_TOKEN),
        collapse_image(labels, ids, image_token_id, -100),
    )


def batch_request(meta: dict, tensors: dict) -> dict:
    rows_per_image = np.diff(meta["offset"])
    num_images = len(rows_per_image)
    return {
        "images": [golden_image(index) for index in meta["image_index"]],
        "conversations": [as_messages(as_turns(conversation)) for conversation in meta["conversation_list"]],
        "image_indices": np.repeat(np.arange(num_images), rows_per_image).tolist(),
        "mask_labels": [tensors[f"gt_masks_{image}"] for image in range(num_images)],
    }


def assert_same_inputs(inputs, meta: dict, tensors: dict) -> None:
    mask = tensors["attention_masks"]
    for row, (row_ids, row_labels) in enumerate(zip(inputs["input_ids"].tolist(), inputs["labels"].tolist())):
        ids, labels = collapse_row(row_ids, row_labels)
        assert torch.tensor(ids)[mask[row]].tolist() == tensors["input_ids"][row, mask[row]].tolist()
        if "labels" in tensors:  # not recorded in `inference`
            assert labels == tensors["labels"][row].tolist()
    assert inputs["reshaped_input_sizes"].tolist() == meta["resize_list"]
    assert inputs["original_sizes"].tolist() == meta["original_sizes"]


def concatenate(tensors: dict, name: str, num_images: int) -> torch.Tensor:
    return torch.cat([tensors[f"{name}_{image}"] for image in range(num_images)])


def assert_same_outputs(outputs, meta: dict, tensors: dict, inputs) -> None:
    num_images = len(meta["image_index"])
    assert_close(outputs["loss"], meta["losses"]["loss"], "loss")
    for part in ("ce_loss", "mask_bce_loss", "mask_dice_loss"):
        assert_close(outputs[part], meta["losses"][part], part)

    # Rows are padded with another token than the original's <unk>: its states differ, and nothing depends on them.
    attended = inputs["attention_mask"].bool()
    expected = tensors["last_hidden_state"]
    start = attended.shape[1] - expected.shape[1]
    attended_part = attended[:, start:]
    assert_close(outputs["last_hidden_state"][:, start:][attended_part], expected[attended_part], "last_hidden_state")
    row_stride, column_stride = meta["logits_stride"]
    vocab_size = load_json("model_config")["vocab_final"]
    logits = outputs["logits"][:, ::row_stride, :vocab_size:column_stride]
    assert_close(logits[attended[:, ::row_stride]], tensors["logits_strided"][attended[:, ::row_stride]], "logits")

    assert_close(outputs["seg_embeddings"], concatenate(tensors, "seg_embeddings", num_images), "seg_embeddings")
    assert_close(outputs["low_res_masks"], concatenate(tensors, "low_res_masks", num_images), "low_res_masks")
    assert_close(outputs["iou_scores"], concatenate(tensors, "iou_pred", num_images)[:, 0], "iou_scores")
    for image, masks in enumerate(outputs["pred_masks"]):
        assert_close(masks, tensors[f"pred_masks_{image}"], f"masks of image {image}")


def assert_same_gradients(norms: dict[str, float], expected_norms: dict, table: list, prefix: str = "") -> None:
    """Compares the norms of all gradients that the original recorded; where it has None, ours may be zero."""
    largest = max(norm for norm in expected_norms.values() if norm is not None)
    for name, expected in convert_state_dict(expected_norms, table).items():
        # A bias of keys does not change the softmax: its gradient is nothing but rounding.
        tolerance = {"abs": 1e-5 * largest} if name.endswith("k_proj.bias") else {"rel": TOLERANCE, "abs": 0.0}
        assert norms[prefix + name] == pytest.approx(expected or 0.0, **tolerance), name
