"""Synthetic originals: the published checkpoints' names and files with tiny shapes, to be converted."""

import json
import re
from pathlib import Path

import torch
from golden_model import GOLDEN, original_config, original_state_dict, write_shards, write_tokenizer
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    SamConfig,
)

from lisa_hf import LisaConfig, LisaForConditionalGeneration
from lisa_hf.conversion import convert_key
from lisa_hf.conversion.lisa import LISA_KEY_TABLE


CLIP = GOLDEN / "clip_tiny"
SAM_PREFIX = "model.visual_model."


def random_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.randn(tensor.shape) * (0.1 if tensor.ndim > 1 else 0.02) + (tensor.ndim == 1)


def language_model(vocab_size: int) -> dict:
    """A Llama's tensors, rotary frequencies included, as transformers of 2023 saved them."""
    torch.manual_seed(vocab_size)
    names = re.compile(r"model\.(layers\..*|embed_tokens\.weight|norm\.weight)|lm_head\.weight")
    state_dict = {name: tensor for name, tensor in original_state_dict().items() if names.fullmatch(name)}
    for name, tensor in state_dict.items():
        if "inv_freq" not in name:
            rows = vocab_size if name.endswith(("embed_tokens.weight", "lm_head.weight")) else len(tensor)
            state_dict[name] = random_like(tensor.new_empty(rows, *tensor.shape[1:]))
    return state_dict


def linear_projector() -> dict:
    return {"model.mm_projector.weight": torch.randn(64, 32) * 0.1, "model.mm_projector.bias": torch.randn(64) * 0.1}


def mlp_projector() -> dict:
    sizes = {"0.weight": (64, 32), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    return {f"model.mm_projector.{name}": torch.randn(size) * 0.1 for name, size in sizes.items()}


def write_llava(directory: Path, state_dict: dict, added_tokens: dict, **config) -> None:
    """The directory of a LLaVA as its trainer saved it."""
    write_shards(state_dict, directory)
    write_tokenizer(directory, added_tokens)
    text = {name: value for name, value in original_config().items() if not name.startswith(("mm_", "train_", "out_"))}
    llava = {"mm_vision_select_layer": -2, "mm_hidden_size": 32, "mm_use_im_patch_token": False, "use_mm_proj": True}
    (directory / "config.json").write_text(json.dumps(text | llava | config))


def write_clip(directory: Path, image_size: int) -> CLIPVisionModel:
    """A CLIP tower whose patches are 14 wide, as in ViT-L/14 at 336."""
    config = CLIPVisionConfig.from_pretrained(CLIP, image_size=image_size)
    torch.manual_seed(image_size)
    tower = CLIPVisionModel(config).eval()
    tower.save_pretrained(directory)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size).save_pretrained(directory)
    return tower


def sam_vit_b() -> dict:
    """SAM with the twelve blocks of ViT-B, four of which see the whole image; tiny, with 16 x 16 patches."""
    torch.manual_seed(0)
    golden = {k.removeprefix(SAM_PREFIX): v for k, v in original_state_dict().items() if k.startswith(SAM_PREFIX)}
    state_dict = {}
    for name, tensor in golden.items():
        if match := re.fullmatch(r"image_encoder\.blocks\.([01])\.(.*)", name):
            is_global = match[1] == "1"
            blocks = [block for block in range(12) if (block in (2, 5, 8, 11)) == is_global]
            state_dict |= {f"image_encoder.blocks.{block}.{match[2]}": random_like(tensor) for block in blocks}
        else:
            state_dict[name] = random_like(tensor)
    return state_dict


def lisa_of_other_sizes(text: dict, clip: dict, sam: dict, decoder: dict) -> LisaForConditionalGeneration:
    """A LISA with random weights; the arguments are fields of the configurations of its parts."""
    torch.manual_seed(0)
    width = sam["output_channels"]
    vision = {"scale": 1.0, "num_pos_feats": width // 2, "initializer_range": 0.1, **sam}
    prompt = {"hidden_size": width, "image_size": sam["image_size"], "patch_size": sam["patch_size"]}
    config = LisaConfig(
        vlm_config=LlavaConfig(
            text_config=LlamaConfig(**text, vocab_size=645, rms_norm_eps=1e-5, initializer_range=0.1),
            vision_config=CLIPVisionConfig(**clip, initializer_range=0.1),
            image_token_index=643,
            image_seq_length=(clip["image_size"] // clip["patch_size"]) ** 2,
            projector_hidden_act="linear",
            tie_word_embeddings=False,
        ),
        mask_config=SamConfig(
            vision_config=vision,
            prompt_encoder_config={**prompt, "mask_input_channels": decoder.pop("mask_input_channels")},
            mask_decoder_config={"hidden_size": width, "layer_norm_eps": 1e-5, **decoder},
            initializer_range=0.1,
        ),
        seg_token_id=640,
        suppress_tokens=[643, 644],
    )
    model = LisaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                weight.normal_(std=0.3)  # zeros would hide a window of another size
        projector = model.vlm.model.multi_modal_projector.linear_2  # the original has one layer
        projector.weight.copy_(torch.eye(len(projector.weight)))
        projector.bias.zero_()
        for rows in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            rows[643:] = 0
    return model


def original_names(model: LisaForConditionalGeneration) -> list[str]:
    """The names that the original has for the tensors of a LISA of these sizes."""
    config = model.config
    depths = {
        r"model\.layers": config.vlm_config.text_config.num_hidden_layers,
        r".*vision_model\.encoder\.layers": config.vlm_config.vision_config.num_hidden_layers,
        r".*image_encoder\.blocks": config.mask_config.vision_config.num_hidden_layers,
        r".*mask_decoder\.transformer\.layers": config.mask_config.mask_decoder_config.num_hidden_layers,
        r".*output_hypernetworks_mlps": config.mask_config.mask_decoder_config.num_multimask_outputs + 1,
    }
    names = []
    for name in original_state_dict():
        for pattern, depth in depths.items():
            if match := re.fullmatch(rf"({pattern})\.(\d+)\.(.*)", name):
                names += [f"{match[1]}.{layer}.{match[3]}" for layer in range(depth) if match[2] == "0"]
                break
        else:
            names.append(name)
    return names


def write_lisa_of_other_sizes(directory: Path, model: LisaForConditionalGeneration) -> None:
    """The model in the original's format, its CLIP tower beside it in `clip`, as the original leaves it out."""
    state_dict, text, vision = model.state_dict(), model.config.vlm_config.text_config, model.config.vlm_config
    original = {}
    for name in original_names(model):
        new_names = convert_key(name, LISA_KEY_TABLE)
        if new_names and "vision_tower" not in name:
            original[name] = state_dict[new_names[0]]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        original[name] = original[name][:643].clone()
    write_shards(original, directory)
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = original_config() | {field: getattr(text, field) for field in fields}
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 643}))
    write_tokenizer(directory, {"[SEG]": 640, "<im_start>": 641, "<im_end>": 642})
    size = {"height": vision.vision_config.image_size, "width": vision.vision_config.image_size}
    model.vlm.model.vision_tower.save_pretrained(directory / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": size["height"]}, crop_size=size).save_pretrained(directory / "clip")


def write_training_base(directory: Path) -> None:
    """The LLaVA that the run began with: configuration and tokenizer know nothing of LISA."""
    config = original_config()
    for name in ("train_mask_decoder", "out_dim", "vision_tower", "mm_use_im_start_end"):
        del config[name]
    write_tokenizer(directory, {})
    (directory / "config.json").write_text(json.dumps(config | {"mm_use_im_start_end": False}))


def write_zero_checkpoint(directory: Path, state_dict: dict, num_processes: int = 2) -> None:
    """What DeepSpeed's ZeRO-2 saves: frozen weights whole, trained ones flat and cut into one part per process."""
    step = directory / "global_step10"
    step.mkdir(parents=True)
    (directory / "latest").write_text(step.name)
    trained = [name for name in state_dict if re.search(r"lora_|lm_head|embed_tokens|mask_decoder|text_hidden", name)]
    buffers = [name for name in state_dict if "inv_freq" in name]
    frozen = [name for name in state_dict if name not in {*trained, *buffers}]
    states = {
        "buffer_names": buffers,
        "module": state_dict,
        "param_shapes": [{name: state_dict[name].shape for name in trained}],
        "frozen_param_shapes": {name: state_dict[name].shape for name in frozen},
        "frozen_param_fragments": {name: state_dict[name] for name in frozen},
        "shared_params": {},
        "ds_version": "0.10.0",
    }
    torch.save(states, step / "mp_rank_00_model_states.pt")
    flat = torch.cat([state_dict[name].flatten() for name in trained])
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % (2 * num_processes))])
    for rank, part in enumerate(padded.chunk(num_processes)):
        optimizer = {
            "zero_stage": 2,
            "partition_count": num_processes,
            "single_partition_of_fp32_groups": [part.clone()],
        }
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, step / name)


def write_7b(directory: Path, num_layers: int) -> None:
    """LLaVA-7B's widths, in half precision, all layers in one file as the originals' shards of 10 GB."""
    hidden, intermediate, vocab_size = 4096, 11008, 32000

    def weight(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float16).fill_(0.5)

    widths = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    widths |= {"mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden)}
    widths |= {"mlp.down_proj": (hidden, intermediate), "input_layernorm": (hidden,)}
    widths |= {"post_attention_layernorm": (hidden,)}
    state_dict = {
        f"model.layers.{layer}.{name}.weight": weight(*shape)
        for layer in range(num_layers)
        for name, shape in widths.items()
    }
    state_dict |= {
        "model.embed_tokens.weight": weight(vocab_size, hidden),
        "lm_head.weight": weight(vocab_size, hidden),
    }
    state_dict |= {"model.norm.weight": weight(hidden), "model.mm_projector.weight": weight(hidden, 32)}
    state_dict |= {"model.mm_projector.bias": weight(hidden)}
    tokens = {f"<{index}>": index for index in range(640, vocab_size)}
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": num_layers}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32}
    write_llava(directory, {}, tokens, mm_vision_tower=str(CLIP), mm_use_im_start_end=False, **sizes, **heads)
    (directory / "pytorch_model.bin.index.json").unlink()
    torch.save(state_dict, directory / "pytorch_model.bin")
