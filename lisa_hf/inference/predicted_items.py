"""Predictions for display: those of recipes/eval.py next to the truth, and those of recipes/predict.py."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..data.images import load_row_image
from ..data.masks import Mask
from ..data.mixture import EvaluationDataset
from ..evaluation.benchmarks import QuestionScore
from ..evaluation.predictions import QuestionPrediction
from ..evaluation.protocols import PROTOCOLS
from ..model.images import load_image
from ..model.processing_lisa import SEG_TOKEN
from .data_items import Item, Message
from .labeling import read_records


@dataclass
class Evaluation:
    """An evaluation on one benchmark.

    Args:
        dataset: The benchmark.
        predictions: Predictions by question id.
        scores: Scores of all questions by one protocol.
        protocol: Name of the protocol in `PROTOCOLS`.
    """

    dataset: EvaluationDataset
    predictions: dict[str, QuestionPrediction]
    scores: list[QuestionScore]
    protocol: str

    def __post_init__(self):
        self.row_numbers = {row_id: number for number, row_id in enumerate(self.dataset.image_ids)}


class EvaluatedItems:
    """The questions of benchmarks, with truth and predictions side by side, worst first.

    Args:
        evaluations: Evaluations by benchmark name.
    """

    pictures = ("Truth", "Prediction")
    group_label = "Benchmark"

    def __init__(self, evaluations: dict[str, Evaluation]):
        self.evaluations = evaluations
        self.groups = list(evaluations)
        self._questions = [(name, score) for name in self.groups for score in evaluations[name].scores]
        self._ious = [_mean_iou(score) for _, score in self._questions]

    def __len__(self) -> int:
        return len(self._questions)

    def find(self, group: str | None = None, image_id: str = "", without_mask: bool = False) -> np.ndarray:
        """Return the numbers of items by ascending IoU, see [`DataItems.find`]."""
        found = [
            number
            for number, (name, score) in enumerate(self._questions)
            if group in (None, name)
            and image_id.lower() in score.image_id.lower()
            and not (without_mask and any(score.targets))
        ]
        return np.array(sorted(found, key=self._ious.__getitem__), dtype=int)

    def __getitem__(self, number: int) -> Item:
        """Read an item; one whose image cannot be read says why."""
        name, score = self._questions[number]
        evaluation = self.evaluations[name]
        prediction, protocol = evaluation.predictions[score.question_id], PROTOCOLS[evaluation.protocol]
        row = evaluation.dataset.rows[evaluation.row_numbers[score.row_id]]
        title = [f"IoU {self._ious[number]:.3f} ({evaluation.protocol})", f"{name}, question {score.question_id}"]
        if row["image"] and row["image"]["path"]:
            title.append(row["image"]["path"])
        item = Item(title)
        question = evaluation.dataset.questions(row)[int(score.question_id.rpartition("_")[2])]
        *context, answer = question.messages
        item.messages = [Message(message["role"], message["content"][-1]["text"].strip()) for message in context]
        text = answer["content"][-1]["text"].strip()
        item.messages.append(Message("assistant", text, list(range(len(question.masks))), title="Truth"))
        if prediction.text and not protocol.teacher_forced:
            numbers = list(range(prediction.text.count(SEG_TOKEN)))
            item.messages.append(Message("assistant", prediction.text, numbers, title="Prediction"))
        try:
            item.image = load_row_image(row)["image"]
            masks = prediction.teacher_forced_masks if protocol.teacher_forced else prediction.masks
            item.pictures = {"Truth": question.masks, "Prediction": masks}
            item.ignore = None if row["ignore"] is None else Mask.from_rle(row["ignore"])
        except ValueError as error:
            item.image, item.error = None, str(error)
        return item


def _mean_iou(score: QuestionScore) -> float:
    """Return the mean IoU of the masks that a question asks for; if none, 1 if none was given and 0 otherwise."""
    if not score.unions:
        return float(score.num_seg_tokens == 0)
    return float(np.mean([i / u if u else 1.0 for i, u in zip(score.intersections, score.unions)]))


class LabeledItems:
    """The answers of recipes/predict.py, in order.

    Args:
        output_dir: Its output directory, with `predictions.jsonl` and `settings.json`.

    Raises:
        ValueError: If it is from an earlier version, which did not save image paths.
    """

    pictures = ("Prediction",)
    group_label = "Question"

    def __init__(self, output_dir: Path):
        self.records = list(read_records(output_dir).values())
        self.paths = json.loads((output_dir / "settings.json").read_text("utf-8")).get("images")
        if self.paths is None:
            raise ValueError(
                f"{output_dir}: expected image paths in settings.json, got none. Run predict.py again "
                "with the same arguments: it keeps the answers."
            )
        self.groups = list(dict.fromkeys(record["question"] for record in self.records))

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def _has_mask(self) -> list[bool]:
        return [any(mask.run_ends[0] < mask.run_ends[-1] for mask in _masks(record)) for record in self.records]

    def find(self, group: str | None = None, image_id: str = "", without_mask: bool = False) -> np.ndarray:
        """Return the numbers of items, see [`DataItems.find`]. Unreadable images have no mask."""
        return np.array(
            [
                number
                for number, record in enumerate(self.records)
                if group in (None, record["question"])
                and image_id.lower() in record["image"].lower()
                and not (without_mask and self._has_mask[number])
            ],
            dtype=int,
        )

    def __getitem__(self, number: int) -> Item:
        """Read an item; one whose image cannot be read says why."""
        record = self.records[number]
        item = Item([f"Image {record['image']}", self.paths[record["image"]]])
        item.messages = [Message("user", record["question"])]
        try:
            item.image = load_image(self.paths[record["image"]])
            if "error" in record:
                raise ValueError(record["error"])
            item.pictures = {"Prediction": _masks(record)}
            item.messages.append(Message("assistant", record["text"], list(range(len(record["masks"])))))
        except ValueError as error:
            item.image, item.error = None, str(error)
        return item


def _masks(record: dict) -> list[Mask]:
    return [Mask.from_rle({**rle, "counts": rle["counts"].encode()}) for rle in record.get("masks", ())]
