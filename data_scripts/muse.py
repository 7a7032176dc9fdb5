"""MUSE: questions about several objects, whose answers name each object with its mask (PixelLM, arXiv 2312.02228).

    from data_scripts import load_source
    rows = load_source("muse", data_dir="dataset", split="val")

Mirrors PixelLM's `MultiReasonSegDataset`, with one `[SEG]` per object.
"""

import os
from typing import Any

from lisa_hf.data.prompts import EVALUATION_LONG_QUESTION
from lisa_hf.data.rows import make_row
from lisa_hf.model.processing_lisa import SEG_TOKEN

from .coco import CocoBuilder
from .segmentation import encode_segmentation
from .source import errors_naming, join_inside, read_json


SPLITS = ("train", "val", "test_less", "test_many")


class Muse(CocoBuilder):
    """MUSE: about 246000 questions whose answers have several masks. One row per question.

    Splits: train, val, test_less with few objects per answer, test_many, if their files exist.

        <data_dir>/
            muse/muse_train.json
            muse/muse_val.json
            muse/muse_test_less.json
            muse/muse_test_many.json
            coco/train2017/*.jpg            or, as PixelLM has them, in refer_seg/images/mscoco/images
            coco/val2017/*.jpg
    """

    SOURCE = "muse"
    DOWNLOAD_PAGE = "https://github.com/MaverickRen/PixelLM#muse-dataset"
    LICENSE = "The questions: Apache-2.0 as the repository; photos: Flickr's terms of use."

    def annotation_files(self, data_dir):
        return [*self._find_files(data_dir).values(), *self.held_out_files(data_dir)]

    def _find_files(self, data_dir: str | None) -> dict[str, str]:
        directory = self.find(data_dir, "muse")
        paths = {split: os.path.join(directory, f"muse_{split}.json") for split in SPLITS}
        found = {split: path for split, path in paths.items() if os.path.exists(path)}
        if not found:
            raise FileNotFoundError(f"MUSE: expected {list(paths.values())}, got none of them. Download them.")
        return found

    def photo(self, record):
        return os.path.basename(record["image"].get("file_name", record["image"].get("coco_url", "")))

    def read_records(self, data_dir):
        records = {}
        for split, path in self._find_files(data_dir).items():
            images = read_json(path)
            with errors_naming(path):
                records[split] = [
                    {"file": path, "image": image, "number": number}
                    for image in images
                    for number in range(len(image.get("questions") or ()))
                ]
        return records

    def make_row(self, record):
        image, number = record["image"], record["number"]
        with errors_naming(
            f"{record['file']!r}, image {image.get('file_name', image.get('coco_url'))}, question {number}"
        ):
            objects = image["answers"][number]
            if not objects:
                return None
            question = EVALUATION_LONG_QUESTION.format(phrase=image["questions"][number].strip()).strip()
            texts = image.get("text_answers") or []
            answer = _write_answer(texts[number] if number < len(texts) else None, objects)
            if answer is None:
                self.pass_over("questions whose answer does not have one mask per object")
                return None
            size = image["height"], image["width"]
            return make_row(
                image=self._find_image(_image_name(image)),
                image_id=os.path.splitext(self.photo(record))[0],
                source=self.source,
                task="conversation",
                targets=[{"rle": encode_segmentation(found["segmentation"], *size)} for found in objects],
                messages=[{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            )

    def _find_image(self, name: str) -> str:
        """Return the path of a photo in LISA's directories, or else in PixelLM's."""
        path = join_inside(os.path.join(self.config.data_dir, "coco"), name)
        pixel_lm = join_inside(os.path.join(self.config.data_dir, "refer_seg", "images", "mscoco", "images"), name)
        return pixel_lm if os.path.exists(pixel_lm) and not os.path.exists(path) else path


def _image_name(image: dict[str, Any]) -> str:
    """Return the directory and name of a COCO photo: "train2017/000000000139.jpg"."""
    if "file_name" in image:
        return f"train2014/{image['file_name']}"
    directory, _, name = image["coco_url"].rpartition("/")
    return f"{directory.rpartition('/')[2]}/{name}"


def _write_answer(text: str | None, objects: list[dict[str, Any]]) -> str | None:
    """Return the answer with a `[SEG]` per object, in order, or None if the recorded answer has a different number.

    Args:
        text: Recorded answer, with "{seg}" after each object. If None, the objects are listed.
        objects: Annotations with a `rephrased_name` or a `category_name`.
    """
    if text is not None:
        return text.replace("{seg}", SEG_TOKEN) if text.count("{seg}") == len(objects) else None
    names = [found.get("rephrased_name") or found["category_name"] for found in objects]
    *others, last = [f"the {name} {SEG_TOKEN}" for name in names]
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"{listed[0].upper()}{listed[1:]}."
