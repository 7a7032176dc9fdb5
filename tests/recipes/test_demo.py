"""demo.py as users run it: in a browser, from Python, and with curl."""

import html
import io
import itertools
import json
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from fixtures.paths import ROOT
from fixtures.recipes import run_here, serve, serve_demo
from fixtures.tiny_models import image, save_talkative

from lisa_hf.evaluation.visualization import COLORS
from lisa_hf.inference.annotation_files import record_masks
from lisa_hf.training.build import load_lisa


pytest.importorskip("gradio")
QUESTION = "What is the red circle?"
NUM_TOKENS = 20


@pytest.fixture(scope="module")
def talkative(tmp_path_factory) -> Path:
    return save_talkative(tmp_path_factory.mktemp("talkative"))


@pytest.fixture(scope="module")
def url(talkative, tmp_path_factory):
    """The address of a demo of the model."""
    with serve_demo(talkative, "--max_new_tokens", NUM_TOKENS, directory=tmp_path_factory.mktemp("gradio")) as url:
        yield url


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("photos")
    image(40, 60).save(directory / "first.png")
    image(64, 32, seed=1).save(directory / "second.png")
    PIL.Image.new("RGB", (10_000, 6_000)).save(directory / "large.png")
    (directory / "notes.txt").write_text("no image")
    return directory


@pytest.fixture(scope="module")
def predicted(talkative, photos, tmp_path_factory) -> dict[str, dict]:
    """What predict.py answers to the question about each photo."""
    directory = tmp_path_factory.mktemp("predicted") / "out"
    paths = [photos / "first.png", photos / "second.png"]
    options = ("--max_new_tokens", NUM_TOKENS, "--output_dir", directory, "--format", "jsonl", "--device", "cpu")
    run_here("predict.py", talkative, "--image", *paths, "--question", QUESTION, *options)
    lines = (directory / "predictions.jsonl").read_text("utf-8").splitlines()
    records = {record["image"]: record for record in map(json.loads, lines)}
    assert len(records["first.png"]["masks"]) > 1
    return records


def test_python_and_curl_get_the_masks_of_predict(url, photos, predicted):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(url, verbose=False)
    answer = client.predict(image=handle_file(photos / "first.png"), question=QUESTION, api_name="/segment")
    expected = {name: predicted["first.png"][name] for name in ("text", "masks", "scores", "height", "width")}
    assert answer == expected
    for name, error in (
        ("large.png", "at most 40 megapixels, got one of 60"),
        ("notes.txt", "image that can be read"),
    ):
        with pytest.raises(AppError, match=error):
            client.predict(image=handle_file(photos / name), question=QUESTION, api_name="/segment")
    with pytest.raises(AppError, match="Type a question first"):
        client.predict(image=handle_file(photos / "first.png"), question=" ", api_name="/segment")

    def curl(*arguments) -> str:
        return subprocess.run(["curl", "-sN", *arguments], capture_output=True, text=True, check=True).stdout

    (path,) = json.loads(curl("-F", f"files=@{photos / 'first.png'}", f"{url}/gradio_api/upload"))
    data = json.dumps({"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, QUESTION]})
    event = json.loads(curl("-H", "Content-Type: application/json", "-d", data, f"{url}/gradio_api/call/segment"))[
        "event_id"
    ]
    result = curl(f"{url}/gradio_api/call/segment/{event}")
    assert json.loads(result.split("data: ")[-1])[0] == expected


def test_two_users_at_once_get_their_own_masks(url, photos, predicted):
    from gradio_client import Client, handle_file

    def ask(name):
        client = Client(url, verbose=False)
        return client.predict(image=handle_file(photos / name), question=QUESTION, api_name="/segment")["masks"]

    names = ["first.png", "second.png"] * 3
    with ThreadPoolExecutor() as executor:
        for name, masks in zip(names, executor.map(ask, names)):
            assert masks == predicted[name]["masks"]


def test_a_file_of_the_server_is_not_read(url):
    data = json.dumps({"data": [{"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}, QUESTION]})
    command = ["curl", "-s", "-H", "Content-Type: application/json", "-d", data, f"{url}/gradio_api/call/segment"]
    event = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)["event_id"]
    command = ["curl", "-sN", f"{url}/gradio_api/call/segment/{event}"]
    result = subprocess.run(command, capture_output=True, text=True).stdout
    assert "event: error" in result and "image that can be read" not in result


def test_the_app_of_a_space_runs_where_a_function_needs_a_gpu(talkative, photos, tmp_path):
    """The three lines in the documentation, with a stand-in for the package `spaces`."""
    from gradio_client import Client, handle_file

    page = (ROOT / "docs" / "inference.md").read_text("utf-8")
    (app,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "build_demo(" in block)
    (tmp_path / "app.py").write_text(app.replace("user/my-lisa", str(talkative)))
    (tmp_path / "spaces.py").write_text(
        "def GPU(function):\n    print('GPU:', function.__name__)\n    return function\n"
    )
    with serve(tmp_path / "app.py", directory=tmp_path) as (url, printed):
        assert "GPU: _respond" in printed
        client = Client(url, verbose=False)
        answer = client.predict(image=handle_file(photos / "first.png"), question=QUESTION, api_name="/segment")
        assert len(answer["masks"]) == answer["text"].count("[SEG]") > 0
        # An answer in another process can only be cut off.
        stop = id_of(client, "Stop")
        assert any(event["cancels"] for event in client.config["dependencies"] if event["targets"][0][0] == stop)


def id_of(client, label: str) -> int:
    (found,) = (part["id"] for part in client.config["components"] if part["props"].get("value") == label)
    return found


# ---- the page -------------------------------------------------------------------------------------------------------


class Visitor:
    """A user and the page that they see."""

    def __init__(self, browser, url: str, width: int = 1280, **options):
        self.page = browser.new_context(viewport={"width": width, "height": 900}, **options).new_page()
        self.page.goto(url)
        self.answers = self.page.locator("[data-testid=bot]")

    def upload(self, path: Path):
        self.page.locator("input[type=file]").first.set_input_files(path)

    def ask(self, question: str) -> list[str]:
        """Ask, wait until the files can be downloaded, and return the texts that the growing answer had."""
        number = self.answers.count()
        self.page.evaluate(
            """number => {
                window.texts = [];
                new MutationObserver(() => {
                    const answer = document.querySelectorAll("[data-testid=bot]")[number];
                    if (answer) window.texts.push(answer.innerText.trim());
                }).observe(document.body, {subtree: true, childList: true, characterData: true});
            }""",
            number,
        )
        self.page.get_by_label("Question", exact=True).fill(question)
        self.page.get_by_role("button", name="Ask", exact=True).click()
        self.answers.nth(number).wait_for()
        self.wait()
        return list(dict.fromkeys(self.page.evaluate("window.texts")))

    def wait(self):
        """Wait until all answers have ended."""
        self.page.wait_for_function("() => !document.querySelector('.overlay .wrap:not(.hide)')")
        self.page.wait_for_timeout(1000)

    def colors(self) -> list[str]:
        """Return the colors of the words about masks, in order."""
        return self.answers.locator("b").evaluate_all("words => words.map(word => getComputedStyle(word).color)")

    def picture(self) -> np.ndarray:
        """Return the picture with the masks, `(H, W, 3)` uint8."""
        address = self.page.locator(".overlay img").first.get_attribute("src")
        return np.asarray(PIL.Image.open(io.BytesIO(self.page.request.get(address).body())).convert("RGB"))


def test_a_conversation_on_the_page(browser, url, photos, predicted):
    visitor = Visitor(browser, url)
    visitor.upload(photos / "first.png")
    visitor.page.locator(".overlay img").wait_for()
    plain = visitor.picture()
    assert plain.shape == (427, 640, 3)

    # The answer streams; each mask has the color of its words.
    texts = visitor.ask(QUESTION)
    expected = predicted["first.png"]
    assert len(texts) > 2 and [len(text) for text in texts] == sorted(len(text) for text in texts)
    num_masks = len(expected["masks"])
    assert visitor.colors() == ["rgb({}, {}, {})".format(*color) for color in COLORS[:num_masks]]
    drawn = visitor.picture()
    masks = [np.asarray(PIL.Image.fromarray(mask).resize((640, 427), 0)) for mask in record_masks(expected)]
    assert (drawn != plain).any(2)[np.any(masks, axis=0)].mean() > 0.99
    assert (drawn == plain).all(2)[~np.any(masks, axis=0)].all()

    # The files hold the masks of predict.py.
    with visitor.page.expect_download() as download:
        visitor.page.get_by_text("RLE JSON").click()
    (record,) = json.loads(Path(download.value.path()).read_text("utf-8"))
    assert {name: record[name] for name in ("masks", "scores", "text")} == {
        name: expected[name] for name in ("masks", "scores", "text")
    }

    # A second question adds masks in further colors. The picture shows those of the newest answer, or of chosen ones.
    boxes = visitor.page.get_by_role("checkbox")
    assert boxes.count() == 0
    visitor.ask("What is it, and what is the circle?")
    assert visitor.answers.count() == 2 and len(set(visitor.colors())) == len(visitor.colors()) > num_masks
    assert [box.is_checked() for box in boxes.all()] == [False, True]
    newest = visitor.picture()
    boxes.nth(0).check()
    visitor.wait()
    both = visitor.picture()
    boxes.nth(1).uncheck()
    visitor.wait()
    assert np.array_equal(visitor.picture(), drawn)
    assert ((both != plain) == (newest != plain) | (drawn != plain)).mean() > 0.99
    with visitor.page.expect_download() as download:
        visitor.page.get_by_text("PNG").click()
    assert np.array_equal(PIL.Image.open(download.value.path()), drawn)

    # A click hides a mask.
    shown = visitor.picture()
    row, column = np.argwhere(masks[-1])[0]
    frame = visitor.page.locator(".overlay img").bounding_box()
    scale = min(frame["width"] / 640, frame["height"] / 427)
    position = {
        "x": (frame["width"] - 640 * scale) / 2 + (column + 0.5) * scale,
        "y": (frame["height"] - 427 * scale) / 2 + (row + 0.5) * scale,
    }
    changes = []
    while True not in changes or changes[-1]:  # masks lie over each other: each click hides one, the last shows all
        visitor.page.locator(".overlay img").click(position=position)
        visitor.page.wait_for_timeout(400)
        changes.append(bool((visitor.picture() != shown).any()))
        assert len(changes) < 30
    assert changes[0]


def test_texts_and_masks_are_copied(browser, url, photos, predicted):
    visitor = Visitor(browser, url, permissions=["clipboard-read", "clipboard-write"])
    visitor.upload(photos / "first.png")
    visitor.page.locator(".overlay img").wait_for()
    visitor.ask(QUESTION)
    copied = []
    for name in ("Copy text", "Copy RLE"):
        visitor.page.get_by_role("button", name=name).click()
        visitor.page.wait_for_timeout(500)
        copied.append(visitor.page.evaluate("navigator.clipboard.readText()"))
    expected = predicted["first.png"]
    assert copied[0] == f"{QUESTION}\n{expected['text']}"
    assert [record["masks"] for record in json.loads(copied[1])] == [expected["masks"]]


def test_words_are_shown_word_for_word():
    from lisa_hf.inference.page import color_words

    content = color_words("Cups:\n    *a_b*: [SEG], `[SEG]\n```", itertools.count())
    assert not re.search(r"[\n*_`\[]", content)  # nothing that Markdown reads
    text = html.unescape(re.sub("<[^>]*>", "", content.replace("<br>", "\n")))
    assert text == "Cups:\n    *a_b*: [SEG], `[SEG]\n```"
    assert [html.unescape(words) for words in re.findall(r"<b [^>]*>(.*?)</b>", content)] == ["[SEG]", "`[SEG]"]


def test_a_phone_shows_all_in_its_width(browser, url, photos):
    visitor = Visitor(browser, url, width=390)
    visitor.upload(photos / "first.png")
    visitor.ask(QUESTION)
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert visitor.page.locator(".overlay").bounding_box()["width"] > 300
    heights = [
        visitor.page.get_by_role("button", name=name, exact=True).bounding_box()["height"]
        for name in ("Ask", "Start over")
    ]
    assert heights[0] == heights[1]  # in one line


@contextmanager
def serve_slow(talkative: Path, photos: Path, names: list[str]):
    """Serve a demo whose answers take seconds, with an example."""
    from lisa_hf.inference.demo import build_demo

    models = {name: load_lisa(str(talkative)) for name in names}
    for model, _ in models.values():
        model.vlm.register_forward_hook(lambda *_: time.sleep(0.05))  # per token
    demo = build_demo(models, [(str(photos / "second.png"), "What is here?")], max_new_tokens=400)
    yield demo.launch(prevent_thread_lock=True, quiet=True, allowed_paths=[str(photos)])[1]
    demo.close()


@pytest.fixture(scope="module")
def slow_url(talkative, photos):
    with serve_slow(talkative, photos, ["slow"]) as url:
        yield url


@pytest.fixture(scope="module")
def slow_pair_url(talkative, photos):
    with serve_slow(talkative, photos, ["slow", "other"]) as url:
        yield url


def test_stop_ends_an_answer_and_keeps_its_masks(browser, slow_url, photos):
    visitor = Visitor(browser, slow_url)
    visitor.upload(photos / "first.png")
    visitor.page.locator(".overlay img").first.wait_for()
    for turn in (1, 2):
        visitor.page.get_by_label("Question", exact=True).fill(QUESTION)
        visitor.page.get_by_role("button", name="Ask", exact=True).click()
        visitor.answers.nth(turn - 1).get_by_text("[SEG]").first.wait_for()
        visitor.page.get_by_role("button", name="Stop").click()
        visitor.wait()
        with visitor.page.expect_download() as download:
            visitor.page.get_by_text("RLE JSON").click()
        records = json.loads(Path(download.value.path()).read_text("utf-8"))
        assert len(records) == turn
        for record in records:
            assert len(record["masks"]) == record["text"].count("[SEG]") > 0
            assert len(record["text"]) < 1000  # of about 1300


def test_stop_reaches_two_models_and_a_question_in_the_queue(browser, slow_pair_url, photos):
    answering, waiting = Visitor(browser, slow_pair_url), Visitor(browser, slow_pair_url)
    for visitor in (answering, waiting):
        visitor.upload(photos / "first.png")
        visitor.page.locator(".overlay img").nth(1).wait_for()
        visitor.page.get_by_label("Question", exact=True).fill(QUESTION)
        visitor.page.get_by_role("button", name="Ask", exact=True).click()
        if visitor is answering:
            for number in range(2):
                visitor.answers.nth(number).get_by_text("[SEG]").first.wait_for()
    for number in range(2):
        waiting.page.locator(".overlay").nth(number).get_by_text(re.compile("queue: ")).first.wait_for()
    waiting.page.get_by_role("button", name="Stop").click()
    waiting.wait()
    answering.page.get_by_role("button", name="Stop").click()
    answering.wait()
    assert waiting.answers.count() == 0
    for number in range(2):
        with answering.page.expect_download() as download:
            answering.page.get_by_text("RLE JSON").nth(number).click()
        (record,) = json.loads(Path(download.value.path()).read_text("utf-8"))
        assert (
            len(record["masks"]) == record["text"].count("[SEG]") > 0 and len(record["text"]) < 1000
        )  # of about 1300
    waiting.page.get_by_role("button", name="Ask", exact=True).click()  # a stopped question can be asked again
    for number in range(2):
        waiting.answers.nth(number).get_by_text("[SEG]").first.wait_for()
    waiting.page.get_by_role("button", name="Stop").click()
    waiting.wait()
    assert waiting.page.get_by_text("RLE JSON").last.is_enabled()


def test_a_new_start_ends_the_answer(browser, slow_url, photos):
    visitor = Visitor(browser, slow_url)
    visitor.page.get_by_text("What is here?").click()  # the example
    visitor.page.locator(".overlay img").first.wait_for()
    assert visitor.page.get_by_label("Question", exact=True).input_value() == "What is here?"
    assert visitor.picture().shape == (640, 320, 3)
    visitor.page.get_by_role("button", name="Ask", exact=True).click()
    visitor.answers.first.wait_for()
    visitor.page.get_by_role("button", name="Start over").click()
    visitor.page.wait_for_function("() => !document.querySelector('[data-testid=bot]')")
    visitor.page.wait_for_timeout(1000)
    assert visitor.answers.count() == 0
    visitor.page.get_by_role("button", name="Ask", exact=True).click()  # at once: the answer before has been stopped
    visitor.page.wait_for_function("() => document.body.innerText.includes('[SEG]')")
    visitor.page.get_by_role("button", name="Stop").click()
    visitor.wait()
    assert visitor.answers.count() == 1


def test_opacity_and_colors_on_a_dark_page(browser, url, photos, predicted):
    visitor = Visitor(browser, url, color_scheme="dark")
    visitor.upload(photos / "first.png")
    visitor.page.locator(".overlay img").wait_for()
    plain = visitor.picture()
    visitor.ask(QUESTION)
    question = "And what is `this` *red* _one_ of [two](three), 1 < 2 &amp; $x$?"
    visitor.ask(question)
    assert visitor.page.locator("[data-testid=user]").last.inner_text().strip() == question
    drawn = visitor.picture()
    visitor.page.locator("input[type=range]").fill("0")
    visitor.page.wait_for_timeout(1000)
    assert np.array_equal(visitor.picture(), plain) and not np.array_equal(drawn, plain)
    number = visitor.page.locator("input[type=number]")
    number.fill("0.5")
    number.press("Enter")
    visitor.page.wait_for_timeout(1000)
    assert np.array_equal(visitor.picture(), drawn)
    backgrounds = visitor.answers.locator("b").evaluate_all(
        "words => words.map(word => getComputedStyle(word).backgroundColor)"
    )
    assert set(backgrounds) == {"rgb(255, 255, 255)"}


@pytest.mark.parametrize(
    "name, sentence", [("large.png", "at most 40 megapixels, got one of 60"), ("notes.txt", "file type")]
)
def test_a_file_that_does_not_fit_is_answered_with_a_sentence(browser, url, photos, name, sentence):
    visitor = Visitor(browser, url)
    visitor.upload(photos / name)
    visitor.page.get_by_text(sentence).first.wait_for()
    assert "Traceback" not in visitor.page.inner_text("body")
