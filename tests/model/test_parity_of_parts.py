"""Parity with the original, as in `test_parity.py`, of parts of the package, or of its own additions."""

import hashlib
import io
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from fixtures.golden_model import (
    GOLDEN,
    ORIGINAL_IMAGE_TOKEN,
    TOLERANCE,
    as_messages,
    as_turns,
    assert_close,
    assert_same_gradients,
    assert_same_inputs,
    assert_same_outputs,
    batch_request,
    collapse_image,
    concatenate,
    converted_config,
    converted_directory,
    converted_model,
    converted_processor,
    golden_image,
    golden_images,
    load_case,
    load_json,
)
from fixtures.recipes import run_here
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import SamImageProcessorPil

from lisa_hf.conversion.key_tables import convert_state_dict
from lisa_hf.conversion.lisa import LISA_KEY_TABLE
from lisa_hf.data.masks import encode_mask
from lisa_hf.data.rows import FEATURES, make_row
from lisa_hf.model.losses import mask_losses
from lisa_hf.model.mask_backbone import encode_images, padded_side, upscale_masks


TOKENIZATION = load_json("tokenization")
LOSSES = load_json("losses")
IMAGES_META, IMAGES = golden_images()


@pytest.fixture(scope="module")
def processor():
    return converted_processor()


@pytest.fixture
def model():
    return converted_model()


# ---- texts ----------------------------------------------------------------------------------------------------------


def test_tokenization_of_raw_strings(processor):
    strings = dict(TOKENIZATION["raw_strings"])
    # Before a text that begins with spaces, transformers 5 adds no further one. No text of a template begins so, and
    # LISA's tokens swallow the spaces that follow them.
    del strings["  two  spaces"]
    for text, expected in strings.items():
        assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == expected["ids"], repr(text)


def test_tokenization_of_the_chat_prompt(processor):
    question = "<image>\nWhere can the driver see the car speed? Please output segmentation mask."
    prompt = processor.apply_chat_template(as_messages([question]), add_generation_prompt=True, tokenize=False)
    assert prompt.rstrip() == TOKENIZATION["chat_prompt"]["prompt"]
    ids = processor(golden_image(1), prompt)["input_ids"][0].tolist()
    ids = collapse_image(ids, ids, processor.vlm_processor.image_token_id, ORIGINAL_IMAGE_TOKEN)
    assert ids == TOKENIZATION["chat_prompt"]["input_ids"]


# ---- images and masks -----------------------------------------------------------------------------------------------


def test_image_preprocessing(processor):
    inputs = processor([golden_image(0), golden_image(1)])
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    resized = (IMAGES["image_1_resized_uint8"].float() - mean) / std
    assert_close(inputs["mask_pixel_values"][0], IMAGES["image_0_sam"], "image 0 for SAM")
    assert_close(inputs["mask_pixel_values"][1], resized.permute(2, 0, 1), "image 1 for SAM")
    for index in (0, 1):
        assert_close(inputs["pixel_values"][index], IMAGES[f"image_{index}_clip"], f"image {index} for CLIP")
    assert inputs["original_sizes"].tolist() == [[93, 131], [80, 80]]
    assert inputs["reshaped_input_sizes"].tolist() == [[182, 256], [256, 256]]


@pytest.mark.parametrize("index", [0, 1])
def test_resize_to_1024_is_equal_to_the_byte(index):
    pixels_only = SamImageProcessorPil(do_rescale=False, do_normalize=False, do_pad=False)
    resized = pixels_only([golden_image(index)])["pixel_values"][0].transpose(1, 2, 0)
    expected = IMAGES_META[f"image_{index}_resize1024"]
    resized = np.ascontiguousarray(resized).astype(np.uint8)
    assert list(resized.shape) == expected["shape"]
    assert hashlib.sha1(resized.tobytes()).hexdigest() == expected["sha1"]


@pytest.mark.parametrize("size, expected", IMAGES_META["preprocess_shapes"].items())
def test_resized_shapes(size, expected):
    (height, width), side = map(int, size.split("@")[0].split("x")), int(size.split("@")[1])
    processor = SamImageProcessorPil(size={"longest_edge": side}, pad_size={"height": side, "width": side})
    inputs = processor([Image.new("RGB", (width, height))])
    assert [int(length) for length in inputs["reshaped_input_sizes"][0]] == expected


@pytest.mark.parametrize("index", [0, 1])
def test_mask_post_processing(index):
    sizes = IMAGES_META["postprocess"][index]
    side = padded_side(converted_config().mask_config)
    masks = upscale_masks(IMAGES["post_low"][:, 0], sizes["input_size"], sizes["original_size"], side)
    assert_close(masks, IMAGES[f"post_out_{index}"][:, 0], "post-processed masks")


# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_mask_losses(name):
    tensors = load_file(GOLDEN / "losses.safetensors")
    inputs_name, num_masks = name.split("|num_masks=")
    if inputs_name in ("a", "b", "empty"):
        inputs, targets = tensors[f"{inputs_name}_inputs"], tensors[f"{inputs_name}_targets"]
    else:
        inputs = tensors["zero_inputs"]
        targets = torch.ones_like(inputs) if inputs_name == "one_target" else torch.zeros_like(inputs)
        if inputs_name.startswith("saturated"):
            inputs = torch.full_like(inputs, -50.0)
    bce, dice = mask_losses(inputs, targets)
    # The original divides by the number of masks + 1e-8. That numerical guard is not ours: we divide by at least 1.
    divisor = float(num_masks) + 1e-8
    assert bce.item() / divisor == pytest.approx(LOSSES[name]["bce"], rel=TOLERANCE, abs=1e-7)
    assert dice.item() / divisor == pytest.approx(LOSSES[name]["dice"], rel=TOLERANCE, abs=1e-7)


# ---- the model ------------------------------------------------------------------------------------------------------


def test_image_encoders(model, processor):
    meta, tensors = load_case("batch_train_3_2")
    inputs = processor([golden_image(index) for index in meta["image_index"]])
    with torch.no_grad():
        embeddings = encode_images(model.mask_model, inputs["mask_pixel_values"])
        position = model.mask_model.get_image_wide_positional_embeddings()
        hidden_states = model.vlm.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    assert_close(embeddings, concatenate(tensors, "image_embeddings", 2), "image embeddings")
    assert_close(position, tensors["image_pe"], "positional embeddings of the image")
    assert_close(hidden_states[-2][:, 1:], tensors["clip_features"], "CLIP features")


def test_lora(model, processor):
    meta, tensors = load_case("batch_train_3_2_lora")
    request = batch_request(meta, tensors)
    mask_labels = request.pop("mask_labels")
    inputs = processor.encode_conversations(**request)
    assert_same_inputs(inputs, meta, tensors)
    lora_config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, target_modules=r"vlm\.model\.language_model\..*\.(q_proj|v_proj)"
    )
    prefix = "base_model.model."
    lora_table = [
        (
            r"model\.(layers\.\d+\.self_attn\.[qv]_proj\.lora_[AB]\.default\.weight)",
            r"vlm.model.language_model.\1",
        ),
        *LISA_KEY_TABLE,
    ]
    peft_model = get_peft_model(model, lora_config)
    lora_weights = load_file(GOLDEN / "lora_weights.safetensors")
    lora_weights = {key.removeprefix(prefix): value for key, value in lora_weights.items()}
    lora_weights = {prefix + key: value for key, value in convert_state_dict(lora_weights, lora_table).items()}
    assert not peft_model.load_state_dict(lora_weights, strict=False).unexpected_keys
    assert {key for key in peft_model.state_dict() if "lora_" in key} == set(lora_weights)

    expected_norms = {key.removeprefix(prefix): norm for key, norm in meta["grad_norms"].items()}
    parameters = dict(peft_model.named_parameters())
    for name in convert_state_dict(expected_norms, lora_table):
        parameters[prefix + name].requires_grad_(True)
    peft_model.train()
    outputs = peft_model(
        **inputs,
        mask_labels=mask_labels,
        output_logits=True,
        output_masks=True,
    )
    assert_same_outputs(outputs, meta, tensors, inputs)
    outputs.loss.backward()
    norms = {name: 0.0 if p.grad is None else p.grad.norm().item() for name, p in parameters.items()}
    assert_same_gradients(norms, expected_norms, lora_table, prefix)


def test_evaluation_recipe(tmp_path):
    """LISA's validation of the recorded questions, through the recipe: each a row, as their ignored pixels differ."""
    meta, tensors = load_case("inference")
    texts = [as_turns(conversation)[0].splitlines()[1] for conversation in meta["conversation_list"]]
    file = io.BytesIO()
    golden_image(meta["image_index"]).save(file, "PNG")
    rows = [
        make_row(
            image=file.getvalue(),
            image_id=str(index),
            source="recorded",
            task="referring",
            targets=[
                {
                    "phrases": [text.removeprefix(" What is ").split(" in this image?")[0]],
                    "rle": encode_mask((mask == 1).numpy()),
                }
            ],
            ignore=encode_mask((mask == 255).numpy()),
        )
        for index, (text, mask) in enumerate(zip(texts, tensors["gt_masks"], strict=True))
    ]
    Dataset.from_list(rows, features=FEATURES).to_parquet(tmp_path / "rows.parquet")
    source = {"recorded": {"builder": "hub", "path": str(tmp_path / "rows.parquet"), "split": "train"}}
    arguments = ["--eval_sources", json.dumps(source), "--output_dir", tmp_path / "out", "--use_cpu", "true"]
    run_here("eval.py", converted_directory(), *arguments, "--eval_generate", "false")
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())["benchmarks"]["recorded"]
    assert results["num_items"] == 3 and results["protocols"].keys() == {"lisa"}
    metrics = results["protocols"]["lisa"]
    assert metrics["giou"] == pytest.approx(meta["giou"], rel=TOLERANCE)
    assert metrics["ciou"] == pytest.approx(meta["ciou"], rel=TOLERANCE)
