"""Answers as files: for a script, for labeling tools, for a person."""

import base64
import io
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import PIL.ImageOps
from pycocotools import mask as coco_mask
from tqdm import tqdm

from ..data.masks import decode_mask, encode_mask
from ..evaluation.visualization import overlay_masks
from ..files import atomic_directory, atomic_file
from ..model.images import load_image
from ..model.pipeline_lisa import Answer
from .conversation import Conversation


OVERLAY_SIDE = 2048  # pixels of the longer side of an overlay, at most
Format = Literal["masks", "coco", "labelme", "jsonl"]


def answer_record(image: str, question: str, answer: Answer, label: str | None = None) -> dict[str, Any]:
    """Return an answer as JSON values, with its masks as pycocotools' compressed RLE.

    Args:
        image: Name or path of the image.
        question: What was asked.
        answer: The answer.
        label: Label of its masks in labeling tools. Default: the question.
    """
    height, width = answer.masks.shape[1:]
    masks = [encode_mask(mask) for mask in answer.masks.numpy()]
    return {
        "image": image,
        "height": height,
        "width": width,
        "question": question,
        "label": label or question,
        "text": answer.text,
        "masks": [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in masks],
        "scores": [round(score, 4) for score in answer.scores.tolist()],
    }


def record_masks(record: dict[str, Any]) -> np.ndarray:
    """Return the masks of a record, `(M, H, W)` bool."""
    masks = [decode_mask({**rle, "counts": rle["counts"].encode()}) for rle in record["masks"]]
    return np.array(masks, dtype=bool).reshape(-1, record["height"], record["width"])


def to_labelme(records: list[dict[str, Any]], image_path: str) -> dict[str, Any]:
    """Return a LabelMe file with the masks of all answers about one image, each as a shape of type `mask`.

    Args:
        records: Answers about the image, see [`answer_record`].
        image_path: Path of the image, relative to the file's directory.
    """
    shapes = []
    for record in records:
        for mask in record_masks(record):
            if not mask.any():
                continue
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            top, left, bottom, right = (int(edge) for edge in (rows[0], columns[0], rows[-1], columns[-1]))
            file = io.BytesIO()
            PIL.Image.fromarray(mask[top : bottom + 1, left : right + 1]).save(file, "PNG")
            shapes.append(
                {
                    "label": record["label"],
                    "points": [[left, top], [right, bottom]],  # both inside the mask's box
                    "group_id": None,
                    "description": record["text"],
                    "shape_type": "mask",
                    "flags": {},
                    "mask": base64.b64encode(file.getvalue()).decode(),
                }
            )
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": image_path,
        "imageData": None,
        "imageHeight": records[0]["height"],
        "imageWidth": records[0]["width"],
    }


def to_coco(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return answers as COCO instances: one category per label, one annotation with RLE per mask."""
    labels = list(dict.fromkeys(record["label"] for record in records))
    images = {record["image"]: record for record in records}
    image_ids = {name: number for number, name in enumerate(images, start=1)}
    annotations = []
    for record in records:
        for rle, score in zip(record["masks"], record["scores"]):
            area = int(coco_mask.area(rle))
            if area == 0:
                continue
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_ids[record["image"]],
                    "category_id": labels.index(record["label"]) + 1,
                    "segmentation": rle,
                    "area": area,
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "iscrowd": 0,
                    "score": score,
                }
            )
    return {
        "images": [
            {"id": image_ids[name], "file_name": name, "height": record["height"], "width": record["width"]}
            for name, record in images.items()
        ],
        "categories": [{"id": number, "name": label} for number, label in enumerate(labels, start=1)],
        "annotations": annotations,
    }


def annotation_paths(format: Format, images: dict[str, str], num_questions: int, output_dir: Path) -> list[Path]:
    """Return the files that [`write_annotations`] writes, or the directories if it writes several files each.

    Raises:
        ValueError: If two images would share a LabelMe file.
    """
    if format == "coco":
        return [output_dir / "instances.json"]
    if format == "labelme":
        paths = {}
        for name in images:
            path = (output_dir / name).with_suffix(".json")
            if path in paths:
                raise ValueError(
                    f"expected images whose names differ in more than their suffix, as LabelMe does, got "
                    f"{paths[path]} and {name}. Rename one."
                )
            paths[path] = name
        return list(paths)
    if format == "masks":
        return [output_dir / name for name in images] if num_questions > 1 else [output_dir / "overlay.png"]
    return []


def write_annotations(
    format: Format,
    records: list[dict[str, Any]],
    images: dict[str, str],
    output_dir: Path,
    keep_edited: bool = False,
) -> list[Path]:
    """Write answers about many images in an annotation format.

    - masks: `mask_0.png`, `mask_1.png`, ... and `overlay.png`, which is reduced for large images. If there are several
      answers, each has its own directory, such as `photo.jpg/question_0`.
    - coco: `instances.json`.
    - labelme: one JSON file per image, named like the image.
    - jsonl: nothing in addition to `predictions.jsonl`.

    Args:
        format: The format.
        records: Answers, see [`answer_record`], and images that could not be read.
        images: Paths and URLs of the images by name.
        output_dir: Directory to write to.
        keep_edited: Whether to keep LabelMe files with other content, such as corrections of an earlier run.

    Returns:
        Files that were kept.
    """
    kept = []
    records = [record for record in records if "text" in record]
    by_image = {}
    for record in records:
        by_image.setdefault(record["image"], []).append(record)
    if format == "coco":
        _write_json(output_dir / "instances.json", to_coco(records))
    for name, answers in tqdm(by_image.items(), desc=f"{format} files", disable=format not in ("labelme", "masks")):
        if format == "labelme":
            path = (output_dir / name).with_suffix(".json")
            path.parent.mkdir(parents=True, exist_ok=True)
            content = to_labelme(answers, os.path.relpath(images[name], path.parent))
            if keep_edited and path.exists() and path.read_text("utf-8") != _as_json(content):
                kept.append(path)
            else:
                _write_json(path, content)
        elif format == "masks":
            image = load_image(images[name])
            for number, record in enumerate(answers):
                directory = output_dir if len(records) == 1 else output_dir / name / f"question_{number}"
                _write_pictures(directory, image, record_masks(record))
    return kept


def _as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_file(path) as incomplete:
        incomplete.write_text(_as_json(content), "utf-8")


def _write_pictures(directory: Path, image: PIL.Image.Image, masks: np.ndarray) -> None:
    """Write masks `(M, H, W)` and their overlay as PNG."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures = [PIL.Image.fromarray(mask) for mask in masks]
    for index, picture in enumerate(pictures):
        picture.save(directory / f"mask_{index}.png")
    # For a 12-megapixel photo, a full-size overlay would take longer than the answer.
    image = image.copy()
    image.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE))
    masks = [np.asarray(picture.resize(image.size, PIL.Image.Resampling.NEAREST)) for picture in pictures]
    overlay_masks(image, masks).save(directory / "overlay.png", compress_level=1)


def save_conversation(conversation: Conversation, directory: Path) -> None:
    """Save a conversation: its image, its answers in `conversation.json`, and pictures of each turn's masks.

    Raises:
        ValueError: If the directory exists and is not empty.
    """
    with atomic_directory(directory) as incomplete:
        conversation.image.save(incomplete / "image.png")
        records = [answer_record("image.png", turn.question, turn.answer) for turn in conversation.turns]
        (incomplete / "conversation.json").write_text(json.dumps(records, indent=2, ensure_ascii=False), "utf-8")
        for number, turn in enumerate(conversation.turns):
            _write_pictures(incomplete / f"turn_{number}", conversation.image, turn.answer.masks.numpy())
