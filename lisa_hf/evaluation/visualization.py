"""Pictures of masks: an overlay on one image, and contact sheets of predictions and of datasets."""

import functools
import logging
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from ..data.images import read_file
from ..data.masks import Mask, decode_mask, merge_masks
from ..model.images import load_image
from ..model.losses import MASK_IGNORE_INDEX


logger = logging.getLogger(__name__)

# Legible on white, and distinguishable by color-blind people: tests/evaluation/test_visualization.py simulates it.
COLORS = np.array(
    [(230, 25, 75), (0, 120, 210), (225, 120, 0), (0, 90, 30), (120, 0, 255), (90, 30, 90)]
    + [(210, 120, 165), (0, 30, 150), (180, 60, 150), (195, 45, 105), (255, 0, 240), (120, 15, 60)]
)
IGNORE_COLOR = np.array((128, 128, 128))
GAP = 12  # pixels between the cells of a sheet
HEADER = 24  # pixels above the cells of a contact sheet
FONT_SIZE = 14
# Fonts of Linux, Windows and macOS for scripts that Pillow's own font lacks: accents, Cyrillic, Greek; Chinese,
# Japanese, Korean; Arabic, Hebrew, Thai. Pillow searches the system's font directories for these names.
FONTS = (
    *("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "arial.ttf", "Arial Unicode.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-zenhei.ttc", "wqy-microhei.ttc"),
    *("DroidSansFallbackFull.ttf", "msyh.ttc", "YuGothM.ttc", "malgun.ttf", "PingFang.ttc", "AppleSDGothicNeo.ttc"),
    *("NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf", "NotoSansThai-Regular.ttf", "tahoma.ttf"),
)


@dataclass
class Prediction:
    """One question about one image, for a contact sheet.

    Args:
        image: The image.
        question: What was asked.
        answer: What the model answered.
        masks: Predicted masks, `(M, H, W)` bool.
        mask_labels: True masks, `(M', H, W)` uint8: 1 object, 255 ignore.
        title: Line above the question.
    """

    image: PIL.Image.Image
    question: str
    answer: str
    masks: np.ndarray
    mask_labels: np.ndarray
    title: str = ""


def overlay_masks(image: PIL.Image.Image, masks: np.ndarray, opacity: float = 0.5) -> PIL.Image.Image:
    """Tint each mask of `(M, H, W)` in its own color and draw its border; pixels of 255 are tinted gray.

    Args:
        image: The image, of W x H pixels.
        masks: Masks, bool or uint8.
        opacity: Opacity of the tint, 0 to 1; the border's is twice that.
    """
    picture = np.asarray(image.convert("RGB")).astype(np.float32)  # [H, W, 3]
    for index, mask in enumerate(masks):
        for region, color in ((mask == 1, COLORS[index % len(COLORS)]), (mask == MASK_IGNORE_INDEX, IGNORE_COLOR)):
            # A pixel is inside if its four neighbors are too.
            padded = np.pad(region, 1, mode="edge")
            inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
            border = region & ~inside
            border_opacity = min(2 * opacity, 1)
            border_color = (1 - border_opacity) * picture[border] + border_opacity * color
            picture[region] = (1 - opacity) * picture[region] + opacity * color
            picture[border] = border_color
    return PIL.Image.fromarray(picture.astype(np.uint8))


# ---- predictions ----------------------------------------------------------------------------------------------------


def contact_sheet(predictions: list[Prediction], columns: int = 2, side: int = 220) -> PIL.Image.Image:
    """Draw a grid of cells: image, prediction and truth side by side, question and answer below them."""
    sheet = _grid([_draw_prediction(prediction, side) for prediction in predictions], columns, top=HEADER)
    draw, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(size=FONT_SIZE)
    for column in range(columns):
        for position, title in enumerate(("image", "predicted", "true")):
            x = GAP + column * (3 * side + 20 + GAP) + position * (side + 10)
            draw.text((x, 6), title, fill="black", font=font)
    return sheet


def _draw_prediction(prediction: Prediction, side: int) -> PIL.Image.Image:
    """Draw one cell of a contact sheet."""
    lines = [prediction.title] if prediction.title else []
    for text in (f"Q: {prediction.question}", f"A: {prediction.answer}"):
        lines += _wrap(text, 92)[:2]  # as many characters and lines as fit
    cell = PIL.Image.new("RGB", (3 * side + 20, side + 20 * len(lines) + 12), "white")
    pictures = (
        prediction.image,
        overlay_masks(prediction.image, prediction.masks),
        overlay_masks(prediction.image, prediction.mask_labels),
    )
    for position, picture in enumerate(pictures):
        cell.paste(_fit(picture, side), (position * (side + 10), 0))
    draw = PIL.ImageDraw.Draw(cell)
    for index, line in enumerate(lines):
        draw.text((0, side + 6 + 20 * index), line, fill="black", font=find_font(line))
    return cell


# ---- data -----------------------------------------------------------------------------------------------------------


def preview_sheet(rows: Sequence[dict], columns: int = 2, side: int = 320) -> PIL.Image.Image:
    """Draw a grid of data rows: the image, the masks over it, and the phrases in the colors of their masks.

    Args:
        rows: Rows of `lisa_hf.data.rows.FEATURES` with undecoded images. A row that cannot be drawn shows the reason.
        columns: Number of cells side by side.
        side: Longer side of each picture, in pixels.
    """
    return _grid([_draw_row(row, side) for row in rows], columns)


def _draw_row(row: dict, side: int) -> PIL.Image.Image:
    """Draw one cell of a preview: image and overlay side by side, the text below them."""
    # 1. Pictures, and the phrases in their colors.
    pictures, lines = [], [("black", f"{row['source']} {row['image_id']}, {row['task']}")]
    try:
        image = load_image(read_file(row))
        phrases, masks = _masks_by_phrases(row, image)
        pictures = [_fit(image, side), _fit(overlay_masks(image, masks), side)]
        lines += [(tuple(color), phrase) for color, phrase in zip(COLORS, phrases)]
        if len(phrases) > len(COLORS):
            lines.append(("black", f"and {len(phrases) - len(COLORS)} more"))
    except Exception as error:  # Pillow has no specific exception for broken files
        lines.append(("red", f"Cannot be shown: {error}"))
    # 2. The other texts of the row.
    if row["ignore"] is not None:
        lines.append((tuple(IGNORE_COLOR), "ignored"))
    if row["explanation"] is not None:
        lines.append(("black", row["explanation"]))
    lines += [("black", f"{message['role']}: {message['content']}") for message in row["messages"][:4]]
    texts = [
        (color, part) for color, line in lines for part in _wrap(line, side // 4, max_lines=3, placeholder=" ...")
    ]
    # 3. The cell.
    height = max([picture.height for picture in pictures], default=0)
    cell = PIL.Image.new("RGB", (2 * side + 10, height + 18 * len(texts) + 6), "white")
    for position, picture in enumerate(pictures):
        cell.paste(picture, (position * (side + 10), 0))
    draw = PIL.ImageDraw.Draw(cell)
    for index, (color, text) in enumerate(texts):
        draw.text((0, height + 4 + 18 * index), text, fill=color, font=find_font(text))
    return cell


def _masks_by_phrases(row: dict, image: PIL.Image.Image) -> tuple[list[str], np.ndarray]:
    """Return the phrases of a row, largest first, and the masks of the first ones, followed by the ignored pixels.

    Raises:
        ValueError: If a mask does not have the size of the image.
    """
    found = {}
    for target in row["targets"]:
        found.setdefault(" / ".join(target["phrases"]), []).append(Mask.from_rle(target["rle"]))
    masks = {phrase: merge_masks(parts).draw() for phrase, parts in found.items()}
    phrases = sorted(masks, key=lambda phrase: masks[phrase].sum(), reverse=True)
    shown = [masks[phrase] for phrase in phrases[: len(COLORS)]]
    if row["ignore"] is not None:
        shown.append(decode_mask(row["ignore"]) * np.uint8(MASK_IGNORE_INDEX))
    for mask in shown:
        if mask.shape != (image.height, image.width):
            raise ValueError(f"expected masks of the image's {(image.height, image.width)} pixels, got {mask.shape}")
    phrases = [phrase if masks[phrase].any() else f"{phrase} (nothing)" for phrase in phrases]
    return phrases, np.array(shown).reshape(-1, image.height, image.width)  # [M, H, W]


# ---- shared ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1000)
def find_font(text: str) -> PIL.ImageFont.FreeTypeFont:
    """Find a font with all or most characters of a text: Pillow's own, or one of the system."""
    best, least = None, None
    for font in _fonts():
        missing = {character for character in text if not _has_glyph(font, character)}
        if least is None or len(missing) < len(least):
            best, least = font, missing
        if not missing:
            return font
    _warn_of_missing_glyphs(unicodedata.name(min(least), "another").split()[0])
    return best


@functools.cache
def _warn_of_missing_glyphs(script: str):
    """Warn once per writing system."""
    logger.warning(
        "No font of this system has the characters of the script %s, so sheets show boxes for them. Install one, such "
        "as fonts-noto-cjk or fonts-noto-core.",
        script,
    )


@functools.cache
def _fonts() -> list[PIL.ImageFont.FreeTypeFont]:
    fonts = [PIL.ImageFont.load_default(size=FONT_SIZE)]
    for name in FONTS:
        try:
            fonts.append(PIL.ImageFont.truetype(name, FONT_SIZE))
        except OSError:  # not on this system
            continue
    return fonts


def _has_glyph(font: PIL.ImageFont.FreeTypeFont, character: str) -> bool:
    if character.isspace():
        return True
    # A font draws missing characters like a character that no font has.
    return bytes(font.getmask(character)) != bytes(font.getmask("\U0010ffff"))


def _wrap(text: str, width: int, **options) -> list[str]:
    """Wrap a text to lines of a width in Latin characters. Chinese, Japanese and Korean ones count twice."""
    is_wide = any(unicodedata.east_asian_width(character) in "WF" for character in text)
    return textwrap.wrap(text, width // 2 if is_wide else width, **options)


def _fit(picture: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """Resize a picture so that its longer side has `side` pixels."""
    scale = side / max(picture.size)
    return picture.convert("RGB").resize([max(round(length * scale), 1) for length in picture.size])


def _grid(cells: list[PIL.Image.Image], columns: int, top: int = 0) -> PIL.Image.Image:
    """Arrange cells of equal width on a sheet that has `top` empty pixels above them."""
    lines = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in line) + GAP for line in lines]
    width = cells[0].width + GAP if cells else 0
    sheet = PIL.Image.new("RGB", (columns * width + GAP, top + sum(heights) + GAP), "white")
    for index, line in enumerate(lines):
        for column, cell in enumerate(line):
            sheet.paste(cell, (GAP + column * width, top + GAP + sum(heights[:index])))
    return sheet
