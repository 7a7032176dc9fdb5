"""Parity with the original implementation, at its numbers recorded at a tiny size (tests/golden).

A directory as the original saves it is converted by `recipes/convert_weights.py` and loaded with transformers' auto
classes; what model and processor make of the original's texts and images is compared with what it made of them.
"""

import hashlib
import importlib.util
import io
import json
import math
import sys
import zlib

import numpy as np
import pytest
import torch
from datasets import Dataset
from golden_model import (
    COMMAND,
    GOLDEN,
    NUM_EXTRA_IMAGE_TOKENS,
    ORIGINAL_IMAGE_TOKEN,
    TOLERANCE,
    as_messages,
    as_turns,
    assert_close,
    collapse_image,
    converted_config,
    converted_directory,
    converted_model,
    converted_processor,
    golden_image,
    golden_images,
    load_case,
    load_json,
    original_directory,
    run_command,
    training_state_dict,
)
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, SamImageProcessorPil, SamModel, SamProcessor

from lisa_hf.conversion import convert_state_dict
from lisa_hf.conversion.lisa import LISA_KEY_TABLE
from lisa_hf.losses import mask_losses
from lisa_hf.mask_backbone import decode_prompts, encode_images, padded_side, upscale_masks
from lisa_hf.metrics import intersection_and_union
from lisa_hf.processing_lisa import TextTooLongError
from lisa_hf.schema import FEATURES, encode_mask, make_row


TOKENIZATION = load_json("tokenization")
LOSSES = load_json("losses")
VOCAB_SIZE = load_json("model_config")["vocab_final"]
IMAGES_META, IMAGES = golden_images()


@pytest.fixture(scope="module")
def processor():
    return converted_processor()


@pytest.fixture
def model():
    return converted_model()


# ---- texts ----------------------------------------------------------------------------------------------------------


def encode_row(processor, turns: list[str], max_length: int | None = None) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row, with the image as the original's single token."""
    features = processor.encode_conversations([golden_image(1)], [as_messages(turns)], max_length=max_length)
    ids, labels = features["input_ids"][0].tolist(), features["labels"][0].tolist()
    image_token_id = processor.vlm_processor.image_token_id
    return (
        collapse_image(ids, ids, image_token_id, ORIGINAL_IMAGE_TOKEN),
        collapse_image(labels, ids, image_token_id, -100),
    )


def assert_same_row_of_text(case: dict, processor) -> None:
    (turns,), (row_ids,), (row_labels,) = case["messages"], case["input_ids"], case["labels"]
    messages = [{"role": ("user", "assistant")[index], "content": text} for index, text in enumerate(turns)]
    encoding = processor.tokenizer.apply_chat_template(
        messages, chat_template=processor.chat_template, return_dict=True, return_assistant_tokens_mask=True
    )
    bos = processor.tokenizer.bos_token_id  # the template leaves it to the tokenizer
    assert [bos, *encoding["input_ids"]] == row_ids
    mask = [0, *encoding["assistant_masks"]]
    assert [token if is_answer else -100 for token, is_answer in zip(row_ids, mask)] == row_labels


@pytest.mark.parametrize("case", TOKENIZATION["cases"], ids=lambda case: f"{case['conv_type']}-{case['name']}")
def test_tokenization(case):
    processor = converted_processor(case["conv_type"], case["use_mm_start_end"])
    if case["name"] == "no_image":  # every row of ours is about an image: tokenizer and template alone
        assert_same_row_of_text(case, processor)
        return
    max_length = None if case["inference"] else case["model_max_length"]
    for turns, row_ids, row_labels, mask in zip(
        case["messages"], case["input_ids"], case["labels"], case["attention_masks"]
    ):
        length = sum(mask)
        ids, labels = encode_row(processor, turns)
        if "truncated" in case["name"]:
            assert length <= case["model_max_length"] - NUM_EXTRA_IMAGE_TOKENS
            if processor.seg_token_id in labels[length:] or ORIGINAL_IMAGE_TOKEN in ids[length:]:
                # The original cuts them off and then lacks a [SEG] for a mask, or the image.
                with pytest.raises(TextTooLongError):
                    encode_row(processor, turns, max_length)
            else:
                assert encode_row(processor, turns, max_length) == (ids[:length], labels[:length])
            ids, labels = ids[:length], labels[:length]
        assert ids == row_ids[:length]
        assert labels == row_labels[:length]


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


def encode_batch(meta: dict, tensors: dict, processor):
    """The batch through our processor, after a check that it is the original's."""
    rows_per_image = np.diff(meta["offset"])
    image_indices = np.repeat(np.arange(len(rows_per_image)), rows_per_image).tolist()
    inputs = processor.encode_conversations(
        [golden_image(index) for index in meta["image_index"]],
        [as_messages(as_turns(conversation)) for conversation in meta["conversation_list"]],
        image_indices=image_indices,
    )
    image_token_id = processor.vlm_processor.image_token_id
    mask = tensors["attention_masks"]
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        labels = collapse_image(inputs["labels"][row].tolist(), ids, image_token_id, -100)
        ids = collapse_image(ids, ids, image_token_id, ORIGINAL_IMAGE_TOKEN)
        assert torch.tensor(ids)[mask[row]].tolist() == tensors["input_ids"][row, mask[row]].tolist()
        if "labels" in tensors:  # not recorded in `inference`
            assert labels == tensors["labels"][row].tolist()
    assert inputs["reshaped_input_sizes"].tolist() == meta["resize_list"]
    assert inputs["original_sizes"].tolist() == meta["original_sizes"]
    return inputs


def concatenate(tensors: dict, name: str, num_images: int) -> torch.Tensor:
    return torch.cat([tensors[f"{name}_{image}"] for image in range(num_images)])


def assert_same_outputs(outputs, meta: dict, tensors: dict, inputs, num_images: int) -> None:
    assert_close(outputs.loss, meta["losses"]["loss"], "loss")
    for part in ("ce_loss", "mask_bce_loss", "mask_dice_loss"):
        assert_close(getattr(outputs, part), meta["losses"][part], part)

    # Rows are padded with another token than the original's <unk>: its states differ, and nothing depends on them.
    attended = inputs["attention_mask"].bool()
    expected = tensors["last_hidden_state"]
    start = attended.shape[1] - expected.shape[1]
    attended_part = attended[:, start:]
    assert_close(outputs.last_hidden_state[:, start:][attended_part], expected[attended_part], "last_hidden_state")
    row_stride, column_stride = meta["logits_stride"]
    logits = outputs.logits[:, ::row_stride, :VOCAB_SIZE:column_stride]
    assert_close(logits[attended[:, ::row_stride]], tensors["logits_strided"][attended[:, ::row_stride]], "logits")

    assert_close(outputs.seg_embeddings, concatenate(tensors, "seg_embeddings", num_images), "seg_embeddings")
    assert_close(outputs.low_res_masks, concatenate(tensors, "low_res_masks", num_images), "low_res_masks")
    assert_close(outputs.iou_scores, concatenate(tensors, "iou_pred", num_images)[:, 0], "iou_scores")
    for image, masks in enumerate(outputs.pred_masks):
        assert_close(masks, tensors[f"pred_masks_{image}"], f"masks of image {image}")


def assert_same_gradients(model, expected_norms: dict, table: list, prefix: str = "") -> None:
    """Compares the norms of all gradients that the original recorded; where it has None, ours may be zero."""
    parameters = dict(model.named_parameters())
    largest = max(norm for norm in expected_norms.values() if norm is not None)
    for name, expected in convert_state_dict(expected_norms, table).items():
        gradient = parameters[prefix + name].grad
        norm = 0.0 if gradient is None else gradient.norm().item()
        # A bias of keys does not change the softmax: its gradient is nothing but rounding.
        tolerance = {"abs": 1e-5 * largest} if name.endswith("k_proj.bias") else {"rel": TOLERANCE, "abs": 0.0}
        assert norm == pytest.approx(expected or 0.0, **tolerance), name


@pytest.mark.parametrize("name", ["batch_train_3_2", "batch_vqa_only", "batch_vqa_plus_seg", "batch_two_seg_tokens"])
def test_forward_and_backward(name, model, processor):
    meta, tensors = load_case(name)
    num_images = len(meta["image_index"])
    inputs = encode_batch(meta, tensors, processor)
    mask_labels = [tensors[f"gt_masks_{image}"] for image in range(num_images)]
    model.train()
    outputs = model(**inputs, mask_labels=mask_labels, output_logits=True, output_masks=True)
    assert_same_outputs(outputs, meta, tensors, inputs, num_images)
    outputs.loss.backward()
    assert_same_gradients(model, meta["grad_norms"], LISA_KEY_TABLE)


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
    inputs = encode_batch(meta, tensors, processor)
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
        mask_labels=[tensors[f"gt_masks_{image}"] for image in range(2)],
        output_logits=True,
        output_masks=True,
    )
    assert_same_outputs(outputs, meta, tensors, inputs, 2)
    outputs.loss.backward()
    assert_same_gradients(peft_model, expected_norms, lora_table, prefix)


def test_merged_lora(tmp_path):
    """The training run's weights, through the command: LoRA is folded in, everything else is as it was trained."""
    meta, tensors = load_case("batch_train_3_2_lora")
    checkpoint = tmp_path / "pytorch_model.bin"
    torch.save(training_state_dict(), checkpoint)
    base, tower = original_directory(), GOLDEN / "clip_tiny"
    run_command(
        *("lisa-train", "--checkpoint", checkpoint, "--base", base, "--vision-tower", tower),
        *("--output", tmp_path / "converted"),
    )
    model, processor = (
        AutoModel.from_pretrained(tmp_path / "converted"),
        AutoProcessor.from_pretrained(tmp_path / "converted"),
    )
    inputs = encode_batch(meta, tensors, processor)
    model.train()
    mask_labels = [tensors[f"gt_masks_{image}"] for image in range(2)]
    outputs = model(**inputs, mask_labels=mask_labels, output_logits=True, output_masks=True)
    assert_same_outputs(outputs, meta, tensors, inputs, 2)
    outputs.loss.backward()
    norms = {name.removeprefix("base_model.model."): norm for name, norm in meta["grad_norms"].items()}
    assert_same_gradients(model, {name: norm for name, norm in norms.items() if "lora_" not in name}, LISA_KEY_TABLE)


def test_inference(model, processor):
    meta, tensors = load_case("inference")
    meta |= {  # the names of a batch
        "offset": [0, 3],
        "image_index": [meta["image_index"]],
        "resize_list": [meta["resize"]],
        "original_sizes": [meta["original_size"]],
    }
    inputs = encode_batch(meta, tensors, processor)
    with torch.no_grad():
        (masks,) = model(**inputs, mask_labels=[tensors["gt_masks"]]).pred_masks
    assert_close(masks, tensors["pred_masks"], "masks")
    counts = [intersection_and_union(mask > 0, target) for mask, target in zip(masks, tensors["gt_masks"])]
    assert counts == [(mask["intersection"][1], mask["union"][1]) for mask in meta["per_mask"]]
    intersections, unions = np.array(counts).T
    # The original adds 1e-5 to each mask's union, and 1e-10 to their sum.
    assert (intersections / unions).mean() == pytest.approx(meta["giou"], rel=TOLERANCE)
    assert intersections.sum() / unions.sum() == pytest.approx(meta["ciou"], rel=TOLERANCE)


def test_evaluation_recipe(tmp_path, monkeypatch):
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
    spec = importlib.util.spec_from_file_location("evaluate_recipe", COMMAND.with_name("evaluate.py"))
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setattr("sys.path", list(sys.path))
    spec.loader.exec_module(recipe)
    source = {"recorded": {"builder": "hub", "path": str(tmp_path / "rows.parquet"), "split": "train"}}
    arguments = ["--eval_sources", json.dumps(source), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    monkeypatch.setattr(
        "sys.argv", ["evaluate.py", str(converted_directory()), *arguments, "--eval_generate", "false"]
    )
    recipe.main()
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())["benchmarks"]["recorded"]
    assert results["num_items"] == 3 and results["protocols"].keys() == {"lisa"}
    figures = results["protocols"]["lisa"]
    assert figures["giou"] == pytest.approx(meta["giou"], rel=TOLERANCE)
    assert figures["ciou"] == pytest.approx(meta["ciou"], rel=TOLERANCE)


@pytest.mark.parametrize("case", ["one_seg", "two_seg", "no_seg"])
def test_generate(case, model, processor):
    meta, tensors = load_case("evaluate")
    meta = meta[case]
    with torch.no_grad():
        model.get_output_embeddings().weight[:VOCAB_SIZE] = tensors[f"{case}_lm_head"]
    inputs = processor(golden_image(meta["image_index"]), meta["prompt"])
    ids = inputs["input_ids"][0].tolist()
    image_token_id = processor.vlm_processor.image_token_id
    prompt_ids = collapse_image(ids, ids, image_token_id, ORIGINAL_IMAGE_TOKEN)
    assert prompt_ids == tensors[f"{case}_prompt_ids"][0].tolist()

    outputs = model.generate(**inputs, do_sample=False, max_new_tokens=32)
    sequence = outputs.sequences[0].tolist()
    assert collapse_image(sequence, sequence, image_token_id, ORIGINAL_IMAGE_TOKEN) == (
        tensors[f"{case}_output_ids"][0].tolist()
    )
    (masks,) = processor.post_process_masks(
        outputs.low_res_masks,
        inputs["original_sizes"],
        inputs["reshaped_input_sizes"],
        outputs.seg_row_indices,
        inputs["image_indices"],
        binarize=False,
    )
    assert_close(masks, tensors[f"{case}_pred_masks"], "masks")


# ---- SAM at its published image and decoder size --------------------------------------------------------------------


def recipe_weight(key: str, shape: list[int]) -> torch.Tensor:
    """The weights of the recorded SAM, which are drawn from each key's own seed and not stored."""
    values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape))
    last = key.split(".")[-1]
    if key.endswith("positional_encoding_gaussian_matrix"):
        scale, shift = 1.0, 0.0
    elif len(shape) == 1:
        scale, shift = 0.1, float(last == "weight")
    elif "pos" in last:
        scale, shift = 0.3, 0.0
    elif ("embed" in key and "patch_embed" not in key) or "token" in key:
        scale, shift = 0.5, 0.0
    else:
        scale, shift = 1.5 / math.sqrt(math.prod(shape[1:])), 0.0
    return torch.from_numpy((shift + scale * values).astype(np.float32))


def recipe_image() -> Image.Image:
    y, x, channel = np.meshgrid(np.arange(1024), np.arange(768), np.arange(3), indexing="ij")
    return Image.fromarray((((x * 7 + y * 13 + channel * 29) ^ (x * y // 17)) % 256).astype(np.uint8))


def test_sam_at_1024(tmp_path):
    meta, tensors = load_case("sam1024")
    torch.save({key: recipe_weight(key, shape) for key, shape in meta["keys"].items()}, tmp_path / "sam.pth")
    run_command("sam", "--checkpoint", tmp_path / "sam.pth", "--output", tmp_path / "converted")
    mask_model = SamModel.from_pretrained(tmp_path / "converted")
    prompts = torch.from_numpy(np.random.RandomState(99).standard_normal((2, 1, 256)).astype(np.float32))
    inputs = SamProcessor.from_pretrained(tmp_path / "converted")(recipe_image(), return_tensors="pt")
    assert inputs["reshaped_input_sizes"][0].tolist() == meta["input_size"]
    with torch.no_grad():
        embeddings = encode_images(mask_model, inputs["pixel_values"])
        position = mask_model.get_image_wide_positional_embeddings()
        low_res_masks, iou_scores = decode_prompts(mask_model, embeddings.expand(2, -1, -1, -1), prompts[:, 0])
    masks = upscale_masks(low_res_masks, meta["input_size"], (333, 250), padded_side(mask_model.config))

    channels, rows, columns = meta["strides"]["image_embeddings"]
    assert_close(embeddings[:, ::channels, ::rows, ::columns], tensors["image_embeddings_stride"], "embeddings")
    assert_close(position[:, ::channels, ::rows, ::columns], tensors["image_pe_stride"], "positions")
    # These random weights make the decoder's attention so steep that it multiplies rounding errors by a thousand: the
    # original's own float32 is 9e-3 off its float64, where ours equals it to 1e-12. Hence another tolerance.
    stride = meta["strides"]["low_res_masks"]
    assert_close(low_res_masks[:, ::stride, ::stride], tensors["low_res_masks_stride"], "low_res_masks", 3e-2)
    assert_close(iou_scores, tensors["iou"][:, 0], "iou_scores", 3e-2)
    stride = meta["strides"]["post"]
    assert_close(masks[:, ::stride, ::stride], tensors["post_stride"], "masks", 3e-2)
