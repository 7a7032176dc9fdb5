"""Measures a training step and generation against the original's arithmetic, in one process, alternating.

Models have random weights and batches random tokens and pixels, so that any size runs anywhere without downloads.
"""

import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_lisa import LisaConfig
from .lora import prepare_for_training
from .losses import IGNORE_INDEX, mask_losses
from .mask_backbone import decode_prompts, encode_images, select_images
from .modeling_lisa import LisaForConditionalGeneration
from .packing import pack_rows


IMAGE_TOKEN_ID, SEG_TOKEN_ID, PAD_TOKEN_ID = 3, 4, 0
FIRST_WORD = 5  # token ids from here on are words
# What torch's counter does not know: the attention kernel of CPUs.
CPU_ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *args, **kwargs: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *args, **kwargs: sdpa_backward_flop_count(gradient, query, key, value)
    ),
}


@dataclass
class Size:
    """Geometry of a LLaVA + SAM LISA: fields of the sub-configurations, and the batch of a step."""

    text: dict
    vision: dict
    mask_encoder: dict
    mask_decoder: dict
    num_images: int = 2
    image_size: tuple[int, int] = (480, 640)
    num_questions: int = 3
    system_length: int = 36  # tokens, like those that follow
    question_length: int = 16
    answer_length: int = 10

    @property
    def num_image_tokens(self) -> int:
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


def _text(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, vocab_size: int = 32000) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
    }


def _vit(hidden_size: int, num_layers: int, num_heads: int, image_size: int, patch_size: int, **kwargs) -> dict:
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "image_size": image_size,
        "patch_size": patch_size,
        **kwargs,
    }


_CLIP_L = _vit(1024, 24, 16, 224, 14, intermediate_size=4096)
_SAM_H = _vit(1280, 32, 16, 1024, 16, global_attn_indexes=[7, 15, 23, 31], mlp_dim=5120)
SIZES = {
    "tiny": Size(
        text=_text(64, 128, 2, 4, vocab_size=512),
        vision=_vit(32, 2, 2, 56, 14, intermediate_size=64),
        mask_encoder=_vit(32, 2, 2, 128, 16, global_attn_indexes=[1], mlp_dim=64, output_channels=32, window_size=4),
        mask_decoder={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
        image_size=(60, 80),
    ),
    "mid": Size(
        text=_text(512, 1376, 8, 8),
        vision=_vit(256, 6, 4, 224, 14, intermediate_size=1024),
        mask_encoder=_vit(192, 6, 3, 1024, 16, global_attn_indexes=[2, 5], mlp_dim=768),
        mask_decoder={},
    ),
    "7b": Size(text=_text(4096, 11008, 32, 32), vision=_CLIP_L, mask_encoder=_SAM_H, mask_decoder={}),
    "13b": Size(text=_text(5120, 13824, 40, 40), vision=_CLIP_L, mask_encoder=_SAM_H, mask_decoder={}),
}


def build_model(size: Size, device: str, dtype: torch.dtype) -> PeftModel:
    """A model with random weights that trains what LISA trains: LoRA of rank 8, embeddings, projector and decoder."""
    vision = {"output_channels": 256, **size.mask_encoder}
    sizes = {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    config = LisaConfig(
        vlm_config=AutoConfig.for_model(
            "llava",
            text_config=size.text,
            vision_config={"model_type": "clip_vision_model", **size.vision},
            image_token_index=IMAGE_TOKEN_ID,
            tie_word_embeddings=False,
        ),
        mask_config=AutoConfig.for_model(
            "sam",
            vision_config={**vision, "num_pos_feats": vision["output_channels"] // 2},
            prompt_encoder_config={**sizes, "hidden_size": vision["output_channels"]},
            mask_decoder_config=size.mask_decoder,
        ),
        seg_token_id=SEG_TOKEN_ID,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = LisaForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    # Without dropout, baseline and candidate can be compared to the last digits.
    return prepare_for_training(model, ["seg_projector", "mask_decoder", "embeddings"], lora_dropout=0.0).train()


def make_batch(size: Size, device: str, dtype: torch.dtype) -> dict:
    """A training batch of separate rows: K questions about each of B images, whose answers end with `[SEG]`."""
    generator = torch.Generator().manual_seed(0)
    num_rows = size.num_images * size.num_questions

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(FIRST_WORD, size.text["vocab_size"], shape, generator=generator)

    system = words(1, size.system_length).expand(num_rows, -1)
    image = torch.full((num_rows, size.num_image_tokens), IMAGE_TOKEN_ID)
    question = words(num_rows, size.question_length)
    answer = words(num_rows, size.answer_length)
    answer[:, -2] = SEG_TOKEN_ID
    input_ids = torch.cat([system, image, question, answer], dim=1)
    labels = input_ids.clone()
    labels[:, : -size.answer_length] = IGNORE_INDEX
    height, width = size.image_size
    side = size.mask_encoder["image_size"]
    resized = [round(side * length / max(height, width)) for length in (height, width)]
    masks = torch.rand(size.num_images, size.num_questions, height, width, generator=generator) < 0.3

    def pixels(side: int) -> torch.Tensor:
        return torch.randn(size.num_images, 3, side, side, generator=generator).to(device, dtype)

    return {
        "input_ids": input_ids.to(device),
        "attention_mask": torch.ones_like(input_ids).to(device),
        "labels": labels.to(device),
        "image_indices": torch.arange(size.num_images).repeat_interleave(size.num_questions).to(device),
        "pixel_values": pixels(size.vision["image_size"]),
        "mask_pixel_values": pixels(side),
        "mask_labels": [image_masks.to(device, torch.uint8) for image_masks in masks],
        "original_sizes": torch.tensor([[height, width]] * size.num_images),
        "reshaped_input_sizes": torch.tensor([resized] * size.num_images),
    }


def reference_loss(model: PeftModel, batch: dict) -> torch.Tensor:
    """The original's arithmetic, with the losses of this project.

    The vision tower sees an image once per question, every row repeats system prompt and image, every position goes
    through the vocabulary and through the projector, and SAM's images are encoded and decoded one by one.
    """
    lisa = model.get_base_model()
    with torch.no_grad():
        features = lisa.vlm.base_model.get_image_features(
            batch["pixel_values"][batch["image_indices"]], return_dict=True
        ).pooler_output
    hidden_states = lisa.vlm.base_model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
        use_cache=False,
    ).last_hidden_state
    logits = lisa.vlm.get_output_embeddings()(hidden_states).float()
    targets = batch["labels"][:, 1:]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    prompts = lisa.seg_projector(hidden_states)[:, :-1]
    bce = dice = 0.0
    for index, labels in enumerate(batch["mask_labels"]):
        embeddings = encode_images(lisa.mask_model, batch["mask_pixel_values"][index : index + 1])
        is_seg = (targets == SEG_TOKEN_ID) & (batch["image_indices"] == index)[:, None]
        first = torch.zeros(len(labels), dtype=torch.long, device=labels.device)
        repeated = select_images(embeddings, first, embeddings.dtype)
        masks, _ = decode_prompts(lisa.mask_model, repeated, prompts[is_seg])
        sizes = batch["reshaped_input_sizes"][index].tolist(), batch["original_sizes"][index].tolist()
        image_bce, image_dice = mask_losses(lisa._upscale(masks, *sizes), labels)
        bce, dice = bce + image_bce, dice + image_dice
    num_masks = sum(map(len, batch["mask_labels"]))
    return loss + (lisa.config.mask_bce_loss_weight * bce + lisa.config.mask_dice_loss_weight * dice) / num_masks


class Benchmark:
    """One model and one batch, trained in three ways.

    `reference`: [`reference_loss`], with activation checkpointing, as the original. `candidate`: this project's
    forward on packed rows, without. `cached`: the same with the features of the frozen encoders given.
    """

    def __init__(self, size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32):
        self.size, self.device = size, device
        self.model = build_model(size, device, dtype)
        self.batch = make_batch(size, device, dtype)
        self.packed = pack_rows(self.batch, IMAGE_TOKEN_ID, PAD_TOKEN_ID)
        lisa = self.model.get_base_model()
        with torch.no_grad():
            features = lisa.vlm.base_model.get_image_features(self.batch["pixel_values"], return_dict=True)
            self.cached = {
                **{name: value for name, value in self.packed.items() if "pixel_values" not in name},
                "vision_features": list(features.pooler_output),
                "image_embeddings": encode_images(lisa.mask_model, self.batch["mask_pixel_values"]),
            }
        self.variants = {
            "reference": lambda: reference_loss(self.model, self.batch),
            "candidate": lambda: self.model(**self.packed).loss,
            "cached": lambda: self.model(**self.cached).loss,
        }

    def step(self, variant: str) -> float:
        """The loss of one step, whose gradients it leaves; the optimizer's part is the same for all and left out."""
        lisa = self.model.get_base_model()
        self.model.zero_grad()
        if variant == "reference":
            lisa.activation_checkpointing_enable({"use_reentrant": False})
        else:
            lisa.activation_checkpointing_disable()
        loss = self.variants[variant]()
        loss.backward()
        return loss.item()

    def inspect(self, variant: str) -> tuple[dict, torch.Tensor]:
        """What a step computes: its figures, and all gradients in one float32 vector."""
        lisa = self.model.get_base_model()
        backbone = lisa.vlm.base_model
        modules = {
            "mask encoder": lisa.mask_model.vision_encoder,
            "vision tower": backbone.get_encoder(modality="image"),
            "language model": backbone.get_decoder(),
            "vocabulary": lisa.get_output_embeddings(),
            "mask decoder": lisa.mask_model.mask_decoder,
        }
        with (
            FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOPS) as counter,
            _count_by_part(modules, counter) as parts,
        ):
            loss = self.step(variant)
        total = counter.get_total_flops() / 1e9
        gflop = {part: operations / 1e9 for part, operations in parts.items()}
        gflop["backward and rest"] = total - sum(gflop.values())
        gradients = torch.cat([p.grad.flatten().float() for p in self.model.parameters() if p.grad is not None])
        return {"gflop_per_step": total, "gflop_by_part": gflop, "loss": loss}, gradients

    def peak_memory_mb(self, variant: str) -> float:
        """Weights and the most that a step allocates beside them, in MB, whatever the allocator keeps."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step(variant)
            return torch.cuda.max_memory_allocated() / 1e6
        self.model.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.step(variant)
        held = peak = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return (sum(p.numel() * p.element_size() for p in self.model.parameters()) + peak) / 1e6

    def time_steps(self, variants: list[str], repeats: int) -> dict[str, list[tuple[float, float]]]:
        """(wall, CPU) seconds of each step, the variants taking turns."""
        seconds = {variant: [] for variant in variants}
        for _ in range(repeats):
            for variant in variants:
                wall, cpu = time.perf_counter(), time.process_time()
                self.step(variant)  # reads the loss, so a GPU has finished
                seconds[variant].append((time.perf_counter() - wall, time.process_time() - cpu))
        return seconds

    def run_generation(self, num_questions: int = 16) -> dict:
        """Seconds of as many calls as there are questions about an image, and of one call that shares their prefix."""
        lisa = self.model.get_base_model()
        rows, length = [0] * num_questions, self.batch["input_ids"].shape[1] - self.size.answer_length
        prompts = self.batch["input_ids"][rows, :length].clone()
        generator = torch.Generator().manual_seed(0)
        questions = (num_questions, self.size.question_length)
        words = torch.randint(FIRST_WORD, self.size.text["vocab_size"], questions, generator=generator)
        prompts[:, -self.size.question_length :] = words.to(self.device)
        image = {name: self.batch[name][:1] for name in ("pixel_values", "mask_pixel_values")}

        def answer(prompts: torch.Tensor) -> torch.Tensor:
            return lisa.generate(
                prompts,
                **image,
                image_indices=torch.zeros(len(prompts), dtype=torch.long, device=self.device),
                max_new_tokens=self.size.answer_length,
                min_new_tokens=self.size.answer_length,
                do_sample=False,
            ).sequences

        self.model.eval()
        begin = time.perf_counter()
        separate = torch.cat([answer(prompt[None]) for prompt in prompts]).tolist()
        middle = time.perf_counter()
        shared = answer(prompts).tolist()
        seconds = {"separate_s": middle - begin, "shared_s": time.perf_counter() - middle}
        self.model.train()
        equal = sum(a == b for a, b in zip(separate, shared))
        return {**seconds, "speedup": seconds["separate_s"] / seconds["shared_s"], "equal_answers": equal}

    def run(self, baseline: str, repeats: int) -> dict:
        """Everything about `baseline`, `candidate` and `cached`, as the recipe writes it to JSON."""
        variants = [baseline, "candidate", "cached"]
        figures, gradients = zip(*(self.inspect(variant) for variant in variants))
        seconds = self.time_steps(variants, repeats)
        num_tokens, scale = self.batch["attention_mask"].sum().item(), gradients[0].abs().max()
        report = {}
        for variant, known, gradient in zip(variants, figures, gradients):
            wall = statistics.median(wall for wall, _ in seconds[variant])
            report[variant] = {
                **known,
                "gradient_error": ((gradient - gradients[0]).abs().max() / scale).item(),
                "wall_s": wall,
                "cpu_s": statistics.median(cpu for _, cpu in seconds[variant]),
                "peak_memory_mb": self.peak_memory_mb(variant),
                "images_per_s": self.size.num_images / wall,
                "tokens_per_s": num_tokens / wall,
            }
        for name, variant in (("speedup", "candidate"), ("speedup_cached", "cached")):
            pairs = zip(seconds[baseline], seconds[variant])
            report[name] = statistics.median(slow / fast for (slow, _), (fast, _) in pairs)
        report["generation"] = self.run_generation()
        return report


@contextmanager
def _count_by_part(modules: dict[str, nn.Module], counter: FlopCounterMode):
    """Collects the operations of each module's forward pass; what is recomputed in the backward pass is not in it."""
    parts = dict.fromkeys(modules, 0)

    def add(part: str, sign: int):
        def hook(*_):
            parts[part] += sign * counter.get_total_flops()

        return hook

    handles = [
        handle
        for part, module in modules.items()
        for handle in (module.register_forward_pre_hook(add(part, -1)), module.register_forward_hook(add(part, 1)))
    ]
    try:
        yield parts
    finally:
        for handle in handles:
            handle.remove()
