"""Recipes at full size, from published configurations: what trains, and the table of docs/backbones.md."""

import json
import re
from collections import Counter
from pathlib import Path

import memory
import pytest
import torch
from fixtures.full_size import write_full_size_vlm
from fixtures.paths import PUBLISHED, ROOT
from transformers import AutoConfig

from lisa_hf.training.arguments import parse_arguments
from lisa_hf.training.build import build_config_and_processor, build_model
from lisa_hf.training.trainable import find_parts, prepare_for_training


PAGE = (ROOT / "docs" / "backbones.md").read_text()
# Rows such as "| Qwen3-VL-4B-Instruct, sam2.1-hiera-large | 306.2 | ...", by their models.
TABLE = {tuple(row[2:].split(" | ")[0].split(", ")): row for row in re.findall(r"^\| \S+, \S+ \| \d.*", PAGE, re.M)}
QUICK = ("SmolVLM2-500M-Video-Instruct", "Qwen3.5-0.8B")
PAIRS = [pytest.param(*pair, id="-".join(pair), marks=[] if pair[0] in QUICK else pytest.mark.slow) for pair in TABLE]

pytestmark = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs published configurations")


def published(name: str) -> Path:
    """Return the directory of a published model by its name without the organization."""
    (path,) = PUBLISHED.glob(f"*__{name}")
    return path


def recipe_of(vlm: str, mask_model: str) -> Path:
    """Return the recipe that names both models, in its keys or in its header."""
    texts = {path: path.read_text() for path in (ROOT / "recipes" / "configs").glob("*.yaml")}
    names = [re.compile(rf"/{re.escape(name)}(?![\w-])") for name in (vlm, mask_model)]
    found = [path for path, text in texts.items() if all(name.search(text) for name in names)]
    (path,) = [path for path in found if path.stem not in ("custom", "real_samples")]
    return path


def arguments(vlm: str, mask_model: str, directory: Path) -> list[str]:
    """Return the command line of the recipe for both models, from their published files."""
    write_full_size_vlm(published(vlm).name, directory / vlm)
    (directory / mask_model).symlink_to(published(mask_model))
    models = ["--vlm", str(directory / vlm), "--mask_model", str(directory / mask_model)]
    return ["--config", str(recipe_of(vlm, mask_model)), *models]


def test_the_table_has_every_published_model_that_opens():
    opened = set()
    for path in PUBLISHED.iterdir():
        try:
            AutoConfig.from_pretrained(path)
        except (OSError, ValueError):
            continue  # remote code, or a directory without a model
        opened.add(path.name.split("__")[1])
    assert opened == {name for pair in TABLE for name in pair}


@pytest.mark.slow
@pytest.mark.parametrize("vlm, mask_model", [pytest.param(*pair, id="-".join(pair)) for pair in TABLE])
def test_the_table_is_what_the_command_prints(vlm, mask_model, tmp_path):
    """20 to 80 s each. If it differs, run recipes/benchmarks/memory.py and write its row into the page."""
    assert memory.report(arguments(vlm, mask_model, tmp_path)).splitlines()[-1] == TABLE[vlm, mask_model]


def test_sizes_are_those_of_the_published_weights(tmp_path):
    index = json.loads((published("llava-1.5-7b-hf") / "model.safetensors.index.json").read_text())
    sizes = {"llava-1.5-7b-hf": index["metadata"]["total_size"] // 2, "Qwen3-VL-8B-Instruct": 8_767_123_696}
    for vlm, mask_model in (pair for pair in TABLE if pair[0] in sizes):
        model_args, _, _ = parse_arguments([*arguments(vlm, mask_model, tmp_path), "--use_cpu", "true"])
        config, _ = build_config_and_processor(model_args)
        model = build_model(model_args, config, empty=True)
        assert sum(weight.numel() for weight in model.vlm.parameters()) == sizes[vlm]


@pytest.mark.parametrize("vlm, mask_model", PAIRS)
def test_what_trains(vlm, mask_model, tmp_path):
    model_args, _, _ = parse_arguments([*arguments(vlm, mask_model, tmp_path), "--use_cpu", "true"])
    config, processor = build_config_and_processor(model_args)
    model = build_model(model_args, config, empty=True)
    assert all(weight.is_meta for weight in model.parameters())
    assert model.get_input_embeddings().num_embeddings >= len(processor.tokenizer) > processor.seg_token_id
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    parts = find_parts(model)
    (language_model,) = parts["language_model"]
    layers = model.get_submodule(language_model).named_modules()
    targets = Counter(name.split(".")[-1] for name, layer in layers if isinstance(layer, torch.nn.Linear))

    model = prepare_for_training(model, **model_args.adaptation)
    trained = [name.removeprefix("base_model.model.") for name, w in model.named_parameters() if w.requires_grad]
    lora = [name for name in trained if ".lora_" in name]
    assert all(name.startswith(f"{language_model}.") for name in lora)
    adapted = Counter(name.split(".lora_A.")[0].split(".")[-1] for name in lora if ".lora_A." in name)
    assert adapted == {name: targets[name] for name in model_args.lora_target_modules}
    rest = {name.replace(".modules_to_save.default", "") for name in trained} - set(lora)
    for part in model_args.trainable:
        assert any(name.startswith(tuple(parts[part])) for name in rest)
    assert all(name.startswith(tuple(path for part in model_args.trainable for path in parts[part])) for name in rest)
    embeddings = tuple(f"{path}.weight" for path in parts["embeddings"])
    # One copy of tied embeddings trains, two of others.
    copies = [
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.requires_grad and name.replace(".modules_to_save.default", "").endswith(embeddings)
    ]
    assert sum(copies) == model.get_input_embeddings().weight.numel() * (1 if is_tied else 2)
