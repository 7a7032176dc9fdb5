"""LISA++: answers with a mask per object, and masks within explanations and conversations (arXiv 2312.17240).

    from data_scripts import load_source
    rows = load_source("lisa_plus", data_dir="dataset", split="instance_seg")

The answers of three of its files refer to outlines by their ids, in brackets of several kinds: "the remotes
[<380|remote>, <348|remote>]", "the remote 《380|remote》", "the pizzas [pizza <107>, pizza <157>]". Each id becomes a
`[SEG]` with that outline as its mask.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

from lisa_hf.data.rows import make_row
from lisa_hf.model.processing_lisa import SEG_TOKEN

from .coco import CocoBuilder
from .segmentation import encode_visible
from .source import errors_naming, join_inside, read_image_size, read_json


SPLITS = ("instance_seg", "cot", "conversations", "caption")
PHOTO_KEYS = ("img_path", "image_path", "img_pth")
# A list of mentions in square brackets, or one mention alone.
MENTIONS = re.compile(r"\[([^\]]*)\]|([<《]\s*\d+\s*\|[^>》]*[>》])")
MENTION = re.compile(r"(\d+)\s*\|[^>》,\]]*|<\s*(\d+)\s*>")
SPEAKER = re.compile(r"<(person|robot)>:")


def answer_by_names(names: Sequence[str]) -> str:
    """Return an answer with a mask per name: "The wheel is [SEG] and the lamp is [SEG]."."""
    return f"T{join_words([f'the {name.strip()} is {SEG_TOKEN}' for name in names])[1:]}."


def join_words(words: Sequence[str]) -> str:
    """Join words to a list in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


class LisaPlus(CocoBuilder):
    """LISA++: instances, explanations, conversations and captions with masks, on photos of COCO train2017.

    Splits: instance_seg, cot, conversations, caption, if their files exist; each is the `data.json` of a
    repository.

        <data_dir>/
            lisa_plus/instance_seg.json     LISA_Plus_Instance_Seg; cot.json, conversations.json, caption.json
            coco/train2017/*.jpg
    """

    SOURCE = "lisa_plus"
    DOWNLOAD_PAGE = "https://huggingface.co/collections/Senqiao/lisa-67713837a32d6abf516a162e"
    LICENSE = "The texts: Apache-2.0; photos: Flickr's terms of use."

    def annotation_files(self, data_dir):
        self.find(data_dir, "coco/train2017")
        found = [path for path in self._paths(data_dir).values() if os.path.exists(path)]
        return [*(found or [self.find(data_dir, "lisa_plus/instance_seg.json")]), *self.held_out_files(data_dir)]

    def _paths(self, data_dir: str) -> dict[str, str]:
        return {split: os.path.join(data_dir, f"lisa_plus/{split}.json") for split in SPLITS}

    def photo(self, record):
        _, _, sample = record
        return next((sample[key] for key in PHOTO_KEYS if key in sample), "")

    def read_records(self, data_dir):
        records = {}
        for split, path in self._paths(data_dir).items():
            if os.path.exists(path):
                samples = read_json(path)
                with errors_naming(path):
                    records[split] = [(split, index, sample) for index, sample in enumerate(samples)]
        return records

    def make_row(self, record):
        split, index, sample = record
        with errors_naming(f"'{split}.json', record {index}"):
            name = self.photo(record)
            photo = join_inside(self.find(self.config.data_dir, "coco/train2017"), name)
            if not os.path.exists(photo):
                raise ValueError(f"expected the photo {photo!r}, which does not exist. Download COCO train2017.")
            outlines = _encode_outlines(sample.get("points", sample.get("info", {})), *read_image_size(photo))
            make_turns = self._instance_turns if split == "instance_seg" else self._turns
            turns, ids = make_turns(sample, outlines)
            return make_row(
                image=photo,
                image_id=os.path.splitext(os.path.basename(name))[0],
                source=self.source,
                task="conversation",
                targets=[{"rle": outlines[number]} for number in ids],
                messages=[{"role": role, "content": text} for role, text in turns],
            )

    def _instance_turns(self, sample: dict, outlines: dict[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
        """Return a question and an answer with the names of the objects, and the ids of their outlines."""
        ids = self._with_outline([str(number) for number in sample["ID"]], outlines)
        if not ids:
            raise ValueError(f"expected an object with an outline, got the ids {sample['ID']}.")
        answer = answer_by_names([sample["points"][number]["label name"] for number in ids])
        return [("user", sample["English Question"]), ("assistant", answer)], ids

    def _turns(self, sample: dict, outlines: dict[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
        """Return the turns of a conversation, with a `[SEG]` for each id in an answer, and these ids in order."""
        if "output" in sample:
            _, *parts = SPEAKER.split(sample["output"])
            said = [("user" if who == "person" else "assistant", text) for who, text in zip(parts[::2], parts[1::2])]
            said = said[: len(said) // 2 * 2]
        else:
            said = [("user", sample["English Question"]), ("assistant", sample["English Answer"])]
        turns, found = [], []
        for role, text in said:

            def replace(match: re.Match, role: str = role) -> str:
                ids = [first or second for first, second in MENTION.findall(match[0])]
                if not ids:
                    return match[0]
                if role == "user":
                    return ""
                ids = self._with_outline(ids, outlines)
                found.extend(ids)
                return join_words([SEG_TOKEN] * len(ids))

            # The text around a mention names the object: "the remote [SEG] is".
            text = re.sub(r"(?<=\w)(?=\[SEG\])|(?<=\[SEG\])(?=\w)", " ", MENTIONS.sub(replace, text))
            turns.append((role, re.sub(r" +(?=[ ,.;?!])", "", text).strip()))
        return turns, found

    def _with_outline(self, ids: list[str], outlines: dict[str, Any]) -> list[str]:
        for number in ids:
            if number not in outlines:
                self.pass_over("mentions of an object without an outline")
        return [number for number in ids if number in outlines]


def _encode_outlines(outlines: dict[str, Any], height: int, width: int) -> dict[str, dict[str, Any]]:
    """Return the RLE by id of all outlines that cover a pixel."""
    rles = {}
    for number, outline in outlines.items():
        points = outline.get("polygon", outline.get("points")) if isinstance(outline, dict) else outline
        rle = encode_visible(points, height, width) if points else None
        if rle is not None:
            rles[number] = rle
    return rles
