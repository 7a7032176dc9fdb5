"""PACO-LVIS: objects and their parts on COCO photos, in the COCO form of its authors.

    from data_scripts import load_source
    rows = load_source("paco_lvis", data_dir="dataset")

Rows keep one target per annotation, where the original takes one instance at random.
"""

import collections

from lisa_hf.schema import make_row

from .coco import CocoBuilder
from .pascal_part import part_phrases
from .source import encode_segmentation, errors_naming, join_inside, read_json


def category_phrases(category: str) -> list[str]:
    """The names of "mouse_(computer_equipment)" or "mouse_(computer_equipment):wire", without what is in brackets."""
    names = [name.split("_(")[0] for name in category.strip().split(":")]
    return names if len(names) == 1 else part_phrases(":".join(names))


class PacoLvis(CocoBuilder):
    """PACO-LVIS: 75 kinds of objects and 456 of parts on 45790 photos. One row per annotated photo. Split: train.

        <data_dir>/
            vlpart/paco/annotations/paco_lvis_v1_train.json     categories "object" and "object:part"
            coco/train2017/*.jpg

    Targets of one category share their phrases: which of them a question means is decided when it is drawn.
    """

    DOWNLOAD_PAGE = "https://github.com/facebookresearch/paco"
    LICENCE = "Annotations: MIT as the repository; photos: Flickr's terms of use."

    def annotation_files(self, data_dir):
        self.find(data_dir, "coco/train2017")
        return [self._find_annotations(data_dir), *self.held_out_files(data_dir)]

    def _find_annotations(self, data_dir):
        return self.find(data_dir, "vlpart/paco/annotations/paco_lvis_v1_train.json")

    def photo(self, record):
        image, _ = record
        return image["file_name"]

    def _split_generators(self, dl_manager):
        path = self._find_annotations(self.config.data_dir)
        content = read_json(path)
        with errors_naming(path):
            phrases = {category["id"]: category_phrases(category["name"]) for category in content["categories"]}
            objects = collections.defaultdict(list)
            for annotation in content["annotations"]:
                objects[annotation["image_id"]].append((annotation["category_id"], annotation["segmentation"]))
            records = [(image, objects[image["id"]]) for image in content["images"] if objects[image["id"]]]
        return self.make_splits({"train": records}, phrases=phrases, path=path)

    def _generate_examples(self, records, phrases, path):
        directory = self.find(self.config.data_dir, "coco")
        for image, objects in (record for shard in records for record in shard):
            with errors_naming(f"{path!r}, image {image['id']}"):
                height, width = image["height"], image["width"]
                row = make_row(
                    image=join_inside(directory, image["file_name"]),
                    image_id=str(image["id"]),
                    source="paco_lvis",
                    task="semantic",
                    targets=[
                        {"phrases": phrases[category], "rle": encode_segmentation(segmentation, height, width)}
                        for category, segmentation in objects
                    ],
                )
            yield image["id"], row
