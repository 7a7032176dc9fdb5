"""`recipes/convert_weights.py` on synthetic originals with the published checkpoints' names, tiny shapes and files."""

import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_model import (
    COMMAND,
    GOLDEN,
    as_messages,
    as_turns,
    converted_directory,
    golden_image,
    load_json,
    original_config,
    original_directory,
    original_state_dict,
    training_state_dict,
    write_shards,
)
from original_checkpoints import (
    CLIP,
    hq_decoder,
    language_model,
    linear_projector,
    lisa_of_other_sizes,
    mlp_projector,
    sam_vit_b,
    write_7b,
    write_clip,
    write_lisa_of_other_sizes,
    write_llava,
    write_training_base,
    write_zero_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMaskGeneration,
    AutoProcessor,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SamHQProcessor,
    SamProcessor,
)

from lisa_hf.arguments import ModelArguments
from lisa_hf.conversion import saving
from lisa_hf.loading import load_model_and_processor


VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture
def convert(monkeypatch):
    """Runs the command in this process: `convert("sam", "--checkpoint", ...)`."""
    spec = importlib.util.spec_from_file_location("convert_weights", COMMAND)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    handler, level = signal.getsignal(signal.SIGTERM), logging.getLogger("lisa_hf").level

    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", [str(COMMAND), *map(str, arguments)])
        module.main()

    yield run
    signal.signal(signal.SIGTERM, handler)
    logging.getLogger("lisa_hf").setLevel(level)


@pytest.fixture
def fail(convert, capsys):
    """Runs the command where it must fail: returns its one line, after a check that nothing was left behind."""

    def run(output: Path, *arguments) -> str:
        with pytest.raises(SystemExit) as exit_info:
            convert(*arguments, "--output", output)
        assert exit_info.value.code == 2
        assert not list(output.parent.glob(f"{output.name}*"))
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


# Loads a converted LISA where this package is not installed, and computes the losses of a recorded batch.
FRESH_PROCESS = """
import json
import sys

from PIL import Image
from safetensors.torch import load_file


class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lisa_hf":
            raise ModuleNotFoundError(f"{name} is not here", name=name)


sys.meta_path.insert(0, NoPackage())
from transformers import AutoModel, AutoProcessor

batch = json.load(sys.stdin)
model = AutoModel.from_pretrained(batch["model"], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(batch["model"], trust_remote_code=True)
images = [Image.open(path) for path in batch["images"]]
inputs = processor.encode_conversations(images, batch["conversations"], image_indices=batch["image_indices"])
tensors = load_file(batch["tensors"])
outputs = model(**inputs, mask_labels=[tensors[f"gt_masks_{image}"] for image in range(len(images))])
names = ("loss", "ce_loss", "mask_bce_loss", "mask_dice_loss")
json.dump({name: outputs[name].item() for name in names}, sys.stdout)
"""


# ---- LLaVA ----------------------------------------------------------------------------------------------------------


def reference_logits(state_dict: dict, tower: CLIPVisionModel, pixel_values, ids: list[int], image_token_id: int):
    """What the original computes: Llama, in its own names, on the text's embeddings and CLIP's projected features."""
    sizes = {name: original_config()[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = LlamaConfig(**sizes, num_hidden_layers=2, rms_norm_eps=1e-5, vocab_size=len(state_dict["lm_head.weight"]))
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict({name: value for name, value in state_dict.items() if name in llama.state_dict()})
    features = tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
    if "model.mm_projector.weight" in state_dict:
        projector = torch.nn.Linear(32, 64)
    else:
        projector = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    prefix = "model.mm_projector."
    projector.load_state_dict({k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)})
    start, count = ids.index(image_token_id), ids.count(image_token_id)
    assert count == features.shape[1]
    embed = llama.get_input_embeddings()
    before, after = torch.tensor([ids[:start]]), torch.tensor([ids[start + count :]])
    return llama(inputs_embeds=torch.cat([embed(before), projector(features), embed(after)], dim=1)).logits


@torch.no_grad()
def assert_same_logits(output: Path, state_dict: dict, tower: CLIPVisionModel) -> AutoProcessor:
    """Loads a converted LLaVA and compares its logits, on its own chat prompt, with the original's."""
    model, info = AutoModelForImageTextToText.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    processor = AutoProcessor.from_pretrained(output)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=golden_image(0), text=prompt, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    expected = reference_logits(state_dict, tower, inputs["pixel_values"], ids, model.config.image_token_id)
    vocab_size = expected.shape[-1]
    torch.testing.assert_close(model(**inputs).logits[..., :vocab_size], expected, rtol=1e-4, atol=1e-5)
    assert model.generation_config.suppress_tokens == list(range(vocab_size, model.config.text_config.vocab_size))
    return processor


def test_llava_delta(tmp_path, convert):
    base, target = language_model(640), language_model(643) | linear_projector()
    delta = {name: tensor.clone() for name, tensor in target.items()}
    for name, tensor in base.items():
        delta[name][: len(tensor)] -= tensor
    write_shards(base, tmp_path / "llama")
    tokens = {"<im_patch>": 640, "<im_start>": 641, "<im_end>": 642}
    write_llava(tmp_path / "delta", delta, tokens, mm_use_im_start_end=True, mm_vision_tower=str(CLIP))
    output = tmp_path / "converted"
    convert("llava-delta", "--checkpoint", tmp_path / "delta", "--base", tmp_path / "llama", "--output", output)
    processor = assert_same_logits(output, target, CLIPVisionModel.from_pretrained(CLIP))
    assert "<im_start><image><im_end>" in processor.chat_template  # llava_v1
    assert processor.tokenizer.convert_tokens_to_ids(list(tokens)) == list(tokens.values())
    assert processor.tokenizer.tokenize("<s>A")[1] == "▁A"  # as the legacy tokenizer, also when it is loaded again


def test_llava_delta_with_another_base(tmp_path, fail):
    delta, base = language_model(643) | linear_projector(), language_model(650)
    del base["model.norm.weight"]
    base["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2, 2)
    write_llava(tmp_path / "delta", delta, {}, mm_vision_tower=str(CLIP))
    (tmp_path / "llama").mkdir()
    save_file(base, tmp_path / "llama" / "model.safetensors")
    arguments = ("llava-delta", "--checkpoint", tmp_path / "delta", "--base", tmp_path / "llama")
    message = fail(tmp_path / "converted", *arguments)
    for problem in (
        "model.norm.weight: only in the delta",
        "model.layers.2.mlp.up_proj.weight: only in the base",
        "lm_head.weight: (643, 64) in the delta, (650, 64) in the base",
    ):
        assert problem in message


def test_llava_1_5(tmp_path, convert):
    tower = write_clip(tmp_path / "clip", 42)
    # Its trainer saves the tower too, with the buffer that CLIP had in 2023, and in half precision.
    state_dict = language_model(640) | mlp_projector()
    state_dict |= {VISION_PREFIX + name: tensor for name, tensor in tower.state_dict().items()}
    state_dict[VISION_PREFIX + "embeddings.position_ids"] = torch.arange(10)[None]
    write_llava(
        *(tmp_path / "llava-v1.5-7b", state_dict, {}),
        mm_projector_type="mlp2x_gelu",
        mm_vision_tower="openai/clip-vit-large-patch14-336",
        image_aspect_ratio="pad",
        mm_use_im_start_end=False,
    )
    output = tmp_path / "converted"
    original = ("llava", "--checkpoint", tmp_path / "llava-v1.5-7b", "--vision-tower", tmp_path / "clip")
    convert(*original, "--output", output)
    processor = assert_same_logits(output, state_dict, tower)
    assert processor.chat_template == (COMMAND.parents[1] / "lisa_hf/chat_templates/llava_1_5.jinja").read_text()
    # LLaVA v1.5 pads to a square in the mean colour: the upper edge of a wide image is 0 after normalisation.
    pixels = processor.image_processor(golden_image(0), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 42, 42) and pixels[0, :, 0].abs().max() < 0.02

    convert(*original, "--output", tmp_path / "half", "--dtype", "float16")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "half")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert torch.equal(model.lm_head.weight[:640], state_dict["lm_head.weight"].half())


def test_llava_on_llama_2(tmp_path, convert):
    directory = tmp_path / "llava-llama-2-13b-chat-lightning-preview"
    state_dict = language_model(641) | linear_projector()
    # Llama 2's tokenizer came with a <pad> of its own, and does not put a space behind special tokens.
    write_llava(directory, state_dict, {"<pad>": 640}, mm_vision_tower=str(CLIP), mm_use_im_start_end=False)
    tokenizer_config = json.loads((directory / "tokenizer_config.json").read_text()) | {"legacy": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    convert("llava", "--checkpoint", directory, "--output", tmp_path / "converted")
    processor = assert_same_logits(tmp_path / "converted", state_dict, CLIPVisionModel.from_pretrained(CLIP))
    assert "[INST]" in processor.chat_template and "<im_start>" not in processor.chat_template
    assert processor.tokenizer.pad_token_id == 640
    assert processor.tokenizer.tokenize("<s>A")[1] == "A"

    convert("llava", "--checkpoint", directory, "--output", tmp_path / "v1", "--chat-template", "llava_v1")
    assert "ASSISTANT:" in AutoProcessor.from_pretrained(tmp_path / "v1").chat_template


# ---- SAM ------------------------------------------------------------------------------------------------------------


def test_sam_vit_b(tmp_path, convert, caplog):
    state_dict = sam_vit_b()
    torch.save(state_dict, tmp_path / "sam_vit_b_01ec64.pth")
    convert("sam", "--checkpoint", tmp_path / "sam_vit_b_01ec64.pth", "--output", tmp_path / "sam")
    assert "image_encoder.neck.2.weight -> vision_encoder.neck.conv2.weight" in caplog.messages
    model, info = AutoModelForMaskGeneration.from_pretrained(tmp_path / "sam", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    config = model.config.vision_config
    assert config.global_attn_indexes == [2, 5, 8, 11] and config.window_size == 14 and config.image_size == 256
    qkv = state_dict["image_encoder.blocks.7.attn.qkv.weight"]
    assert torch.equal(model.vision_encoder.layers[7].attn.qkv.weight, qkv)
    positions = state_dict["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    assert torch.equal(model.shared_image_embedding.positional_embedding, positions)
    assert torch.equal(model.prompt_encoder.shared_embedding.positional_embedding, positions)

    processor = AutoProcessor.from_pretrained(tmp_path / "sam")
    assert isinstance(processor, SamProcessor)
    inputs = processor(golden_image(0), input_points=[[[20, 30]]], return_tensors="pt")
    with torch.no_grad():
        masks = model(**inputs).pred_masks
    (masks,) = processor.post_process_masks(masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    assert masks.shape == (1, 3, 93, 131)


def test_sam_hq(tmp_path, convert):
    state_dict = sam_vit_b() | hq_decoder()
    torch.save(state_dict, tmp_path / "sam_hq_vit_b.pth")
    convert("sam", "--checkpoint", tmp_path / "sam_hq_vit_b.pth", "--output", tmp_path / "sam")
    model, info = AutoModelForMaskGeneration.from_pretrained(tmp_path / "sam", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    decoder = model.mask_decoder
    for name, module in {
        "hf_token": decoder.hq_token,
        "hf_mlp.layers.2": decoder.hq_mask_mlp.proj_out,
        "compress_vit_feat.0": decoder.compress_vit_conv1,
        "embedding_encoder.3": decoder.encoder_conv2,
        "embedding_maskfeature.1": decoder.mask_norm,
    }.items():
        assert torch.equal(module.weight, state_dict[f"mask_decoder.{name}.weight"]), name
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "sam"), SamHQProcessor)


def test_a_new_lisa_from_converted_halves(tmp_path, convert):
    state_dict = language_model(640) | linear_projector()
    write_llava(tmp_path / "llava", state_dict, {}, mm_vision_tower=str(CLIP), mm_use_im_start_end=False)
    torch.save(sam_vit_b(), tmp_path / "sam.pth")
    convert("llava", "--checkpoint", tmp_path / "llava", "--output", tmp_path / "vlm")
    convert("sam", "--checkpoint", tmp_path / "sam.pth", "--output", tmp_path / "mask_model")
    halves = ModelArguments(vlm=str(tmp_path / "vlm"), mask_model=str(tmp_path / "mask_model"))
    model, processor = load_model_and_processor(halves)
    turns = ["<image>\nWhat is it?", "It is [SEG]."]
    inputs = processor.encode_conversations([golden_image(0)], [as_messages(turns)])
    outputs = model(**inputs, mask_labels=[torch.ones(1, 93, 131)])
    assert outputs.loss.isfinite() and outputs.pred_masks[0].shape == (1, 93, 131)


# ---- LISA -----------------------------------------------------------------------------------------------------------


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


def test_lisa_without_this_package(tmp_path):
    meta = load_json("batch_train_3_2")
    images = [tmp_path / f"{position}.png" for position in range(2)]
    for path, index in zip(images, meta["image_index"]):
        golden_image(index).save(path)
    batch = {
        "model": str(converted_directory()),
        "images": list(map(str, images)),
        "conversations": [as_messages(as_turns(text)) for text in meta["conversation_list"]],
        "image_indices": [0] * meta["offset"][1] + [1] * (meta["offset"][2] - meta["offset"][1]),
        "tensors": str(GOLDEN / "batch_train_3_2.safetensors"),
    }
    process = subprocess.run(
        [sys.executable, "-I", "-c", FRESH_PROCESS],
        input=json.dumps(batch),
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    losses = json.loads(process.stdout)
    assert losses == pytest.approx({name: meta["losses"][name] for name in losses}, rel=1e-4)


# Widths, depths, heads, windows and images that are nobody's: what is not read off the checkpoint shows.
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
def test_lisa_of_other_sizes(tmp_path, convert, sizes):
    model = lisa_of_other_sizes(**{part: dict(fields) for part, fields in sizes.items()})
    write_lisa_of_other_sizes(tmp_path / "original", model)
    vision_tower = tmp_path / "original" / "clip"
    output = tmp_path / "converted"
    convert("lisa", "--checkpoint", tmp_path / "original", "--vision-tower", vision_tower, "--output", output)
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


def test_lisa_train_sharded_directory(tmp_path, convert):
    # Later releases of zero_to_fp32.py make a directory of the name that LISA's README gives to the file.
    write_training_base(tmp_path / "llava")
    write_shards(training_state_dict(), tmp_path / "pytorch_model.bin", num_shards=3)
    options = ("--base", tmp_path / "llava", "--vision-tower", CLIP, "--output", tmp_path / "converted")
    convert("lisa-train", "--checkpoint", tmp_path / "pytorch_model.bin", *options)
    assert_merged(tmp_path / "converted")


@pytest.mark.parametrize("checkpoint", ["ckpt_model", "ckpt_model/global_step10"])
def test_lisa_train_zero_checkpoint(tmp_path, convert, checkpoint):
    write_training_base(tmp_path / "llava")
    write_zero_checkpoint(tmp_path / "ckpt_model", training_state_dict())
    options = ("--base", tmp_path / "llava", "--vision-tower", CLIP, "--output", tmp_path / "converted")
    convert("lisa-train", "--checkpoint", tmp_path / checkpoint, *options)
    assert_merged(tmp_path / "converted")


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


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_lisa_train_checkpoint_of_deepspeed(tmp_path, convert, stage):
    (tmp_path / "save.py").write_text(DEEPSPEED)
    torch.save(training_state_dict(), tmp_path / "state.pt")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [tmp_path / "save.py", tmp_path / "state.pt", tmp_path / "ckpt_model", str(stage)]
    subprocess.run([*launch, *arguments], check=True, timeout=300, capture_output=True)
    write_training_base(tmp_path / "llava")
    options = ("--base", tmp_path / "llava", "--vision-tower", CLIP, "--output", tmp_path / "converted")
    convert("lisa-train", "--checkpoint", tmp_path / "ckpt_model", *options)
    assert_merged(tmp_path / "converted")


def test_lisa_train_truncated_shard_is_named(tmp_path, fail):
    write_zero_checkpoint(tmp_path / "ckpt_model", training_state_dict())
    shard = tmp_path / "ckpt_model/global_step10/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shard.write_bytes(shard.read_bytes()[:1000])
    message = fail(tmp_path / "converted", "lisa-train", "--checkpoint", tmp_path / "ckpt_model")
    assert str(shard) in message and "truncated" in message


def test_lisa_train_without_its_base(tmp_path, fail):
    torch.save(training_state_dict(), tmp_path / "pytorch_model.bin")
    arguments = ("lisa-train", "--checkpoint", tmp_path / "pytorch_model.bin", "--vision-tower", CLIP)
    assert "as --base" in fail(tmp_path / "converted", *arguments)


def test_lora_factor_without_its_partner(tmp_path, fail):
    state_dict = training_state_dict()
    module = "model.layers.0.self_attn.q_proj"
    del state_dict[f"base_model.model.{module}.lora_B.default.weight"]
    torch.save(state_dict, tmp_path / "pytorch_model.bin")
    write_training_base(tmp_path)
    arguments = ("lisa-train", "--checkpoint", tmp_path / "pytorch_model.bin", "--vision-tower", CLIP)
    assert module in fail(tmp_path / "converted", *arguments)


@pytest.mark.parametrize("argument", ["model", "vlm"])
def test_originals_are_refused_with_the_command_that_converts_them(tmp_path, argument):
    write_llava(tmp_path / "llava", {}, {}, mm_vision_tower=str(CLIP))
    write_llava(tmp_path / "llava-delta", {}, {}, mm_vision_tower=str(CLIP))
    write_zero_checkpoint(tmp_path / "ckpt_model", training_state_dict())
    expected = {
        original_directory(): "lisa --checkpoint {} --output",
        tmp_path / "llava": "llava --checkpoint {} --output",
        tmp_path / "llava-delta": "llava-delta --checkpoint {} --base LLAMA --output",
        tmp_path / "ckpt_model": "lisa-train --checkpoint {} --base LLAVA --output",
    }
    for path, command in expected.items():
        arguments = {"model": {"model": str(path)}, "vlm": {"vlm": str(path), "mask_model": "sam"}}[argument]
        with pytest.raises(ValueError) as refused:
            load_model_and_processor(ModelArguments(**arguments))
        assert f"`python recipes/convert_weights.py {command.format(path)} OUTPUT`" in str(refused.value)


def test_an_original_mask_model_is_refused_with_its_command(tmp_path):
    torch.save(sam_vit_b(), tmp_path / "sam.pth")
    arguments = ModelArguments(vlm=str(converted_directory()), mask_model=str(tmp_path / "sam.pth"))
    with pytest.raises(ValueError, match=r"recipes/convert_weights.py sam --checkpoint .*sam\.pth --output"):
        load_model_and_processor(arguments)


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_unknown_missing_and_misshapen_tensors_are_listed(tmp_path, fail):
    state_dict = sam_vit_b()
    cases = {
        r"image_encoder\.extra\.weight.*mask_decoder\.extra\.bias": state_dict
        | {"image_encoder.extra.weight": torch.zeros(1), "mask_decoder.extra.bias": torch.zeros(1)},
        r"2 tensors are missing: .*vision_encoder\.layers\.3\.mlp\.lin1\.bias.*mask_decoder\.iou_token\.weight": {
            name: tensor
            for name, tensor in state_dict.items()
            if name not in ("image_encoder.blocks.3.mlp.lin1.bias", "mask_decoder.iou_token.weight")
        },
        r"vision_encoder\.neck\.conv1\.weight \(32, 31, 1, 1\), expected \(32, 32, 1, 1\)": state_dict
        | {"image_encoder.neck.0.weight": torch.zeros(32, 31, 1, 1)},
        r"The checkpoint has no image_encoder\.pos_embed": {
            name: tensor for name, tensor in state_dict.items() if name != "image_encoder.pos_embed"
        },
    }
    for message, content in cases.items():
        torch.save(content, tmp_path / "sam.pth")
        found = fail(tmp_path / "converted", "sam", "--checkpoint", tmp_path / "sam.pth")
        assert re.search(message, found), found


def test_unknown_and_missing_tensors_of_lisa_are_listed(tmp_path, fail):
    directory = Path(shutil.copytree(original_directory(), tmp_path / "lisa"))
    arguments = ("lisa", "--checkpoint", directory, "--vision-tower", CLIP)
    state_dict = {name: tensor for name, tensor in original_state_dict().items() if "vision_tower" not in name}
    write_shards(state_dict | {"model.mm_projector.4.bias": torch.zeros(1), "extra": torch.zeros(1)}, directory)
    assert re.search(r"'model\.mm_projector\.4\.bias', 'extra'", fail(tmp_path / "converted", *arguments))
    gone = {"model.text_hidden_fcs.0.2.bias", "model.layers.1.mlp.up_proj.weight"}
    write_shards({name: tensor for name, tensor in state_dict.items() if name not in gone}, directory)
    message = fail(tmp_path / "converted", *arguments)
    assert "2 tensors are missing" in message
    assert "seg_projector.linear_2.bias" in message and "layers.1.mlp.up_proj.weight" in message


def test_missing_shards_and_tensors_are_named(tmp_path, fail):
    state_dict = language_model(640) | linear_projector()
    write_llava(tmp_path / "llava", state_dict, {}, mm_vision_tower=str(CLIP), mm_use_im_start_end=False)
    index = tmp_path / "llava" / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.gone.weight"] = "pytorch_model-00001-of-00002.bin"
    index.write_text(json.dumps(content))
    arguments = ("llava", "--checkpoint", tmp_path / "llava")
    assert "model.gone.weight" in fail(tmp_path / "converted", *arguments)
    shard = tmp_path / "llava" / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard} cannot be read" in fail(tmp_path / "converted", *arguments)
    shard.unlink()
    assert f"{shard} is missing" in fail(tmp_path / "converted", *arguments)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_pickles_are_not_executed(tmp_path, fail, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"image_encoder.pos_embed": Malicious()}, tmp_path / "sam.pth")
    assert "cannot be read" in fail(tmp_path / "converted", "sam", "--checkpoint", tmp_path / "sam.pth")
    assert not Path("executed").exists()
    torch.save({"model": sam_vit_b()}, tmp_path / "sam.pth")
    assert "['model']" in fail(tmp_path / "converted", "sam", "--checkpoint", tmp_path / "sam.pth")


def test_a_checkpoint_that_is_not_there(tmp_path, fail):
    message = fail(tmp_path / "converted", "lisa", "--checkpoint", "xinlai/LISA-7B-v1")
    assert "xinlai/LISA-7B-v1 does not exist" in message and "hf download" in message


def test_a_converted_model_is_not_converted_again(fail, tmp_path):
    message = fail(tmp_path / "converted", "lisa", "--checkpoint", converted_directory())
    assert "['LisaForConditionalGeneration']" in message and "needs no conversion" in message


def test_output_that_exists_is_kept(tmp_path, convert, capsys):
    (tmp_path / "sam").mkdir()
    (tmp_path / "sam" / "mine").touch()
    torch.save(sam_vit_b(), tmp_path / "sam.pth")
    with pytest.raises(SystemExit):
        convert("sam", "--checkpoint", tmp_path / "sam.pth", "--output", tmp_path / "sam")
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "sam").iterdir()] == ["mine"]


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_it_leaves_nothing(tmp_path, convert, monkeypatch, signal_number):
    def save_half(tensors, path, metadata):
        path.write_bytes(b"half")
        signal.raise_signal(signal_number)

    monkeypatch.setattr(saving, "save_file", save_half)
    torch.save(sam_vit_b(), tmp_path / "sam.pth")
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        convert("sam", "--checkpoint", tmp_path / "sam.pth", "--output", tmp_path / "sam")
    assert [path.name for path in tmp_path.iterdir()] == ["sam.pth"]


def test_what_a_killed_run_left_is_replaced(tmp_path, convert):
    (tmp_path / "sam.incomplete").mkdir()
    (tmp_path / "sam.incomplete" / "model.safetensors").write_bytes(b"half")
    torch.save(sam_vit_b(), tmp_path / "sam.pth")
    convert("sam", "--checkpoint", tmp_path / "sam.pth", "--output", tmp_path / "sam")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sam", "sam.pth"]


def test_a_disk_that_forgets_is_noticed(tmp_path, fail, monkeypatch):
    def save_zeros(tensors, path, metadata):
        save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, path, metadata)

    monkeypatch.setattr(saving, "save_file", save_zeros)
    torch.save(sam_vit_b(), tmp_path / "sam.pth")
    message = fail(tmp_path / "converted", "sam", "--checkpoint", tmp_path / "sam.pth")
    assert "does not hold what was written" in message and "vision_encoder.pos_embed" in message


def test_shards_and_index(tmp_path, convert, monkeypatch):
    monkeypatch.setattr(saving, "MAX_SHARD_SIZE", "300KB")
    output = tmp_path / "converted"
    convert("lisa", "--checkpoint", original_directory(), "--vision-tower", CLIP, "--output", output)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    names = set()
    for shard in set(index["weight_map"].values()):
        with safe_open(output / shard, "pt") as tensors:
            names |= set(tensors.keys())
    assert names == set(index["weight_map"]) and len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] > 1e6
    model, info = AutoModel.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    rows = model.get_input_embeddings().weight
    vocab_size = load_json("model_config")["vocab_final"]
    assert torch.equal(rows[:vocab_size], original_state_dict()["model.embed_tokens.weight"])
    assert not rows[vocab_size:].any()


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_depend_on_the_number_of_layers(tmp_path):
    """Measured: 4.2 GB with four layers (2 GB of weights) and with eight (3.6 GB)."""
    peaks = {}
    for num_layers in (4, 8):
        directory, output = tmp_path / f"layers-{num_layers}", tmp_path / f"converted-{num_layers}"
        write_7b(directory, num_layers)
        process = os.posix_spawn(
            sys.executable,
            [sys.executable, str(COMMAND), "llava", "--checkpoint", str(directory), "--output", str(output)],
            os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        _, status, usage = os.wait4(process, 0)
        assert status == 0
        peaks[num_layers] = usage.ru_maxrss / 2**20  # GB: Linux counts in kB
    assert peaks[8] < 1.1 * peaks[4] and peaks[8] < 6, peaks
