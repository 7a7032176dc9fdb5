"""Exports of the annotation tool Label Studio.

sources:
  rooms: {builder: label_studio, annotations: rooms.json, images: photos}
"""

from collections.abc import Sequence
from typing import Any

from .file_names import is_image, list_images, split_name
from .label_studio_rle import decode_brush
from .own_data import ImagesConfig, Labeled
from .segmentation import check_size, encode_ellipse, encode_patch, encode_visible
from .source import errors_naming, read_json


class LabelStudio(Labeled):
    """Label Studio's export of the format JSON. One row per image, one target per polygon, brush mask and ellipse.

    annotations     JSON: tasks with `data` and `annotations`
    images          directory of the images, which are found by the last part of their URLs

    If an image has several annotations, the ground truth is used, or else the latest one.
    """

    BUILDER_CONFIG_CLASS = ImagesConfig

    def annotation_files(self, data_dir):
        return [self.locate(data_dir, "annotations"), *list_images(self.locate(data_dir, "images"))]

    def read_records(self, data_dir):
        path = self.locate(data_dir, "annotations")
        tasks = read_json(path, self.config.encoding)
        if not isinstance(tasks, list) or not all(isinstance(task, dict) and "data" in task for task in tasks):
            raise ValueError(
                f"expected a list of tasks with `data` and `annotations` in {path!r}, got other content. Export the "
                "project from Label Studio in the format JSON (not JSON-MIN)."
            )
        records, num_others, num_predicted = [], 0, 0
        for task in tasks:
            with errors_naming(f"{path!r}, task {task.get('id')}"):
                annotations = [made for made in task.get("annotations") or [] if not made.get("was_cancelled")]
                annotations.sort(key=lambda made: (bool(made.get("ground_truth")), str(made.get("created_at") or "")))
            num_others += max(len(annotations) - 1, 0)
            if annotations and annotations[-1].get("result"):
                records.append((task.get("id"), task["data"], annotations[-1]["result"]))
            num_predicted += not annotations and bool(task.get("predictions"))
        if num_others:
            self.read_remarks.append(
                f"dropped {num_others} annotations of images that have a later one or a ground truth"
            )
        if num_predicted:
            self.read_remarks.append(f"skipped {num_predicted} tasks with predictions only, which nobody accepted")
        return {self.config.split: records}

    def make_row(self, record):
        number, data, results = record
        with errors_naming(f"{self.locate(self.config.data_dir, 'annotations')!r}, task {number}"):
            image, regions = self._find_task_image(data, results)
            size = _region_size(regions)
            objects = []
            for region in regions:
                value = region["value"]
                labels = value.get(region["type"]) or []
                if not _is_drawn(value) or region["type"] in ("vectorlabels", "vector"):
                    self.pass_over(f"regions of the type {region['type']!r}")
                elif labels:
                    rle = _encode_region(value, *size)
                    objects += [(label, rle) for label in labels]
                elif region["type"].endswith("labels"):
                    self.pass_over("regions without a label")
            return self.make_labeled_row(image, str(number), objects)

    def annotated_size(self, record):
        _, data, results = record
        image, regions = self._find_task_image(data, results)
        return image, _region_size(regions)

    def _find_task_image(self, data: dict[str, Any], results: list[dict]) -> tuple[str, list[dict[str, Any]]]:
        """Return the path of the image of a task, and the results that are regions of it."""
        regions = [result for result in results if "original_width" in result or _is_drawn(result.get("value"))]
        if any(region.get("image_rotation") for region in regions):
            raise ValueError(
                "expected regions of the original image, got an image that was rotated in the tool. Rotate it back."
            )
        names = {region.get("to_name") for region in regions}
        if len(names) > 1:
            raise ValueError(f"expected regions of one image per task, got {sorted(map(str, names))}.")
        texts = {key: value for key, value in data.items() if isinstance(value, str) and value.strip()}
        names = {key: name for key, name in texts.items() if key == "image" or is_image(split_name(name)[-1])}
        if "image" not in names and len(names) != 1:
            raise ValueError(f"expected the URL of one image in `data`, got {data!r:.200}. Name it 'image'.")
        name = names.get("image") or next(iter(names.values()))
        return self.find_image(self.locate(self.config.data_dir, "images"), name), regions


def _is_drawn(value: Any) -> bool:
    """Return whether the value of a result is an outline or a mask."""
    return isinstance(value, dict) and not {"points", "rle", "radiusX"}.isdisjoint(value)


def _region_size(regions: Sequence[dict[str, Any]]) -> tuple[int, int] | None:
    sizes = {check_size(region["original_height"], region["original_width"]) for region in regions}
    if len(sizes) > 1:
        raise ValueError(f"expected all regions to have the same image size, got {sorted(sizes)}.")
    return next(iter(sizes), None)


def _encode_region(value: dict[str, Any], height: int, width: int) -> dict[str, Any] | None:
    """Encode a region of Label Studio, whose lengths are percentages of the image's width and height."""
    if "rle" in value:
        mask = decode_brush(value["rle"], height, width)
        return encode_patch(mask, 0, 0, height, width)
    if "points" in value:
        points = [[x * width / 100, y * height / 100] for x, y in value["points"]]
        return encode_visible([points], height, width)
    center = value["x"] * width / 100, value["y"] * height / 100
    radii = value["radiusX"] * width / 100, value["radiusY"] * height / 100
    return encode_ellipse(center, radii, value.get("rotation") or 0, height, width)
