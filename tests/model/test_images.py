"""One image reader: upright RGB with 8 bits of any source, mode and orientation, the same everywhere."""

import http.server
import io
import threading

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest

from lisa_hf.model import images
from lisa_hf.model.images import load_image


RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)
GRAY = np.repeat(np.arange(256, dtype=np.uint8), 256).reshape(256, 256)  # the ramp in 8 bits
CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]], [[9, 9, 9], [0, 0, 0]]], np.uint8)


def encoded(image: PIL.Image.Image, image_format: str, **kwargs) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **kwargs)
    return file.getvalue()


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_16_bits(image_format, byte_order):
    picture = PIL.Image.fromarray(RAMP)
    if byte_order == ">":
        picture = PIL.Image.frombytes("I;16B", picture.size, RAMP.astype(">u2").tobytes())
    pixels = np.asarray(load_image(encoded(picture, image_format) if byte_order == "<" else picture))
    assert pixels.min() == 0 and pixels.max() == 255
    assert (np.abs(pixels.astype(int) - GRAY[..., None]) <= 1).all() and pixels[128, 0].tolist() == [128] * 3


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.array([[0, 32768, 65535]], np.int32), [0, 128, 255]),
        (np.array([[0, 7, 255]], np.int32), [0, 7, 255]),
        (np.array([[-1000, 0, 1000]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 7.2, 250]], np.float32), [0, 7, 250]),
        (np.array([[0.2, 0.2, np.nan]], np.float32), [51, 51, 0]),
        (np.array([[0, 5e5, 1e6]], np.float32), [0, 128, 255]),
        (np.zeros((1, 3), np.float32), [0, 0, 0]),
        (np.full((1, 3), -7, np.float32), [0, 0, 0]),
        (np.array([[-np.inf, 0, np.inf]], np.float32), [0, 128, 255]),
    ],
)
def test_32_bits(values, expected):
    for source in (PIL.Image.fromarray(values), encoded(PIL.Image.fromarray(values), "TIFF")):
        assert np.asarray(load_image(source))[0].tolist() == [[value] * 3 for value in expected]


def palette(*transparent) -> PIL.Image.Image:
    picture = PIL.Image.new("P", (2, 1))
    picture.putpalette([200, 10, 20, 1, 2, 3])
    picture.putdata([0, 1])
    picture.info |= {"transparency": index for index in transparent}
    return picture


@pytest.mark.parametrize(
    "picture, expected",
    [
        (PIL.Image.new("1", (2, 1), 1), [255, 255, 255]),
        (PIL.Image.new("L", (2, 1), 77), [77, 77, 77]),
        (PIL.Image.new("LA", (2, 1), (77, 0)), [77, 77, 77]),  # transparent
        (PIL.Image.new("RGBA", (2, 1), (200, 10, 20, 0)), [200, 10, 20]),
        (PIL.Image.new("CMYK", (2, 1), (0, 255, 255, 0)), [255, 0, 0]),
        (palette(), [200, 10, 20]),
        (palette(0), [200, 10, 20]),
    ],
    ids=["1", "L", "LA", "RGBA", "CMYK", "P", "P transparent"],
)
def test_modes(picture, expected):
    sources = [picture, encoded(picture, "TIFF" if picture.mode == "CMYK" else "PNG")]
    for source in sources:
        image = load_image(source)
        assert image.mode == "RGB" and image.getpixel((0, 0)) == tuple(expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation):
    """Stored in each of the eight ways, the picture is shown in one."""
    turns = {
        **{1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1)},
        **{6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1)},
    }
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = orientation
    stored = PIL.Image.fromarray(np.ascontiguousarray(turns[orientation](CORNERS)))
    file = encoded(stored, "PNG", exif=exif)
    assert np.array_equal(np.asarray(load_image(file)), CORNERS)
    opened = PIL.Image.open(io.BytesIO(file)).convert("RGB")  # keeps its orientation tag
    assert np.array_equal(np.asarray(load_image(opened)), CORNERS)
    assert np.array_equal(np.asarray(load_image(load_image(opened))), CORNERS)


def test_sources(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encoded(PIL.Image.fromarray(CORNERS), "PNG"))
    handler = http.server.SimpleHTTPRequestHandler
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/image.png"
        for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), url):
            assert np.array_equal(np.asarray(load_image(source)), CORNERS)
        with pytest.raises(ValueError, match="^expected an image that can be read, got HTTPError.*404"):
            load_image(f"{url}x")
        server.shutdown()
    with pytest.raises(
        ValueError, match="^expected an image that can be read, got .*nowhere.png: No such file or directory$"
    ):
        load_image("nowhere.png")
    for source in (None, CORNERS):
        with pytest.raises(ValueError, match=f"^expected an image, got {type(source).__name__}. Pass a path"):
            load_image(source)


def test_too_many_pixels_are_refused_in_one_sentence(monkeypatch):
    file = encoded(PIL.Image.new("1", (60, 60)), "PNG")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10**3)
    with pytest.raises(ValueError, match=r"^expected an image of at most 0.002 megapixels, got a larger one: .*3600"):
        load_image(file)


@pytest.mark.parametrize(("orientation", "corner"), [(1, "red"), (3, "blue"), (6, "blue"), (8, "red")])
def test_photos_of_iphones(orientation, corner):
    picture = PIL.Image.new("RGB", (64, 48), "red")
    picture.paste("blue", (0, 24, 64, 48))
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    pytest.importorskip("pillow_heif").from_pillow(picture).save(file, exif=exif.tobytes())
    loaded = load_image(file.getvalue())
    assert loaded.size == (picture.size if orientation < 5 else picture.size[::-1])
    expected = np.array({"red": (255, 0, 0), "blue": (0, 0, 255)}[corner])
    assert np.abs(np.array(loaded.getpixel((8, 8))) - expected).max() < 30


def test_a_photo_of_an_iphone_asks_for_its_reader(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "pillow_heif", None)
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    for source in (str(tmp_path / "a.jpg"), (tmp_path / "a.jpg").read_bytes()):
        with pytest.raises(ValueError, match="got HEIC. Run `pip install pillow-heif`"):
            load_image(source)
