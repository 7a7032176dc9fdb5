"""Pictures of masks: an overlay on one image, and contact sheets of predictions and of data sets."""

import textwrap
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


COLOURS = np.array(
    [(230, 25, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (60, 180, 75), (240, 50, 230)]
    + [(0, 128, 128), (170, 110, 40), (210, 190, 0), (128, 0, 0), (0, 0, 128), (110, 110, 0)]
)
IGNORE_COLOUR = np.array((128, 128, 128))


@dataclass
class Prediction:
    """One question about one image, for a contact sheet.

    Args:
        masks: `(M, H, W)` bool, predicted.
        mask_labels: `(M', H, W)` uint8, true: 1 object, 255 ignore.
        title: shown above the question.
    """

    image: PIL.Image.Image
    question: str
    answer: str
    masks: np.ndarray
    mask_labels: np.ndarray
    title: str = ""


def overlay_masks(image: PIL.Image.Image, masks: np.ndarray) -> PIL.Image.Image:
    """Tints each mask in a colour of its own and draws its border; 255 is tinted grey. `masks` is `(M, H, W)`."""
    picture = np.asarray(image.convert("RGB")).astype(np.float32)
    for index, mask in enumerate(masks):
        for region, colour in ((mask == 1, COLOURS[index % len(COLOURS)]), (mask == MASK_IGNORE_INDEX, IGNORE_COLOUR)):
            padded = np.pad(region, 1, mode="edge")
            inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
            picture[region] = 0.5 * picture[region] + 0.5 * colour
            picture[region & ~inside] = colour
    return PIL.Image.fromarray(picture.astype(np.uint8))


def contact_sheet(predictions: list[Prediction], columns: int = 2, side: int = 220) -> PIL.Image.Image:
    """A grid of cells: image, prediction and truth side by side, question and answer below them."""
    font = PIL.ImageFont.load_default(size=14)
    cell_width, gap = 3 * side + 20, 12
    texts = [_caption(prediction) for prediction in predictions]
    # As high as the longest text of each line of cells.
    heights = [
        side + 20 * max(len(text) for text in texts[start : start + columns]) + 12 + gap
        for start in range(0, len(texts), columns)
    ]
    sheet = PIL.Image.new("RGB", (columns * (cell_width + gap) + gap, sum(heights) + 24 + gap), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for column in range(columns):
        for position, title in enumerate(("image", "predicted", "true")):
            x = gap + column * (cell_width + gap) + position * (side + 10)
            draw.text((x, 6), title, fill="black", font=font)
    for index, (prediction, text) in enumerate(zip(predictions, texts)):
        x = gap + index % columns * (cell_width + gap)
        y = 24 + gap + sum(heights[: index // columns])
        pictures = (
            prediction.image,
            overlay_masks(prediction.image, prediction.masks),
            overlay_masks(prediction.image, prediction.mask_labels),
        )
        for position, picture in enumerate(pictures):
            scale = side / max(picture.size)
            picture = picture.convert("RGB").resize([max(round(length * scale), 1) for length in picture.size])
            sheet.paste(picture, (x + position * (side + 10), y))
        draw.multiline_text((x, y + side + 6), "\n".join(text), fill="black", font=font, spacing=3)
    return sheet


def _caption(prediction: Prediction) -> list[str]:
    """Lines of text below a cell: title, question and answer, each cut to what there is room for."""
    lines = [prediction.title] if prediction.title else []
    for text in (f"Q: {prediction.question}", f"A: {prediction.answer}"):
        lines += textwrap.wrap(text, 92)[:2]
    return lines


def preview_sheet(rows: Sequence[dict], columns: int = 2, side: int = 320) -> PIL.Image.Image:
    """A grid of rows of a data set: the image, the masks over it, and the phrases in the colours of their masks.

    Args:
        rows: Rows of `lisa_hf.data.rows.FEATURES` with undecoded images. One that cannot be shown says why.
    """
    cells, gap = [_draw_row(row, side) for row in rows], 12
    lines = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in line) + gap for line in lines]
    sheet = PIL.Image.new("RGB", (columns * (2 * side + 10 + gap) + gap, sum(heights) + gap), "white")
    for index, line in enumerate(lines):
        for column, cell in enumerate(line):
            sheet.paste(cell, (gap + column * (cell.width + gap), gap + sum(heights[:index])))
    return sheet


def _draw_row(row: dict, side: int) -> PIL.Image.Image:
    """One cell of a preview: image and overlay side by side, the text below them."""
    pictures, lines = [], [("black", f"{row['source']} {row['image_id']}, {row['task']}")]
    try:
        image = load_image(read_file(row))
        phrases, masks = _masks_by_phrases(row, image)
        scale = side / max(image.size)
        size = [max(round(length * scale), 1) for length in image.size]
        pictures = [image.resize(size), overlay_masks(image, masks).resize(size)]
        lines += [(tuple(colour), phrase) for colour, phrase in zip(COLOURS, phrases)]
        if len(phrases) > len(COLOURS):
            lines.append(("black", f"and {len(phrases) - len(COLOURS)} more"))
    except Exception as error:  # Pillow has no exception of its own for broken files.
        lines.append(("red", f"Cannot be shown: {error}"))
    if row["ignore"] is not None:
        lines.append((tuple(IGNORE_COLOUR), "ignored"))
    if row["explanation"] is not None:
        lines.append(("black", row["explanation"]))
    lines += [("black", f"{message['role']}: {message['content']}") for message in row["messages"][:4]]

    font = PIL.ImageFont.load_default(size=14)
    texts = [
        (colour, part)
        for colour, line in lines
        for part in textwrap.wrap(line, side // 4, max_lines=3, placeholder=" ...")
    ]
    height = max([picture.height for picture in pictures], default=0)
    cell = PIL.Image.new("RGB", (2 * side + 10, height + 18 * len(texts) + 6), "white")
    for position, picture in enumerate(pictures):
        cell.paste(picture, (position * (side + 10), 0))
    draw = PIL.ImageDraw.Draw(cell)
    for index, (colour, text) in enumerate(texts):
        draw.text((0, height + 4 + 18 * index), text, fill=colour, font=font)
    return cell


def _masks_by_phrases(row: dict, image: PIL.Image.Image) -> tuple[list[str], np.ndarray]:
    """The phrases of a row, the largest first, and `(M, H, W)` the masks of the first ones, then what is ignored."""
    found = {}
    for target in row["targets"]:
        found.setdefault(" / ".join(target["phrases"]), []).append(Mask.from_rle(target["rle"]))
    masks = {phrase: merge_masks(parts).draw() for phrase, parts in found.items()}
    phrases = sorted(masks, key=lambda phrase: masks[phrase].sum(), reverse=True)
    shown = [masks[phrase] for phrase in phrases[: len(COLOURS)]]
    if row["ignore"] is not None:
        shown.append(decode_mask(row["ignore"]) * np.uint8(MASK_IGNORE_INDEX))
    for mask in shown:
        if mask.shape != (image.height, image.width):
            raise ValueError(f"the image has {(image.height, image.width)} pixels, but a mask has {mask.shape}")
    phrases = [phrase if masks[phrase].any() else f"{phrase} (nothing)" for phrase in phrases]
    return phrases, np.array(shown).reshape(-1, image.height, image.width)
