"""Predictions as JSON Lines, one question per line, which anyone can write and [`score_predictions`] reads:

    question_id             id of the image and number of the question about it, "000000123_0"
    image_id                id of the image within its source
    question                what was asked
    text                    the model's own answer
    masks                   masks in this answer, as the compressed RLE of pycocotools: dicts of `size` and `counts`
    scores                  the model's own estimate of each mask's IoU, if it has one
    teacher_forced_masks    masks decoded from the true answer

All metrics are computed from such a file, so an evaluation can be interrupted, and masks from other programs are
scored in the same way.
"""

import json
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.utils.data import Subset
from transformers import Trainer

from ..data.images import read_file
from ..data.masks import Mask, encode_mask, rle_size
from ..data.mixture import EvaluationDataset
from ..data.prompts import Question
from ..files import atomic_file
from ..model.images import open_image
from ..model.pipeline_lisa import Answer


logger = logging.getLogger(__name__)


@dataclass
class QuestionPrediction:
    """The prediction for a question.

    Args:
        text: The model's own answer.
        masks: Masks in this answer; None if there is none.
        teacher_forced_masks: Masks that were decoded from the true answer; None if there are none.
    """

    text: str = ""
    masks: list[Mask] | None = None
    teacher_forced_masks: list[Mask] | None = None


def question_ids(image_id: str, number: int) -> list[str]:
    """Return the ids of this many questions about an image."""
    return [f"{image_id}_{index}" for index in range(number)]


def iterate_questions(dataset: EvaluationDataset) -> Iterator[tuple[dict, str, dict[str, Question]]]:
    """Iterate over rows, without reading images: the row, the image's id, and the questions by their ids."""
    for image_id, row in zip(dataset.image_ids, dataset.rows.remove_columns("image")):
        questions = dataset.questions(row)
        yield row, image_id, dict(zip(question_ids(image_id, len(questions)), questions))


# ---- predictions of a model -----------------------------------------------------------------------------------------


class PredictionWriter:
    """Appends predictions to a file, batch by batch.

    Args:
        path: The file. If a process was killed while writing, it may end with an incomplete line.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a", encoding="utf-8")
        if self.file.tell():
            self.file.write("\n")

    def write(
        self,
        image_ids: list[str],
        image_indices: torch.Tensor,
        masks_due: torch.Tensor,
        teacher_forced: list[torch.Tensor],
        answers: list[Answer] | None,
    ) -> None:
        """Append the answers to all N questions about B images.

        Args:
            image_ids: Ids of the B images.
            image_indices: Index of each question's image, `(N,)`.
            masks_due: Number of masks that each question asks for, `(N,)`.
            teacher_forced: Masks decoded from the true answers, B bool tensors `(M_b, H_b, W_b)`.
            answers: The model's own N answers, if it gave any.
        """
        for image, image_id in enumerate(image_ids):
            rows = (image_indices == image).nonzero().flatten().tolist()
            given = teacher_forced[image].split(masks_due[rows].tolist())
            for question_id, row, masks in zip(question_ids(image_id, len(rows)), rows, given):
                prediction = {"question_id": question_id, "image_id": image_id}
                if answers is not None:
                    scores = [round(score, 4) for score in answers[row].scores.tolist()]
                    prediction |= {"text": answers[row].text, "masks": _encode(answers[row].masks), "scores": scores}
                prediction["teacher_forced_masks"] = _encode(masks)
                self.file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
        self.file.flush()


def predict_benchmark(trainer: Trainer, dataset: EvaluationDataset, path: Path) -> None:
    """Write answers to all questions of a dataset to a file, resuming an interrupted call.

    Every process must call it, and all must see the same directory.

    Args:
        trainer: A [`LisaTrainer`]; with `args.eval_generate` the model also answers by itself.
        dataset: The dataset.
        path: The file. Until all questions are answered, each process appends to its own file in a directory next to
            it.
    """
    if path.exists():
        return
    parts = path.with_suffix(".incomplete")
    answered = _read_parts(parts)
    todo = [
        index
        for index, (_, _, questions) in enumerate(iterate_questions(dataset))
        if not questions.keys() <= answered.keys()
    ]
    if answered and trainer.is_world_process_zero():
        logger.info("%d of %d images are answered already.", len(dataset) - len(todo), len(dataset))
    trainer.accelerator.wait_for_everyone()  # before anything is written: all processes must find the same images
    if todo:
        trainer.prediction_writer = PredictionWriter(parts / f"{trainer.args.process_index}.jsonl")
        trainer.predict(Subset(dataset, todo))
        trainer.prediction_writer.file.close()
        trainer.prediction_writer = None
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        _merge_parts(parts, dataset, path)


def _read_parts(parts: Path) -> dict[str, dict]:
    """Read the answers of all processes, without the incomplete lines of killed ones."""
    found = {}
    for file in sorted(parts.glob("*.jsonl")):
        for line in file.read_text("utf-8").split("\n"):
            try:
                prediction = json.loads(line)
            except json.JSONDecodeError:
                continue
            # A loader that pads its last batch answers some questions twice.
            found.setdefault(prediction["question_id"], prediction)
    return found


def _merge_parts(parts: Path, dataset: EvaluationDataset, path: Path) -> None:
    """Merge the files of all processes into one, in the order of the dataset, and remove them."""
    answered = _read_parts(parts)
    with atomic_file(path) as incomplete, open(incomplete, "w", encoding="utf-8") as file:
        for _, _, questions in iterate_questions(dataset):
            for name, question in questions.items():
                if name not in answered:
                    raise ValueError(
                        f"{path}: expected an answer to {name}, got none. If there are several machines, let "
                        "--output_dir be a directory that all of them share."
                    )
                prediction = {"question_id": name, "image_id": "", "question": question.prompt} | answered[name]
                file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
    for file in parts.glob("*.jsonl"):
        file.unlink()
    parts.rmdir()


def _encode(masks: torch.Tensor) -> list[dict[str, Any]]:
    """Encode masks `(M, H, W)` bool as JSON values."""
    found = [encode_mask(mask) for mask in masks.cpu().numpy()]
    return [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in found]


# ---- predictions of anyone ------------------------------------------------------------------------------------------


def export_questions(path: Path, datasets: dict[str, EvaluationDataset], overwrite: bool = False) -> int:
    """Write the questions of benchmarks for another program to answer, and return their number.

    Args:
        path: JSON Lines file. A line has `benchmark`, `question_id`, `image_id`, `image` (path of the file),
            `question` (what LISA is asked), `phrase` (the text in it; empty in conversations), `texts` (what the
            phrase is among, see [`~lisa_hf.data.prompts.TEXTS`]) and `messages` (the whole conversation). Images that
            are not separate files are written to a directory next to the file.
        datasets: Datasets by the name of the benchmark.
        overwrite: Whether to replace the file.

    Raises:
        ValueError: If the file exists.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"--export_questions: expected a new file, got {path}. Name another, or add --overwrite.")
    num_questions = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as incomplete, open(incomplete, "w", encoding="utf-8") as file:
        for benchmark, dataset in datasets.items():
            for index, (_, image_id, questions) in enumerate(iterate_questions(dataset)):
                row = dataset.rows[index]
                image = row["image"]["path"]
                if row["image"]["bytes"] is not None or not os.path.isfile(image):
                    image = _write_image(read_file(row), path.with_suffix("") / f"{benchmark}_{index:06d}")
                for name, question in questions.items():
                    line = {
                        "benchmark": benchmark,
                        "question_id": name,
                        "image_id": image_id,
                        "image": os.path.abspath(image),
                        "question": question.prompt,
                        "phrase": question.phrase,
                        "texts": sorted(question.texts),
                        "messages": question.messages[:-1],
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    num_questions += 1
    return num_questions


def _write_image(content: bytes, path: Path) -> Path:
    path = path.with_suffix(f".{open_image(content).format.lower()}")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def find_predictions(path: Path, benchmark: str) -> Path:
    """Return the path of the predictions for one benchmark: `path` itself, or what is named after it in `path`."""
    for name in (f"predictions_{benchmark}.jsonl", f"{benchmark}.jsonl", benchmark):
        if (path / name).exists():
            return path / name
    return path


def read_predictions(
    path: Path, dataset: EvaluationDataset, missing_as_empty: bool = False, benchmark: str | None = None
) -> dict[str, QuestionPrediction]:
    """Read and check predictions for the questions of a dataset.

    Args:
        path: A JSON Lines file, see this module, or a directory of masks as `QUESTION_ID.png`. A line needs `masks`
            and names its question: by `question_id`, by `image_id` and `question` (the text asked with, or the phrase
            in it), or by an `image_id` that has one question. Masks may also be uncompressed RLE, or paths of PNG
            files, relative to the JSON Lines file.
        dataset: The dataset.
        missing_as_empty: Whether a question without a prediction counts as answered without a mask.
        benchmark: Name of the dataset. Lines of another `benchmark` are skipped.

    Returns:
        Predictions by the id of the question. All of them have masks of the same kinds.

    Raises:
        ValueError: If predictions are missing, of another size than their image, or damaged.
    """
    rows = list(iterate_questions(dataset))
    names = _QuestionNames(rows)
    sizes = {name: _size(row, questions) for row, _, questions in rows for name in questions}
    found, unknown, others, reworded = {}, [], Counter(), []
    for where, prediction in _iterate_directory(path) if path.is_dir() else _iterate_lines(path):
        if benchmark is not None and (other := prediction.get("benchmark", benchmark)) != benchmark:
            others[str(other)] += 1
            continue
        name = names.find(prediction)
        if name is None:
            unknown.append(where)
            continue
        if name in found:
            raise ValueError(f"{where}: expected one prediction per question, got a second one for {name}.")
        if not names.is_asked(name, prediction):
            reworded.append(f"{name} with {prediction['question']!r}")
        found[name] = _parse(prediction, path.parent, sizes[name], where)
    missing = [name for name in sizes if name not in found]
    if unknown:
        logger.warning(
            "%s: %d of %d predictions match no question of this benchmark, such as %s. They are skipped.",
            *(path, len(unknown), len(unknown) + len(found), unknown[0]),
        )
    if reworded:
        logger.warning(
            "%s: %d of %d predictions name another question than this benchmark asks, such as %s. Check that they "
            "are for it.",
            *(path, len(reworded), len(found), reworded[0]),
        )
    if missing and not missing_as_empty:
        elsewhere = f" {others.total()} are for other benchmarks ({', '.join(others)})." if others else ""
        raise ValueError(
            f"{path}: expected a prediction for each of {len(sizes)} questions, got none for {len(missing)}, such as "
            f"{missing[0]}.{elsewhere} See --export_questions for all ids, or count them as empty with "
            "--missing_as_empty."
        )
    if missing:
        message = "%s: %d of %d questions have no prediction, and count as answered without a mask."
        logger.warning(message, path, len(missing), len(sizes))
    for kind in ("masks", "teacher_forced_masks"):
        lacking = [name for name, prediction in found.items() if getattr(prediction, kind) is None]
        if 0 < len(lacking) < len(found):
            raise ValueError(f"{path}: expected `{kind}` for all questions or none, got none for {lacking[0]}.")
        if not lacking:
            for name in missing:
                found.setdefault(name, QuestionPrediction())
                setattr(found[name], kind, [])
    return found


class _QuestionNames:
    """Finds the question that a prediction is about. Texts and ids are compared in one Unicode form."""

    def __init__(self, rows: list[tuple[dict, str, dict[str, Question]]]):
        self.ids, self.by_text, self.by_image, self.texts = {}, {}, {}, {}
        for _, image_id, questions in rows:
            image_id = _one_form(image_id)
            self.by_image[image_id] = next(iter(questions)) if len(questions) == 1 else None
            for name, question in questions.items():
                self.ids[_one_form(name)] = name
                self.texts[name] = {_one_form(text) for text in (question.prompt, question.phrase)} - {""}
                for text in self.texts[name]:
                    # Two objects may have the same name: such a text identifies neither.
                    key = image_id, text
                    self.by_text[key] = None if key in self.by_text else name

    def find(self, prediction: dict) -> str | None:
        if (name := prediction.get("question_id")) is not None:
            name = _one_form(name)
            return self.ids.get(name) or self.by_image.get(name)
        image_id, question = _one_form(prediction.get("image_id")), prediction.get("question")
        if question is None:
            return self.by_image.get(image_id)
        return self.by_text.get((image_id, _one_form(question)))

    def is_asked(self, name: str, prediction: dict) -> bool:
        """Return whether a prediction names no other text than its question's."""
        return not prediction.get("question") or _one_form(prediction["question"]) in self.texts[name]


def _one_form(text: Any) -> str:
    # File systems and editors write letters with accents as one character or as two.
    return unicodedata.normalize("NFC", str(text)).strip()


def _parse(prediction: dict, directory: Path, size: tuple[int, int] | None, where: str) -> QuestionPrediction:
    masks = {
        kind: [_read_mask(mask, directory, size, where) for mask in prediction[kind]]
        for kind in ("masks", "teacher_forced_masks")
        if kind in prediction
    }
    if not masks:
        raise ValueError(f"{where}: expected `masks`, a list of RLEs, got none.")
    return QuestionPrediction(str(prediction.get("text", "")), **masks)


def _iterate_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Iterate over the objects of a JSON Lines file, each with its location."""
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            prediction = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: expected JSON, got {error}.") from error
        masks = prediction.get("masks", []) if isinstance(prediction, dict) else None
        if not isinstance(masks, list) or not isinstance(prediction.get("teacher_forced_masks", []), list):
            raise ValueError(f"{where}: expected an object with a list of `masks`, got {line.strip()[:80]}.")
        yield where, prediction


def _read_lines(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--predictions: expected a JSON Lines file or a directory of PNG masks, got {error}."
        ) from error


def _iterate_directory(path: Path) -> Iterator[tuple[str, dict]]:
    for file in sorted(path.rglob("*.png")):
        name = file.relative_to(path).with_suffix("").as_posix()
        yield str(file), {"question_id": name, "masks": [str(file.absolute())]}


def _size(row: dict, questions: dict[str, Question]) -> tuple[int, int] | None:
    """Return the size [H, W] of a row's masks, if it has any."""
    for question in questions.values():
        for mask in question.masks:
            return mask.size
    return rle_size(row["ignore"]) if row["ignore"] is not None else None


def _read_mask(mask: Any, directory: Path, size: tuple[int, int] | None, where: str) -> Mask:
    """Read a mask: RLE, compressed or not, or the path of a PNG file."""
    try:
        if isinstance(mask, str):
            found = _read_png(directory / mask)
        elif isinstance(mask, dict) and isinstance(mask.get("counts"), str | list) and len(mask.get("size", ())) == 2:
            found = _read_rle(mask)
        else:
            raise ValueError(f"expected a mask as RLE or as path of a PNG file, got {str(mask)[:80]}.")
    # Pillow raises a SyntaxError where the content of a PNG file is none.
    except (ValueError, TypeError, OverflowError, OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: {error}") from error
    if size is not None and found.size != tuple(size):
        raise ValueError(
            f"{where}: expected masks of the image's {size[0]} x {size[1]} pixels (height x width), got one of "
            f"{found.size[0]} x {found.size[1]}. Resize masks to the upright image."
        )
    return found


def _read_rle(rle: dict) -> Mask:
    height, width = (int(side) for side in rle["size"])
    if isinstance(rle["counts"], str):
        return Mask.from_rle({"size": [height, width], "counts": rle["counts"].encode()})
    runs = np.array(rle["counts"], dtype=np.int64)
    if (
        runs.ndim != 1
        or runs.min(initial=0) < 0
        or runs.max(initial=0) > height * width
        or runs.sum() != height * width
    ):
        raise ValueError(f"expected RLE counts of {height * width} pixels, got {runs.sum()}.")
    return Mask((height, width), runs.cumsum().astype(np.int32))


def _read_png(path: Path) -> Mask:
    with PIL.Image.open(path) as image:
        pixels = np.asarray(image)
    if pixels.ndim != 2:
        raise ValueError(f"{path}: expected a mask with one channel, got the mode {image.mode}. Save it in grayscale.")
    return Mask.from_rle(encode_mask(pixels != 0))
