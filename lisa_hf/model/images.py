"""The one way from an image file to pixels: an upright RGB picture, for training, evaluation, CLI and pipeline.

It is one of the model's modules because the pipeline needs it on the Hub, where this package is not installed.
"""

import io
import os
import urllib.request
from contextlib import contextmanager
from typing import IO

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps


try:
    import pillow_heif
except ImportError:
    pillow_heif = None
else:
    pillow_heif.register_heif_opener()

# What can be loaded: a path, an http(s) URL, the bytes of a file, an open file, or a picture.
ImageSource = str | os.PathLike | bytes | IO[bytes] | PIL.Image.Image
TIMEOUT = 30  # of a download, seconds without an answer


def load_image(source: ImageSource) -> PIL.Image.Image:
    """Load an image as viewers show it: upright by its EXIF orientation, in RGB with 8 bits.

    - 16-bit and floating-point gray is scaled to 8 bits from its range: 0..65535 for 16 bits. 32-bit files do not
      specify theirs. They get the first of 0..1 (floats only), 0..255 and 0..65535 that contains all of their values,
      or else the one from their smallest to their largest value.
    - Alpha is dropped, as in PIL, OpenCV and the tools that datasets were annotated with: transparent pixels show
      their stored color.
    - Palettes, CMYK and 1-bit pictures are converted by PIL.

    Args:
        source: Path, http(s) URL, bytes of a file, open file, or PIL image, which is not changed.

    Raises:
        ValueError: If it cannot be read, or has more than 179 megapixels, PIL's decompression-bomb limit.
    """
    image = open_image(source)
    with raise_unreadable():
        image.load()
        if image.getexif().get(PIL.ExifTags.Base.Orientation) is not None:
            image = PIL.ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = PIL.Image.fromarray(_tone_map(np.asarray(image)))
        return image if image.mode == "RGB" else image.convert("RGB")


def open_image(source: ImageSource) -> PIL.Image.Image:
    """Open an image for [`load_image`], reading only its header: size and format are known, pixels are not decoded.

    Args:
        source: As in [`load_image`]; a PIL image is returned unchanged.

    Raises:
        ValueError: As [`load_image`].
    """
    if isinstance(source, PIL.Image.Image):
        return source
    if not (isinstance(source, (str, bytes, os.PathLike)) or callable(getattr(source, "read", None))):
        raise ValueError(
            f"expected an image, got {type(source).__name__}. Pass a path, URL, bytes, open file or PIL image."
        )
    with raise_unreadable():
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            # Some servers reject Python's default user agent.
            request = urllib.request.Request(source, headers={"User-Agent": "Mozilla/5.0 (compatible; lisa_hf)"})
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                source = response.read()
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        try:
            return PIL.Image.open(source)
        except PIL.UnidentifiedImageError:
            if pillow_heif is not None or not _is_heic(source):
                raise
    raise ValueError("expected an image that can be read, got HEIC. Run `pip install pillow-heif`, or save it as JPEG")


def _is_heic(source: str | os.PathLike | IO[bytes]) -> bool:
    """Return whether a file begins as the photos of iPhones do."""
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            start = file.read(12)
    else:
        source.seek(0)
        start = source.read(12)
    return start[4:8] == b"ftyp" and start[8:] in (b"heic", b"heix", b"hevc", b"mif1")


@contextmanager
def raise_unreadable():
    """Raise anything that goes wrong with an image file as a one-sentence `ValueError`."""
    try:
        yield
    except PIL.Image.DecompressionBombError as error:
        limit = 2 * PIL.Image.MAX_IMAGE_PIXELS / 1e6
        raise ValueError(f"expected an image of at most {limit:.4g} megapixels, got a larger one: {error}") from error
    except Exception as error:
        # PIL has no specific exception for broken files: a bad PNG chunk is a SyntaxError, and a damaged EXIF block a
        # struct.error, an AttributeError or a TypeError.
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.filename and error.strerror:  # no such file, no permission
            reason = f"{error.filename}: {error.strerror}"
        raise ValueError(f"expected an image that can be read, got {reason}") from error


def _tone_map(values: np.ndarray) -> np.ndarray:
    """Scale gray values `(H, W)` of more than 8 bits to uint8, see [`load_image`]."""
    ranges = {"f": (1, 255, 65535), "i": (255, 65535), "u": (65535,)}[values.dtype.kind]
    values = np.nan_to_num(values).astype(np.float64)
    low, high = values.min(), values.max()
    if low >= 0 and high <= ranges[-1]:
        low, high = 0, next(limit for limit in ranges if high <= limit)
    return ((values - low) / (high - low or 1) * 255 + 0.5).astype(np.uint8)  # a constant image becomes black
