"""Images of rows: find and read a file, decode it as small as allowed, and compare its size with the masks.

`lisa_hf.model.images` turns files into pixels, for rows and for all other images.
"""

from typing import Any

import PIL.Image
from datasets import Dataset, Image, IterableDataset
from datasets.utils.file_utils import xopen

from ..model.images import load_image, open_image, raise_unreadable


def undecoded(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return the rows with their images as `{"path", "bytes"}`.

    If images were decoded while a row is read, errors could not name the file.
    """
    return rows.cast_column("image", Image(decode=False))


def load_row_image(row: dict, feature_cache=None, min_decoded_edge: int | None = None) -> dict[str, Any]:
    """Load the image of an undecoded row, as the image part of an item.

    Args:
        row: Row of `lisa_hf.data.rows.FEATURES`.
        feature_cache: [`FeatureCache`] to look up the image in. An image whose entry has the features of both encoders
            is opened but not decoded: it was decodable when the entry was written.
        min_decoded_edge: See [`reduce_decoding`], which changes `image` only.

    Returns:
        `image`: PIL image, `original_size`: [H, W] of the file, `cached_features`: its entry, or None.

    Raises:
        ValueError: If the image cannot be read, or a mask of the row has a different size.
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
    """Return the stored image file of an undecoded row."""
    image = row["image"]
    if image["bytes"] is not None:
        return image["bytes"]
    with xopen(image["path"], "rb") as file:  # may be in an archive or on a server
        return file.read()


def reduce_decoding(image: PIL.Image.Image, min_decoded_edge: int) -> int:
    """Make an opened JPEG decode at 1/8, 1/4 or 1/2 of its size, in a fraction of the time.

    The factor must divide both edges, which keeps the aspect ratio, so a later resize to fit a square gives the same
    size as from the full image.

    Args:
        image: Opened image that is not decoded yet.
        min_decoded_edge: Minimum number of pixels that the longer edge keeps.

    Returns:
        The factor: 8, 4, 2, or 1 if the image is small or not a JPEG and stays as it is.
    """
    width, height = image.size
    for factor in (8, 4, 2):
        if max(width, height) >= factor * min_decoded_edge and width % factor == height % factor == 0:
            image.draft(None, (width // factor, height // factor))
            break
    return width // image.width
