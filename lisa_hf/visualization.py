"""Pictures of masks: an overlay on one image, and a contact sheet of predictions beside the truth."""

import textwrap
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from .modeling_lisa import MASK_IGNORE_INDEX


COLOURS = np.array([(230, 25, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (60, 180, 75), (240, 50, 230)])
IGNORE_COLOUR = np.array((128, 128, 128))


@dataclass
class Prediction:
    """One question about one image, for a contact sheet.

    Args:
        masks: `(M, H, W)` bool, predicted.
        mask_labels: `(M', H, W)` uint8, true: 1 object, 255 ignore.
    """

    image: PIL.Image.Image
    question: str
    answer: str
    masks: np.ndarray
    mask_labels: np.ndarray


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
    cell_width, text_height, gap = 3 * side + 20, 88, 12
    rows = -(-len(predictions) // columns)
    sheet = PIL.Image.new(
        "RGB", (columns * (cell_width + gap) + gap, rows * (side + text_height + gap) + 24 + gap), "white"
    )
    draw = PIL.ImageDraw.Draw(sheet)
    for column in range(columns):
        for position, title in enumerate(("image", "predicted", "true")):
            x = gap + column * (cell_width + gap) + position * (side + 10)
            draw.text((x, 6), title, fill="black", font=font)
    for index, prediction in enumerate(predictions):
        x = gap + index % columns * (cell_width + gap)
        y = 24 + gap + index // columns * (side + text_height + gap)
        pictures = (
            prediction.image,
            overlay_masks(prediction.image, prediction.masks),
            overlay_masks(prediction.image, prediction.mask_labels),
        )
        for position, picture in enumerate(pictures):
            scale = side / max(picture.size)
            picture = picture.convert("RGB").resize([max(round(length * scale), 1) for length in picture.size])
            sheet.paste(picture, (x + position * (side + 10), y))
        lines = textwrap.wrap(f"Q: {prediction.question}", 92)[:2] + textwrap.wrap(f"A: {prediction.answer}", 92)[:2]
        draw.multiline_text((x, y + side + 6), "\n".join(lines), fill="black", font=font, spacing=3)
    return sheet
