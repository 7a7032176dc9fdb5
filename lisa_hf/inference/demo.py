"""The web demo: a conversation about an image in the browser, with masks over it, and the same as an API.

demo = build_demo({"my-lisa": (model, processor)})
demo.launch()
"""

import html
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import PIL.Image

from ..evaluation.visualization import overlay_masks
from ..model.images import load_image, open_image
from ..model.modeling_lisa import LisaForConditionalGeneration
from ..model.pipeline_lisa import Answer
from ..model.processing_lisa import LisaProcessor
from .annotation_files import answer_record, record_masks, to_labelme
from .conversation import Conversation, Turn
from .page import color_words, errors_on_page, fit_masks, fit_page


try:  # on a Hugging Face Space with ZeroGPU, a function has a GPU only under this decorator
    from spaces import GPU as needs_gpu

    IS_ZERO_GPU = True
except ImportError:
    IS_ZERO_GPU = False

    def needs_gpu(function: Callable) -> Callable:
        return function


FILES = ("PNG", "RLE JSON", "LabelMe JSON")  # of all answers
Turns = list[dict[str, Any]]


def build_demo(
    models: dict[str, tuple[LisaForConditionalGeneration, LisaProcessor]],
    examples: Sequence[tuple[str, str]] = (),
    max_megapixels: float = 40,
    max_new_tokens: int = 256,
) -> gr.Blocks:
    """Build the demo of one model, or of several that answer side by side.

    Args:
        models: Models in evaluation mode with their processors, by the name on the page.
        examples: Paths of images, each with a question.
        max_megapixels: Size of the largest image that is accepted.
        max_new_tokens: Longest answer, in tokens.

    Returns:
        The app. Its API has the endpoint `/segment`, which the first model answers.
    """
    private = {"api_visibility": "private"}
    with gr.Blocks(title="lisa_hf", analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        with gr.Row():
            with gr.Column(min_width=320):
                sources = ["upload", "clipboard", "webcam"]
                image = gr.Image(label="Image", type="filepath", image_mode=None, sources=sources, height=360)
                question = gr.Textbox(label="Question", placeholder="What is red? Please output segmentation mask.")
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", size="md", min_width=80)
                    stop = gr.Button("Stop", size="md", min_width=80)
                    clear = gr.Button("Start over", size="md", min_width=80)
                opacity = gr.Slider(0, 1, 0.5, label="Opacity of the masks")
            panels = [_Panel(name, *model, max_megapixels, max_new_tokens) for name, model in models.items()]
        if examples:
            gr.Examples([list(example) for example in examples], [image, question])

        # Questions wait in a queue, because a model answers one at a time; several models do it side by side.
        queues = [{"concurrency_limit": 1, "concurrency_id": name} for name in models]
        answers = []
        for panel, queue in zip(panels, queues):
            page = [image, panel.turns, panel.hidden, opacity]
            for event in (ask.click, question.submit):
                answers.append(event(panel.answer, [question, *page], panel.outputs, **private, **queue))
            opacity.change(panel.draw, page, panel.overlay, **private)
            panel.overlay.select(panel.toggle, page, [panel.hidden, panel.overlay], **private)
        for panel in panels:
            image.change(panel.change_image, image, panel.outputs, **private)  # queued, or its errors are not shown
            for event in (clear.click, panel.chat.clear):
                event(panel.restart, image, panel.outputs, queue=False, **private)
            # With ZeroGPU, a model answers in another process, where its answer can only be cut off.
            stop.click(panel.stop, image, cancels=answers if IS_ZERO_GPU else None, queue=False, **private)

        # The API. Its components are not on the page; through them Gradio checks and documents what goes in and out.
        file, text = gr.File(label="image", visible=False), gr.Textbox(label="question", visible=False)
        answer = gr.JSON(label="answer", visible=False)
        gr.Button(visible=False).click(panels[0].segment, [file, text], answer, api_name="segment", **queues[0])
    return demo


@dataclass
class _Running:
    """An answer that grows, and the image that it is about."""

    path: str | None


class _Panel:
    """What one model says: its conversation, the masks of all its answers over the image, and files of them.

    The page keeps the turns as records, see [`answer_record`], and the numbers of the masks that the user hid. An
    answer that is still growing has no masks yet.
    """

    def __init__(self, name: str, model, processor, max_megapixels: float, max_new_tokens: int):
        self.max_megapixels = max_megapixels
        # Conversations of recent users, with their caches. Each begins anew from the page's turns if it is not there.
        self.conversation = lru_cache(maxsize=8)(
            lambda session, path: Conversation(model, processor, path, max_new_tokens)
        )
        self.respond = needs_gpu(self._respond)
        self.running: dict[str, _Running] = {}  # answers that grow, by session
        with gr.Column(min_width=320):
            self.turns, self.hidden = gr.State([]), gr.State([])
            label = f"{name}: click a mask to hide it"
            self.overlay = gr.Image(
                label=label,
                interactive=False,
                format="png",
                height=360,
                buttons=["fullscreen"],
                elem_classes="overlay",
            )
            self.chat = gr.Chatbot(label=name, height=240, buttons=[])
            with gr.Row():
                self.files = [gr.DownloadButton(label, interactive=False, size="sm", min_width=80) for label in FILES]
        self.outputs = [self.turns, self.hidden, self.chat, self.overlay, *self.files]

    # ---- events -----------------------------------------------------------------------------------------------------

    def answer(
        self,
        question: str,
        path: str | None,
        turns: Turns,
        hidden: list[int],
        opacity: float,
        request: gr.Request,
    ):
        """Yield the outputs while the answer grows, then with its masks."""
        session = request.session_hash
        running = self.running[session] = _Running(path)
        try:
            with errors_on_page():
                self.check(path, question)
                for turns in self.respond(session, path, question.strip(), turns):
                    if self.running.get(session) is not running:  # the page is about something else
                        yield [gr.skip()] * len(self.outputs)  # Gradio repeats the last outputs at the end
                        return
                    yield turns, hidden, _chat_messages(turns), *[gr.skip()] * (1 + len(FILES))
                files = [gr.DownloadButton(value=file, interactive=True) for file in _write_files(path, turns)]
                yield turns, hidden, _chat_messages(turns), self.draw(path, turns, hidden, opacity), *files
        finally:
            if self.running.get(session) is running:
                del self.running[session]

    def segment(self, image: str, question: str) -> dict[str, Any]:
        """Answer a question about an image: text, masks as pycocotools' compressed RLE, and their scores."""
        with errors_on_page():
            self.check(image, question)
            *_, (record,) = self.respond(None, image, question.strip(), [])
        return {name: record[name] for name in ("text", "masks", "scores", "height", "width")}

    def stop(self, path: str | None, request: gr.Request):
        """Stop the user's answer: it keeps what there is of it, with the masks."""
        if path:
            self.conversation(request.session_hash, path).stop()

    def change_image(self, path: str | None, request: gr.Request):
        """Return the outputs of a new conversation, and end an answer about another image."""
        running = self.running.get(request.session_hash)
        if running is not None and running.path != path:
            del self.running[request.session_hash]
        with errors_on_page():
            if path:
                self.check(path)
        return [], [], [], path and _display_image(path), *[gr.DownloadButton(interactive=False)] * len(FILES)

    def restart(self, path: str | None, request: gr.Request):
        """Return the outputs of a new conversation, and end the user's answer."""
        self.running.pop(request.session_hash, None)
        return self.change_image(path, request)

    def draw(self, path: str | None, turns: Turns, hidden: list[int], opacity: float) -> PIL.Image.Image | None:
        """Draw the masks that are not hidden."""
        if not path:
            return None
        image = _display_image(path)
        masks = _display_masks(turns, image)
        masks[hidden] = 0
        return overlay_masks(image, masks, opacity)

    def toggle(self, path: str, turns: Turns, hidden: list[int], opacity: float, click: gr.SelectData):
        """Hide the uppermost mask at the clicked pixel, or show those that are hidden there."""
        column, row = click.index
        (clicked,) = _display_masks(turns, _display_image(path))[:, row, column].nonzero()
        visible = [number for number in clicked.tolist() if number not in hidden]
        hidden = [*hidden, visible[-1]] if visible else [number for number in hidden if number not in clicked]
        return hidden, self.draw(path, turns, hidden, opacity)

    # ---- the model --------------------------------------------------------------------------------------------------

    def check(self, path: str | None, question: str = "?"):
        """Raise what is wrong with an image or a question as a `ValueError` of a sentence."""
        if not path:
            raise ValueError("Choose an image first.")
        if not question.strip():
            raise ValueError("Type a question first.")
        width, height = open_image(path).size
        if width * height > self.max_megapixels * 1e6:
            raise ValueError(
                f"expected an image of at most {self.max_megapixels:g} megapixels, got one of "
                f"{width * height / 1e6:.0f}. Make it smaller."
            )

    def _respond(self, session: str | None, path: str, question: str, turns: Turns) -> Iterator[Turns]:
        conversation = self.conversation(session, path)
        conversation.turns = [Turn(turn["question"], Answer(turn["text"], masks=None, scores=None)) for turn in turns]
        text = ""
        for piece in conversation.ask(question):
            text += piece
            yield [*turns, {"question": question, "text": text}]
        yield [*turns, answer_record(Path(path).name, question, conversation.turns[-1].answer)]


# ---- what is on the page --------------------------------------------------------------------------------------------


def _chat_messages(turns: Turns) -> list[dict[str, str]]:
    """Return the messages of Gradio's chatbot, with the words before each `[SEG]` in the color of its mask."""
    messages, mask_numbers = [], itertools.count()
    for turn in turns:
        messages.append({"role": "user", "content": html.escape(turn["question"])})
        messages.append({"role": "assistant", "content": color_words(turn["text"], mask_numbers)})
    return messages


@lru_cache(maxsize=8)
def _display_image(path: str) -> PIL.Image.Image:
    return fit_page(load_image(path))


def _display_masks(turns: Turns, image: PIL.Image.Image) -> np.ndarray:
    """Return the masks of all answers at the size of the picture on the page, `(M, H, W)` uint8."""
    return fit_masks([mask for turn in turns if "masks" in turn for mask in record_masks(turn)], image)


def _write_files(path: str, turns: Turns) -> list[str]:
    """Write the files of `FILES` beside the uploaded image, and return their paths."""
    directory = Path(tempfile.mkdtemp(dir=Path(path).parent))
    name = Path(path).stem
    picture, rle, labelme = (directory / f"{name}{suffix}" for suffix in (".png", "_rle.json", ".json"))
    answers = [turn for turn in turns if "masks" in turn]
    overlay_masks(load_image(path), np.concatenate(list(map(record_masks, answers)))).save(picture)
    rle.write_text(json.dumps(answers, ensure_ascii=False), "utf-8")
    labelme.write_text(json.dumps(to_labelme(answers, Path(path).name), ensure_ascii=False), "utf-8")
    return [str(picture), str(rle), str(labelme)]
