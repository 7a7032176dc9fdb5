"""Estimate the size and memory of a recipe from the configurations of its models, without weights or a GPU.

    python recipes/benchmarks/memory.py --config recipes/configs/qwen3_vl_sam2.yaml --vlm Qwen/Qwen3-VL-8B-Instruct

The arguments are those of train.py. The VLM and the mask model are built at full size without memory; only their
configurations and processors are downloaded. Prints what trains, and a row of the table in docs/backbones.md.
"""

import json
import sys
from pathlib import Path

import torch

from lisa_hf import LisaConfig, LisaDataCollator
from lisa_hf.errors import report_user_errors
from lisa_hf.model.packing import resolve_packing
from lisa_hf.training.arguments import ModelArguments, parse_arguments
from lisa_hf.training.build import build_config_and_processor, build_model
from lisa_hf.training.memory_estimate import Engine, MemoryEstimate, estimate_memory, example_batch
from lisa_hf.training.trainable import parameter_parts, prepare_for_training, trainable_summary


NUM_GPUS = (1, 8)
ZERO_STAGES = (2, 3)
PARTS = {
    "vision tower": ("vision_tower",),
    "projector": ("multi_modal_projector",),
    "language model": ("language_model", "embeddings"),
    "mask encoder": ("mask_encoder",),
    "mask decoder": ("mask_decoder",),
    "`seg_projector`": ("seg_projector",),
}
COLUMNS = ("model", *PARTS, "trained", "DDP", *(f"ZeRO-{stage}" for stage in ZERO_STAGES))
HEADER = f"| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}"


def main():
    with report_user_errors():
        print(report(sys.argv[1:]))


def report(argv: list[str]) -> str:
    """Return what trains, and a one-row table: parameters in millions, GiB per GPU with each engine."""
    # Options of a recipe are checked against this machine, which may not have a GPU.
    device = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    model_args, data_args, training_args = parse_arguments([*argv, *device])
    config, processor = build_config_and_processor(model_args)
    model = make_empty_model(model_args, config)
    summary = trainable_summary(model, training_args)
    counts = [f"{count / 1e6:.1f}" for count in (*count_parameters(model).values(), _num_trained(model))]
    packing = resolve_packing(model.config, data_args.packing)
    collator = LisaDataCollator(processor, data_args.max_length, packing=packing)
    batch = example_batch(collator, training_args.per_device_train_batch_size, data_args.num_questions)
    cells = []
    for has_deepspeed in (False, True):
        if has_deepspeed and training_args.muon_learning_rate is not None:
            cells += ["-" for _ in ZERO_STAGES]  # Muon needs whole matrices
            continue
        engines = [engine for engine in make_engines() if (engine.zero is not None) == has_deepspeed]
        model = make_empty_model(model_args, config)
        cells += _largest_of_ranks(engines, estimate_memory(model, model_args, training_args, batch, engines))
    sources = [source for source in (model_args.model, model_args.vlm, model_args.mask_model) if source]
    name = ", ".join(Path(source).name for source in sources) or "randomly initialized"
    return f"{summary}\n\n{HEADER}\n| {' | '.join((name, *counts, *cells))} |"


def make_engines() -> list[Engine]:
    """Return every process of DDP, ZeRO-2 and ZeRO-3 on each number of GPUs."""
    stages = (None, *ZERO_STAGES)
    return [make_engine(number, rank, stage) for stage in stages for number in NUM_GPUS for rank in range(number)]


def make_engine(num_processes: int, process_index: int, zero_stage: int | None) -> Engine:
    """Return a process of DDP, or of a ZeRO stage as in `ds_configs`."""
    if zero_stage is None:
        return Engine(num_processes, process_index)
    file = Path(__file__).parents[2] / "ds_configs" / f"zero{zero_stage}.json"
    return Engine(num_processes, process_index, json.loads(file.read_text())["zero_optimization"])


def count_parameters(model) -> dict[str, int]:
    """Return the number of parameters of each part before training adds any, in the order of the table."""
    parts = parameter_parts(model)
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        for label, members in PARTS.items():
            if parts[name] and parts[name][0] in members:
                counts[label] += parameter.numel()
    return counts


def _num_trained(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _largest_of_ranks(engines: list[Engine], estimates: list[MemoryEstimate]) -> list[str]:
    """Return one cell per kind of engine: the largest GiB of any process, on each number of GPUs."""
    largest = {}
    for engine, estimate in zip(engines, estimates):
        stage = engine.zero["stage"] if engine.zero else 0
        sizes = largest.setdefault(stage, dict.fromkeys(NUM_GPUS, 0))
        sizes[engine.num_processes] = max(sizes[engine.num_processes], estimate.total)
    more_than = "> " if estimates[0].activations is None else ""
    return [" / ".join(f"{more_than}{size / 2**30:.1f}" for size in sizes.values()) for sizes in largest.values()]


def make_empty_model(model_args: ModelArguments, config: LisaConfig):
    """Create the model that a recipe trains, without weights."""
    return prepare_for_training(build_model(model_args, config, empty=True), **model_args.adaptation)


if __name__ == "__main__":
    main()
