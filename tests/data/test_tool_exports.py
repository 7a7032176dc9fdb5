"""Exports of three scenes, written by the tools' own libraries: each gives the masks that were drawn.

`golden/tool_exports` was written by Datumaro 1.13.12 (COCO, CVAT, PASCAL VOC, COCO panoptic), labelme 6.3.1,
supervision 0.31.2, Label Studio's converter 2.1.2, Supervisely's SDK 6.74.51 and pycocotools 2.0.11.
"""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from fixtures.paths import GOLDEN
from pycocotools import mask as coco_mask

from data_scripts import load_source
from lisa_hf.data.mixture import EvaluationDataset


SIZE = (480, 720)
CRACKS = [[440, 80, 660, 120, 600, 400, 480, 360], [60, 340, 240, 360, 200, 448, 80, 440]]
VOC = {"classes": "voc/labelmap.txt", "masks": "voc/SegmentationClass", "images": "photos"}
EXPORTS = {
    "pycocotools": ("coco_instances", {"annotations": "pycocotools.json", "images": "photos"}, 1),
    "datumaro": ("coco_instances", {"annotations": "datumaro_coco.json", "images": "photos"}, 1),
    "cvat polygons": ("cvat", {"annotations": "cvat_polygons.xml", "images": "photos"}, 1),
    "cvat masks": ("cvat", {"annotations": "cvat_masks.xml", "images": "photos"}, 1),
    "label studio brush": ("label_studio", {"annotations": "label_studio_brush.json", "images": "photos"}, 1),
    "label studio yolo": ("yolo", {"annotations": "label_studio_yolo", "images": "photos"}, 1),
    "labelme polygons": ("labelme", {"annotations": "labelme", "images": "photos"}, 1),
    "labelme masks": ("labelme", {"annotations": "labelme_masks", "images": "photos"}, 1),
    "voc classes": ("class_masks", VOC, 1),
    "voc instances": ("class_masks", VOC | {"instances": "voc/SegmentationObject"}, 1),
    "panoptic": ("coco_panoptic", {"annotations": "panoptic.json", "images": "photos", "masks": "panoptic"}, 1),
    "supervisely": ("supervisely", {"annotations": "supervisely"}, 1),
    # supervision draws an outline through the centers of the border's pixels, half a pixel inside.
    "supervision": ("coco_instances", {"annotations": "supervision_coco.json", "images": "photos"}, 0.98),
    "supervision yolo": ("yolo", {"annotations": "supervision_yolo", "images": "photos"}, 0.98),
}


def drawn(scene: int) -> dict[str, np.ndarray]:
    rust = [80 + 20 * scene, 60, 320, 40, 360, 240, 120, 280]
    polygons = {"rust patch": [rust], "crack": CRACKS}
    return {
        name: coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(outlines, *SIZE)))
        for name, outlines in polygons.items()
    }


@pytest.mark.parametrize("name", EXPORTS)
def test_masks_of_an_export(name, tmp_path):
    builder, options, bar = EXPORTS[name]
    root = Path(shutil.copytree(GOLDEN / "tool_exports", tmp_path / "data"))
    shutil.copytree(root / "photos", root / "supervisely/ds0/img")
    rows = load_source("mine", str(root), builder=builder, cache_dir=str(tmp_path / "cache"), **options)
    items = EvaluationDataset(rows)
    assert len(items) == 3
    for row, item in zip(rows.cast_column("image", datasets.Image(decode=False)), items):
        truth = drawn(int(Path(row["image"]["path"]).stem))
        assert len(item["questions"]) == 2
        for question in item["questions"]:
            text = question.messages[0]["content"][-1]["text"]
            (name,) = (name for name in truth if name in text)
            (mask,) = (mask.draw() for mask in question.masks)
            assert (mask & truth[name]).sum() >= bar * (mask | truth[name]).sum()
