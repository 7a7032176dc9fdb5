"""Show a LISA model in the browser: ask about an image, see the masks, download them.

    pip install -e '.[demo]'
    python recipes/demo.py outputs/quickstart

The page is an API as well:

    from gradio_client import Client, handle_file

    answer = Client("http://127.0.0.1:7860").predict(
        image=handle_file("photo.jpg"), question="What is red?", api_name="/segment"
    )
    answer["text"], answer["masks"], answer["scores"]  # masks as pycocotools' compressed RLE

Gradio's variables GRADIO_SERVER_NAME, GRADIO_SERVER_PORT and GRADIO_SHARE say where it is served.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image

from data_scripts.shapes import draw_scene
from lisa_hf.errors import report_user_errors
from lisa_hf.inference.arguments import add_model_arguments
from lisa_hf.training.build import load_lisa


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="LISA model: directory or Hub id")
    parser.add_argument("--compare", metavar="MODEL", help="another model that answers beside it")
    parser.add_argument("--max_megapixels", type=float, default=40, help="largest image (%(default)s)")
    add_model_arguments(parser)
    return parser.parse_args()


def draw_examples(directory: Path) -> list[tuple[str, str]]:
    """Draw three scenes, each with a question about its first shape."""
    examples = []
    for seed in range(3):
        picture, items = draw_scene(np.random.default_rng(seed), image_size=256)
        path = directory / f"scene_{seed}.png"
        PIL.Image.fromarray(picture).save(path)
        examples.append((str(path), f"Please segment the {items[0].name} in this image."))
    return examples


def main():
    args = parse_arguments()
    with report_user_errors():
        try:
            from lisa_hf.inference.demo import build_demo
        except ImportError as error:
            raise ValueError(f"expected Gradio, got {error}. Do `pip install -e '.[demo]'`.") from error
        models = {}
        for path in filter(None, (args.model, args.compare)):
            model, processor = load_lisa(path, dtype=args.dtype)
            name = Path(path).name
            models[path if name in models else name] = model.to(args.device).eval(), processor
        with tempfile.TemporaryDirectory() as directory:
            demo = build_demo(models, draw_examples(Path(directory)), args.max_megapixels, args.max_new_tokens)
            demo.launch(allowed_paths=[directory])


if __name__ == "__main__":
    main()
