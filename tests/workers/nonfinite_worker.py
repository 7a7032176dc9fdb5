"""Train a tiny LISA in which one process has a non-finite loss in the second step.

accelerate launch --config_file recipes/accelerate/zero2.yaml tests/workers/nonfinite_worker.py RESULTS zero2
"""

import json
import logging
import sys
import tempfile
from pathlib import Path

import torch
from fixtures.tiny_training import ENGINES, LISA_PARTS, Items, build_model, engine_state, make_trainer, sabotage

from lisa_hf.training.trainable import prepare_for_training


def run(engine: str) -> dict:
    model, processor = build_model()
    model = prepare_for_training(model, LISA_PARTS, lora_r=4, lora_dropout=0.0)
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("lisa_hf.training.callbacks").addHandler(handler)
    with engine_state(engine), tempfile.TemporaryDirectory() as output_dir:
        arguments = {
            "optim": "adamw_torch",
            "learning_rate": 1e-3,
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 1,
            **ENGINES[engine],
        }
        trainer = make_trainer(model, processor, output_dir, Items(), per_device_train_batch_size=2, **arguments)
        trainer.remove_callback(trainer.recorder)  # whole gradients and weights are not to be had everywhere
        if trainer.args.process_index == 1:
            sabotage(model, {1}, "loss")
        error = None
        try:
            trainer.train()
        except ValueError as stopped:
            error = str(stopped)
        checkpoints = sorted(path.name for path in Path(output_dir).glob("checkpoint-*"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    num_skipped = trainer.nonfinite_steps.num_skipped
    return {
        "messages": messages,
        "num_skipped": num_skipped,
        "losses": losses,
        "error": error,
        "checkpoints": checkpoints,
    }


if __name__ == "__main__":
    results = run(sys.argv[2])
    Path(f"{sys.argv[1]}.{torch.distributed.get_rank()}").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
