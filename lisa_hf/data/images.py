"""Reads, orients and decodes image files."""

import io
from typing import Any

import PIL.Image
import PIL.ImageOps
from datasets import Dataset, Image, IterableDataset
from datasets.utils.file_utils import xopen


def undecoded(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    # Decoding while a row is read would fail before the row can say which file it is.
    return rows.cast_column("image", Image(decode=False))


def load_image(row: dict, feature_cache=None, min_decoded_edge: int | None = None) -> dict[str, Any]:
    """What an item says of the image of a row: `image`, `original_size` and `features`.

    Args:
        feature_cache (`FeatureCache`, *optional*): Where its features are looked up. An image with an entry for both
            encoders can be decoded, else it had none, and is not.
        min_decoded_edge (`int`, *optional*): As in [`reduce_decoding`], which changes the `image` alone.

    Raises:
        ValueError: If the image cannot be read, or a mask of the row has another size.
    """
    if row["image"] is None:
        raise ValueError("it has no image. Remove it.")
    try:
        file = read_file(row)
        features = None if feature_cache is None else feature_cache.load(file)
        image = PIL.Image.open(io.BytesIO(file))
        factor = 1 if min_decoded_edge is None else reduce_decoding(image, min_decoded_edge)
        if features is None or not feature_cache.is_complete:
            image = decode_image(image)
        size = [factor * image.height, factor * image.width]
        if features is not None:
            size = features["original_sizes"].tolist()
    except Exception as error:
        # Pillow has no exception of its own for broken files: a bad PNG chunk is a SyntaxError, a bomb a plain
        # Exception, and a damaged EXIF block a struct.error, an AttributeError or a TypeError.
        raise ValueError(
            f"cannot read the image, {type(error).__name__}: {error}. Restore the file or remove its annotation."
        ) from error
    rles = [target["rle"] for target in row["targets"]]
    if row["ignore"] is not None:
        rles.append(row["ignore"])
    for rle in rles:
        if list(rle["size"]) != size:
            raise ValueError(
                f"expected masks of the image's size {size} (height, width), found one of {list(rle['size'])}. "
                "Restore the image that was annotated, or remove the annotation."
            )
    return {"image": image, "original_size": size, "features": features}


def read_file(row: dict) -> bytes:
    """The image file of an undecoded row, as it is stored."""
    image = row["image"]
    if image["bytes"] is not None:
        return image["bytes"]
    with xopen(image["path"], "rb") as file:  # also of an archive or a server
        return file.read()


def reduce_decoding(image: PIL.Image.Image, min_decoded_edge: int) -> int:
    """Lets an opened JPEG be decoded at 1/8, 1/4 or 1/2 of its size, for a fraction of the time.

    Its longer edge keeps at least `min_decoded_edge` pixels. A factor must divide both edges: then the aspect ratio
    stays, and whoever resizes the image to fit a square gets the same size as from all of it.

    Returns:
        The factor: 8, 4, 2, or 1 where the image stays as it is, because of its size or because it is not a JPEG.
    """
    width, height = image.size
    for factor in (8, 4, 2):
        if max(width, height) >= factor * min_decoded_edge and width % factor == height % factor == 0:
            image.draft(None, (width // factor, height // factor))
            break
    return width // image.width


def decode_image(image: PIL.Image.Image) -> PIL.Image.Image:
    """An opened image in RGB, turned upright as its EXIF orientation says; one that is so already stays as it is."""
    image.load()
    if image.getexif().get(PIL.Image.ExifTags.Base.Orientation) is not None:
        image = PIL.ImageOps.exif_transpose(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _where(row: dict) -> str:
    path = (row["image"] or {}).get("path")
    return f"Row {row['image_id']!r} of {row['source']!r}" + (f" (file {path})" if path else "")
