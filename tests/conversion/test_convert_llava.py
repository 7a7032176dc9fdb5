"""LLaVA through `recipes/convert_weights.py`: its logits are the original's; its halves and SAM's make a new LISA."""

import json
from pathlib import Path

import torch
from fixtures.golden_model import as_messages, convert, golden_image, original_config, write_shards
from fixtures.original_checkpoints import (
    CLIP,
    language_model,
    linear_projector,
    mlp_projector,
    write_clip,
    write_llava,
)
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from lisa_hf.chat_templates import load_chat_template
from lisa_hf.training.arguments import ModelArguments
from lisa_hf.training.build import build_config_and_processor, build_model


VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."


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


def test_llava_delta(tmp_path, output):
    base, target = language_model(640), language_model(643) | linear_projector()
    delta = {name: tensor.clone() for name, tensor in target.items()}
    for name, tensor in base.items():
        delta[name][: len(tensor)] -= tensor
    write_shards(base, tmp_path / "llama")
    tokens = {"<im_patch>": 640, "<im_start>": 641, "<im_end>": 642}
    write_llava(tmp_path / "delta", delta, tokens, mm_use_im_start_end=True, mm_vision_tower=str(CLIP))
    convert("llava-delta", "--checkpoint", tmp_path / "delta", "--base", tmp_path / "llama", "--output", output)
    processor = assert_same_logits(output, target, CLIPVisionModel.from_pretrained(CLIP))
    assert "<im_start><image><im_end>" in processor.chat_template  # llava_v1
    assert processor.tokenizer.convert_tokens_to_ids(list(tokens)) == list(tokens.values())
    assert processor.tokenizer.tokenize("<s>A")[1] == "▁A"  # as the legacy tokenizer, also when it is loaded again


def test_llava_delta_with_another_base(tmp_path, fail):
    delta, base = language_model(643) | linear_projector(), language_model(650)
    del base["model.norm.weight"]
    delta["model.norm.weight"] = torch.zeros(64)  # small differences make it a delta
    base["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2, 2)
    write_llava(tmp_path / "delta", delta, {}, mm_vision_tower=str(CLIP))
    (tmp_path / "llama").mkdir()
    save_file(base, tmp_path / "llama" / "model.safetensors")
    arguments = ("llava-delta", "--checkpoint", tmp_path / "delta", "--base", tmp_path / "llama")
    message = fail(*arguments)
    for problem in (
        "model.norm.weight: only in the delta",
        "model.layers.2.mlp.up_proj.weight: only in the base",
        "lm_head.weight: (643, 64) in the delta, (650, 64) in the base",
    ):
        assert problem in message


def test_llava_1_5(tmp_path, output):
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
    original = ("llava", "--checkpoint", tmp_path / "llava-v1.5-7b", "--vision_tower", tmp_path / "clip")
    convert(*original, "--output", output)
    processor = assert_same_logits(output, state_dict, tower)
    assert processor.chat_template == load_chat_template("llava_1_5")
    # LLaVA v1.5 pads to a square in the mean color: the upper edge of a wide image is 0 after normalization.
    pixels = processor.image_processor(golden_image(0), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 42, 42) and pixels[0, :, 0].abs().max() < 0.02

    convert(*original, "--output", tmp_path / "half", "--dtype", "float16")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "half")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert torch.equal(model.lm_head.weight[:640], state_dict["lm_head.weight"].half())


def test_llava_on_llama_2(tmp_path, output):
    directory = tmp_path / "llava-llama-2-13b-chat-lightning-preview"
    state_dict = language_model(641) | linear_projector()
    # Llama 2's tokenizer has its own <pad>, and does not put a space after special tokens.
    write_llava(directory, state_dict, {"<pad>": 640}, mm_vision_tower=str(CLIP), mm_use_im_start_end=False)
    tokenizer_config = json.loads((directory / "tokenizer_config.json").read_text()) | {"legacy": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    convert("llava", "--checkpoint", directory, "--output", output)
    processor = assert_same_logits(output, state_dict, CLIPVisionModel.from_pretrained(CLIP))
    assert "[INST]" in processor.chat_template and "<im_start>" not in processor.chat_template
    assert processor.tokenizer.pad_token_id == 640
    assert processor.tokenizer.tokenize("<s>A")[1] == "A"

    convert("llava", "--checkpoint", directory, "--output", tmp_path / "v1", "--chat-template", "llava_v1")
    assert "ASSISTANT:" in AutoProcessor.from_pretrained(tmp_path / "v1").chat_template


def test_a_new_lisa_from_converted_halves(tmp_path, sam_file):
    state_dict = language_model(640) | linear_projector()
    write_llava(tmp_path / "llava", state_dict, {}, mm_vision_tower=str(CLIP), mm_use_im_start_end=False)
    convert("llava", "--checkpoint", tmp_path / "llava", "--output", tmp_path / "vlm")
    convert("sam", "--checkpoint", sam_file, "--output", tmp_path / "mask_model")
    halves = ModelArguments(vlm=str(tmp_path / "vlm"), mask_model=str(tmp_path / "mask_model"))
    config, processor = build_config_and_processor(halves)
    model = build_model(halves, config)
    turns = ["<image>\nWhat is it?", "It is [SEG]."]
    inputs = processor.encode_conversations([golden_image(0)], [as_messages(turns)])
    outputs = model(**inputs, mask_labels=[torch.ones(1, 93, 131)])
    assert outputs.loss.isfinite() and outputs.pred_masks[0].shape == (1, 93, 131)
