"""Train and evaluate a tiny LISA in several ways, on two processes; on three it only evaluates.

    accelerate launch --config_file recipes/accelerate/ddp.yaml \\
        tests/workers/distributed_worker.py RESULTS.pt NUM_STEPS

The first process writes what came out; `test_distributed.py` compares it with what one process gets.
"""

import datetime
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from fixtures.tiny_training import (
    ENGINES,
    LISA_PARTS,
    WITHOUT_MASKS,
    Items,
    build_model,
    copy_state,
    engine_state,
    make_trainer,
)
from PIL import Image
from torch.distributed.tensor import DTensor
from torch.utils.data import ConcatDataset, Subset

from lisa_hf.data.masks import encode_mask
from lisa_hf.data.mixture import EvaluationDataset
from lisa_hf.data.prompts import TEXTS
from lisa_hf.data.rows import FEATURES, make_row
from lisa_hf.evaluation.benchmarks import score_predictions
from lisa_hf.evaluation.predictions import predict_benchmark, read_predictions
from lisa_hf.evaluation.protocols import PROTOCOLS
from lisa_hf.training.arguments import TRAINABLE_PARTS
from lisa_hf.training.callbacks import PredictionSheet, SelfCheck
from lisa_hf.training.trainable import prepare_for_training


# How eight items become a step: by name, items per process and micro-batch, and the other arguments.
TRAINING_RUNS = {
    "full": {"parts": list(TRAINABLE_PARTS), "lora_r": 0, "cuts": (4, 2, 1)},
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


def build_speaker():
    """A model whose answers are one `[SEG]` and end with it, or run to the maximum length without any.

    Processes that share the weights must make as many passes for a short answer as the others make for a long one.
    """
    model, processor = build_model()
    spoken = {processor.seg_token_id, 120}
    generation_config = model.vlm.generation_config
    generation_config.suppress_tokens = [i for i in range(len(processor.tokenizer)) if i not in spoken]
    generation_config.eos_token_id = processor.seg_token_id
    return model, processor


def train_and_evaluate(engine: str, num_processes: int, num_steps: int) -> dict:
    """Figures before the first step, and the losses of the steps, of which the last of each three has no mask.

    AdamW and clipping are those of the recipes; clipping takes the gradient's norm over all pieces of the model.
    """
    model, processor = build_speaker()
    torch.manual_seed(0)
    model = prepare_for_training(model, LISA_PARTS, lora_r=4, lora_dropout=0.0)
    with engine_state(engine), tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(
            model,
            processor,
            output_dir,
            ConcatDataset([Items(), Subset(Items(), WITHOUT_MASKS)]),
            {"uneven": Items(NUM_EVAL_ITEMS), "maskless": Subset(Items(), WITHOUT_MASKS[:3])},
            max_steps=num_steps,
            per_device_train_batch_size=8 if num_processes == 1 else 1,
            gradient_accumulation_steps=1 if num_processes == 1 else 8 // num_processes,
            optim="adamw_torch",
            learning_rate=1e-3,
            max_grad_norm=1.0,
            per_device_eval_batch_size=1,  # answers of one process are as long as the longest
            metric_for_best_model="uneven_giou",
            eval_on_start=True,
            eval_generate=True,
            **(ENGINES[engine] if num_processes > 1 else {}),
        )
        trainer.remove_callback(trainer.recorder)  # whole gradients and weights are not to be had everywhere
        trainer.add_callback(PredictionSheet(trainer, Items(2)))
        if num_processes > 1:  # the one process without it shows that it changes nothing
            trainer.add_callback(SelfCheck(trainer))
        trainer.train()
        pieces = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters()]
        return {
            "wrapper": type(trainer.model_wrapped).__name__,
            "num_held_weights": sum(piece.numel() for piece in pieces),
            "logs": trainer.state.log_history,
            "sheets": [np.asarray(Image.open(path)) for path in Path(output_dir).glob("predictions/*.png")],
        }


def make_evaluator(output_dir: str, eval_dataset=None, **arguments):
    model, processor = build_speaker()
    return make_trainer(model, processor, output_dir, eval_dataset=eval_dataset, eval_generate=True, **arguments)


def evaluate() -> dict[str, float]:
    """Figures of both protocols in a training."""
    with tempfile.TemporaryDirectory() as output_dir:
        return make_evaluator(output_dir, Items(NUM_EVAL_ITEMS)).evaluate()


def reasoning_rows(num_rows: int) -> Dataset:
    """Rows as ReasonSeg has them: phrases and sentences, one text or several, pixels to ignore."""
    rows = []
    for index in range(num_rows):
        rng = np.random.default_rng(index)
        height, width = (int(side) for side in rng.integers(20, 40, size=2))
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)).save(file, "PNG")
        mask, ignore = np.zeros((2, height, width), dtype=bool)
        mask[: height // 2], ignore[:, : width // 4] = index != 2, index % 2  # in one image there is nothing
        rows.append(
            make_row(
                image=file.getvalue(),
                image_id=str(index),
                source="reasons",
                task="reasoning",
                targets=[{"phrases": [f"it {n} {index}" for n in range(1 + index % 3)], "rle": encode_mask(mask)}],
                ignore=encode_mask(ignore),
                is_sentence=index % 2 == 0,
            )
        )
    return Dataset.from_list(rows, features=FEATURES)


def evaluate_benchmarks(output_dir: Path) -> dict[int, tuple]:
    """Results, scores and the file of predictions, by the number of images: more and fewer of them than processes."""
    trainer = make_evaluator(output_dir, per_device_eval_batch_size=1)
    outcome = {}
    for num_rows in (NUM_EVAL_ITEMS, 2):
        dataset = EvaluationDataset(reasoning_rows(num_rows), texts=TEXTS)
        path = output_dir / f"{num_rows}.jsonl"
        predict_benchmark(trainer, dataset, path)
        if trainer.is_world_process_zero():
            scored = score_predictions(dataset, read_predictions(path, dataset), PROTOCOLS)
            outcome[num_rows] = (*scored, path.read_text())
    return outcome


def run(num_processes: int, num_steps: int, output_dir: Path) -> dict:
    """All runs; a single process takes the eight items of a step at once."""
    results = {"metrics": evaluate(), "benchmarks": evaluate_benchmarks(output_dir)}
    for engine in ENGINES if num_processes > 1 else ["ddp"]:
        results[engine] = train_and_evaluate(engine, num_processes, num_steps)
    if num_processes > 2:  # the eight items of a step cannot be shared by three
        return results
    for name, settings in TRAINING_RUNS.items():
        settings = dict(settings)
        for cut in settings.pop("cuts"):
            if num_processes == 1:
                results.setdefault(name, train(8, 1, **settings))
            else:
                results[name, cut] = train(cut, num_processes, **settings)
    return results


if __name__ == "__main__":
    # A process that waits for another in vain shall say so, rather than hang.
    state = PartialState(cpu=True, timeout=datetime.timedelta(seconds=300))
    outcome = run(state.num_processes, int(sys.argv[2]), Path(sys.argv[1]).parent)
    if state.is_main_process:
        torch.save(outcome, sys.argv[1])
    state.destroy_process_group()
