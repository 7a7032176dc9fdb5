"""Images, masks, and a list of questions or conversations about them in JSON Lines.

sources:
  damage: {builder: image_folder, questions: damage/train.jsonl, images: damage/photos, masks: damage/masks}
"""

import dataclasses
import json
from typing import Any

import numpy as np

from lisa_hf.data.masks import encode_mask
from lisa_hf.data.rows import make_row

from .file_names import list_images
from .orientation import read_orientation
from .own_data import OwnData, OwnDataConfig
from .segmentation import read_mask
from .source import errors_naming, read_image_size
from .text import read_text


@dataclasses.dataclass
class ImageFolderConfig(OwnDataConfig):
    """Options of an image folder.

    Args:
        questions: Path of the JSON Lines file.
        images: Directory of the images.
        masks: Directory of the masks.
    """

    questions: str = ""
    images: str = ""
    masks: str = ""


class ImageFolder(OwnData):
    """Images, masks, and a list of questions about them. One row per line of the list, with one target.

    questions   JSON Lines: {"image": "a.jpg", "mask": "a.png", "question": "What could break?"}
                or {..., "phrase": "the cracked wheel"}; a list of either: they are interchangeable;
                optional "explanation": why the mask answers the question;
                or {"image": "a.jpg", "messages": [{"role": "user", "content": "What is broken?"}, {"role":
                "assistant", "content": "The wheel [SEG]."}], "masks": ["a.png"]}: a mask per [SEG], in their order
    images      the directory of the images
    masks       the directory of the masks: images of the photo's size with 0 for the background and one other value;
                255 in addition to a smaller value is ignored
    """

    BUILDER_CONFIG_CLASS = ImageFolderConfig

    def annotation_files(self, data_dir):
        directories = {self.locate(data_dir, "images"), self.locate(data_dir, "masks")}
        return [
            self.locate(data_dir, "questions"),
            *(file for name in sorted(directories) for file in list_images(name)),
        ]

    def read_records(self, data_dir):
        lines = read_text(self.locate(data_dir, "questions"), self.config.encoding).split("\n")
        return {self.config.split: [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]}

    def make_row(self, record):
        number, line = record
        data_dir = self.config.data_dir
        with errors_naming(f"{self.locate(data_dir, 'questions')!r}, line {number}"):
            record = json.loads(line)
            if "messages" in record:
                return self._make_conversation(record)
            is_sentence = "question" in record
            phrases = record["question" if is_sentence else "phrase"]
            image = self.find_image(self.locate(data_dir, "images"), record["image"])
            mask, ignore = self._read_mask(image, record["mask"])
            row = make_row(
                image=image,
                image_id=record["image"],
                source=self.source,
                task="reasoning" if is_sentence else "referring",
                targets=[{"phrases": phrases if isinstance(phrases, list) else [phrases], "rle": encode_mask(mask)}],
                ignore=None if ignore is None else encode_mask(ignore),
                is_sentence=is_sentence,
                explanation=record.get("explanation"),
            )
            return self.turn_upright(row)

    def _read_mask(self, image: str, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a mask and what it ignores, of the size of its image."""
        mask, ignore = read_mask(self.find_image(self.locate(self.config.data_dir, "masks"), name))
        _, sizes = read_orientation(image)
        if mask.shape not in sizes.values():
            size = sizes["display"]
            raise ValueError(f"expected a mask of the image's size {size} (height, width), got {mask.shape}.")
        return mask, ignore

    def _make_conversation(self, record: dict[str, Any]) -> dict[str, Any]:
        image = self.find_image(self.locate(self.config.data_dir, "images"), record["image"])
        masks = [self._read_mask(image, name) for name in record.get("masks", [])]
        ignored = [ignore for _, ignore in masks if ignore is not None]
        row = make_row(
            image=image,
            image_id=record["image"],
            source=self.source,
            task="conversation",
            targets=[{"rle": encode_mask(mask)} for mask, _ in masks],
            ignore=encode_mask(np.any(ignored, axis=0)) if ignored else None,
            messages=record["messages"],
        )
        return self.turn_upright(row)

    def annotated_size(self, record):
        line = json.loads(record[1])
        data_dir = self.config.data_dir
        image = self.find_image(self.locate(data_dir, "images"), line["image"])
        masks = line.get("masks", []) if "messages" in line else [line["mask"]]
        if not masks:
            return image, None
        return image, read_image_size(self.find_image(self.locate(data_dir, "masks"), masks[0]))
