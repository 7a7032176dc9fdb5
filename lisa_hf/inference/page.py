"""Shared parts of the pages: pictures at screen size, words in the colors of their masks, errors as sentences."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import gradio as gr
import numpy as np
import PIL.Image

from ..evaluation.visualization import COLORS
from ..model.conversation_text import CUT_MARK
from ..model.processing_lisa import SEG_TOKEN


DISPLAY_SIDES = (640, 1280)  # pixels of the longer side of a picture on the page, at least and at most


@contextmanager
def errors_on_page():
    """Show user errors as a sentence on the page."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


def fit_page(image: PIL.Image.Image) -> PIL.Image.Image:
    """Resize an image for the page."""
    smallest, largest = DISPLAY_SIDES
    scale = min(max(max(image.size), smallest), largest) / max(image.size)
    return image.resize([max(round(side * scale), 1) for side in image.size])


def fit_masks(masks: Iterable[np.ndarray], picture: PIL.Image.Image) -> np.ndarray:
    """Resize M masks, bool or uint8, to the size of a picture on the page, `(M, H, W)` uint8."""
    resized = [PIL.Image.fromarray(mask).resize(picture.size, PIL.Image.Resampling.NEAREST) for mask in masks]
    return np.array(resized, dtype=np.uint8).reshape(-1, picture.height, picture.width)


def escape_text(text: str) -> str:
    """Return a text as HTML that shows it verbatim, even where Markdown is rendered, as in Gradio's chatbot."""
    escaped = re.sub(r"[!-/:-@\[-`{-~]", lambda match: f"&#{ord(match[0])};", text)  # ASCII punctuation
    return escaped.replace("\n", "<br>")


def color_words(text: str, mask_numbers: Iterator[int]) -> str:
    """Return a text as HTML, verbatim, with the words before each `[SEG]` in the color of its mask.

    Args:
        text: The text.
        mask_numbers: Index of each `[SEG]`'s mask among those of the picture. Further ones have no color.
    """
    *segmented, rest = text.split(SEG_TOKEN)
    content = ""
    for part in segmented:
        # The words after the last punctuation mark or line.
        start = max((match.end() for match in re.finditer(r"[.,;:!?]\s|\n", part)), default=0)
        style, number = "", next(mask_numbers, None)
        if number is not None:
            color = ", ".join(map(str, COLORS[number % len(COLORS)]))
            style = f"color: rgb({color}); background: white; padding: 0 2px"  # dark ones are lost on a dark page
        words = escape_text(part[start:] + SEG_TOKEN)
        content += f'{escape_text(part[:start])}<b style="{style}">{words}</b>'
    return (content + escape_text(rest)).replace(CUT_MARK, "")
