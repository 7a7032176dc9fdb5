"""The images of rows: find and read a file, decode it as small as it may be, compare it with the masks.

How a file becomes pixels is in `lisa_hf.model.images`, for rows as for every other image.
"""

from typing import Any

import PIL.Image
from datasets import Dataset, Image, IterableDataset
from datasets.utils.file_utils import xopen

from ..model.images import load_image, open_image, raise_unreadable


def undecoded(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return the rows with their images as `{"path", "bytes"}`.

    Decoding an image while its row is read would fail before the row can say which file it is.
    """
    return rows.cast_column("image", Image(decode=False))


def load_row_image(row: dict, feature_cache=None, min_decoded_edge: int | None = None) -> dict[str, Any]:
    """Load the image of an undecoded row, as the part of an item that is about it.

    Args:
        row: Row of `lisa_hf.data.rows.FEATURES`.
        feature_cache: [`FeatureCache`] to look the image up in. The image of an entry with the features of both
            encoders is opened but not decoded: it could be decoded when the entry was made.
        min_decoded_edge: As in [`reduce_decoding`], which changes `image` alone.

    Returns:
        `image`: PIL image, `original_size`: [H, W] of the file, `cached_features`: its entry, or None.

    Raises:
        ValueError: If the image cannot be read, or a mask of the row has another size.
    """
    if row["image"] is None:
        raise ValueError("expected an image, got none. Remove the row.")
    cached_features = None
    try:
        with raise_unreadable():
            file = read_file(row)
        image = open_image(file)
        if feature_cache is not None:
            cached_features = feature_cache.load(file)
        factor = 1 if min_decoded_edge is None else reduce_decoding(image, min_decoded_edge)
        if cached_features is None or not feature_cache.is_complete:
            image = load_image(image)
    except ValueError as error:
        raise ValueError(f"{error}. Restore the file or remove its annotation.") from error
    size = [factor * image.height, factor * image.width]
    if cached_features is not None:
        size = cached_features["original_sizes"].tolist()  # of the upright image
    rles = [target["rle"] for target in row["targets"]] + ([row["ignore"]] if row["ignore"] is not None else [])
    for rle in rles:
        if list(rle["size"]) != size:
            raise ValueError(
                f"expected masks of the image's size {size} (height, width), got one of {list(rle['size'])}. "
                "Restore the image that was annotated, or remove the annotation."
            )
    return {"image": image, "original_size": size, "cached_features": cached_features}


def read_file(row: dict) -> bytes:
    """Return the image file of an undecoded row, as it is stored."""
    image = row["image"]
    if image["bytes"] is not None:
        return image["bytes"]
    with xopen(image["path"], "rb") as file:  # also of an archive or a server
        return file.read()


def reduce_decoding(image: PIL.Image.Image, min_decoded_edge: int) -> int:
    """Let an opened JPEG be decoded at 1/8, 1/4 or 1/2 of its size, in a fraction of the time.

    The factor must divide both edges: that keeps the aspect ratio, and a later resize to fit a square gives the same
    size as from the full image.

    Args:
        image: Opened, not yet decoded.
        min_decoded_edge: Least number of pixels that its longer edge keeps.

    Returns:
        The factor: 8, 4, 2, or 1 if the image is left as it is, because it is small or not a JPEG.
    """
    width, height = image.size
    for factor in (8, 4, 2):
        if max(width, height) >= factor * min_decoded_edge and width % factor == height % factor == 0:
            image.draft(None, (width // factor, height // factor))
            break
    return width // image.width
