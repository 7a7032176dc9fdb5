"""Texts on sheets: in any script that a system font has, and never wider than their cell."""

import logging

import numpy as np
import PIL.Image
import PIL.ImageFont
import pytest

from lisa_hf.evaluation import visualization
from lisa_hf.evaluation.visualization import contact_sheet, find_font, preview_sheet


PLAIN = PIL.ImageFont.load_default(size=14)


class FontOf:
    """A font that has the given characters alone."""

    def __init__(self, characters):
        self.characters = characters

    def getmask(self, character):
        return [ord(character) % 256 if character in self.characters else 0]


@pytest.fixture
def fonts(monkeypatch):
    latin, greek, chinese = FontOf("rust"), FontOf("rustσκουριά"), FontOf("rust锈蚀")
    monkeypatch.setattr(visualization, "_fonts", lambda: [latin, greek, chinese])
    for cached in (visualization.find_font, visualization._warn_of_missing_glyphs):
        cached.cache_clear()
    yield latin, greek, chinese
    find_font.cache_clear()


def test_the_first_font_that_has_all_characters_draws_a_text(fonts, caplog):
    assert [find_font(text) for text in ("rust", "σκουριά rust", "锈蚀 rust")] == list(fonts)
    assert not caplog.records


def test_what_no_font_has_is_said_once_and_drawn_as_far_as_possible(fonts, caplog):
    with caplog.at_level(logging.WARNING):
        assert find_font("锈蚀的") is fonts[2] and find_font("锈蚀部") is fonts[2]
    (record,) = caplog.records
    assert "characters of the script CJK" in record.getMessage()


def test_accents_are_not_boxes():
    try:
        PIL.ImageFont.truetype("DejaVuSans.ttf", 14)
    except OSError:
        pytest.skip("no font with accents on this system")
    find_font.cache_clear()
    for text in ("déjà vu", "ржавчина"):
        assert all(visualization._has_glyph(find_font(text), character) for character in text)
    assert find_font("plain").getname() == PLAIN.getname()


def test_wide_characters_count_twice():
    assert max(map(len, visualization._wrap("锈" * 100, 40))) == 20
    assert max(map(len, visualization._wrap("rust " * 100, 40))) in range(35, 41)


def test_sheets_of_texts_in_all_scripts():
    messages = [{"role": "user", "content": text} for text in ("rouillé", "ржавчина", "锈蚀的部分" * 30)]
    row = {"image": None, "image_id": "锈", "source": "s", "task": "vqa", "targets": [], "ignore": None}
    sheet = preview_sheet([row | {"explanation": None, "messages": messages}], columns=1, side=200)
    assert sheet.height > 6 * 18
    image = PIL.Image.new("RGB", (8, 8))
    masks = np.zeros((1, 8, 8), bool)
    prediction = visualization.Prediction(image, "哪里生锈了?" * 40, "[SEG]", masks, masks.astype("uint8"))
    assert contact_sheet([prediction], columns=1).width > 600


# ---- colors ---------------------------------------------------------------------------------------------------------

# What the cones of color-blind people see of linear RGB, after Machado et al. 2009 (severity 1).
VISION = {
    "all cones": np.eye(3),
    "no long cones": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no medium cones": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no short cones": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def to_lab(linear: np.ndarray) -> np.ndarray:
    """Return CIELAB of linear RGB, `(N, 3)`; colors 20 apart are told apart at a glance."""
    x, y, z = (np.cbrt(np.clip(linear, 1e-3, 1) @ TO_XYZ.T) / np.cbrt(TO_XYZ.sum(1))).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def test_colors_of_masks_are_told_apart_by_color_blind_people_and_legible():
    colors = visualization.COLORS / 255
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    for cones, matrix in VISION.items():
        lab = to_lab(linear @ np.transpose(matrix))
        distances = np.linalg.norm(lab[:, None] - lab, axis=2) + 100 * np.eye(len(lab))
        assert distances.min() > 15 and distances[:8, :8].min() > 20, cones
    contrast = 1.05 / (linear @ TO_XYZ[1] + 0.05)  # on white: WCAG asks for 3 where letters are bold
    assert contrast.min() > 2.95
