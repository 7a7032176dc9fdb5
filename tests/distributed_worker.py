"""Trains and evaluates a tiny LISA in several ways, on as many processes as there are.

    torchrun --nproc_per_node 2 tests/distributed_worker.py RESULTS.pt

The first process writes what came out; `test_distributed.py` compares it with what one process gets.
"""

import datetime
import sys
import tempfile

import torch
from accelerate import PartialState
from tiny_training import Items, build_model, copy_state, make_trainer

from lisa_hf.arguments import TRAINABLE_PARTS
from lisa_hf.lora import prepare_for_training


# Without the vision tower, whose last norm is not used.
ALL_PARTS = [part for part in TRAINABLE_PARTS if part != "vision_tower"]
LISA_PARTS = ["seg_projector", "mask_decoder", "embeddings"]
# How eight items become a step: by name, items per process and micro-batch, and the other arguments.
TRAINING_RUNS = {
    "full": {"parts": ALL_PARTS, "lora_r": 0, "cuts": (4, 2, 1)},
    "lora": {"parts": LISA_PARTS, "lora_r": 4, "cuts": (2,)},
    "shuffled": {"parts": LISA_PARTS, "lora_r": 4, "cuts": (4,), "train_sampling_strategy": "random"},
    "checkpointing": {"parts": LISA_PARTS, "lora_r": 4, "cuts": (2,), "activation_checkpointing": True},
}
NUM_EVAL_ITEMS = 7


def train(cut: int, num_processes: int, parts: list[str], lora_r: int, **arguments) -> dict:
    """Loss curve, gradients of every step, and the weights after the last one."""
    model, processor = build_model()
    torch.manual_seed(0)
    model = prepare_for_training(model, parts, lora_r, lora_dropout=0.0)
    items = Items()
    items.items[1]["num_skipped"], items.items[5]["num_skipped"] = 1, 2
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(
            model,
            processor,
            output_dir,
            items,
            max_steps=4,
            per_device_train_batch_size=cut,
            gradient_accumulation_steps=8 // cut // num_processes,
            **arguments,
        )
        trainer.train()
    return {
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "gradients": trainer.recorder.gradients,
        "weights": copy_state(model),
    }


def evaluate() -> dict[str, float]:
    """Figures of both protocols. Only three tokens are ever generated, so that some answers have a `[SEG]`."""
    model, processor = build_model()
    spoken = {processor.seg_token_id, processor.tokenizer.eos_token_id, 120}
    model.vlm.generation_config.suppress_tokens = [i for i in range(len(processor.tokenizer)) if i not in spoken]
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(model, processor, output_dir, eval_dataset=Items(NUM_EVAL_ITEMS), eval_generate=True)
        return trainer.evaluate()


def run(num_processes: int) -> dict:
    """All runs; a single process takes the eight items of a step at once."""
    results = {}
    for name, settings in TRAINING_RUNS.items():
        settings = dict(settings)
        for cut in settings.pop("cuts"):
            if num_processes == 1:
                results.setdefault(name, train(8, 1, **settings))
            else:
                results[name, cut] = train(cut, num_processes, **settings)
    results["metrics"] = evaluate()
    return results


if __name__ == "__main__":
    # A process that waits for another in vain shall say so, rather than hang.
    state = PartialState(cpu=True, timeout=datetime.timedelta(seconds=60))
    outcome = run(state.num_processes)
    if state.is_main_process:
        torch.save(outcome, sys.argv[1])
    state.destroy_process_group()
