"""A LLaVA + SAM LISA of a few thousand weights, items of every kind, the trainer around them, in one process or more.

Shared by the tests of training and by the processes that `test_distributed.py` and `test_endurance.py` start.
"""

import importlib
import os
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from PIL import Image
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lisa_hf import LisaDataCollator, LisaForConditionalGeneration, LisaProcessor, LisaTrainer
from lisa_hf.arguments import LisaTrainingArguments
from lisa_hf.loading import load_chat_template
from lisa_hf.prompts import Question
from lisa_hf.schema import encode_mask
from lisa_hf.scratch import build_from_scratch, train_tokenizer


ROOT = Path(__file__).parents[1]
IMAGE_SIZE = 32  # of both encoders, in pixels
QUESTION = "What is {phrase} in this image? Please output segmentation mask."
# One list per item, one number of masks per question. Some batches of 1 or 2 of the first eight items have no mask; of
# the second eight the first item alone has any, so that a second process never does.
MASKS_DUE = [
    *([1], [1, 1, 0], [0], [2], [0, 0], [0], [1, 0, 2], [1]),
    *([1, 2], [0], [0], [0, 0], [0], [0, 0], [0, 0, 0], [0]),
]
WITHOUT_MASKS = [9, 10, 11, 12, 13, 14, 15, 4]
LISA_PARTS = ["seg_projector", "mask_decoder", "embeddings"]
# How processes share a model, with the files that the launchers in recipes/accelerate use.
ENGINES = {
    "ddp": {},
    "fsdp2": {
        "fsdp": True,
        "fsdp_config": yaml.safe_load((ROOT / "recipes/accelerate/fsdp2.yaml").read_text())["fsdp_config"],
        "use_cpu": False,
    },
    "zero2": {"deepspeed": str(ROOT / "ds_configs/zero2.json")},
    "zero3": {"deepspeed": str(ROOT / "ds_configs/zero3.json")},
}
VISION_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": 16,
    "projection_dim": 8,
    "initializer_range": 0.1,
}
TEXT_CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
MASK_CONFIG = {
    "initializer_range": 0.3,
    "vision_config": {
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "window_size": 2,
        "global_attn_indexes": [1],
        "scale": 1.0,
        "mlp_dim": 32,
        "initializer_range": 0.1,
    },
    "mask_decoder_config": {"mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
}


def build_model(
    tie_word_embeddings: bool = False, chat_template: str = "llava_v1"
) -> tuple[LisaForConditionalGeneration, LisaProcessor]:
    """The same random weights at every call."""
    rng_state = torch.get_rng_state()
    torch.manual_seed(0)
    template = load_chat_template(chat_template)
    model, processor = build_from_scratch(
        {
            "vision_config": VISION_CONFIG,
            "vision_feature_layer": -1,
            "text_config": {**TEXT_CONFIG, "tie_word_embeddings": tie_word_embeddings},
            "tie_word_embeddings": tie_word_embeddings,
        },
        MASK_CONFIG,
        train_tokenizer([QUESTION, template, "It is", "There is none. The answer is red."] * 10, vocab_size=400),
        template,
        tie_word_embeddings=tie_word_embeddings,
    )
    torch.set_rng_state(rng_state)
    return model, processor


def make_item(index: int, masks_due: list[int]) -> dict:
    """An item as `lisa_hf.mixture` makes them: images of several sizes, answers of several lengths."""
    rng = np.random.default_rng(index)
    height, width = (int(side) for side in rng.integers(20, 40, size=2))
    questions = []
    for number, due in enumerate(masks_due):
        phrase, seg = f"shape {index} {number}", ", ".join(["[SEG]"] * due)
        answer = f"It is {seg}." if due else "There is none." + " The answer is red." * (index % 3)
        messages = [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": QUESTION.format(phrase=phrase)}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        questions.append(Question(messages, [encode_mask(_rectangle(rng, height, width)) for _ in range(due)]))
    return {
        "image": Image.fromarray(rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)),
        "original_size": [height, width],
        "features": None,
        "image_id": f"image_{index}",
        "source": "drawn",
        "questions": questions,
        "ignore": encode_mask(_rectangle(rng, height, width)) if index % 2 else None,
        "num_skipped": 0,
    }


def _rectangle(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    top, left = rng.integers(height // 2), rng.integers(width // 2)
    mask[top : top + height // 2, left : left + width // 2] = True
    return mask


class Items(Dataset):
    """The items of `MASKS_DUE`, or the first few of them."""

    def __init__(self, length: int = len(MASKS_DUE)):
        self.items = [make_item(index, masks_due) for index, masks_due in enumerate(MASKS_DUE[:length])]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return self.items[index]


class Recorder(TrainerCallback):
    """Keeps the weights at the start and at every checkpoint, and the gradients and learning rates of every step."""

    def __init__(self):
        self.initial_state, self.saved_states, self.gradients, self.rates = None, {}, [], []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.initial_state = copy_state(model)

    def on_save(self, args, state, control, model, **kwargs):
        self.saved_states[state.global_step] = copy_state(model)

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.gradients.append(
            {
                name.removeprefix("module."): parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
        )


def copy_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor of a model, plain or inside DDP."""
    return {name.removeprefix("module."): tensor.clone() for name, tensor in model.state_dict().items()}


def assert_gradients_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    """To 1e-5 of the largest entry of each tensor; some are zero but for rounding, as those of a key's bias."""
    assert found.keys() == expected.keys()
    overall = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        scale = max(gradient.abs().max(), 0.01 * overall)
        assert (found[name] - gradient).abs().max() <= 1e-5 * scale, name


def make_trainer(model, processor, output_dir, train_dataset=None, eval_dataset=None, **arguments) -> LisaTrainer:
    """A trainer of one step per 8 items with plain gradient descent, which does not amplify rounding as Adam does."""
    settings = {
        "use_cpu": True,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "generation_max_new_tokens": 6,
        # Every trained weight gets a gradient in every step, or this is an error.
        "ddp_find_unused_parameters": False,
    }
    recorder = Recorder()
    trainer = LisaTrainer(
        model=model,
        args=LisaTrainingArguments(output_dir=str(output_dir), **{**settings, **arguments}),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=LisaDataCollator(processor),
        processing_class=processor,
        callbacks=[recorder],
    )
    trainer.recorder = recorder
    return trainer


@contextmanager
def engine_state(engine: str):
    """Settings of accelerate that an engine needs among CPU processes, and that must not outlive a run.

    accelerate takes processes for FSDP's only if they have GPUs, and would quietly use DDP; so it is told they do, and
    torch's own `fully_shard` cuts the model over gloo. DeepSpeed would compile a kernel for sums among CPU processes,
    minutes long, where gloo's serve as well.
    """
    deepspeed_torch = importlib.import_module("deepspeed.comm.torch")  # as an attribute, it is torch itself
    with mock.patch.dict(os.environ), mock.patch.object(deepspeed_torch, "build_shm_op", lambda: None):
        if engine == "fsdp2":
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
            backend = ("gloo", DistributedType.MULTI_GPU)
            with mock.patch.object(PartialState, "_prepare_backend", lambda *args: backend):
                yield
        else:
            yield
    unset_hf_deepspeed_config()  # else the next model would be made in pieces
