"""Your own annotations in the COCO format.

sources:
  parts: {builder: coco_instances, annotations: parts/train.json, images: parts/photos}
"""

import dataclasses

from .coco import CocoBuilder, CocoConfig, encode_objects, read_instances
from .file_names import list_images
from .own_data import Labeled, LabeledConfig
from .source import errors_naming


@dataclasses.dataclass
class CocoInstancesConfig(CocoConfig, LabeledConfig):
    """Options of COCO instances.

    Args:
        annotations: Path of the JSON file.
        images: Directory of the images.
    """

    annotations: str = ""
    images: str = ""


class CocoInstances(CocoBuilder, Labeled):
    """Annotations in the COCO format. One row per annotated image, one target per annotation, named by its category.

    annotations     JSON with images, annotations (polygons or RLE) and categories
    images          the directory of the images
    """

    BUILDER_CONFIG_CLASS = CocoInstancesConfig

    def annotation_files(self, data_dir):
        images = list_images(self.locate(data_dir, "images"))
        return [self.locate(data_dir, "annotations"), *images, *self.held_out_files(data_dir)]

    def photo(self, record):
        return record["image"].get("file_name", "")

    def read_records(self, data_dir):
        path = self.locate(data_dir, "annotations")
        return {self.config.split: read_instances(path, self.read_remarks, self.config.encoding)}

    def make_row(self, record):
        path, image = self.locate(self.config.data_dir, "annotations"), record["image"]
        with errors_naming(f"{path!r}, image {image['id']}"):
            objects = list(encode_objects(record, self.pass_over))
            if not objects:
                return None
            file = self.find_image(self.locate(self.config.data_dir, "images"), image["file_name"])
            return self.make_labeled_row(file, str(image["id"]), objects)

    def annotated_size(self, record):
        image = record["image"]
        path = self.find_image(self.locate(self.config.data_dir, "images"), image["file_name"])
        return path, (image["height"], image["width"])
