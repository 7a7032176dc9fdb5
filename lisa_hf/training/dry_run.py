"""Report of `recipes/train.py --dry_run`, before a run costs anything: its data, one step and one checkpoint.

    python recipes/train.py --config recipes/configs/quickstart.yaml --dry_run

Nothing is kept, and the content of `output_dir` does not change.
"""

import itertools
import math
import shutil
from collections import defaultdict
from pathlib import Path

from torch.utils.data import IterableDataset
from tqdm import tqdm
from transformers import BatchFeature

from ..data.collator import LisaDataCollator
from ..data.mixture import Mixture
from ..model.losses import IGNORE_INDEX
from ..model.processing_lisa import LisaProcessor
from .checkpointing import find_checkpoint
from .trainer import LOSS_PARTS, LisaTrainer


def dry_run(trainer: LisaTrainer) -> str:
    """Describe the data, run one step and save one checkpoint; every process must call it."""
    data = describe_items(trainer.train_dataset, trainer.data_collator)
    trainer.train()
    return f"{data}\n\n{finish_dry_run(trainer)}"


def describe_items(dataset: Mixture, collator: LisaDataCollator, num_items: int = 32) -> str:
    """Draw the first items of a mixture and collate each one.

    Args:
        dataset: The training mixture.
        collator: The training collator.
        num_items: Number of items to draw.

    Returns:
        A line per source with its numbers of items, rows and masks, and the tokens of its rows. Then the first row as
        decoded by the tokenizer, with the answers that the model learns in double brackets.

    Raises:
        ValueError: If something is wrong with a row, the chat template or `max_length`.
    """
    items = dataset if isinstance(dataset, IterableDataset) else map(dataset.__getitem__, range(len(dataset)))
    lengths, masks, drawn, example = defaultdict(list), defaultdict(int), defaultdict(int), None
    for item in tqdm(itertools.islice(items, num_items), total=num_items, desc="Reading items", leave=False):
        batch = collator([item])
        example = example or show_row(batch, collator.processor)
        drawn[item["source"]] += 1
        masks[item["source"]] += len(batch["mask_labels"][0])
        lengths[item["source"]] += batch["attention_mask"].sum(1).tolist()
    lines = [f"{'source':<20}{'items':>8}{'rows':>8}{'masks':>8}{'tokens per row':>20}"]
    for name, counts in sorted(lengths.items()):
        tokens = f"{min(counts)} to {max(counts)}"
        lines.append(f"{name:<20}{drawn[name]:>8}{len(counts):>8}{masks[name]:>8}{tokens:>20}")
    return "\n".join([*lines, "", "The first row, with what the model learns to answer in double brackets:", example])


def show_row(batch: BatchFeature, processor: LisaProcessor) -> str:
    """Decode the first row of a batch, with learned answers in [[ ]] and each run of image tokens as one with its
    length.

    Args:
        batch: A batch of the collator.
        processor: The model's processor.
    """
    tokenizer, image_token_id = processor.tokenizer, processor.image_token_id
    seen = batch["attention_mask"][0].bool()
    ids = batch["input_ids"][0][seen].tolist()
    is_answer = (batch["labels"][0][seen] != IGNORE_INDEX).tolist()
    kinds = [(is_learned, token == image_token_id) for token, is_learned in zip(ids, is_answer)]
    text = ""
    for (is_learned, is_image), run in itertools.groupby(zip(ids, kinds), lambda pair: pair[1]):
        run = [token for token, _ in run]
        piece = f"{tokenizer.decode(run[:1])} x {len(run)} " if is_image else tokenizer.decode(run)
        text += f"[[{piece}]]" if is_learned else piece
    return text


def finish_dry_run(trainer: LisaTrainer) -> str:
    """Check the step and the checkpoint of a dry run, and remove the checkpoint; every process must call it.

    Raises:
        ValueError: If a part of the loss is non-finite.
    """
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    metrics = {name: log[name] for name in ("loss", *LOSS_PARTS, "grad_norm")}
    if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise ValueError(
            f"first step: expected finite numbers, got {', '.join(f'{name} {metrics[name]}' for name in bad)}. Check "
            "the data above, lower the learning rate, or use bf16 instead of fp16."
        )
    checkpoint = Path(find_checkpoint(trainer.args.output_dir))
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        shutil.rmtree(trainer.args.output_dir)
    parts = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    return f"Dry run: one step ({parts}) and one checkpoint ({size / 2**20:.1f} MiB) succeeded."
