"""Texts of sheets: in any script that a font of the system has, and never wider than their cell."""

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
