"""The page that browses data: an image with its masks, the questions about it, and a model's answers.

build_data_page(DataItems(train_rows, eval_datasets)).launch()
"""

import html

import gradio as gr
import numpy as np

from ..evaluation.visualization import overlay_masks
from ..model.losses import MASK_IGNORE_INDEX
from .data_items import DataItems, Item
from .page import color_words, errors_on_page, escape_text, fit_masks, fit_page
from .predicted_items import EvaluatedItems, LabeledItems


ALL = "all"
# Clicks the button of the visible page.
ON_ARROW_KEYS = """() => {
    document.onkeydown = event => {
        if (event.target.closest("input, textarea")) return;
        const name = {ArrowLeft: ".previous-item", ArrowRight: ".next-item"}[event.key];
        if (name) [...document.querySelectorAll(name)].find(button => button.offsetParent)?.click();
    };
}"""


def build_data_page(items: DataItems | EvaluatedItems | LabeledItems) -> gr.Blocks:
    """Build the page that browses items.

    Args:
        items: The items.
    """
    page = _Page(items)
    with gr.Blocks(title="lisa_hf", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        position = gr.State(0)  # among the items found
        with gr.Row():
            group = gr.Dropdown([ALL, *items.groups], label=items.group_label, min_width=160)
            image_id = gr.Textbox("", label="Image", placeholder="part of its name, Enter", min_width=160)
            without_mask = gr.Checkbox(label="No mask", min_width=160)
            number = gr.Number(1, label="Go to", precision=0, min_width=160)  # people count from 1
            opacity = gr.Slider(0, 1, 0.5, label="Opacity of the masks", min_width=160)
        with gr.Row():
            backward = gr.Button("← Previous", size="sm", min_width=100, elem_classes="previous-item")
            forward = gr.Button("Next →", size="sm", min_width=100, elem_classes="next-item")
        title = gr.HTML()
        with gr.Row():
            pictures = [
                gr.Image(
                    label=label,
                    interactive=False,
                    format="png",
                    height=480,
                    min_width=320,
                    buttons=["fullscreen"],
                    elem_classes="item",
                    alt_text=f"The image. {label}",
                )
                for label in items.pictures
            ]
            with gr.Column(min_width=320):
                texts = gr.HTML(max_height=480)

        filters = [group, image_id, without_mask]
        shown = [position, number, title, *pictures, texts]
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        for event in (group.input, without_mask.input, image_id.submit, blocks.load):
            event(page.first, [*filters, opacity], shown, **hidden)
        backward.click(page.previous, [position, *filters, opacity], shown, **hidden)
        forward.click(page.next, [position, *filters, opacity], shown, **hidden)
        number.submit(page.jump, [number, *filters, opacity], shown, **hidden)
        opacity.change(page.show, [position, *filters, opacity], shown, **hidden)
        blocks.load(None, js=ON_ARROW_KEYS)
    return blocks


class _Page:
    """Events of the page. Each returns what to show."""

    def __init__(self, items: DataItems | EvaluatedItems | LabeledItems):
        self.items = items

    def first(self, *filters_and_opacity):
        return self.show(0, *filters_and_opacity)

    def previous(self, position: int, *filters_and_opacity):
        return self.show(max(position - 1, 0), *filters_and_opacity)

    def next(self, position: int, *filters_and_opacity):
        return self.show(position + 1, *filters_and_opacity)

    def jump(self, number: int, group: str, image_id: str, without_mask: bool, opacity: float):
        """Show the item with this number among those that pass the filters."""
        with errors_on_page():
            num_found = len(self._find(group, image_id, without_mask))
            if not 1 <= (number or 0) <= num_found:
                raise ValueError(f"expected the number of an item from 1 to {num_found}, got {number}.")
        return self.show(number - 1, group, image_id, without_mask, opacity)

    def show(self, position: int, group: str, image_id: str, without_mask: bool, opacity: float):
        """Show the item at a position among those that pass the filters."""
        found = self._find(group, image_id, without_mask)
        if len(found) == 0:
            return 0, gr.skip(), "No items match.", *[None] * len(self.items.pictures), ""
        position = min(position, len(found) - 1)
        item = self.items[int(found[position])]
        lines = [f"<b>{position + 1} of {len(found)}</b>", *map(html.escape, item.title)]
        if item.error:
            error = html.escape(item.error)
            lines.append(f'<span style="color: var(--error-text-color)">Cannot be shown: {error}</span>')
        title = f'<div style="overflow-wrap: anywhere">{"<br>".join(lines)}</div>'  # paths are long
        return position, position + 1, title, *self._draw(item, opacity), _texts(item)

    def _find(self, group: str, image_id: str, without_mask: bool) -> np.ndarray:
        return self.items.find(None if group == ALL else group, image_id.strip(), without_mask)

    def _draw(self, item: Item, opacity: float) -> list:
        if item.image is None:
            return [None] * len(self.items.pictures)
        image = fit_page(item.image)
        ignore = fit_masks([] if item.ignore is None else [item.ignore.draw()], image) * np.uint8(MASK_IGNORE_INDEX)
        drawn = []
        for masks in item.pictures.values():
            masks = fit_masks([mask.draw() for mask in masks], image)
            drawn.append(overlay_masks(image, np.concatenate([masks, ignore]), opacity))
        return drawn


def _texts(item: Item) -> str:
    """Return the messages as HTML, verbatim."""
    parts = []
    for message in item.messages:
        if message.role == "user":
            parts.append(f'<p style="margin-top: 1em; opacity: 0.75">{escape_text(message.text)}</p>')
        else:
            title = f"<b>{message.title}:</b> " if message.title else ""
            reasoning = f"<p><i>{escape_text(message.reasoning)}</i></p>" if message.reasoning else ""
            parts.append(f"{reasoning}<p>{title}{color_words(message.text, iter(message.mask_numbers))}</p>")
    return "".join(parts)
