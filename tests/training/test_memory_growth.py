"""Memory does not grow over 200 training steps with evaluations, sheets and checkpoints."""

import ctypes
import gc

import psutil
import pytest
import torch
from fixtures.tiny_training import make_trainer
from transformers import TrainerCallback
from workers.distributed_worker import reasoning_rows

from lisa_hf.data.mixture import EvaluationDataset, MixtureDataset
from lisa_hf.training.callbacks import PredictionSheet
from lisa_hf.training.trainable import prepare_for_training


class MemoryRecorder(TrainerCallback):
    """Every four steps, what is in use: the number of living tensors, and bytes of this process."""

    def __init__(self):
        self.num_tensors, self.num_bytes = [], []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 4 == 0:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what the allocator keeps is counted too
            self.num_tensors.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
            self.num_bytes.append(psutil.Process().memory_full_info().uss)


@pytest.mark.parametrize(
    ("num_steps", "num_workers"),
    [
        (20, 0),
        pytest.param(200, 0, marks=pytest.mark.slow),
        pytest.param(200, 2, marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow(num_steps, num_workers, tiny, tmp_path):
    model, processor = tiny
    evaluation = EvaluationDataset(reasoning_rows(2))
    trainer = make_trainer(
        prepare_for_training(model, ["seg_projector", "mask_decoder", "embeddings"], lora_r=4),
        processor,
        tmp_path,
        MixtureDataset({"reasons": reasoning_rows(16)}, length=1000),
        evaluation,
        max_steps=num_steps,
        per_device_train_batch_size=2,
        dataloader_num_workers=num_workers,
        optim="adamw_torch",
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=10,
        eval_generate=True,
        save_strategy="steps",
        save_steps=10,
        save_total_limit=1,
        report_to="tensorboard",
    )
    trainer.remove_callback(trainer.recorder)  # which keeps all gradients
    trainer.data_collator.packing = True
    trainer.add_callback(PredictionSheet(trainer, evaluation))
    trainer.add_callback(recorder := MemoryRecorder())
    trainer.train()
    # The first steps fill caches, and what an allocator gives back at a moment is chance.
    num_tensors, num_bytes = recorder.num_tensors[2:], recorder.num_bytes[2:]
    assert len(set(num_tensors)) == 1, num_tensors
    middle = len(num_bytes) // 2
    assert min(num_bytes[middle:]) < min(num_bytes[:middle]) + 10e6, num_bytes
