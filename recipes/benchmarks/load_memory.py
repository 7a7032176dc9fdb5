"""Measure the host memory of each process while a recipe loads its model, up to its first training step.

    python recipes/benchmarks/load_memory.py make big
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 4 \\
        recipes/benchmarks/load_memory.py --vlm big/vlm --mask_model big/mask_model --output_dir out

`make` saves a random 2 GB LISA in bfloat16: the whole model in `big`, its halves in `big/vlm` and `big/mask_model`.
All other arguments are those of train.py, without data. `peak` is the most memory that a process held, minus what it
held after importing all packages; `anonymous` is the part that is not mapped files, whose pages are shared by the
processes of a machine and can be dropped by the system. `share` is the size of the weights divided by the number of
processes.
"""

import json
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from lisa_hf import LisaDataCollator, LisaForConditionalGeneration, LisaTrainer
from lisa_hf.chat_templates import load_chat_template
from lisa_hf.errors import report_user_errors
from lisa_hf.from_scratch.configuration import tiny_config_and_processor
from lisa_hf.from_scratch.tokenizer import train_tokenizer
from lisa_hf.training.arguments import ModelArguments, parse_arguments
from lisa_hf.training.build import build_config_and_processor, build_for_training


VLM = {
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096}
    | {"num_hidden_layers": 4, "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "projection_dim": 64},
    "text_config": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 14}
    | {"num_attention_heads": 16, "num_key_value_heads": 16},
}
MASK_MODEL = {
    "vision_config": {"hidden_size": 768, "output_channels": 256, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"image_size": 1024, "patch_size": 16}
}
VOCABULARY_SIZE = 32000
MAX_SHARD_SIZE = "300MB"
SAMPLING_SECONDS = 0.005


def main():
    with report_user_errors():
        if sys.argv[1:2] == ["make"]:
            return make_model(Path(sys.argv[2]))
        model_args, _, training_args = parse_arguments()
        processes = gather_object([measure(model_args, training_args)])
        if training_args.should_log:
            report = compare_with_share(model_args, processes)
            print(json.dumps(report, indent=2))


def make_model(directory: Path) -> None:
    """Save a LLaVA + SAM LISA with random weights, and its halves."""
    template = load_chat_template("llava_v1")
    tokenizer = train_tokenizer([template], vocab_size=400)
    config, processor = tiny_config_and_processor(VLM, MASK_MODEL, tokenizer, template)
    config.vlm_config.get_text_config().vocab_size = VOCABULARY_SIZE
    model = LisaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    halves = {"": (model, processor), "vlm": (model.vlm, processor.vlm_processor), "mask_model": (model.mask_model,)}
    for name, parts in halves.items():
        for part in parts:
            part.save_pretrained(directory / name, **({"max_shard_size": MAX_SHARD_SIZE} if part is parts[0] else {}))
    processor.mask_image_processor.save_pretrained(directory / "mask_model")


def measure(model_args: ModelArguments, training_args) -> dict[str, int | float]:
    """Load the model as in train.py, and return the bytes that this process held meanwhile."""
    imported = _memory("VmHWM")
    start = time.perf_counter()
    with _sampled_anonymous_memory() as anonymous:
        config, processor = build_config_and_processor(model_args)
        model = build_for_training(model_args, config, training_args)
        built = _memory("VmHWM")
        try:
            with tempfile.TemporaryDirectory() as training_args.output_dir:
                LisaTrainer(
                    model=model,
                    args=training_args,
                    train_dataset=[None] * training_args.train_batch_size * training_args.world_size,
                    data_collator=LisaDataCollator(processor),
                    processing_class=processor,
                    callbacks=[_StopWhenLoaded()],
                ).train()
        except _LoadedError:
            pass
    return {
        "imported": imported,
        "peak_after_build": built - imported,
        "peak": _memory("VmHWM") - imported,
        "anonymous": max(anonymous) - anonymous[0],
        "seconds": time.perf_counter() - start,
    }


def compare_with_share(model_args: ModelArguments, processes: list[dict]) -> dict:
    """Return the measurements with the share of a process and the largest file, in GB of 1e9 bytes."""
    paths = [model_args.model] if model_args.model else [model_args.vlm, model_args.mask_model]
    sizes = [file.stat().st_size for path in paths for file in Path(path).glob("*.safetensors")]
    share, largest = sum(sizes) / len(processes), max(sizes)
    sizes = {"share": share, "largest_file": largest, "bound": 1.3 * share + largest}
    return {
        **{name: size / 1e9 for name, size in sizes.items()},
        "processes": [
            {name: value if name == "seconds" else value / 1e9 for name, value in process.items()}
            for process in processes
        ],
    }


class _LoadedError(Exception):
    """The model is where its first step would need it."""


class _StopWhenLoaded(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        raise _LoadedError


def _memory(field: str) -> int:
    """Return a field of this process's memory in bytes: VmHWM (the most it ever held), RssAnon, ..."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


@contextmanager
def _sampled_anonymous_memory():
    """Yield a list that gets this process's anonymous memory every few milliseconds, in bytes."""
    samples, is_over = [_memory("RssAnon")], threading.Event()

    def sample():
        while not is_over.wait(SAMPLING_SECONDS):
            samples.append(_memory("RssAnon"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        is_over.set()
        thread.join()


if __name__ == "__main__":
    main()
