"""Parity with the original implementation, at its numbers recorded at a tiny size (tests/golden).

A directory as the original saves it is converted by `recipes/convert_weights.py` and loaded with transformers' auto
classes where this package is not installed; what model and processor make of the original's texts and images there is
compared with what it made of them. Parts of the package are compared in `test_parity_of_parts.py`.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.golden_model import (
    GOLDEN,
    NUM_EXTRA_IMAGE_TOKENS,
    ORIGINAL_IMAGE_TOKEN,
    TOLERANCE,
    as_messages,
    assert_close,
    assert_same_gradients,
    assert_same_inputs,
    assert_same_outputs,
    batch_request,
    collapse_row,
    convert,
    converted_directory,
    converted_processor,
    golden_image,
    load_case,
    load_json,
    original_directory,
    training_state_dict,
)
from fixtures.paths import ROOT

from lisa_hf.conversion.lisa import LISA_KEY_TABLE
from lisa_hf.evaluation.metrics import intersection_and_union


TOKENIZATION = load_json("tokenization")
BATCHES = ("batch_train_3_2", "batch_vqa_only", "batch_vqa_plus_seg", "batch_two_seg_tokens")


def case_name(case: dict) -> str:
    return f"{case['conv_type']}-{case['name']}"


def load_inference() -> tuple[dict, dict]:
    """The case `inference`, under the names of a batch."""
    meta, tensors = load_case("inference")
    meta |= {
        "offset": [0, 3],
        "image_index": [meta["image_index"]],
        "resize_list": [meta["resize"]],
        "original_sizes": [meta["original_size"]],
    }
    return meta, tensors | {"gt_masks_0": tensors["gt_masks"]}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    """What converted models answer, by `parity_worker.py`, in a process that does not have this package."""
    directory = tmp_path_factory.mktemp("parity")
    requests = [
        *tokenization_requests(directory),
        *((name, ("forward", converted_directory(), batch_request(*load_case(name)))) for name in BATCHES),
        ("merged_lora", ("forward", merged_directory(directory), batch_request(*load_case("batch_train_3_2_lora")))),
        ("inference", ("forward", converted_directory(), batch_request(*load_inference()))),
        *generation_requests(),
    ]
    (directory / "requests.pkl").write_bytes(pickle.dumps(dict(requests)))
    process = subprocess.run(
        [
            sys.executable,
            "-I",
            ROOT / "tests" / "workers" / "parity_worker.py",
            "requests.pkl",
            "answers.pkl",
        ],
        cwd=directory,
        env=os.environ | {"HF_MODULES_CACHE": str(directory / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return pickle.loads((directory / "answers.pkl").read_bytes())


def tokenization_requests(directory: Path):
    """One per case; models for the other template, and without `<im_start>`, are converted first."""
    for case in TOKENIZATION["cases"]:
        template, use_mm_start_end = case["conv_type"], case["use_mm_start_end"]
        model = converted_directory()
        if (template, use_mm_start_end) != ("llava_v1", True):
            model = directory / f"{template}-{use_mm_start_end}"
            if not model.exists():
                original, tower = original_directory(use_mm_start_end), GOLDEN / "clip_tiny"
                options = ("--vision-tower", tower, "--chat-template", template, "--output", model)
                convert("lisa", "--checkpoint", original, *options)
        if case["name"] == "no_image":  # every row of ours is about an image: tokenizer and template alone
            (turns,) = case["messages"]
            messages = [{"role": ("user", "assistant")[index], "content": text} for index, text in enumerate(turns)]
            yield case_name(case), ("encode_without_image", model, {"messages": messages})
            continue
        conversations = [as_messages(turns) for turns in case["messages"]]
        max_length = case["model_max_length"] if "truncated" in case["name"] else None
        kwargs = {"images": [golden_image(1)], "conversations": conversations, "max_length": max_length}
        yield case_name(case), ("encode", model, kwargs)


def merged_directory(directory: Path) -> Path:
    """The training run's weights, through the command: LoRA is folded in, everything else is as it was trained."""
    torch.save(training_state_dict(), directory / "pytorch_model.bin")
    base, tower = original_directory(), GOLDEN / "clip_tiny"
    options = ("--base", base, "--vision-tower", tower, "--output", directory / "merged")
    convert("lisa-train", "--checkpoint", directory / "pytorch_model.bin", *options)
    return directory / "merged"


def generation_requests():
    cases, tensors = load_case("evaluate")
    for name, case in cases.items():
        kwargs = {"image": golden_image(case["image_index"]), "prompt": case["prompt"]}
        yield name, ("generate", converted_directory(), kwargs | {"output_embeddings": tensors[f"{name}_lm_head"]})


# ---- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TOKENIZATION["cases"], ids=case_name)
def test_tokenization(case, answers):
    answer, processor = answers[case_name(case)], converted_processor()
    if case["name"] == "no_image":
        (row_ids,), (row_labels,) = case["input_ids"], case["labels"]
        bos = processor.tokenizer.bos_token_id  # the template leaves it to the tokenizer
        assert [bos, *answer["input_ids"]] == row_ids
        mask = [0, *answer["assistant_masks"]]
        assert [token if is_answer else -100 for token, is_answer in zip(row_ids, mask, strict=True)] == row_labels
        return
    for row, row_ids, row_labels, mask in zip(
        answer, case["input_ids"], case["labels"], case["attention_masks"], strict=True
    ):
        length = sum(mask)
        ids, labels = collapse_row(*row["whole"])
        if "truncated" in case["name"]:
            assert length <= case["model_max_length"] - NUM_EXTRA_IMAGE_TOKENS
            if processor.seg_token_id in labels[length:] or ORIGINAL_IMAGE_TOKEN in ids[length:]:
                # The original cuts them off and then lacks a [SEG] for a mask, or the image.
                assert row["cut"] == "TextTooLongError"
            else:
                assert collapse_row(*row["cut"]) == (ids[:length], labels[:length])
            ids, labels = ids[:length], labels[:length]
        assert ids == row_ids[:length]
        assert labels == row_labels[:length]


# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BATCHES)
def test_forward_and_backward(name, answers):
    (meta, tensors), answer = load_case(name), answers[name]
    assert_same_inputs(answer["inputs"], meta, tensors)
    assert_same_outputs(answer["outputs"], meta, tensors, answer["inputs"])
    assert_same_gradients(answer["gradient_norms"], meta["grad_norms"], LISA_KEY_TABLE)


def test_merged_lora(answers):
    (meta, tensors), answer = load_case("batch_train_3_2_lora"), answers["merged_lora"]
    assert_same_inputs(answer["inputs"], meta, tensors)
    assert_same_outputs(answer["outputs"], meta, tensors, answer["inputs"])
    norms = {name.removeprefix("base_model.model."): norm for name, norm in meta["grad_norms"].items()}
    norms = {name: norm for name, norm in norms.items() if "lora_" not in name}
    assert_same_gradients(answer["gradient_norms"], norms, LISA_KEY_TABLE)


def test_inference(answers):
    (meta, tensors), answer = load_inference(), answers["inference"]
    assert_same_inputs(answer["inputs"], meta, tensors)
    (masks,) = answer["outputs"]["pred_masks"]
    assert_close(masks, tensors["pred_masks"], "masks")
    counts = [intersection_and_union(mask > 0, target) for mask, target in zip(masks, tensors["gt_masks"])]
    assert counts == [(mask["intersection"][1], mask["union"][1]) for mask in meta["per_mask"]]
    intersections, unions = np.array(counts).T
    # The original adds 1e-5 to each mask's union, and 1e-10 to their sum.
    assert (intersections / unions).mean() == pytest.approx(meta["giou"], rel=TOLERANCE)
    assert intersections.sum() / unions.sum() == pytest.approx(meta["ciou"], rel=TOLERANCE)


@pytest.mark.parametrize("name", ["one_seg", "two_seg", "no_seg"])
def test_generate(name, answers):
    (_, tensors), answer = load_case("evaluate"), answers[name]
    for kind, ids in (("prompt_ids", answer["prompt"]), ("output_ids", answer["sequence"])):
        assert collapse_row(ids, ids)[0] == tensors[f"{name}_{kind}"][0].tolist()
    assert_close(answer["masks"], tensors[f"{name}_pred_masks"], "masks")
