"""Referring expressions: refCOCO, refCOCO+, refCOCOg, refCLEF, gRefCOCO, and those with false premises.

    from data_scripts import load_source
    rows = load_source("refcoco", data_dir="dataset", split="testA")

Mirrors `REFER` and `G_REFER` as the original uses them. A row holds all refs of one image in one split, with one
target per ref, whose phrases are the expressions in the file. For the published scores, every expression of every ref
is a question, even if two refs of an image share it: evaluate with `merge_instances=False`. The false expressions of a
ref, which refer to nothing in the image, are a separate target with an empty mask.
"""

import collections
import dataclasses
import os
from typing import Any

import numpy as np

from lisa_hf.data.masks import Mask, encode_mask, merge_masks
from lisa_hf.data.prompts import SHORT_QUESTIONS
from lisa_hf.data.rows import make_row
from lisa_hf.model.processing_lisa import SEG_TOKEN

from .coco import CocoBuilder, CocoConfig, id_key, index_by_id, read_refs
from .lisa_plus import join_words
from .segmentation import encode_segmentation
from .source import errors_naming, join_inside, read_json


NO_OBJECT = "There is nothing like that in this image."


def splits_of(split: str) -> list[str]:
    """Return the splits that contain the refs of a split: "testAB" is part of testA, testB and test."""
    return ["test", *(f"test{part}" for part in split[4:])] if split.startswith("test") else [split]


def is_false(sentence: dict[str, Any]) -> bool:
    """Return whether an expression refers to nothing, as marked by FP-RefCOCO or R-RefCOCO."""
    return bool(sentence.get("is_false_premise", not sentence.get("exist", True)))


def _choose_segmentation(annotations: list[dict[str, Any]], image_id: str) -> Any:
    """Return the segmentation of the annotation in the image, among those that share an id."""
    if len(annotations) > 1:
        annotations = [found for found in annotations if id_key(found["image_id"]) == image_id] or annotations
    if any(other["segmentation"] != annotations[0]["segmentation"] for other in annotations):
        raise ValueError(
            f"expected one annotation with the id {annotations[0]['id']!r} in the image {image_id}, got a duplicate "
            "id with different masks. Renumber the annotations when you merge files."
        )
    return annotations[0]["segmentation"]


def encode_object(segmentations: list[Any], height: int, width: int) -> dict[str, Any]:
    """Encode the object or objects of an expression as the RLE of one mask.

    Args:
        segmentations: COCO segmentations, or lists of RLEs as in refCLEF. If there are none, or only empty ones, the
            mask is empty: the expression has no object in the image (gRefCOCO), or the object was not outlined.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
    """
    parts = []
    for segmentation in filter(None, segmentations):
        several = isinstance(segmentation, list) and isinstance(segmentation[0], dict)
        parts += segmentation if several else [segmentation]
    rles = [encode_segmentation(part, height, width) for part in parts]
    if not rles:
        return encode_mask(np.zeros((height, width), dtype=np.uint8))
    # The original adds up polygons and RLEs, so its masks are 2 where they overlap.
    return merge_masks([Mask.from_rle(rle) for rle in rles]).to_rle() if len(rles) > 1 else rles[0]


@dataclasses.dataclass
class ReferSegConfig(CocoConfig):
    """Options of the referring datasets.

    Args:
        split_by: Author of the splits: "unc", "umd", "google" or "berkeley". Defaults to the original's choice.
    """

    split_by: str | None = None


class ReferSeg(CocoBuilder):
    """Base of the referring datasets, whose files are in `refer_seg/<SOURCE>` and `refer_seg/<IMAGES>`."""

    BUILDER_CONFIG_CLASS = ReferSegConfig
    REFS = "refs({}).p"
    SPLIT_BY = "unc"
    IMAGES = "images/mscoco/images/train2014"
    ONE_ROW_PER_REF = False
    DOWNLOAD_PAGE = "https://github.com/lichengunc/refer"
    LICENSE = "The expressions: Apache-2.0 as the repository; photos: Flickr's terms of use."

    def annotation_files(self, data_dir):
        self.find(data_dir, f"refer_seg/{self.IMAGES}")
        return [*self._find_annotations(data_dir), *self.held_out_files(data_dir)]

    def _find_annotations(self, data_dir):
        refs = self.REFS.format(self.config.split_by or self.SPLIT_BY)
        return [self.find(data_dir, f"refer_seg/{self.SOURCE}/{name}") for name in (refs, "instances.json")]

    def photo(self, record):
        return record["image"].get("file_name", "")

    def read_records(self, data_dir):
        refs_path, instances_path = self._find_annotations(data_dir)
        refs, instances = read_refs(refs_path), read_json(instances_path)
        with errors_naming(instances_path):
            images = index_by_id(instances["images"], "images", "file_name")
            annotated = collections.defaultdict(list)
            for annotation in instances["annotations"]:
                annotated[id_key(annotation["id"])].append(annotation)
        splits = collections.defaultdict(dict)
        with errors_naming(refs_path):
            for ref in refs:
                image_id = id_key(ref["image_id"])
                annotations = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
                annotations = [] if annotations == [-1] else [id_key(number) for number in annotations]
                missing = [f"annotation {number}" for number in annotations if number not in annotated]
                sentences = ref.get("sentences", [])
                referred = {
                    "ref_id": ref["ref_id"],
                    "phrases": [sentence["sent"] for sentence in sentences if not is_false(sentence)],
                    "false_phrases": [sentence["sent"] for sentence in sentences if is_false(sentence)],
                    "segmentations": [
                        _choose_segmentation(annotated[number], image_id) if number in annotated else None
                        for number in annotations
                    ],
                    "missing": ", ".join(missing if image_id in images else [f"image {image_id}", *missing]),
                }
                for split in splits_of(ref["split"]):
                    record = {"image": images.get(image_id, {"id": image_id}), "refs": []}
                    key = (image_id, ref["ref_id"]) if self.ONE_ROW_PER_REF else image_id
                    splits[split].setdefault(key, record)["refs"].append(referred)
        return {split: list(records.values()) for split, records in splits.items()}

    def make_row(self, record):
        refs_path, instances_path = self._find_annotations(self.config.data_dir)
        directory = self.find(self.config.data_dir, f"refer_seg/{self.IMAGES}")
        image, targets = record["image"], []
        with errors_naming(f"{refs_path!r} or {instances_path!r}, image {image['id']}"):
            for ref in record["refs"]:
                if ref["missing"]:
                    raise ValueError(
                        f"Ref {ref['ref_id']} needs the {ref['missing']}, which {os.path.basename(instances_path)} "
                        "lacks. Download both files again."
                    )
                size = image["height"], image["width"]
                if ref["phrases"] or not ref["false_phrases"]:
                    targets.append({"phrases": ref["phrases"], "rle": encode_object(ref["segmentations"], *size)})
                if ref["false_phrases"]:
                    targets.append({"phrases": ref["false_phrases"], "rle": encode_object([], *size)})
            return make_row(
                image=join_inside(directory, image["file_name"]),
                image_id=str(image["id"]),
                source=self.source,
                task="referring",
                targets=targets,
            )


class RefCoco(ReferSeg):
    """refCOCO: 142210 expressions for 50000 objects in 19994 photos.

    Splits: train, val, testA (people), testB (other objects), test (both).

        <data_dir>/refer_seg/
            refcoco/refs(unc).p
            refcoco/instances.json
            images/mscoco/images/train2014/*.jpg
    """

    SOURCE = "refcoco"


class RefCocoPlus(ReferSeg):
    """refCOCO+: 141564 expressions without places for 49856 objects in 19992 photos.

    Splits: train, val, testA (people), testB (other objects), test (both).

        <data_dir>/refer_seg/
            refcoco+/refs(unc).p
            refcoco+/instances.json
            images/mscoco/images/train2014/*.jpg
    """

    SOURCE = "refcoco+"


class RefCocoG(ReferSeg):
    """refCOCOg as split by UMD: 95010 longer expressions for 49822 objects in 25799 photos.

    Splits: train, val, test.

        <data_dir>/refer_seg/
            refcocog/refs(umd).p
            refcocog/instances.json
            images/mscoco/images/train2014/*.jpg
    """

    SOURCE = "refcocog"
    SPLIT_BY = "umd"


class RefClef(ReferSeg):
    """refCLEF: about 130000 expressions for objects and regions in 19997 photos of ImageCLEF.

    Splits: train, val, testA, testB, testC, test (all three). It has no COCO photos for
    `exclude_refer_val` to exclude. 19579.jpg is a GIF, which the original cannot read.

        <data_dir>/refer_seg/
            refclef/refs(unc).p
            refclef/instances.json
            images/saiapr_tc-12/*.jpg
    """

    SOURCE = "refclef"
    IMAGES = "images/saiapr_tc-12"
    LICENSE = "The expressions: Apache-2.0 as the repository; photos: those of SAIAPR TC-12, for research."


@dataclasses.dataclass
class GRefCocoConfig(ReferSegConfig):
    """Options of gRefCOCO.

    Args:
        conversations: Whether each expression is a separate row, whose answer has a mask per object or says that there
            is none. The published scores use the default rows.
    """

    conversations: bool = False


class GRefCoco(ReferSeg):
    """gRefCOCO: 278232 expressions for one object, several or none, in 19994 photos.

    Splits: train, val, and testA, testB, test (both) once published. An expression without an object has an
    empty mask. With `conversations: true`, the answer has a mask per object, and none where there is no object.

        <data_dir>/refer_seg/
            grefcoco/grefs(unc).json
            grefcoco/instances.json
            images/mscoco/images/train2014/*.jpg
    """

    BUILDER_CONFIG_CLASS = GRefCocoConfig
    SOURCE = "grefcoco"
    REFS = "grefs({}).json"
    DOWNLOAD_PAGE = "https://github.com/henghuiding/gRefCOCO"
    LICENSE = "The expressions: see the download page; photos: Flickr's terms of use."

    def read_records(self, data_dir):
        splits = super().read_records(data_dir)
        if not self.config.conversations:
            return splits
        return {
            split: [
                {"image": record["image"], "refs": [ref | {"phrases": [phrase]}]}
                for record in records
                for ref in record["refs"]
                for phrase in ref["phrases"]
            ]
            for split, records in splits.items()
        }

    def make_row(self, record):
        row = super().make_row(record)
        if not self.config.conversations:
            return row
        ((ref,), image) = record["refs"], record["image"]
        objects = [
            encode_object([segmentation], image["height"], image["width"]) for segmentation in ref["segmentations"]
        ]
        template = SHORT_QUESTIONS[ref["ref_id"] % len(SHORT_QUESTIONS)]
        answer = f"Sure, {join_words([SEG_TOKEN] * len(objects))}." if objects else NO_OBJECT
        messages = [
            {"role": "user", "content": template.format(phrase=ref["phrases"][0].strip().lower())},
            {"role": "assistant", "content": answer},
        ]
        return make_row(
            row["image"]["path"],
            row["image_id"],
            self.source,
            "conversation",
            targets=[{"rle": rle} for rle in objects],
            messages=messages,
        )


class FalsePremises(ReferSeg):
    """Base of FP-RefCOCO and its siblings."""

    SPLIT_BY = "berkeley_exclude_unified"
    DOWNLOAD_PAGE = "https://github.com/see-say-segment/sesame/tree/main/dataset"
    LICENSE = "The expressions: MIT as the repository; photos: Flickr's terms of use."


class FpRefCoco(FalsePremises):
    """FP-RefCOCO: expressions of refCOCO and false ones that a language model changed (SESAME, arXiv 2312.08366).

    Splits: train, val, testA, testB, test, if the refs have them. A false expression has an empty mask.

        <data_dir>/refer_seg/
            fprefcoco/refs(berkeley_exclude_unified).p
            fprefcoco/instances.json
            images/mscoco/images/train2014/*.jpg
    """

    SOURCE = "fprefcoco"


class FpRefCocoPlus(FalsePremises):
    """FP-RefCOCO+: expressions of refCOCO+ and false ones that a language model changed (SESAME, arXiv 2312.08366).

    Splits: train, val, testA, testB, test, if the refs have them. A false expression has an empty mask.

        <data_dir>/refer_seg/
            fprefcoco+/refs(berkeley_exclude_unified).p
            fprefcoco+/instances.json
            images/mscoco/images/train2014/*.jpg
    """

    SOURCE = "fprefcoco+"


class FpRefCocoG(FalsePremises):
    """FP-RefCOCOg: expressions of refCOCOg and false ones that a language model changed (SESAME, arXiv 2312.08366).

    Splits: train, val, test, if the refs have them. A false expression has an empty mask.

        <data_dir>/refer_seg/
            fprefcocog/refs(berkeley_exclude_unified).p
            fprefcocog/instances.json
            images/mscoco/images/train2014/*.jpg
    """

    SOURCE = "fprefcocog"


class RobustRefer(ReferSeg):
    """Base of R-RefCOCO and its siblings. One row per ref, because their metrics are means over refs."""

    SPLIT_BY = "unc_exclude_unified"
    ONE_ROW_PER_REF = True
    DOWNLOAD_PAGE = "https://github.com/jianzongwu/robust-ref-seg"
    LICENSE = "The expressions: none stated; photos: Flickr's terms of use."


class RobustRefCoco(RobustRefer):
    """R-RefCOCO: expressions of refCOCO and negative ones, drawn from other photos (arXiv 2209.09554).

    Splits: train, val, testA, testB, test, if the refs have them. One row per ref. A negative
    expression has an empty mask. The files are those that SESAME publishes, or with `split_by: unc` the authors'.

        <data_dir>/refer_seg/
            R-refcoco/refs(unc_exclude_unified).p
            R-refcoco/instances.json
            images/mscoco/images/train2014/*.jpg
    """

    SOURCE = "R-refcoco"


class RobustRefCocoPlus(RobustRefer):
    """R-RefCOCO+: expressions of refCOCO+ and negative ones, drawn from other photos (arXiv 2209.09554).

    Splits: train, val, testA, testB, test, if the refs have them. One row per ref. A negative
    expression has an empty mask. The files are those that SESAME publishes, or with `split_by: unc` the authors'.

        <data_dir>/refer_seg/
            R-refcoco+/refs(unc_exclude_unified).p
            R-refcoco+/instances.json
            images/mscoco/images/train2014/*.jpg
    """

    SOURCE = "R-refcoco+"


class RobustRefCocoG(RobustRefer):
    """R-RefCOCOg: expressions of refCOCOg and negative ones, drawn from other photos (arXiv 2209.09554).

    Splits: train, val, test, if the refs have them. One row per ref. A negative expression has an
    empty mask. The files are those that SESAME publishes, or with `split_by: umd` the authors'.

        <data_dir>/refer_seg/
            R-refcocog/refs(umd_exclude_unified).p
            R-refcocog/instances.json
            images/mscoco/images/train2014/*.jpg
    """

    SOURCE = "R-refcocog"
    SPLIT_BY = "umd_exclude_unified"
