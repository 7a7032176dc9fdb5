"""Plan a run on GPUs you do not have: memory, step time and cost of a recipe with DDP, ZeRO-2, ZeRO-3 and FSDP2.

    python recipes/benchmarks/plan.py --config recipes/configs/lisa_7b.yaml --nodes 2 --gpus_per_node 8 \
        --gpu_memory 80 --peak_tflops 989 --mfu 0.35 --node_bandwidth 450 --network_bandwidth 50

The cluster arguments default to eight H100s (SXM). All other arguments are those of train.py. The models are built at
full size without memory, as in memory.py; only their configurations and processors are downloaded.

The time of a step is modeled as:

    computing      operations of a step on one GPU / (peak_tflops * mfu)
    communicating  bytes that one GPU sends in a step / bandwidth of the slowest link

Operations are counted in a forward and a backward pass, including what activation checkpointing recomputes. In a ring
of N GPUs, each sends 2 (N-1)/N times the gradients of the trained weights with DDP and ZeRO-2, once per step; with
ZeRO-3 and FSDP2, it sends (N-1)/N times the gradients and twice all weights in each accumulation step. Nothing is
assumed to overlap. Data and evaluation take no time. `mfu` is the share of its peak that a GPU reaches: measure it
with step.py.

    python recipes/benchmarks/plan.py --check

compares the computing time with every step measured in docs/cost.md.
"""

import argparse
import re
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from memory import make_empty_model, make_engine
from torch.utils.flop_counter import FlopCounterMode

from lisa_hf import LisaDataCollator
from lisa_hf.errors import report_user_errors
from lisa_hf.model.packing import resolve_packing
from lisa_hf.training.arguments import LisaTrainingArguments, parse_arguments
from lisa_hf.training.build import build_config_and_processor
from lisa_hf.training.memory_estimate import Engine, estimate_memory, example_batch


# The first process of an engine on a number of GPUs.
ENGINES = {
    "DDP": Engine,
    "ZeRO-2": partial(make_engine, process_index=0, zero_stage=2),
    "ZeRO-3": partial(make_engine, process_index=0, zero_stage=3),
    "FSDP2": partial(Engine, fsdp=True),
}
MEASUREMENTS = Path(__file__).parents[2] / "docs" / "cost.md"
VARIANTS = ("original's arithmetic", "this code", "with a warm feature cache", "losses on sampled points")
HEADER = (
    "| engine | GiB per GPU | fits | computing, s | communicating, s | images per s | days | GPU hours |\n"
    "|---|---:|---|---:|---:|---:|---:|---:|"
)


@dataclass
class Cluster:
    """GPUs and their links.

    Args:
        nodes: Number of machines.
        gpus_per_node: GPUs of each.
        gpu_memory: GiB of each GPU.
        peak_tflops: 10^12 operations per second of a GPU, in the dtype of the training, without sparsity.
        mfu: Share of the peak that a training step reaches.
        node_bandwidth: 10^9 bytes per second that a GPU can send to the others in its machine.
        network_bandwidth: 10^9 bytes per second that a GPU can send to other machines.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu_memory: float = 80
    peak_tflops: float = 989
    mfu: float = 0.35
    node_bandwidth: float = 450
    network_bandwidth: float = 50

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def bytes_per_second(self) -> float:
        return 1e9 * (self.node_bandwidth if self.nodes == 1 else self.network_bandwidth)


@dataclass
class Model:
    """Cost of a micro-step of a recipe on one GPU.

    Args:
        flops: Operations.
        weight_bytes: Bytes of all weights.
        gradient_bytes: Bytes of the trained weights' gradients.
        memory: Bytes by engine name; None if activations could not be measured.
    """

    flops: int
    weight_bytes: int
    gradient_bytes: int
    memory: dict[str, int | None]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in vars(Cluster()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="compare the plan with measurements")
    args, others = parser.parse_known_args()
    if args.check:
        print(check(MEASUREMENTS.read_text(encoding="utf-8")))
        return
    del args.check
    with report_user_errors():
        print(report(Cluster(**vars(args)), others))


def report(cluster: Cluster, argv: list[str]) -> str:
    """Return a table with one row per engine, and the best engine.

    Args:
        cluster: The GPUs.
        argv: Arguments of train.py.
    """
    device = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    model_args, data_args, args = parse_arguments([*argv, *device])
    if args.max_steps < 1:
        raise ValueError(f"max_steps: expected the number of steps, got {args.max_steps}. Pass it: --max_steps 5000.")
    model = measure_model(model_args, data_args, args, cluster.num_gpus)
    images = cluster.num_gpus * args.per_device_train_batch_size * args.gradient_accumulation_steps
    lines, best = [], None
    for engine, memory in model.memory.items():
        computing, communicating = step_seconds(model, engine, cluster, args.gradient_accumulation_steps)
        days = args.max_steps * (computing + communicating) / 86400
        fits = memory is not None and memory / 2**30 <= cluster.gpu_memory
        cells = [engine, "unknown" if memory is None else f"{memory / 2**30:.1f}", "yes" if fits else "no"]
        cells += [f"{computing:.2f}", f"{communicating:.2f}", f"{images / (computing + communicating):.1f}"]
        lines.append(f"| {' | '.join([*cells, f'{days:.2f}', f'{24 * days * cluster.num_gpus:.0f}'])} |")
        if fits and (best is None or days < best[1]):
            best = engine, days
    advice = (
        f"{best[0]} is the fastest of those that fit."
        if best
        else "None fits: see the remedies that train.py --dry_run names, or use GPUs with more memory."
    )
    what = f"{args.max_steps} steps of {images} images on {cluster.num_gpus} GPUs, {model.flops / 1e12:.2f} TFLOP per "
    return f"{what}GPU and micro-step.\n\n{HEADER}\n" + "\n".join(lines) + f"\n\n{advice}"


def measure_model(model_args, data_args, args: LisaTrainingArguments, num_gpus: int) -> Model:
    """Count the operations and the memory of a micro-step, without weights."""
    config, processor = build_config_and_processor(model_args)
    memory = {}
    for name, make in ENGINES.items():
        if name != "DDP" and args.muon_learning_rate is not None:
            continue  # Muon needs whole matrices
        model = make_empty_model(model_args, config)
        packing = resolve_packing(model.config, data_args.packing)
        collator = LisaDataCollator(processor, data_args.max_length, packing=packing)
        batch = example_batch(collator, args.per_device_train_batch_size, data_args.num_questions)
        with FlopCounterMode(display=False) as counter:
            (estimate,) = estimate_memory(model, model_args, args, batch, [make(num_gpus)])
        memory[name] = None if estimate.activations is None else estimate.total
        if name == "DDP":
            flops = counter.get_total_flops()
            sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    return Model(flops, sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained), memory)


def step_seconds(model: Model, engine: str, cluster: Cluster, accumulation_steps: int) -> tuple[float, float]:
    """Return the seconds of computing and of communicating in a step, see the top of this file."""
    computing = accumulation_steps * model.flops / (1e12 * cluster.peak_tflops * cluster.mfu)
    share = (cluster.num_gpus - 1) / cluster.num_gpus
    sent = 2 * model.gradient_bytes
    if engine in ("ZeRO-3", "FSDP2"):
        sent = accumulation_steps * (model.gradient_bytes + 2 * model.weight_bytes)
    return computing, share * sent / cluster.bytes_per_second


def measured_steps(page: str) -> list[tuple[str, float, float]]:
    """Return the description, 10^9 operations and CPU seconds of each step in the tables of docs/cost.md."""
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")] for line in page.splitlines() if line.startswith("|")
    ]
    mid = {name: values for name, *values in rows if len(values) == len(VARIANTS) - 1}
    steps = [(f"mid, {v}", *numbers) for v, *numbers in zip(VARIANTS, mid["GFLOP per step"], mid["CPU time, s"])]
    for place, *cells in rows:
        if re.match(r"(questions per image|image tokens|image size|vocabulary).*: ", place):
            operations, seconds = (cell.split(" / ") for cell in cells[:2])
            steps += [(f"small, {place}, {v}", *numbers) for v, *numbers in zip(VARIANTS, operations, seconds)]
    return [(name, float(operations), float(seconds)) for name, operations, seconds in steps]


def check(page: str) -> str:
    """Return a table of measured and planned seconds, from one compute rate: that of "this code" at mid.

    Args:
        page: Text of docs/cost.md.
    """
    steps = measured_steps(page)
    rate = {name: operations / seconds for name, operations, seconds in steps}[f"mid, {VARIANTS[1]}"]
    errors = [operations / rate / seconds - 1 for _, operations, seconds in steps]
    lines = [
        f"| {name} | {operations:g} | {seconds:g} | {operations / rate:.2f} | {error:+.0%} |"
        for (name, operations, seconds), error in zip(steps, errors)
    ]
    header = "| step on one CPU core | GFLOP | measured, s | planned, s | error |\n|---|---:|---:|---:|---:|"
    median = statistics.median(map(abs, errors))
    return "\n".join([header, *lines, "", f"{len(steps)} steps, median error {median:.0%}, at {rate:.1f} GFLOP/s."])


if __name__ == "__main__":
    main()
