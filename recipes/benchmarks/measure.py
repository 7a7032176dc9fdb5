"""Measure operations, time, memory and gradients of training steps, and seconds of generation."""

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch
from models import FIRST_WORD, IMAGE_TOKEN_ID, PAD_TOKEN_ID, Size, build_model, make_batch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from variants import BASELINES, Features, configure, step_loss

from lisa_hf.model.mask_backbone import encode_images
from lisa_hf.model.packing import pack_rows


# The CPU attention kernel, which torch's counter does not know.
CPU_ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *args, **kwargs: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *args, **kwargs: sdpa_backward_flop_count(gradient, query, key, value)
    ),
}
LADDER = Features.ladder()
EVERYTHING = list(LADDER.values())[-1]


class Benchmark:
    """One model and one batch, trained by several variants of a step.

    `reference` is the original's arithmetic, see [`step_loss`], and `reference_sdpa` the same with today's attention
    kernels. `candidate` is this project's forward on packed rows, `cached` the same with precomputed features of the
    frozen encoders, and `points` the candidate with mask losses on 12544 pixels per mask. The names in
    [`Features.ladder`] lead from the reference to the candidate.
    """

    def __init__(self, size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32):
        self.size, self.device = size, device
        self.model = build_model(size, device, dtype)
        self.lisa = self.model.get_base_model()
        self.batch = make_batch(size, device, dtype)
        self.packed = pack_rows(self.batch, IMAGE_TOKEN_ID, PAD_TOKEN_ID)
        with torch.no_grad():
            features = self.lisa.vlm.base_model.get_image_features(self.batch["pixel_values"], return_dict=True)
            self.cached = {
                **{name: value for name, value in self.packed.items() if "pixel_values" not in name},
                "vision_features": list(features.pooler_output),
                "image_embeddings": encode_images(self.lisa.mask_model, self.batch["mask_pixel_values"]),
            }

    def step(self, variant: str) -> float:
        """Run forward and backward and return the loss. The optimizer's step is omitted: it is the same for all."""
        return self._prepare(variant)()

    def _prepare(self, variant: str) -> Callable[[], float]:
        """Configure the model for a variant and return a function that runs a step of it."""
        features = (BASELINES | LADDER).get(variant)
        configure(self.lisa, features or EVERYTHING)
        self.lisa.config.mask_loss_points = 12544 if variant == "points" else 0

        def run() -> float:
            self.model.zero_grad()
            if features is None:
                loss = self.model(**(self.cached if variant == "cached" else self.packed)).loss
            else:
                loss = step_loss(self.model, self.packed if features.packing else self.batch, features)
            loss.backward()
            return loss.item()  # waits for a GPU

        return run

    def count(self, variant: str) -> tuple[dict, torch.Tensor]:
        """Return operations and loss of a step, and all gradients in one float32 vector."""
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOPS) as counter:
            with self._by_part(counter.get_total_flops) as parts:
                loss = self.step(variant)
        gflop = {part: operations / 1e9 for part, operations in parts.items()}
        gradients = torch.cat([p.grad.flatten().float() for p in self.model.parameters() if p.grad is not None])
        return {"gflop_per_step": sum(gflop.values()), "gflop_by_part": gflop, "loss": loss}, gradients

    def seconds_by_part(self, variant: str) -> dict[str, float]:
        """Return the wall time of each part of a step, which is slow because it synchronizes after each part."""

        def clock() -> float:
            if self.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        with self._by_part(clock) as parts:
            self.step(variant)
        return dict(parts)

    @contextmanager
    def _by_part(self, read: Callable[[], float]):
        """Yield by how much `read()` grows in each module's forward pass; the rest includes recomputation."""
        backbone = self.lisa.vlm.base_model
        modules = {
            "mask encoder": self.lisa.mask_model.vision_encoder,
            "vision tower": backbone.get_encoder(modality="image"),
            "language model": backbone.get_decoder(),
            "vocabulary": self.lisa.get_output_embeddings(),
            "mask decoder": self.lisa.mask_model.mask_decoder,
        }
        parts = dict.fromkeys(modules, 0)

        def add(part: str, sign: int) -> Callable:
            def hook(*_):
                parts[part] += sign * read()

            return hook

        handles = _add_hooks(modules, add)
        begin = read()
        try:
            yield parts
            parts["backward and rest"] = read() - begin - sum(parts.values())
        finally:
            for handle in handles:
                handle.remove()

    def peak_memory_mb(self, variant: str) -> float:
        """Return the size of the weights and the peak allocation of a step in addition, in MB."""
        run = self._prepare(variant)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            run()
            return torch.cuda.max_memory_allocated() / 1e6
        # The sum of allocations, because the process's own memory includes what the allocator keeps.
        self.model.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        held = peak = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return (sum(p.numel() * p.element_size() for p in self.model.parameters()) + peak) / 1e6

    def time_steps(self, variants: list[str], repeats: int) -> dict[str, list[tuple[float, float]]]:
        """Return (wall, CPU) seconds of each step. Variants take turns, so that other programs affect all of them."""
        seconds = {variant: [] for variant in variants}
        for _ in range(repeats):
            for variant in variants:
                run = self._prepare(variant)
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                seconds[variant].append((time.perf_counter() - wall, time.process_time() - cpu))
        return seconds

    def measure(self, variants: list[str], repeats: int) -> dict[str, dict]:
        """Return the metrics of each variant. Speedups are medians over pairs of consecutive steps."""
        seconds = self.time_steps(variants, repeats)
        num_tokens = self.batch["attention_mask"].sum().item()
        report, reference = {}, None
        for variant in variants:
            counted, gradients = self.count(variant)
            reference = gradients if reference is None else reference
            wall, cpu = map(statistics.median, zip(*seconds[variant]))
            # Pairs, because the machine's speed changes more over a run than between two steps.
            pairs = list(zip(seconds[variants[0]], seconds[variant]))
            report[variant] = {
                **counted,
                "gradient_error": ((gradients - reference).abs().max() / reference.abs().max()).item(),
                "wall_s": wall,
                "cpu_s": cpu,
                "speedup": statistics.median(slow / fast for (slow, _), (fast, _) in pairs),
                "speedup_cpu": statistics.median(slow / fast for (_, slow), (_, fast) in pairs),
                "seconds_by_part": self.seconds_by_part(variant),
                "peak_memory_mb": self.peak_memory_mb(variant),
                "images_per_s": self.size.num_images / wall,
                "tokens_per_s": num_tokens / wall,
            }
        return report

    def run(self, baseline: str, repeats: int, by_feature: bool = False) -> dict:
        """Return all metrics, as step.py writes them to JSON."""
        report = self.measure([baseline, "candidate", "cached"], repeats)
        report["speedup"] = report["candidate"]["speedup"]
        report["speedup_cached"] = report["cached"]["speedup"]
        if by_feature:
            report["features"] = self.measure(list(LADDER), repeats)
        report["generation"] = self.run_generation()
        return report

    def run_generation(self, num_questions: int = 16) -> dict:
        """Time one call of `generate` per question about an image, and one call for all, which shares their prefix."""
        rows, length = [0] * num_questions, self.batch["input_ids"].shape[1] - self.size.answer_length
        # The first row's prompt with different questions: the prefix is shared, the last tokens differ.
        prompts = self.batch["input_ids"][rows, :length].clone()
        generator = torch.Generator().manual_seed(0)
        questions = (num_questions, self.size.question_length)
        words = torch.randint(FIRST_WORD, self.size.text["vocab_size"], questions, generator=generator)
        prompts[:, -self.size.question_length :] = words.to(self.device)
        image = {name: self.batch[name][:1] for name in ("pixel_values", "mask_pixel_values")}

        def answer(prompts: torch.Tensor) -> torch.Tensor:
            return self.lisa.generate(
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


def _add_hooks(modules: dict[str, nn.Module], add: Callable) -> list:
    """Register hooks before and after the forward pass of each part."""
    return [
        handle
        for part, module in modules.items()
        for handle in (module.register_forward_pre_hook(add(part, -1)), module.register_forward_hook(add(part, 1)))
    ]
