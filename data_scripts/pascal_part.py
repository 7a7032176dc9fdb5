"""PASCAL-Part: parts of the objects in PASCAL VOC 2010, in the COCO form that VLPart made of them.

    from data_scripts import load_source
    rows = load_source("pascal_part", data_dir="dataset")

Rows keep one target per annotation, where the original takes one instance at random.
"""

import collections
from typing import Any

import datasets

from lisa_hf.schema import make_row

from .source import SourceBuilder, encode_segmentation, errors_naming, join_inside, read_json, split_into_shards


def part_phrases(category: str) -> list[str]:
    """The names of a category "object:part": "object part" and "the part of the object"."""
    thing, colon, part = category.strip().partition(":")
    if not (thing and colon and part):
        raise ValueError(f"Expected categories like 'dog:head', but found {category!r}.")
    return [f"{thing} {part}", f"the {part} of the {thing}"]


class PascalPart(SourceBuilder):
    """PASCAL-Part: 93 kinds of parts. One row per image that has parts, one target per annotation. Split: train.

        <data_dir>/vlpart/pascal_part/
            train.json                      VLPart's, in COCO form with categories "object:part"
            VOCdevkit/VOC2010/JPEGImages/   the photos of PASCAL VOC 2010

    Targets of one category share their phrases: which of them a question means is decided when it is drawn.
    """

    DOWNLOAD_PAGE = "https://github.com/facebookresearch/VLPart/tree/main/datasets#pascal-part"
    LICENCE = "PASCAL VOC: the photos are subject to Flickr's terms of use; PASCAL-Part states none."

    def annotation_files(self, data_dir):
        self.find(data_dir, "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages")
        return [self.find(data_dir, "vlpart/pascal_part/train.json")]

    def _split_generators(self, dl_manager):
        path = self.find(self.config.data_dir, "vlpart/pascal_part/train.json")
        content = read_json(path)
        with errors_naming(path):
            phrases = {category["id"]: part_phrases(category["name"]) for category in content["categories"]}
            parts = collections.defaultdict(list)
            for annotation in content["annotations"]:
                parts[annotation["image_id"]].append(annotation)
            records = [(image, parts[image["id"]]) for image in content["images"] if parts[image["id"]]]
        return [
            datasets.SplitGenerator(
                name="train",
                gen_kwargs={"records": split_into_shards(records), "phrases": phrases, "path": path},
            )
        ]

    def _generate_examples(self, records, phrases, path):
        directory = self.find(self.config.data_dir, "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages")
        for image, annotations in (record for shard in records for record in shard):
            with errors_naming(f"{path!r}, image {image['id']}"):
                row = _make_row(directory, image, annotations, phrases)
            yield image["id"], row


def _make_row(
    directory: str, image: dict[str, Any], annotations: list[dict[str, Any]], phrases: dict[int, list[str]]
) -> dict[str, Any]:
    return make_row(
        image=join_inside(directory, image["file_name"]),
        image_id=str(image["id"]),
        source="pascal_part",
        task="semantic",
        targets=[
            {
                "phrases": phrases[annotation["category_id"]],
                "rle": encode_segmentation(annotation["segmentation"], image["height"], image["width"]),
            }
            for annotation in annotations
        ],
    )
