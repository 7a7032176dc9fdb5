"""Show a LISA model in the browser: ask about an image, see and download the masks. Also browse data and predictions.

    pip install -e '.[demo]'
    python recipes/demo.py outputs/quickstart
    python recipes/demo.py --data recipes/configs/quickstart.yaml
    python recipes/demo.py --predictions outputs/evaluate/quickstart

The page of a model also has an API:

    from gradio_client import Client, handle_file

    answer = Client("http://127.0.0.1:7860").predict(
        image=handle_file("photo.jpg"), question="What is red?", api_name="/segment"
    )
    answer["text"], answer["masks"], answer["scores"]  # masks as pycocotools' compressed RLE

Gradio's variables GRADIO_SERVER_NAME, GRADIO_SERVER_PORT and GRADIO_SHARE set where it is served.
"""

import argparse
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from data_scripts import load_sources
from data_scripts.shapes import draw_scene
from lisa_hf.data.mixture import EvaluationDataset
from lisa_hf.errors import report_user_errors
from lisa_hf.evaluation.benchmarks import EVALUATION, read_scores
from lisa_hf.evaluation.predictions import find_predictions, read_predictions
from lisa_hf.evaluation.protocols import PROTOCOLS
from lisa_hf.inference.arguments import add_model_arguments
from lisa_hf.inference.data_items import DataItems
from lisa_hf.inference.predicted_items import EvaluatedItems, Evaluation, LabeledItems
from lisa_hf.training.arguments import parse_data_arguments
from lisa_hf.training.build import load_lisa


# One question of each kind, by the seed of its scene, that the quick start's model is good at: it confuses shapes of
# one color more often than colors.
EXAMPLES = {
    10: "What is yellow? Please output segmentation mask.",
    8: "Which object could be a lake? Please output segmentation mask.",
    6: "Please segment the white circle in this image.",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="LISA model: directory or Hub id")
    parser.add_argument("--compare", metavar="MODEL", help="another model that answers side by side")
    parser.add_argument(
        "--data", metavar="CONFIG", help="browse the training and evaluation sources of a recipe (YAML)"
    )
    parser.add_argument(
        "--predictions",
        metavar="DIRECTORY",
        type=Path,
        help="browse the output of recipes/eval.py, worst first, with the truth, or that of recipes/predict.py",
    )
    parser.add_argument("--data_dir", help="directory of all datasets in LISA's layout (default: the recipe's)")
    parser.add_argument("--max_megapixels", type=float, default=40, help="largest image (%(default)s)")
    add_model_arguments(parser)
    args = parser.parse_args()
    if not (args.model or args.data or args.predictions):
        parser.error("expected a model, --data or --predictions, got none of them")
    return args


def draw_examples(directory: Path) -> list[tuple[str, str]]:
    """Draw a scene for each question of `EXAMPLES`."""
    examples = []
    for seed, question in EXAMPLES.items():
        picture, _ = draw_scene(np.random.default_rng(seed), image_size=256)
        path = directory / f"scene_{seed}.png"
        PIL.Image.fromarray(picture).save(path)
        examples.append((str(path), question))
    return examples


def load_data(config: str, data_dir: str | None) -> DataItems:
    """Load the rows of a recipe's sources as in training and evaluation."""
    data_args = parse_data_arguments(config)
    data_dir = data_dir or data_args.data_dir
    options = {"on_bad_row": data_args.on_bad_row, "exclude_refer_val": data_args.exclude_refer_val}
    train_rows = load_sources(data_args.sources, data_dir, **options)
    eval_rows = load_sources(data_args.eval_sources, data_dir, data_args.max_eval_items)
    if not train_rows | eval_rows:
        raise ValueError(f"--data: expected sources or eval_sources in {config}, got none.")
    return DataItems(train_rows, {name: EvaluationDataset(rows) for name, rows in eval_rows.items()})


def load_predictions(directory: Path, data_dir: str | None) -> EvaluatedItems | LabeledItems:
    """Load the output of recipes/eval.py or recipes/predict.py."""
    if (directory / "predictions.jsonl").exists():
        return LabeledItems(directory)
    if not (directory / EVALUATION).exists():
        raise ValueError(
            f"--predictions: expected a directory that recipes/eval.py or recipes/predict.py wrote, got {directory}."
        )
    content = json.loads((directory / EVALUATION).read_text("utf-8"))
    evaluations = {}
    for path in sorted(directory.glob("scores_*.jsonl")):
        name = path.stem.removeprefix("scores_")
        try:
            texts = {PROTOCOLS[protocol].texts for protocol in content["settings"]["protocols"]}
            options = {**content["benchmarks"][name]}
            num_items, _, merge_instances = map(options.pop, ("num_items", "protocols", "merge_instances"))
        except KeyError as error:
            raise ValueError(
                f"{directory / EVALUATION}: expected {error}, got none. Run recipes/eval.py again."
            ) from error
        rows = load_sources({name: options}, data_dir, num_items)[name]
        dataset = EvaluationDataset(rows, merge_instances, texts)
        scores = read_scores(path)
        protocol = "generated" if "generated" in scores else next(iter(scores))
        source = find_predictions(Path(content["settings"].get("predictions", directory)), name)
        predictions = read_predictions(source, dataset, content["settings"].get("missing_as_empty", False), name)
        evaluations[name] = Evaluation(dataset, predictions, scores[protocol], protocol)
    if not evaluations:
        raise ValueError(f"--predictions: expected scores of at least one benchmark, got none in {directory}.")
    return EvaluatedItems(evaluations)


def load_models(paths: list[str], device: torch.device, dtype: str) -> dict:
    """Load models and their processors, by name on the page."""
    models = {}
    for path in paths:
        model, processor = load_lisa(path, dtype=dtype)
        name = Path(path).name
        models[path if name in models else name] = model.to(device).eval(), processor
    return models


def main():
    args = parse_arguments()
    with report_user_errors(), tempfile.TemporaryDirectory() as directory:
        try:
            import gradio as gr

            from lisa_hf.inference.data_page import build_data_page
            from lisa_hf.inference.demo import build_demo
        except ImportError as error:
            raise ValueError(f"expected Gradio, got {error}. Run `pip install -e '.[demo]'`.") from error
        pages = {}
        if args.model:
            models = load_models(list(filter(None, (args.model, args.compare))), args.device, args.dtype)
            examples = draw_examples(Path(directory))
            pages["Ask"] = build_demo(models, examples, args.max_megapixels, args.max_new_tokens)
        if args.data:
            pages["Data"] = build_data_page(load_data(args.data, args.data_dir))
        if args.predictions:
            pages["Predictions"] = build_data_page(load_predictions(args.predictions, args.data_dir))
        with gr.Blocks(title="lisa_hf", analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
            for name, page in pages.items():
                with gr.Tab(name) if len(pages) > 1 else nullcontext():
                    page.render()
        demo.launch(allowed_paths=[directory])


if __name__ == "__main__":
    main()
