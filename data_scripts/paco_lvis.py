"""PACO-LVIS: objects and their parts on COCO photos, in the authors' COCO format.

    from data_scripts import load_source
    rows = load_source("paco_lvis", data_dir="dataset")

Rows have one target per annotation, whereas the original draws one instance.
"""

from .coco import CocoBuilder, make_instances_row, read_instances
from .pascal_part import part_phrases


def category_phrases(category: str) -> list[str]:
    """Return the phrases of "mouse_(computer_equipment)" or "mouse_(computer_equipment):wire", without parentheses."""
    names = [name.split("_(")[0] for name in category.strip().split(":")]
    return names if len(names) == 1 else part_phrases(":".join(names))


class PacoLvis(CocoBuilder):
    """PACO-LVIS: 75 kinds of objects and 456 of parts on 45790 photos. One row per annotated photo. Split: train.

        <data_dir>/
            vlpart/paco/annotations/paco_lvis_v1_train.json     categories "object" and "object:part"
            coco/train2017/*.jpg

    Targets of one category share their phrases. Whether a question asks for one or for all of them is decided when it
    is drawn.
    """

    SOURCE = "paco_lvis"
    DOWNLOAD_PAGE = "https://github.com/facebookresearch/paco"
    LICENSE = "Annotations: MIT as the repository; photos: Flickr's terms of use."

    def annotation_files(self, data_dir):
        self.find(data_dir, "coco/train2017")
        return [self._find_annotations(data_dir), *self.held_out_files(data_dir)]

    def _find_annotations(self, data_dir):
        return self.find(data_dir, "vlpart/paco/annotations/paco_lvis_v1_train.json")

    def photo(self, record):
        return record["image"].get("file_name", "")

    def read_records(self, data_dir):
        return {"train": read_instances(self._find_annotations(data_dir), self.read_remarks)}

    def make_row(self, record):
        path = self._find_annotations(self.config.data_dir)
        directory = self.find(self.config.data_dir, "coco")
        return make_instances_row(record, path, directory, self.source, category_phrases, self.pass_over)
