"""PASCAL-Part: parts of the objects in PASCAL VOC 2010, in the COCO format of VLPart.

    from data_scripts import load_source
    rows = load_source("pascal_part", data_dir="dataset")

Rows have one target per annotation, whereas the original draws one instance.
"""

from .coco import make_instances_row, read_instances
from .source import SourceBuilder


def part_phrases(category: str) -> list[str]:
    """Return the phrases of a category "object:part": "object part" and "the part of the object"."""
    thing, colon, part = category.strip().partition(":")
    if not (thing and colon and part):
        raise ValueError(f"expected categories like 'dog:head', got {category!r}.")
    return [f"{thing} {part}", f"the {part} of the {thing}"]


class PascalPart(SourceBuilder):
    """PASCAL-Part: 93 kinds of parts. One row per image that has parts, one target per annotation. Split: train.

        <data_dir>/vlpart/pascal_part/
            train.json                      VLPart's, in the COCO format with categories "object:part"
            VOCdevkit/VOC2010/JPEGImages/   the photos of PASCAL VOC 2010

    Targets of one category share their phrases. Whether a question asks for one or for all of them is decided when it
    is drawn.
    """

    SOURCE = "pascal_part"
    DOWNLOAD_PAGE = "https://github.com/facebookresearch/VLPart/tree/main/datasets#pascal-part"
    LICENSE = "PASCAL VOC: the photos are subject to Flickr's terms of use; PASCAL-Part states none."

    def annotation_files(self, data_dir):
        self._find_photos(data_dir)
        return [self._find_annotations(data_dir)]

    def _find_annotations(self, data_dir):
        return self.find(data_dir, "vlpart/pascal_part/train.json")

    def _find_photos(self, data_dir):
        return self.find(data_dir, "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages")

    def read_records(self, data_dir):
        return {"train": read_instances(self._find_annotations(data_dir), self.read_remarks)}

    def make_row(self, record):
        path = self._find_annotations(self.config.data_dir)
        directory = self._find_photos(self.config.data_dir)
        return make_instances_row(record, path, directory, self.source, part_phrases, self.pass_over)
