"""Photos with an EXIF orientation: whether their annotations refer to the pixels as stored or as displayed.

Phones store the sensor's pixels and how viewers must rotate them. `lisa_hf.model.images` rotates them too; some
annotation tools use the rotated photo and some the stored pixels. The size of an annotation tells which, unless both
sizes are equal.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, Literal

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.TiffImagePlugin

from lisa_hf.data.masks import decode_mask, encode_mask
from lisa_hf.model.images import open_image, raise_unreadable


Space = Literal["stored", "display"]
Size = tuple[int, int]

# By EXIF orientation: how the stored pixels (H, W) become the displayed ones.
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).T,
    8: np.rot90,
}
# Tags of a TIFF: its width and height as stored.
TIFF_SIZE = (PIL.TiffImagePlugin.IMAGEWIDTH, PIL.TiffImagePlugin.IMAGELENGTH)


def read_orientation(file: str | IO[bytes]) -> tuple[int, dict[Space, Size]]:
    """Read the EXIF orientation of an image from its header, and its height and width as stored and as displayed."""
    try:
        with raise_unreadable(), open_image(file) as image:
            width, height = image.size
            if isinstance(image, PIL.TiffImagePlugin.TiffImageFile):  # its size is that after the turn
                width, height = (image.tag_v2[side] for side in TIFF_SIZE)
            orientation = image.getexif().get(PIL.ExifTags.Base.Orientation)
    except ValueError as error:
        raise ValueError(f"The image {file!r} cannot be read: {error}. Download it again, or remove it.") from error
    orientation = orientation if orientation in TURNS else 1
    stored = (height, width)
    return orientation, {"stored": stored, "display": stored[::-1] if orientation >= 5 else stored}


def turn_mask(rle: dict[str, Any], orientation: int) -> dict[str, Any]:
    """Rotate a mask of the stored pixels as viewers rotate the photo."""
    return encode_mask(TURNS[orientation](decode_mask(rle))) if orientation in TURNS else rle


def fitting_spaces(size: Size | None, sizes: dict[Space, Size]) -> tuple[Space, ...]:
    """Return the spaces in which an image has the size of its annotation; both if that is unknown."""
    return tuple(space for space, found in sizes.items() if size is None or tuple(size) == found)


def count_spaces(images: Iterable[tuple[str | IO[bytes], Size | None]]) -> Counter[tuple[Space, ...]]:
    """Count the spaces that fit the annotations of photos with an EXIF orientation.

    Args:
        images: Paths or open files of images, and the sizes of their annotations. Images that cannot be read do not
            count.
    """

    def find(image: tuple[str | IO[bytes], Size | None]) -> tuple[Space, ...] | None:
        file, size = image
        try:
            orientation, sizes = read_orientation(file)
        except ValueError:
            return None
        return fitting_spaces(size, sizes) if orientation > 1 else None

    with ThreadPoolExecutor(max_workers=8) as pool:
        return Counter(spaces for spaces in pool.map(find, images) if spaces)


def decide_space(counts: Counter[tuple[Space, ...]], option: Space | None) -> tuple[Space | None, list[str]]:
    """Decide which space to use for annotations that fit both.

    Args:
        counts: Result of [`count_spaces`].
        option: Choice of the user.

    Returns:
        `option` if given, else the space of the other annotations if they agree, else None; and remarks for the user.
    """
    stored, displayed, both = counts["stored",], counts["display",], counts["stored", "display"]
    agreed = None if bool(stored) == bool(displayed) else "stored" if stored else "display"
    space = option or agreed
    if not counts.total():
        return space, []
    remark = f"{counts.total()} photos have an EXIF orientation: "
    remark += f"by their sizes, {stored} are annotated as stored and {displayed} as displayed"
    if both:
        by = "the option `orientation`" if option else "the others"
        remark += f"; {both} fit both, " + (f"treated as {space!r} by {by}" if space else "which is undecided")
    return space, [remark]
