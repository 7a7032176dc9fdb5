"""Ask a LISA model questions about images, and write its masks for people, scripts or labeling tools.

    python recipes/predict.py outputs/quickstart --image scene.png --question "What is blue?"
    python recipes/predict.py outputs/mine --image photos --question "Where is rust?" "Where are cracks?" \\
        --label rust crack --batch_size 8 --format labelme --output_dir outputs/rust

Writes `predictions.jsonl`, with one line per image and question, and the files of `--format` to `--output_dir`. To
resume an interrupted run, run the command again. For several GPUs: `accelerate launch recipes/predict.py ...`.
"""

import argparse
from pathlib import Path
from typing import get_args

from accelerate import PartialState

from lisa_hf.errors import report_user_errors
from lisa_hf.inference.annotation_files import Format, annotation_paths, write_annotations
from lisa_hf.inference.arguments import add_model_arguments, positive_int
from lisa_hf.inference.labeling import find_images, label_images, open_output_dir, questions_by_image, read_questions
from lisa_hf.model.images import load_image
from lisa_hf.training.build import load_lisa


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="LISA model: directory or Hub id")
    parser.add_argument("--image", nargs="+", required=True, help="image files, directories, glob patterns or URLs")
    question = parser.add_mutually_exclusive_group(required=True)
    question.add_argument("--question", nargs="+", help="e.g. 'Please segment the red circle in this image.'")
    question.add_argument(
        "--questions",
        type=Path,
        help='JSON Lines with "question" and, optionally, "label" and "image"',
    )
    parser.add_argument(
        "--label", nargs="+", help="label of the masks of each --question in labeling tools (default: the question)"
    )
    parser.add_argument("--output_dir", type=Path, default="outputs/predict", help="default: %(default)s")
    parser.add_argument("--format", choices=get_args(Format), default="masks", help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier predictions, or other files")
    parser.add_argument("--batch_size", type=positive_int, default=1, help="images per batch (%(default)s)")
    add_model_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_arguments()
    with report_user_errors():
        # 1. Find out what to do, before weights are loaded.
        images = find_images(args.image)
        if len(images) == 1:  # among several, an unreadable one is skipped
            check_image(*images.values())
        questions = questions_by_image(images, ask(args))
        settings = {name: str(getattr(args, name)) for name in ("model", "dtype", "batch_size", "max_new_tokens")}
        state, is_same = PartialState(cpu=args.device.type == "cpu"), False
        if state.is_main_process:  # others would remove what it has started to write
            planned = annotation_paths(args.format, images, sum(map(len, questions.values())), args.output_dir)
            settings["questions"] = questions
            is_same = open_output_dir(args.output_dir, settings, images, args.overwrite, planned)
        state.wait_for_everyone()
        # 2. Answer.
        model, processor = load_lisa(args.model, dtype=args.dtype)
        model.to(state.device if state.num_processes > 1 else args.device).eval()
        records = label_images(
            model, processor, images, questions, args.output_dir, args.batch_size, args.max_new_tokens
        )
        # 3. Write files for labeling tools.
        if state.is_main_process:
            kept = write_annotations(args.format, records, images, args.output_dir, keep_edited=is_same)
            report(records, args.output_dir)
            if kept:
                print(f"Kept {len(kept)} files that were edited since, such as {kept[0]}. --overwrite replaces them.")


def ask(args: argparse.Namespace) -> list[dict[str, str]]:
    """Return the questions and their labels."""
    if args.questions:
        if args.label:
            raise ValueError("--label: expected none with --questions, got one. Write a `label` with each question.")
        return read_questions(args.questions)
    if not args.label:
        return [{"question": question} for question in args.question]
    if len(args.label) != len(args.question):
        raise ValueError(f"--label: expected one for each of {len(args.question)} questions, got {len(args.label)}.")
    return [{"question": question, "label": label} for question, label in zip(args.question, args.label)]


def check_image(source: str):
    try:
        load_image(source)
    except ValueError as error:
        raise ValueError(f"--image: {error}") from error


def report(records: list[dict], output_dir: Path):
    """Print the answer if there is only one, and the numbers of masks and unreadable images."""
    answered = [record for record in records if "text" in record]
    if len(records) == len(answered) == 1:
        print(answered[0]["text"])
    num_masks = sum(len(record["masks"]) for record in answered)
    num_without = sum(not record["masks"] for record in answered)
    num_unreadable = len({record["image"] for record in records if "text" not in record})
    print(f"Saved {_count(len(answered), 'answer')} with {_count(num_masks, 'mask')}: {output_dir.resolve()}")
    if num_unreadable:
        print(f"{_count(num_unreadable, 'image')} could not be read. Repair and run again to add what is missing.")
    if num_masks == 0:
        print("No answer has a [SEG]. Ask as in training: '... Please output segmentation mask.'")
    elif num_without:
        print(f"Without a mask: {num_without}. Look at them: python recipes/demo.py --predictions {output_dir}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


if __name__ == "__main__":
    main()
