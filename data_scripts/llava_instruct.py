"""LLaVA-Instruct-150k: conversations about COCO photos (LLaVA, arXiv 2304.08485), without masks.

    from data_scripts import load_source
    rows = load_source("llava_instruct", data_dir="dataset")

Mirrors the VQA dataset of the original.
"""

import os

from lisa_hf.data.rows import make_row

from .coco import CocoBuilder
from .source import errors_naming, join_inside, read_json


ROLES = {"human": "user", "gpt": "assistant"}


class LlavaInstruct(CocoBuilder):
    """LLaVA-Instruct-150k: 157712 conversations about photos of COCO train2017.

    One row per conversation. Split: train.

        <data_dir>/
            llava_dataset/llava_instruct_150k.json
            coco/train2017/*.jpg
    """

    SOURCE = "llava_instruct"
    DOWNLOAD_PAGE = "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K"
    LICENSE = "CC BY-NC 4.0, and OpenAI's terms of use; photos: Flickr's terms of use."

    def annotation_files(self, data_dir):
        self.find(data_dir, "coco/train2017")
        return [self._find_conversations(data_dir), *self.held_out_files(data_dir)]

    def _find_conversations(self, data_dir):
        return self.find(data_dir, "llava_dataset/llava_instruct_150k.json")

    def photo(self, record):
        _, conversation = record
        return conversation.get("image", "")

    def read_records(self, data_dir):
        path = self._find_conversations(data_dir)
        conversations = read_json(path)
        with errors_naming(path):
            # Conversations about the same photo share an id, so the position identifies them.
            return {"train": list(enumerate(conversations))}

    def make_row(self, record):
        index, conversation = record
        directory = self.find(self.config.data_dir, "coco/train2017")
        with errors_naming(f"{self._find_conversations(self.config.data_dir)!r}, record {index}"):
            turns = conversation["conversations"]
            if turns and turns[0]["from"] == "gpt":
                turns = turns[1:]  # an answer without a question, which the original drops too
            name = conversation["image"]
            return make_row(
                image=join_inside(directory, name),
                image_id=os.path.splitext(name)[0],
                source=self.source,
                task="vqa",
                messages=[{"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns],
            )
