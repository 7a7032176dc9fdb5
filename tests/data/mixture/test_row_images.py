"""Images of rows: modes, orientation, reduced decoding."""

import io

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
from fixtures.rows import HEIGHT, WIDTH, comparable, dataset, image_file, mask, segmentation_row

from lisa_hf.data.mixture import EvaluationDataset, MixtureDataset
from lisa_hf.data.rows import make_row


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1"])
def test_images_of_every_mode_become_rgb(mode, tmp_path):
    image = image_file(tmp_path / "image", mode=mode, format="TIFF" if mode == "CMYK" else "PNG")
    assert EvaluationDataset(dataset(segmentation_row("classes", 0, image)))[0]["image"].mode == "RGB"


def test_a_photo_is_turned_upright_before_its_masks_are_compared(tmp_path):
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    image = image_file(tmp_path / "turned.jpg", size=(HEIGHT, WIDTH), exif=exif)
    assert EvaluationDataset(dataset(segmentation_row("classes", 0, image)))[0]["image"].size == (WIDTH, HEIGHT)


def photo_row(path, size, orientation=1):
    """A row about a photo of smooth colors; its EXIF orientation turns it to `size` (width, height)."""
    across, down = (np.linspace(0, 3, edge) for edge in (size if orientation < 5 else size[::-1]))
    colors = [np.sin(np.add.outer(down, across) * frequency) * 120 + 128 for frequency in (1, 2, 3)]
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = orientation
    PIL.Image.fromarray(np.stack(colors, axis=-1).astype(np.uint8)).save(path, exif=exif)
    targets = [{"phrases": ["sea"], "rle": mask(1, size[::-1])}]
    return make_row(str(path), "photos/0", "photos", "semantic", targets=targets)


@pytest.mark.parametrize(
    "size, min_decoded_edge, factor",
    [
        ((192, 128), 24, 8),
        ((192, 128), 25, 4),
        ((128, 192), 49, 2),
        ((192, 128), 97, 1),  # small enough
        ((192, 124), 24, 4),
        ((191, 128), 24, 1),  # no factor divides it
    ],
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_photo_is_decoded_at_reduced_scale(size, min_decoded_edge, factor, orientation, tmp_path):
    rows = dataset(photo_row(tmp_path / "photo.jpg", size, orientation))
    full = EvaluationDataset(rows)[0]
    item = MixtureDataset({"photos": rows}, length=1, min_decoded_edge=min_decoded_edge)[0]
    width, height = size
    assert full["image"].size == size and item["image"].size == (width // factor, height // factor)
    assert item["original_size"] == full["original_size"] == [height, width]
    assert {mask.size for question in item["questions"] for mask in question.masks} == {(height, width)}
    expected = np.asarray(full["image"].reduce(factor), dtype=float)
    assert np.abs(expected - np.asarray(item["image"])).mean() < (2 if factor > 1 else 1e-9)


def test_other_files_are_decoded_in_full(tmp_path):
    rows = dataset(photo_row(tmp_path / "photo.png", (192, 128)))
    plain, item = (MixtureDataset({"photos": rows}, length=1, min_decoded_edge=edge)[0] for edge in (None, 24))
    assert comparable(item) == comparable(plain)


def test_images_may_be_stored_in_the_rows(tmp_path):
    encoded = io.BytesIO()
    PIL.Image.new("RGB", (WIDTH, HEIGHT), "red").save(encoded, format="PNG")
    item = MixtureDataset({"made": dataset(segmentation_row("made", 0, encoded.getvalue()))}, length=1)[0]
    assert item["image"].getpixel((0, 0)) == (255, 0, 0)
