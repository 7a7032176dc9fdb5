"""Convert published original checkpoints to transformers' format.

    python recipes/convert_weights.py auto --checkpoint LISA-7B-v1 --output weights/lisa-7b-v1
    python recipes/convert_weights.py sam --checkpoint sam_vit_h_4b8939.pth --output weights/sam-vit-h
    python recipes/convert_weights.py llava --checkpoint llava-v1.5-7b --output weights/llava-1.5-7b
    python recipes/convert_weights.py llava-delta --checkpoint LLaVA-Lightning-7B-delta-v1-1 --base llama-7b \\
        --output weights/llava-7b-v1
    python recipes/convert_weights.py lisa --checkpoint LISA-7B-v1 --output weights/lisa-7b-v1
    python recipes/convert_weights.py lisa-train --checkpoint runs/lisa-7b/ckpt_model --base LLaVA-Lightning-7B-v1-1 \\
        --output weights/my-lisa-7b

Prints the old and new name of every tensor, fails if one is missing or left over, and verifies the written files.
"""

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

from lisa_hf.conversion.checkpoints import open_checkpoint
from lisa_hf.conversion.lazy_tensors import LazyTensor, add_delta, merge_lora_tensors
from lisa_hf.conversion.lisa import LISA_LAYOUTS, convert_lisa
from lisa_hf.conversion.llava import convert_llava, find_config, read_original_config
from lisa_hf.conversion.original_formats import recognize_source
from lisa_hf.conversion.sa2va import convert_sa2va
from lisa_hf.conversion.sam import convert_sam
from lisa_hf.conversion.saving import DTYPES, ConvertedModel, save_converted
from lisa_hf.conversion.zero_checkpoints import is_zero_checkpoint, open_zero_checkpoint
from lisa_hf.errors import report_user_errors
from lisa_hf.training.run_record import write_conversion_record


SOURCES = {
    "auto": "any of these, detected from the tensors",
    "llava-delta": "LLaVA v1, published as a difference to LLaMA (--base)",
    "llava": "LLaVA v1, v1.1, on Llama 2, v1.5",
    "sam": "sam_vit_{b,l,h}*.pth, sam_hq_vit_{b,l,h}.pth",
    "lisa": "LISA v1, explanatory, LISA++, SESAME, READ",
    "lisa-v0": "LISA v0, which has its SAM in a separate file",
    "glamm": "GLaMM-RefSeg and other GLaMMs with masks, without their questions about boxes",
    "sa2va": "Sa2VA on Qwen2.5-VL, Qwen3-VL, or InternVL 2.5 and 3",
    "lisa-train": "a run of LISA's train_ds.py: its ZeRO checkpoint, or the pytorch_model.bin made from it",
}


# The authors' statements about the training data of published weights, by architecture or format.
TRAINING_DATA = {
    "SESAMEForCausalLM": "SESAME's published weights were trained on RefCOCO, R-RefCOCO and FP-RefCOCO (with + and g) "
    "and LLaVA's questions.",
    "READForCausalLM": "READ's published weights were trained on SESAME's data, and those for ReasonSeg on its train.",
    "lisa": "LISA's published weights of v1 were trained on both ReasonSeg train and val, so their metrics on its val "
    "cannot be compared.",
    "lisa-v0": "LISA's published weights of v0 were trained on ReasonSeg train, and not on its val.",
}


def parse_arguments() -> argparse.Namespace:
    sources = "\n".join(f"  {name:<13}{description}" for name, description in SOURCES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nsources:\n{sources}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", choices=SOURCES, metavar="SOURCE", help="format of the checkpoint, see above")
    parser.add_argument("--checkpoint", type=Path, required=True, help="file or directory of the original")
    parser.add_argument("--output", type=Path, required=True, help="new directory to write")
    parser.add_argument(
        "--base",
        type=Path,
        help="llava-delta: the LLaMA that the delta belongs to. lisa-train: the LLaVA that the run started from, for "
        "configuration and tokenizer (default: searched in and above the checkpoint)",
    )
    parser.add_argument(
        "--vision_tower", "--vision-tower", help="CLIP: directory or Hub id (default: named in config.json)"
    )
    parser.add_argument(
        *("--chat_template", "--chat-template"),
        help="llava_v1, llava_llama_2, llava_1_5 or a Jinja file (default for LLaVA: chosen by the model's name, as "
        "in its code; for others: the one that it was trained with)",
    )
    parser.add_argument(
        "--lora_alpha", "--lora-alpha", type=float, default=16, help="lisa-train: lora_alpha of the run (%(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the weights (auto: the original's most common)"
    )
    return parser.parse_args()


def convert(args: argparse.Namespace) -> ConvertedModel:
    """Open the checkpoint and the files that belong to it, without reading the weights."""
    options = {"vision_tower": args.vision_tower, "chat_template": args.chat_template}
    if not args.checkpoint.exists():
        raise ValueError(
            f"--checkpoint: expected a file or directory, got {args.checkpoint}, which does not exist. Download a "
            "repository of the Hub first: `hf download ORGANIZATION/NAME --local-dir DIRECTORY`"
        )
    is_zero = is_zero_checkpoint(args.checkpoint)
    tensors = open_zero_checkpoint(args.checkpoint) if is_zero else open_checkpoint(args.checkpoint)
    source = choose_source(args.source, "lisa-train" if is_zero else recognize_source(tensors), tensors)
    if source == "lisa-train":
        tensors = merge_lora_tensors(tensors, args.lora_alpha)
        return convert_lisa(tensors, args.base or find_config(args.checkpoint), **options)
    if source == "sam":
        return convert_sam(tensors)
    if source == "sa2va":
        return convert_sa2va(tensors, find_config(args.checkpoint), args.chat_template)
    if source in LISA_LAYOUTS:
        directory = find_config(args.checkpoint)
        converted = convert_lisa(tensors, directory, layout=LISA_LAYOUTS[source], **options)
        names = [*(read_original_config(directory).get("architectures") or []), source]
        known = next((TRAINING_DATA[name] for name in names if name in TRAINING_DATA), "")
        return dataclasses.replace(converted, training_data=known)
    if source == "llava-delta":
        if args.base is None:
            raise ValueError("--base: expected the directory of the LLaMA that this delta belongs to, got none.")
        tensors = add_delta(tensors, open_checkpoint(args.base))
    return convert_llava(tensors, find_config(args.checkpoint), **options)


def choose_source(given: str, recognized: str | None, tensors: dict[str, LazyTensor]) -> str:
    """Return the source to convert from.

    Raises:
        ValueError: The tensors belong to another source than the given one, or `auto` does not recognize them.
    """
    if given == "auto":
        if recognized is None:
            raise ValueError(
                f"--checkpoint: expected the tensors of an original LLaVA, SAM or LISA, got {list(tensors)[:3]}. A "
                "model in transformers' format needs no conversion."
            )
        print(f"Source: {recognized}, {SOURCES[recognized]}")
        return recognized
    # Unknown tensors are listed by the key tables; a run may have been trained without LoRA, or be merged.
    if recognized in (None, given) or (given, recognized) == ("lisa-train", "lisa"):
        return given
    raise ValueError(
        f"SOURCE: expected `{recognized}` for this checkpoint, got `{given}`: its tensors are those of "
        f"{recognized} ({SOURCES[recognized]}). Name `{recognized}`, or `auto`."
    )


def main():
    args = parse_arguments()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    logging.getLogger("lisa_hf").setLevel(logging.INFO)
    with report_user_errors():
        converted = convert(args)
        save_converted(converted, args.output, DTYPES[args.dtype])
        if converted.training_data:
            write_conversion_record(args.output, str(args.checkpoint), converted.training_data)
            print(converted.training_data)
        print(f"Done. Model and processor: {args.output.resolve()}")


if __name__ == "__main__":
    main()
