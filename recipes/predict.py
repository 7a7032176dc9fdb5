"""Ask a LISA model about an image: print the answer, write its masks and an overlay.

    python recipes/predict.py outputs/quickstart --image scene.png --question "What is blue?"

Writes mask_0.png, mask_1.png, ... and overlay.png to `--output_dir`.
"""

import argparse
from pathlib import Path

import PIL.Image
import torch

from lisa_hf.errors import report_user_errors
from lisa_hf.evaluation.predict import answer_questions
from lisa_hf.evaluation.visualization import overlay_masks
from lisa_hf.model.conversation_text import user_message
from lisa_hf.model.images import load_image
from lisa_hf.training.build import load_lisa


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="LISA model: directory or Hub id")
    parser.add_argument("--image", required=True, help="image file or URL")
    parser.add_argument("--question", required=True, help="e.g. 'Please segment the red circle in this image.'")
    parser.add_argument("--output_dir", type=Path, default="outputs/predict", help="default: %(default)s")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer, in tokens (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights: float32, bfloat16, ... (%(default)s)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    with report_user_errors():
        # 1. Read the image and load the model.
        try:
            image = load_image(args.image)
        except ValueError as error:
            raise ValueError(f"--image: {error}") from error
        model, processor = load_lisa(args.model, dtype=args.dtype)
        # 2. Ask: a conversation with one question gives one answer, whose masks have the image's size.
        conversation = [user_message(args.question)]
        (answer,) = answer_questions(model.to(args.device), processor, image, [conversation], args.max_new_tokens)
        masks = answer.masks.numpy()  # [M, H, W] bool
        print(answer.text)
        # 3. Write the masks, in place of those of an earlier question.
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for old in args.output_dir.glob("mask_*.png"):
            old.unlink()
        for index, mask in enumerate(masks):
            PIL.Image.fromarray(mask).save(args.output_dir / f"mask_{index}.png")
        overlay_masks(image, masks).save(args.output_dir / "overlay.png")
        print(f"Saved {len(masks)} masks and overlay.png: {args.output_dir.resolve()}")
        if len(masks) == 0:
            print("The answer has no [SEG]. Ask as in training: '... Please output segmentation mask.'")


if __name__ == "__main__":
    main()
