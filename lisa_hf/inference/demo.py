"""The web demo: a conversation about an image in the browser, with masks over it, and an API.

demo = build_demo({"my-lisa": (model, processor)})
demo.launch()
"""

import itertools
import json
import tempfile
import textwrap
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
from .page import color_words, errors_on_page, escape_text, fit_masks, fit_page


try:  # on a Hugging Face Space with ZeroGPU, a function has a GPU only under this decorator
    from spaces import GPU as needs_gpu

    IS_ZERO_GPU = True
except ImportError:
    IS_ZERO_GPU = False

    def needs_gpu(function: Callable) -> Callable:
        return function


ANNOTATIONS = ("RLE JSON", "LabelMe JSON")  # files with the masks of all answers
Turns = list[dict[str, Any]]
HINT = "Choose an image and ask about it.<br>For a mask, end with: Please output segmentation mask."
# Gradio's own button copies the HTML that colors the words. Browsers let pages of http write to the clipboard on
# localhost only.
_COPY = "navigator.clipboard ? navigator.clipboard.writeText(text) : alert('Copying needs https or localhost.')"
COPY_TEXT = f"""messages => {{
    const parse = html => new DOMParser().parseFromString(html, "text/html").body.textContent;
    const text = messages.map(message => parse(message.content[0].text.replaceAll("<br>", "\\n"))).join("\\n");
    {_COPY};
}}"""
COPY_FILE = f"async file => {{ const text = await (await fetch(file.url)).text(); {_COPY}; }}"


def build_demo(
    models: dict[str, tuple[LisaForConditionalGeneration, LisaProcessor]],
    examples: Sequence[tuple[str, str]] = (),
    max_megapixels: float = 40,
    max_new_tokens: int = 256,
) -> gr.Blocks:
    """Build the demo of one model, or of several that answer side by side.

    Args:
        models: Models in evaluation mode with their processors, by name on the page.
        examples: Paths of images, each with a question.
        max_megapixels: Maximum size of an image.
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
                    clear = gr.Button("Start over", size="md", min_width=130)  # in one line on a phone
                opacity = gr.Slider(0, 1, 0.5, label="Opacity of the masks")
            panels = [_Panel(name, *model, max_megapixels, max_new_tokens) for name, model in models.items()]
        if examples:
            gr.Examples([list(example) for example in examples], [image, question])

        # Questions wait in a queue, because a model answers one at a time. Several models answer side by side, but not
        # as events of one button, which wait for each other.
        queues = [{"concurrency_limit": 1, "concurrency_id": name} for name in models]
        num_asked = gr.State(0)
        at_once = {"concurrency_limit": None, **private}  # not without a queue, where a state's change is no event
        gr.on([ask.click, question.submit], lambda number: number + 1, num_asked, num_asked, **at_once)
        for panel, queue in zip(panels, queues):
            page = [image, panel.turns, panel.shown, panel.hidden, opacity]
            asked = [question, image, panel.turns, panel.hidden, opacity]
            answer = num_asked.change(panel.answer, asked, panel.outputs, trigger_mode="once", **private, **queue)
            for event in (opacity.change, panel.shown.input):
                event(panel.draw, page, panel.pictures, **private)
            panel.overlay.select(panel.toggle, page, [panel.hidden, *panel.pictures], **private)
            # With ZeroGPU, a model answers in another process, where its answer can only be aborted.
            cancels = answer if IS_ZERO_GPU else None
            stop.click(panel.stop, panel.num_canceled, panel.num_canceled, cancels=cancels, **at_once)
            panel.num_canceled.change(None, cancels=answer)
        for panel in panels:
            image.change(panel.change_image, image, panel.outputs, **private)  # queued, or its errors are not shown
            for event in (clear.click, panel.chat.clear):
                event(panel.restart, image, panel.outputs, queue=False, **private)

        # The API. Its components are not on the page; Gradio uses them to check and document inputs and outputs.
        file, text = gr.File(label="image", visible=False), gr.Textbox(label="question", visible=False)
        answer = gr.JSON(label="answer", visible=False)
        gr.Button(visible=False).click(panels[0].segment, [file, text], answer, api_name="segment", **queues[0])
    return demo


@dataclass
class _Running:
    """An answer in progress, its image, and whether the user has stopped it."""

    path: str | None
    is_stopped: bool = False


class _Panel:
    """Panel of one model: its conversation, the masks of all its answers over the image, and files of them.

    The page keeps the turns as records, see [`answer_record`], the indices of the answers whose masks are shown (the
    newest one unless the user chooses others), and the indices of the masks that the user hid. An answer in progress
    has no masks yet.
    """

    def __init__(self, name: str, model, processor, max_megapixels: float, max_new_tokens: int):
        self.max_megapixels = max_megapixels
        # Conversations of recent users, with their caches. A missing one is recreated from the page's turns.
        self.conversation = lru_cache(maxsize=8)(
            lambda session, path: Conversation(model, processor, path, max_new_tokens)
        )
        self.respond = needs_gpu(self._respond)
        self.running: dict[str, _Running] = {}  # answers in progress, by session
        with gr.Column(min_width=320):
            self.turns, self.hidden = gr.State([]), gr.State([])
            self.num_canceled = gr.State(0)
            label = f"{name}: click a mask to hide it"
            self.overlay = gr.Image(
                label=label,
                interactive=False,
                format="png",
                height=360,
                buttons=["fullscreen"],
                elem_classes="overlay",
                alt_text="The image with the masks of the answers",
            )
            self.shown = gr.CheckboxGroup(label="Masks of", visible=False)
            copies = [gr.Button(label) for label in ("Copy text", "Copy RLE")]
            self.chat = gr.Chatbot(label=name, height=300, buttons=copies, placeholder=HINT)
            with gr.Row():
                png, *files = [
                    gr.DownloadButton(f"↓ {label}", interactive=False, size="sm", min_width=80)
                    for label in ("PNG", *ANNOTATIONS)
                ]
            for button, component, script in zip(copies, (self.chat, files[0]), (COPY_TEXT, COPY_FILE)):
                button.click(None, component, js=script)
        self.pictures = [self.overlay, png]
        self.outputs = [self.turns, self.hidden, self.chat, self.shown, *self.pictures, *files]

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
                    if running.is_stopped:
                        self.conversation(session, path).stop()
                    yield turns, hidden, _chat_messages(turns), *[gr.skip()] * (len(self.outputs) - 3)
                shown = [len(turns) - 1]
                files = [gr.DownloadButton(value=file, interactive=True) for file in _write_annotations(path, turns)]
                pictures = self.draw(path, turns, shown, hidden, opacity)
                yield turns, hidden, _chat_messages(turns), _choose_answers(turns, shown), *pictures, *files
        finally:
            if self.running.get(session) is running:
                del self.running[session]

    def segment(self, image: str, question: str) -> dict[str, Any]:
        """Answer a question about an image: text, masks as pycocotools' compressed RLE, and their scores."""
        with errors_on_page():
            self.check(image, question)
            *_, (record,) = self.respond(None, image, question.strip(), [])
        return {name: record[name] for name in ("text", "masks", "scores", "height", "width")}

    def stop(self, num_canceled: int, request: gr.Request) -> int:
        """Stop the user's answer, which keeps the text and masks generated so far.

        Returns:
            The number of questions canceled while waiting in the queue; a change of it cancels one.
        """
        running = self.running.get(request.session_hash)
        if running is None:
            return num_canceled + 1
        running.is_stopped = True
        return num_canceled

    def change_image(self, path: str | None, request: gr.Request):
        """Return the outputs of a new conversation, and stop an answer about another image."""
        running = self.running.get(request.session_hash)
        if running is not None and running.path != path:
            del self.running[request.session_hash]
        with errors_on_page():
            if path:
                self.check(path)
        files = [gr.DownloadButton(interactive=False)] * (1 + len(ANNOTATIONS))
        return [], [], [], _choose_answers([], []), path and _display_image(path), *files

    def restart(self, path: str | None, request: gr.Request):
        """Return the outputs of a new conversation, and stop the user's answer."""
        self.running.pop(request.session_hash, None)
        return self.change_image(path, request)

    def draw(self, path: str | None, turns: Turns, shown: list[int], hidden: list[int], opacity: float) -> tuple:
        """Return the picture with the visible masks of the chosen answers, and its download button."""
        if not path:
            return None, gr.DownloadButton(interactive=False)
        image = _display_image(path)
        masks = _display_masks(turns, shown, image)
        masks[hidden] = 0
        file = Path(tempfile.mkdtemp(dir=Path(path).parent)) / f"{Path(path).stem}.png"
        overlay_masks(image, masks, opacity).save(file, compress_level=1)
        return str(file), gr.DownloadButton(value=str(file), interactive=bool(turns))

    def toggle(
        self, path: str, turns: Turns, shown: list[int], hidden: list[int], opacity: float, click: gr.SelectData
    ):
        """Hide the topmost mask at the clicked pixel, or show those hidden there."""
        column, row = click.index
        (clicked,) = _display_masks(turns, shown, _display_image(path))[:, row, column].nonzero()
        visible = [number for number in clicked.tolist() if number not in hidden]
        hidden = [*hidden, visible[-1]] if visible else [number for number in hidden if number not in clicked]
        return hidden, *self.draw(path, turns, shown, hidden, opacity)

    # ---- the model --------------------------------------------------------------------------------------------------

    def check(self, path: str | None, question: str = "?"):
        """Raise a `ValueError` with a full sentence if an image or a question is unusable."""
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
        messages.append({"role": "user", "content": escape_text(turn["question"])})
        messages.append({"role": "assistant", "content": color_words(turn["text"], mask_numbers)})
    return messages


@lru_cache(maxsize=8)
def _display_image(path: str) -> PIL.Image.Image:
    return fit_page(load_image(path))


def _display_masks(turns: Turns, shown: list[int], image: PIL.Image.Image) -> np.ndarray:
    """Return the masks of all answers at the size of the picture on the page, `(M, H, W)` uint8; 0 if not shown."""
    masks = [
        mask if number in shown else np.zeros_like(mask)
        for number, turn in enumerate(turns)
        for mask in (record_masks(turn) if "masks" in turn else ())
    ]
    return fit_masks(masks, image)


def _choose_answers(turns: Turns, shown: list[int]) -> gr.CheckboxGroup:
    """Return the choice of answers whose masks are shown. It is hidden if only one answer has masks."""
    choices = [
        (f"{number + 1}. {textwrap.shorten(turn['question'], 32, placeholder='...')}", number)
        for number, turn in enumerate(turns)
        if turn.get("masks")
    ]
    value = [number for _, number in choices if number in shown]
    return gr.CheckboxGroup(choices, value=value, visible=len(choices) > 1)


def _write_annotations(path: str, turns: Turns) -> list[str]:
    """Write the files of `ANNOTATIONS` next to the uploaded image, and return their paths."""
    directory = Path(tempfile.mkdtemp(dir=Path(path).parent))
    rle, labelme = (directory / f"{Path(path).stem}{suffix}" for suffix in ("_rle.json", ".json"))
    answers = [turn for turn in turns if "masks" in turn]  # an aborted one has none
    rle.write_text(json.dumps(answers, ensure_ascii=False), "utf-8")
    labelme.write_text(json.dumps(to_labelme(answers, Path(path).name), ensure_ascii=False), "utf-8")
    return [str(rle), str(labelme)]
