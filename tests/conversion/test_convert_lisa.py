"""LISA through `recipes/convert_weights.py`, in every size, and its training runs (`lisa-train`)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures.golden_model import as_messages, convert, golden_image, training_state_dict, write_shards
from fixtures.original_checkpoints import (
    CLIP,
    lisa_of_other_sizes,
    write_lisa_of_other_sizes,
    write_training_base,
    write_zero_checkpoint,
)
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from lisa_hf import LisaProcessor
from lisa_hf.conversion.zero_checkpoints import open_zero_checkpoint


def assert_merged(output: Path) -> None:
    """The run's weights with LoRA folded in, in the converted model's names."""
    converted, original = load_file(output / "model.safetensors"), training_state_dict()
    prefix = "base_model.model.model.layers.1.self_attn.v_proj"
    factors = [original[f"{prefix}.lora_{factor}.default.weight"].double() for factor in "BA"]
    merged = original[f"{prefix}.weight"].double() + 16 / 8 * (factors[0] @ factors[1])
    name = "vlm.model.language_model.layers.1.self_attn.v_proj.weight"
    torch.testing.assert_close(converted[name], merged.float(), rtol=0, atol=1e-6)
    tower = "vision_model.embeddings.class_embedding"
    assert torch.equal(
        converted["vlm.model.vision_tower.embeddings.class_embedding"],
        original[f"base_model.model.model.vision_tower.vision_tower.{tower}"],
    )
    assert "<im_start><image><im_end>" in AutoProcessor.from_pretrained(output).chat_template


# Widths, depths, heads, windows and images unlike any published model's: values not read from the checkpoint show.
OTHER_SIZES = [
    {  # grouped-query attention; a window that does not divide the grid; the decoder's own width and depth
        "text": {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6}
        | {"num_key_value_heads": 2},
        "clip": {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
        | {"image_size": 40, "patch_size": 8},
        "sam": {"hidden_size": 48, "output_channels": 64, "num_hidden_layers": 4, "num_attention_heads": 3}
        | {"image_size": 192, "patch_size": 16, "window_size": 5, "global_attn_indexes": [0, 2], "mlp_dim": 72},
        "decoder": {"mlp_dim": 96, "num_hidden_layers": 3, "attention_downsample_rate": 4, "num_attention_heads": 8}
        | {"num_multimask_outputs": 2, "iou_head_hidden_dim": 24, "mask_input_channels": 8},
    },
    {  # one head; a window larger than the grid; no block that sees the whole image
        "text": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1},
        "clip": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1}
        | {"image_size": 28, "patch_size": 14},
        "sam": {"hidden_size": 16, "output_channels": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
        | {"image_size": 64, "patch_size": 8, "window_size": 14, "global_attn_indexes": [], "mlp_dim": 16},
        "decoder": {"mlp_dim": 16, "num_hidden_layers": 1, "attention_downsample_rate": 1, "num_attention_heads": 8}
        | {"num_multimask_outputs": 3, "iou_head_hidden_dim": 32, "mask_input_channels": 16},
    },
    {  # a window of the grid's own size; all blocks alike
        "text": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2},
        "clip": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
        | {"image_size": 64, "patch_size": 16},
        "sam": {"hidden_size": 64, "output_channels": 128, "num_hidden_layers": 3, "num_attention_heads": 8}
        | {"image_size": 224, "patch_size": 16, "window_size": 14, "global_attn_indexes": [1], "mlp_dim": 128},
        "decoder": {"mlp_dim": 48, "num_hidden_layers": 2, "attention_downsample_rate": 2, "num_attention_heads": 8}
        | {"num_multimask_outputs": 3, "iou_head_hidden_dim": 64, "mask_input_channels": 4},
    },
]


@pytest.mark.parametrize("sizes", OTHER_SIZES, ids=("ragged", "smallest", "window is grid"))
def test_lisa_of_other_sizes(tmp_path, output, sizes):
    model = lisa_of_other_sizes(**{part: dict(fields) for part, fields in sizes.items()})
    original = tmp_path / "original"
    write_lisa_of_other_sizes(original, model)
    convert("lisa", "--checkpoint", original, "--vision_tower", original / "clip", "--output", output)
    converted, processor = AutoModel.from_pretrained(output), AutoProcessor.from_pretrained(output)
    state_dict = model.state_dict()
    assert all(torch.equal(tensor, state_dict[name]) for name, tensor in converted.state_dict().items())
    turns = ["<image>\nWhat is it?", "It is [SEG] and [SEG]."]
    inputs = processor.encode_conversations([golden_image(0)], [as_messages(turns)])
    assert inputs["mask_pixel_values"].shape[-1] == sizes["sam"]["image_size"]
    masks = torch.ones(2, 93, 131)
    with torch.no_grad():
        expected, found = (m(**inputs, mask_labels=[masks], output_logits=True) for m in (model, converted))
    for name in ("loss", "logits", "low_res_masks", "iou_scores", "seg_embeddings"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert found.low_res_masks.std() > 1e-3 and found.loss.isfinite()


def test_a_processor_that_does_not_fit_is_not_written(tmp_path, fail, monkeypatch):
    """The self-check: pixels of training are those of the VLM's own processor."""
    write_lisa_of_other_sizes(tmp_path, lisa_of_other_sizes(**OTHER_SIZES[1]))
    monkeypatch.setattr(LisaProcessor, "normalize_pixels", lambda self, batch: None)
    message = fail("lisa", "--checkpoint", tmp_path, "--vision_tower", tmp_path / "clip")
    assert "Self-check: expected LlavaForConditionalGeneration" in message and "`pixel_values`" in message


# Builds modules with the names of a state dict, and lets DeepSpeed itself save them in the middle of a training.
DEEPSPEED = """
import re
import sys

import deepspeed
import torch

state_dict, output, stage = torch.load(sys.argv[1]), sys.argv[2], int(sys.argv[3])
model = torch.nn.Module()
for name, tensor in state_dict.items():
    *path, leaf = name.split(".")
    module = model
    for part in path:
        if part not in module._modules:
            module.add_module(part, torch.nn.Module())
        module = module._modules[part]
    trained = bool(re.search("lora_|lm_head|embed_tokens|mask_decoder|text_hidden", name))
    if "inv_freq" in name:
        module.register_buffer(leaf, tensor)
    else:
        module.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=trained))
deepspeed.init_distributed("gloo")
optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
config["zero_allow_untested_optimizer"] = True
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
engine.save_checkpoint(output)
"""


def write_run(directory: Path, kind: str) -> Path:
    """The checkpoint of a training run of the original, in one of the forms that DeepSpeed leaves it in."""
    state_dict = training_state_dict()
    if kind == "shards":  # later zero_to_fp32.py: a directory of the name that LISA's README gives to the file
        write_shards(state_dict, directory / "pytorch_model.bin", num_shards=3)
        return directory / "pytorch_model.bin"
    if kind.startswith("deepspeed"):
        (directory / "save.py").write_text(DEEPSPEED)
        torch.save(state_dict, directory / "state.pt")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        arguments = [directory / "save.py", directory / "state.pt", directory / "ckpt_model", kind[-1]]
        subprocess.run([*launch, *arguments], check=True, timeout=300, capture_output=True)
    else:
        write_zero_checkpoint(directory / "ckpt_model", state_dict)
    return directory / ("ckpt_model/global_step10" if kind == "step" else "ckpt_model")


@pytest.mark.parametrize(
    "kind", ["shards", "zero", "step", *(pytest.param(f"deepspeed{n}", marks=pytest.mark.slow) for n in (2, 3))]
)
def test_lisa_train(tmp_path, output, kind):
    write_training_base(tmp_path / "llava")
    options = ("--base", tmp_path / "llava", "--vision_tower", CLIP, "--output", output)
    convert("lisa-train", "--checkpoint", write_run(tmp_path, kind), *options)
    assert_merged(output)


def test_lisa_train_without_its_base_or_a_lora_factor(tmp_path, fail):
    state_dict = training_state_dict()
    arguments = ("lisa-train", "--checkpoint", tmp_path / "pytorch_model.bin", "--vision_tower", CLIP)
    torch.save(state_dict, tmp_path / "pytorch_model.bin")
    assert "as --base" in fail(*arguments)
    write_training_base(tmp_path)
    del state_dict["base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"]
    torch.save(state_dict, tmp_path / "pytorch_model.bin")
    assert "model.layers.0.self_attn.q_proj" in fail(*arguments)


def test_missing_and_truncated_zero_files_are_named(tmp_path, fail):
    weights = {name: tensor for name, tensor in training_state_dict().items() if "text_hidden" in name}
    write_zero_checkpoint(tmp_path, weights, num_processes=3)
    arguments, step = ("lisa-train", "--checkpoint", tmp_path), tmp_path / "global_step10"
    assert open_zero_checkpoint(tmp_path).keys() == weights.keys()
    for name in ("bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"):
        (step / name).rename(tmp_path / "aside")
        assert f"{name} missing" in fail(*arguments)
        (tmp_path / "aside").rename(step / name)
    shard = step / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shard.write_bytes(shard.read_bytes()[:1000])
    assert re.search(f"{shard} cannot be read.*truncated", fail(*arguments))
