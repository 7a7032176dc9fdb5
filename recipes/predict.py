"""Asks a LISA model about an image: prints the answer, writes the masks and an overlay.

python recipes/predict.py outputs/quickstart --image scene.png --question "What is blue?"
"""

import argparse
from pathlib import Path

import PIL.Image
import torch

from lisa_hf.errors import report_user_errors
from lisa_hf.evaluation.predict import answer_questions
from lisa_hf.evaluation.visualization import overlay_masks
from lisa_hf.model.images import load_image
from lisa_hf.model.processing_lisa import user_message
from lisa_hf.training.build import load_lisa


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="LISA model: directory or Hub id")
    parser.add_argument("--image", required=True, help="image file")
    parser.add_argument("--question", required=True, help="e.g. 'Please segment the red circle in this image.'")
    parser.add_argument("--output_dir", default="outputs/predict", help="where masks and overlay are written")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer, in tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    parser.add_argument("--dtype", default="auto", help="of the weights: float32, bfloat16, ...")
    args = parser.parse_args()
    with report_user_errors():
        try:
            image = load_image(args.image)
        except ValueError as error:
            raise ValueError(f"--image: {error}") from error
        model, processor = load_lisa(args.model, dtype=args.dtype)
        (answer,) = answer_questions(
            model.to(args.device), processor, image, [[user_message(args.question)]], args.max_new_tokens
        )
        print(answer.text)
        output_dir = Path(args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        for old in output_dir.glob("mask_*.png"):  # of an earlier question
            old.unlink()
        for index, mask in enumerate(answer.masks.numpy()):
            PIL.Image.fromarray(mask).save(output_dir / f"mask_{index}.png")
        overlay_masks(image, answer.masks.numpy()).save(output_dir / "overlay.png")
        print(f"Masks: {len(answer.masks)}; they and overlay.png: {output_dir.resolve()}")
        if len(answer.masks) == 0:
            print("No [SEG] in the answer. A mask is asked for as in training: '... Please output segmentation mask.'")


if __name__ == "__main__":
    main()
