"""Semantic segmentation from label maps, images whose pixels are class indices: ADE20K, COCO-Stuff, Mapillary Vistas.

    from data_scripts import load_source
    rows = load_source("ade20k", data_dir="dataset", split="validation")

Mirrors the semantic datasets of the original. The class names of ADE20K and COCO-Stuff next to this file are LISA's
(github.com/dvlab-research/LISA, Apache-2.0): released checkpoints were trained on exactly these.
"""

import functools
import os
import pathlib

import numpy as np
import PIL.Image
import PIL.ImageOps

from lisa_hf.data.rows import make_row

from .coco import CocoBuilder
from .segmentation import encode_labels
from .source import SourceBuilder, errors_naming, read_json


IGNORED, UNKNOWN = -1, -2


def read_label_map(path: str) -> np.ndarray:
    """Read a grayscale or palette image, rotated by its EXIF orientation, as labels of shape `(H, W)`, uint8."""
    try:
        with PIL.Image.open(path) as image:
            image = PIL.ImageOps.exif_transpose(image)
            image.load()
    except Exception as error:  # Pillow has no specific exception for broken files.
        raise ValueError(f"expected a label map, got an unreadable file: {error}. Download it again.") from error
    if image.mode not in ("L", "P"):
        raise ValueError(
            f"expected a label map with one channel of 8 bits (mode L or P), got the mode {image.mode}. "
            "Download it again."
        )
    return np.asarray(image)


class LabelMapBuilder(SourceBuilder):
    """Base of the sources that label every pixel. One row per image that shows a named class, one target per name.

    Classes with the same name are one target. The original answers with the mask of the first class of that name,
    which is usually empty. `ignore` holds the pixels without a named class; the original trains on them as background.
    """

    def find_pairs(self, data_dir: str | None) -> dict[str, list[tuple[str, str]]]:
        """Return the paths (image, label map) of every split."""
        raise NotImplementedError

    def find_classes(self, data_dir: str | None) -> str:
        """Return the path of the file with the class names."""
        raise NotImplementedError

    def read_names(self, path: str) -> list[str | None]:
        """Read the class name of every pixel value from 0. Pixels with the name None or the value 255 are ignored."""
        raise NotImplementedError

    def pair_with_images(self, data_dir: str | None, label_maps: str, images: str) -> list[tuple[str, str]]:
        """Return the paths (image, label map) of the label maps in a directory."""
        label_maps, images = self.find(data_dir, label_maps), self.find(data_dir, images)
        stems = sorted(name.removesuffix(".png") for name in os.listdir(label_maps) if name.endswith(".png"))
        return [(os.path.join(images, f"{stem}.jpg"), os.path.join(label_maps, f"{stem}.png")) for stem in stems]

    def annotation_files(self, data_dir):
        pairs = self.find_pairs(data_dir)
        return [self.find_classes(data_dir), *(label_map for split in pairs.values() for _, label_map in split)]

    @functools.cached_property
    def names(self) -> list[str | None]:
        """Return the class name of every pixel value from 0."""
        path = self.find_classes(self.config.data_dir)
        with errors_naming(path):
            return self.read_names(path)

    def read_records(self, data_dir):
        if not self.names:
            raise ValueError(f"expected class names, got none in {self.find_classes(data_dir)!r}. Download it again.")
        return self.find_pairs(data_dir)

    def make_row(self, record):
        image_path, path = record
        classes = np.full(max(len(self.names), 256), UNKNOWN, dtype=np.int16)
        classes[: len(self.names)] = [IGNORED if name is None else self.names.index(name) for name in self.names]
        classes[255] = IGNORED
        with errors_naming(path):
            labels = read_label_map(path)
            rles = encode_labels(classes[labels])
            if UNKNOWN in rles:
                unknown = np.unique(labels[classes[labels] == UNKNOWN]).tolist()
                raise ValueError(f"expected labels below {len(self.names)}, or 255, got {unknown}. Download it again.")
            ignore = rles.pop(IGNORED, None)
            if not rles:
                return None
            image_id = os.path.splitext(os.path.basename(image_path))[0]
            targets = [{"phrases": [self.names[index]], "rle": rle} for index, rle in rles.items()]
            return make_row(image_path, image_id, self.source, "semantic", targets, ignore)


class Ade20k(LabelMapBuilder):
    """ADE20K, scene parsing: 150 classes, 20210 images for training, 2000 for validation.

    Splits: train, validation, if their label maps exist.

        <data_dir>/ade20k/
            images/training/*.jpg           the directories of ADEChallengeData2016
            images/validation/*.jpg
            annotations/training/*.png
            annotations/validation/*.png    pixels: 0 another object, ignored; 1 to 150 the classes
    """

    SOURCE = "ade20k"
    DOWNLOAD_PAGE = "http://sceneparsing.csail.mit.edu"
    LICENSE = "Images: non-commercial research and education; annotations: BSD-3-Clause."

    def find_pairs(self, data_dir):
        root = self.find(data_dir, "ade20k/annotations")
        return {
            split: self.pair_with_images(data_dir, f"ade20k/annotations/{part}", f"ade20k/images/{part}")
            for split, part in (("train", "training"), ("validation", "validation"))
            if os.path.isdir(os.path.join(root, part))
        }

    def find_classes(self, data_dir):
        return str(pathlib.Path(__file__).with_name("ade20k_classes.json"))

    def read_names(self, path):
        return [None, *read_json(path)]


class CocoStuff(LabelMapBuilder, CocoBuilder):
    """COCO-Stuff: things and stuff on the 118287 photos of COCO train2017. Split: train.

    As in the original, questions ask for the 143 of 171 classes without a "-"; "wall-brick" is ignored, for example.

        <data_dir>/
            cocostuff/train2017/*.png       stuffthingmaps_trainval2017; pixels: 0 to 181 the classes, 255 unlabeled
            coco/train2017/*.jpg
    """

    SOURCE = "cocostuff"
    DOWNLOAD_PAGE = "https://github.com/nightrome/cocostuff#downloads"
    LICENSE = "Annotations: CC BY 4.0; photos: Flickr's terms of use."

    def find_pairs(self, data_dir):
        return {"train": self.pair_with_images(data_dir, "cocostuff/train2017", "coco/train2017")}

    def annotation_files(self, data_dir):
        return [*super().annotation_files(data_dir), *self.held_out_files(data_dir)]

    def photo(self, record):
        return record[0]

    def find_classes(self, data_dir):
        return str(pathlib.Path(__file__).with_name("cocostuff_classes.json"))

    def read_names(self, path):
        return [None if "-" in name else name for name in read_json(path)]


class Mapillary(LabelMapBuilder):
    """Mapillary Vistas 2.0, street scenes: 124 classes, 18000 images for training.

    Split: train.

        <data_dir>/mapillary/
            config_v2.0.json                `labels`: `readable` names in the order of the pixel values
            training/images/*.jpg
            training/v2.0/labels/*.png
    """

    SOURCE = "mapillary"
    DOWNLOAD_PAGE = "https://www.mapillary.com/dataset/vistas"
    LICENSE = "Mapillary Vistas research edition: CC BY-NC-SA."

    def find_pairs(self, data_dir):
        pairs = self.pair_with_images(data_dir, "mapillary/training/v2.0/labels", "mapillary/training/images")
        return {"train": pairs}

    def find_classes(self, data_dir):
        return self.find(data_dir, "mapillary/config_v2.0.json")

    def read_names(self, path):
        return [label["readable"].lower() for label in read_json(path)["labels"]]
