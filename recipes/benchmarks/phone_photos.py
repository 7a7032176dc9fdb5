"""Fine-tune on photos as phones store them, and on the same photos stored upright: the gIoU should not differ.

    python recipes/benchmarks/phone_photos.py --model outputs/quickstart --output_dir outputs/phone_photos

Twenty drawn photos have all eight EXIF orientations; three of them have 16 bits per color, and one has 100 megapixels.
Half are annotated as in LabelMe, on the photo as viewers rotate it, and half in COCO, on the stored pixels. Both
models answer questions about 24 other photos of the same kind, except for their number of pixels.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import PIL.ExifTags
import PIL.Image

from data_scripts.orientation import TURNS
from data_scripts.shapes import draw_scene
from lisa_hf.data.masks import encode_mask
from lisa_hf.evaluation.benchmarks import read_scores
from lisa_hf.evaluation.comparison import Comparison, compare_scores
from lisa_hf.evaluation.protocols import PROTOCOLS


RECIPES = Path(__file__).resolve().parents[1]
ARMS = ("upright", "turned")
ORIENTATIONS = range(1, 9)
INVERSE = {6: 8, 8: 6}  # the other orientations are their own inverses
SIDE, CROP = 160, 20
LARGE = 72  # 99.5 megapixels
PROTOCOL = "lisa"


@dataclasses.dataclass
class Photo:
    """A photo as viewers show it: `pixels`, shape `(H, W, 3)`, uint8 RGB, and the masks of its shapes, by name."""

    pixels: np.ndarray
    masks: list[tuple[str, np.ndarray]]
    orientation: int
    is_deep: bool = False
    is_large: bool = False


def draw_photo(seed: int, index: int, **facts) -> Photo:
    """Draw a 4:3 or 3:4 photo, by index."""
    pixels, items = draw_scene(np.random.default_rng((seed, index)), SIDE)
    inner = slice(CROP, SIDE - CROP)
    crop = (inner, slice(None)) if index % 2 else (slice(None), inner)
    masks = [(item.name, item.mask[crop]) for item in items if item.mask[crop].any()]
    return Photo(pixels[crop], masks, ORIENTATIONS[index % 8], **facts)


def turn_back(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return the stored pixels that viewers rotate to these."""
    return TURNS[INVERSE.get(orientation, orientation)](pixels) if orientation in TURNS else pixels


def write_image(path: Path, photo: Photo) -> None:
    """Write a photo as JPEG, or with 16 bits per color as PNG, with its EXIF orientation."""
    stored = np.stack([turn_back(channel, photo.orientation) for channel in np.moveaxis(photo.pixels, 2, 0)], axis=2)
    if photo.is_large:
        stored = stored.repeat(LARGE, axis=0).repeat(LARGE, axis=1)
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = photo.orientation
    if not photo.is_deep:
        PIL.Image.fromarray(stored).save(path, quality=95, subsampling=0, exif=exif)
        return
    deep = cv2.cvtColor(stored, cv2.COLOR_RGB2BGR).astype(np.uint16) * 257
    content = np.frombuffer(exif.tobytes()[6:], np.uint8)  # without the JPEG marker
    cv2.imwriteWithMetadata(str(path), deep, [cv2.IMAGE_METADATA_EXIF], [content])


def write_labelme(directory: Path, name: str, photo: Photo) -> None:
    """Write a LabelMe file: outlines on the photo as viewers rotate it."""
    scale = LARGE if photo.is_large else 1
    shapes = []
    for label, mask in photo.masks:
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        outline = max(outlines, key=len)[:, 0]
        if len(outline) > 2:
            points = ((outline + 0.5) * scale).tolist()
            shapes.append({"label": label, "points": points, "shape_type": "polygon", "group_id": None, "flags": {}})
    height, width = (side * scale for side in photo.masks[0][1].shape)
    content = {"version": "5.5.0", "imagePath": name, "imageData": None, "imageHeight": height, "imageWidth": width}
    (directory / f"{Path(name).stem}.json").write_text(json.dumps(content | {"flags": {}, "shapes": shapes}))


def write_coco(path: Path, photos: dict[str, Photo]) -> None:
    """Write COCO annotations of the stored pixels, like programs that ignore the orientation."""
    images, annotations, labels = [], [], sorted({label for photo in photos.values() for label, _ in photo.masks})
    for number, (name, photo) in enumerate(photos.items(), start=1):
        for label, mask in photo.masks:
            stored = turn_back(mask, photo.orientation)
            rle = encode_mask(stored)
            segmentation = {"size": list(stored.shape), "counts": rle["counts"].decode()}
            found = {"id": len(annotations) + 1, "image_id": number, "category_id": labels.index(label) + 1}
            annotations.append(found | {"iscrowd": 0, "segmentation": segmentation})
        images.append({"id": number, "file_name": name, "height": stored.shape[0], "width": stored.shape[1]})
    categories = [{"id": number, "name": label} for number, label in enumerate(labels, start=1)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def write_arm(root: Path, arm: str, num_train: int, num_held_out: int, large: bool = True) -> None:
    """Write the photos of an arm and their annotations: train and held_out, half of them for each tool."""
    for seed, (split, number) in enumerate({"train": num_train, "held_out": num_held_out}.items()):
        by_tool = {"labelme": {}, "coco": {}}
        for index in range(number):
            is_deep = index in (2, 7, 12)
            is_large = large and split == "train" and index == 5
            photo = draw_photo(seed, index, is_deep=is_deep, is_large=is_large)
            if arm == "upright":
                photo.orientation = 1
            tool = "labelme" if index < number // 2 else "coco"
            by_tool[tool][f"{index:02d}.{'png' if is_deep else 'jpg'}"] = photo
        for tool, photos in by_tool.items() if number else ():
            directory = root / arm / split / tool
            directory.mkdir(parents=True, exist_ok=True)
            for name, photo in photos.items():
                write_image(directory / name, photo)
                if tool == "labelme":
                    write_labelme(directory, name, photo)
            if tool == "coco":
                write_coco(directory / "annotations.json", photos)


def sources(root: Path, arm: str, split: str) -> dict[str, dict]:
    """Return the `sources` or `eval_sources` of a recipe."""
    directory = root / arm / split
    labelme = {"builder": "labelme", "annotations": str(directory / "labelme")}
    images = directory / "coco"
    coco = {"builder": "coco_instances", "annotations": str(images / "annotations.json"), "images": str(images)}
    return {"labelme": labelme, "coco": coco}


def train_and_evaluate(model: str, root: Path, arm: str, seed: int, max_steps: int) -> list:
    """Fine-tune a model on the photos of an arm; return the scores of the questions about the held-out ones."""
    run, evaluation = root / f"{arm}_{seed}", root / f"{arm}_{seed}_evaluation"
    config = [f"--config={RECIPES}/configs/quickstart.yaml", "--vlm_config=null", "--mask_config=null"]
    shared = ["--use_cpu=true", "--report_to=none", "--disable_tqdm=true"]
    train = [
        *(sys.executable, str(RECIPES / "train.py"), *config, f"--model={model}", f"--output_dir={run}"),
        *("--sources", json.dumps(sources(root, arm, "train")), "--eval_sources=null", f"--seed={seed}"),
        *(f"--max_steps={max_steps}", "--warmup_steps=10", "--per_device_train_batch_size=4", "--learning_rate=3e-4"),
        *("--muon_learning_rate=0.001", f"--mask_loss_points={SIDE * SIDE}", "--overwrite_output_dir", *shared),
    ]
    evaluate = [
        *(sys.executable, str(RECIPES / "eval.py"), str(run), f"--protocols={PROTOCOL}", f"--output_dir={evaluation}"),
        *("--eval_sources", json.dumps(sources(root, arm, "held_out")), "--overwrite", *shared),
    ]
    for command in (train, evaluate):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = [read_scores(evaluation / f"scores_{tool}.jsonl")[PROTOCOL] for tool in ("labelme", "coco")]
    # Ids of images and questions are unique over all seeds and tools.
    return [
        dataclasses.replace(
            score, question_id=f"{seed}/{tool}/{score.question_id}", image_id=f"{seed}/{tool}/{score.image_id}"
        )
        for tool, scores in zip(("labelme", "coco"), found)
        for score in scores
    ]


def giou(scores: list) -> float:
    """Return the mean IoU of all masks."""
    return float(np.mean([i / u for score in scores for i, u in zip(score.intersections, score.unions) if u]))


def compare(arms: dict[str, list]) -> Comparison:
    """Return how the scores on photos as phones store them differ from those on upright ones."""
    return compare_scores(arms["upright"], arms["turned"], PROTOCOLS[PROTOCOL])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="trained model, such as outputs/quickstart")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--max_steps", type=int, default=150)
    parser.add_argument("--num_train", type=int, default=20)
    parser.add_argument("--num_held_out", type=int, default=24)
    args = parser.parse_args()
    for arm in ARMS:
        write_arm(args.output_dir, arm, args.num_train, args.num_held_out)
    arms = {arm: [] for arm in ARMS}
    print("| seed | gIoU upright | gIoU rotated | difference (95% interval) |\n|---|---:|---:|---|")
    for seed in args.seeds:
        scored = {arm: train_and_evaluate(args.model, args.output_dir, arm, seed, args.max_steps) for arm in ARMS}
        print(_line(str(seed), scored), flush=True)
        arms = {arm: arms[arm] + scored[arm] for arm in ARMS}
    print(_line("all", arms))


def _line(name: str, arms: dict[str, list]) -> str:
    value, low, high = compare(arms).giou
    numbers = " | ".join(f"{giou(arms[arm]):.4f}" for arm in ARMS)
    return f"| {name} | {numbers} | {value:+.4f} ({low:+.4f} to {high:+.4f}) |"


if __name__ == "__main__":
    main()
