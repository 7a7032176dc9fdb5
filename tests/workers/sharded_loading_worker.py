"""Load models in shards and whole, train one in shards, on two processes; one process trains it whole.

    accelerate launch --config_file recipes/accelerate/ddp.yaml tests/workers/sharded_loading_worker.py RESULTS.pt

The first process writes what came out; `test_zero.py` looks at it.
"""

import datetime
import sys
from pathlib import Path

import deepspeed
import torch
from accelerate import PartialState
from fixtures.tiny_training import ENGINES, LISA_PARTS, Items, build_model, engine_state, make_trainer, training_logs
from torch import nn

from lisa_hf.training.arguments import LisaTrainingArguments, ModelArguments
from lisa_hf.training.build import build_for_training
from lisa_hf.training.trainable import trainable_summary


NUM_NEW_TOKENS = 9
# What is loaded, from what, and what trains in it.
CASES = {
    "halves": {"tied": False, "joined": False},
    "tied halves": {"tied": True, "joined": False},
    "joined": {"tied": False, "joined": True},
    "DoRA": {"tied": False, "joined": True, "use_dora": True},
    "in full": {"tied": True, "joined": True, "lora_r": 0},
}


def save_models(directory: Path) -> None:
    """Save what `CASES` load, in several files each."""
    for tied in (False, True):
        model, processor = build_model(tied)
        halves = {"vlm": model.vlm, "mask_model": model.mask_model, "joined": model}
        for name, part in halves.items():
            part.save_pretrained(directory / str(tied) / name, max_shard_size="40KB")
        processor.save_pretrained(directory / str(tied) / "joined")


def load(directory: Path, args: LisaTrainingArguments, tied: bool, joined: bool, **adaptation) -> nn.Module:
    """Build a model for training. The halves' vocabulary grows."""
    directory = directory / str(tied)
    names = {"model": "joined"} if joined else {"vlm": "vlm", "mask_model": "mask_model"}
    paths = {argument: str(directory / name) for argument, name in names.items()}
    arguments = ModelArguments(**paths, trainable=LISA_PARTS, lora_dropout=0.0, **adaptation)
    config = build_model(tied)[0].config
    config.get_text_config().vocab_size += NUM_NEW_TOKENS
    torch.manual_seed(0)
    return build_for_training(arguments, config, args)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter, by all of its names, and every buffer."""
    state = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([weight]):
            state[name] = weight.detach().clone()
    return state | dict(model.named_buffers(remove_duplicate=False))


def compare(directory: Path, args: LisaTrainingArguments, case: dict) -> dict:
    """Differences between a model in shards and the same one whole."""
    whole = load(directory, LisaTrainingArguments(output_dir=args.output_dir, use_cpu=True), **case)
    sharded = load(directory, args, **case)
    expected, found = whole_state(whole), whole_state(sharded)
    same = {name for name in expected if name in found and found[name].dtype == expected[name].dtype}
    held = sum(getattr(weight, "ds_tensor", weight).numel() for weight in sharded.parameters())
    return {
        "num_weights": len(expected),
        "different": [name for name in expected if name not in same or not torch.equal(expected[name], found[name])],
        "left_over": sorted(found.keys() - expected.keys()),
        "trained": [[weight.requires_grad for weight in model.parameters()] for model in (whole, sharded)],
        "tied": [
            model.get_input_embeddings().weight is model.get_output_embeddings().weight for model in (whole, sharded)
        ],
        "tables": [trainable_summary(whole, args), trainable_summary(sharded, args)],
        "held": held / sum(weight.numel() for weight in whole.parameters()),
    }


def train(directory: Path, num_processes: int, case: dict, engine: dict) -> list[dict]:
    """Losses of four steps on the same items."""
    settings = {"per_device_train_batch_size": 8 // num_processes, "optim": "adamw_torch", "learning_rate": 1e-3}
    args = LisaTrainingArguments(output_dir=str(directory / "run"), use_cpu=True, report_to="none", **engine)
    model, processor = load(directory, args, **case), build_model(case["tied"])[1]
    trainer = make_trainer(model, processor, directory / "run", Items(), max_steps=4, **settings, **engine)
    trainer.remove_callback(trainer.recorder)
    trainer.train()
    return training_logs(trainer)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    state = PartialState(cpu=True, timeout=datetime.timedelta(seconds=300))
    with engine_state("zero3"):
        args = LisaTrainingArguments(output_dir=str(path.parent / "run"), use_cpu=True, **ENGINES["zero3"])
        results = {name: compare(path.parent, args, case) for name, case in CASES.items()}
        results["losses"] = train(path.parent, state.num_processes, CASES["halves"], ENGINES["zero3"])
    if state.is_main_process:
        torch.save(results, path)
    state.destroy_process_group()
