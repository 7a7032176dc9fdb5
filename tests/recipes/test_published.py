"""Small random copies of published models, end to end: train, evaluate, export, answer without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from fixtures.paths import PUBLISHED
from fixtures.recipes import run
from fixtures.shrunken import write_shrunken_mask_model, write_shrunken_vlm
from fixtures.tiny_models import image
from fixtures.without_package import NO_PACKAGE
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, pipeline

import lisa_hf  # noqa: F401  registers the classes


pytestmark = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs published configurations")
# Every VLM and every mask model that transformers opens, the pairs of the recipes among them.
PAIRS = {
    "Qwen__Qwen3-VL-2B-Instruct": "facebook__sam2.1-hiera-large",
    "Qwen__Qwen3-VL-4B-Instruct": "facebook__sam2.1-hiera-tiny",
    "Qwen__Qwen3-VL-8B-Instruct": "facebook__sam2.1-hiera-large",
    "Qwen__Qwen2.5-VL-3B-Instruct": "facebook__sam2.1-hiera-large",
    "Qwen__Qwen3.5-0.8B": "facebook__sam3",
    "OpenGVLab__InternVL3-2B-hf": "syscv-community__sam-hq-vit-huge",
    "OpenGVLab__InternVL3_5-1B-HF": "facebook__sam2.1-hiera-large",
    "HuggingFaceTB__SmolVLM-256M-Instruct": "yonigozlan__EdgeTAM-hf",
    "HuggingFaceTB__SmolVLM2-500M-Video-Instruct": "yonigozlan__EdgeTAM-hf",
    "google__gemma-3-4b-it": "facebook__sam3",
    "google__gemma-4-E2B-it": "facebook__sam2.1-hiera-large",
    "google__gemma-4-31B-it": "facebook__sam2.1-hiera-large",
    "llava-hf__llava-1.5-7b-hf": "facebook__sam-vit-huge",
    "llava-hf__llava-onevision-qwen2-0.5b-ov-hf": "facebook__sam-vit-huge",
    "llava-hf__llava-v1.6-mistral-7b-hf": "facebook__sam2.1-hiera-tiny",
}
SIZES = [(40, 60), (64, 32), (50, 50), (30, 90)]  # height and width
FRESH = (
    NO_PACKAGE
    + """
import sys

import torch
from safetensors.torch import save_file

from transformers import AutoModel, AutoProcessor, pipeline

directory, picture, answers = sys.argv[1:]
model = AutoModel.from_pretrained(directory, trust_remote_code=True)
seg = torch.tensor(model.config.seg_token_id)
AutoProcessor.from_pretrained(directory, trust_remote_code=True)
pipe = pipeline("reasoning-segmentation", model=directory, trust_remote_code=True)
only_seg = {"logits_processor": [lambda _, scores: scores.index_fill(1, seg, 1e4)]}
answer = pipe(picture, question="What is it?", max_new_tokens=2, generate_kwargs=only_seg)
save_file({"masks": answer["masks"], "scores": answer["scores"]}, answers)
"""
)


def write_photos(directory: Path) -> None:
    """Write photos of several sizes, one of them lying on its side, with masks and questions."""
    (directory / "masks").mkdir(parents=True)
    lines = []
    for index, size in enumerate(SIZES):
        photo, exif = image(*size, seed=index), PIL.Image.Exif()
        if index == 3:
            exif[PIL.Image.ExifTags.Base.Orientation] = 6
            photo = photo.rotate(90, expand=True)
        photo.save(directory / f"{index}.jpg", exif=exif)
        mask = np.zeros(size, dtype=np.uint8)
        mask[5:20, 5:25] = 255
        PIL.Image.fromarray(mask).save(directory / "masks" / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.jpg", "mask": f"{index}.png", "phrase": "the red circle"}))
    (directory / "questions.jsonl").write_text("\n".join(lines), "utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("vlm", PAIRS)
def test_from_published_files_to_masks_elsewhere(vlm, tmp_path):
    """About a minute each."""
    write_shrunken_vlm(vlm, tmp_path / "vlm")
    write_shrunken_mask_model(PAIRS[vlm], tmp_path / "mask_model")
    write_photos(tmp_path / "photos")
    source = {
        "builder": "image_folder",
        "images": "photos",
        "masks": "photos/masks",
        "questions": "photos/questions.jsonl",
    }
    sources = json.dumps({"photos": source})
    run(
        *("train.py", "--vlm", "vlm", "--mask_model", "mask_model", "--sources", sources, "--output_dir", "run"),
        *("--max_steps", 5, "--per_device_train_batch_size", 2, "--use_cpu", "true", "--report_to", "none"),
        *("--save_strategy", "no", "--logging_steps", 1),
        cwd=tmp_path,
    )
    run(
        *("eval.py", "run", "--eval_sources", sources, "--output_dir", "figures", "--generation_max_new_tokens", 4),
        *("--use_cpu", "true"),
        cwd=tmp_path,
    )
    figures = json.loads((tmp_path / "figures" / "evaluation.json").read_text())["benchmarks"]["photos"]
    assert figures["num_items"] == len(SIZES) and {"lisa", "generated"} <= figures["protocols"].keys()
    run("export.py", "run", "--output", "exported", cwd=tmp_path)

    picture = tmp_path / "photos" / "3.jpg"
    environment = {"HF_MODULES_CACHE": tmp_path / "modules", "HF_HOME": tmp_path / "home", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FRESH, tmp_path / "exported", picture, tmp_path / "answers.safetensors"]
    result = subprocess.run(
        list(map(str, command)),
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        | {name: str(value) for name, value in environment.items()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    model, processor = AutoModel.from_pretrained(tmp_path / "run"), AutoProcessor.from_pretrained(tmp_path / "run")
    seg = torch.tensor(model.config.seg_token_id)
    pipe = pipeline("reasoning-segmentation", model=model, processor=processor)
    only_seg = {"logits_processor": [lambda _, scores: scores.index_fill(1, seg, 1e4)]}
    answer = pipe(str(picture), question="What is it?", max_new_tokens=2, generate_kwargs=only_seg)
    elsewhere = load_file(tmp_path / "answers.safetensors")
    assert answer["masks"].shape == (2, 30, 90) and torch.equal(elsewhere["masks"], answer["masks"])
    torch.testing.assert_close(elsewhere["scores"], answer["scores"], rtol=0, atol=1e-5)
