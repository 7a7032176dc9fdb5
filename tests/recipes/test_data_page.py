"""The page that browses data, in a browser, together with the page that asks a model."""

import io
import json

import numpy as np
import PIL.Image
import pytest
import yaml
from fixtures.recipes import run_here, serve_demo_here
from fixtures.tiny_models import image, save_talkative

from lisa_hf.evaluation.visualization import COLORS


pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of a demo of a model, of a recipe (five images of one source, two of another) and of predictions."""
    directory = tmp_path_factory.mktemp("data")
    mask = np.zeros((427, 640), dtype=np.uint8)
    mask[:, :320] = 255
    for name, pixels in (("left", mask), ("right", 255 - mask)):
        PIL.Image.fromarray(pixels).save(directory / f"{name}.png")
    lines = [
        {"image": "0.png", "mask": "left.png", "phrase": "the left & <b>best</b> *half*"},
        {
            "image": "1.png",
            "masks": ["left.png", "right.png"],
            "messages": [
                {"role": "user", "content": "What is there?"},
                {"role": "assistant", "content": "A door [SEG] and a wall [SEG]. There is no dog."},
            ],
        },
        *({"image": f"{number}.png", "mask": "right.png", "phrase": "the right"} for number in (2, 3)),
        {
            "image": "4.png",
            "masks": [],
            "messages": [{"role": "user", "content": "A cat?"}, {"role": "assistant", "content": "There is none."}],
        },
    ]
    for number in range(5):
        image(427, 640, seed=number).save(directory / f"{number}.png")
    source = {"builder": "image_folder", "images": str(directory), "masks": str(directory)}
    for name, part in (("own", lines), ("more", lines[2:4])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    sources = {name: source | {"questions": str(directory / f"{name}.jsonl")} for name in ("own", "more")}
    (directory / "config.yaml").write_text(yaml.safe_dump({"sources": sources}, sort_keys=False))
    rle = {"size": [427, 640], "counts": [427 * 320, 427 * 320]}  # the right half
    predictions = [{"image_id": f"{number}.png", "masks": [rle]} for number in (2, 0)]
    (directory / "predicted.jsonl").write_text("".join(json.dumps(line) + "\n" for line in predictions))
    evaluated = json.dumps({"test": sources["own"] | {"questions": str(directory / "test.jsonl")}})
    (directory / "test.jsonl").write_text("".join(json.dumps(lines[number]) + "\n" for number in (2, 0)))
    options = ("--eval_sources", evaluated, "--output_dir", directory / "evaluated", "--use_cpu", "true")
    run_here("eval.py", "--predictions", directory / "predicted.jsonl", *options)
    model = save_talkative(tmp_path_factory.mktemp("talkative"))
    options = ("--data", directory / "config.yaml", "--predictions", directory / "evaluated", "--max_new_tokens", 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        with serve_demo_here(model, *options) as url:
            (directory / "3.png").unlink()
            yield url


class Visitor:
    """A user of the data page, or of the same page of predictions."""

    def __init__(self, browser, url: str, width: int = 1280, tab: str = "Data", begins: str = "1 of 7"):
        self.page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
        self.page.goto(url)
        self.page.get_by_role("tab", name=tab).click()
        self.read(begins)

    def read(self, position: str) -> str:
        """Wait until the item at a position is shown, and return all that is written about it."""
        self.page.get_by_text(position, exact=True).wait_for()
        self.page.wait_for_timeout(200)
        return self.page.inner_text("body")

    def picture(self, number: int = 0) -> np.ndarray:
        address = self.page.locator(".item:visible img").nth(number).get_attribute("src")
        return np.asarray(PIL.Image.open(io.BytesIO(self.page.request.get(address).body())).convert("RGB"))


def tinted(number: int, halves: list[tuple]) -> np.ndarray:
    """Return an image with halves in the colors of masks, left and right."""
    pixels = np.asarray(image(427, 640, seed=number)).astype(float)
    for half, color in zip((pixels[:, :320], pixels[:, 320:]), halves):
        if color is not None:
            half[:] = (half + color) / 2
    return pixels.astype(np.uint8)


def without_borders(picture: np.ndarray) -> np.ndarray:
    return np.concatenate([picture[1:-1, 1:318], picture[1:-1, 322:-1]], axis=1)


def test_items_are_browsed(browser, url):
    visitor = Visitor(browser, url)
    text = visitor.read("1 of 7")
    assert "own, row 0, referring" in text and "the left & <b>best</b> *half*" in text
    assert np.array_equal(without_borders(visitor.picture()), without_borders(tinted(0, [COLORS[0], None])))

    # Keys turn the pages, except while something is typed.
    visitor.page.keyboard.press("ArrowRight")
    assert "A door [SEG] and a wall [SEG]. There is no dog." in visitor.read("2 of 7")
    assert np.array_equal(without_borders(visitor.picture()), without_borders(tinted(1, COLORS[:2])))
    colors = visitor.page.locator("b[style]").evaluate_all("words => words.map(word => getComputedStyle(word).color)")
    assert colors == ["rgb({}, {}, {})".format(*color) for color in COLORS[:2]]
    visitor.page.keyboard.press("ArrowLeft")
    visitor.read("1 of 7")
    number = visitor.page.get_by_label("Go to")
    number.focus()
    visitor.page.keyboard.press("ArrowRight")
    visitor.read("1 of 7")

    # Jump, then leave out sources and images with masks.
    number.fill("4")
    number.press("Enter")
    assert "Cannot be shown: expected an image that can be read" in visitor.read("4 of 7")
    visitor.page.get_by_role("button", name="Next").click()
    visitor.read("5 of 7")
    visitor.page.get_by_label("No mask").check()
    assert "There is none." in visitor.read("1 of 1")
    assert np.array_equal(visitor.picture(), tinted(4, []))
    assert number.input_value() == "1"
    number.fill("2")
    number.press("Enter")
    visitor.page.get_by_text("from 1 to 1, got 2").wait_for()
    visitor.page.get_by_label("No mask").uncheck()
    visitor.page.get_by_label("Source").click()
    visitor.page.get_by_role("option", name="more").click()
    assert "more, row 0, referring" in visitor.read("1 of 2")
    names = visitor.page.get_by_label("Image", exact=True).last
    names.fill("NO SUCH")
    names.press("Enter")
    visitor.page.get_by_text("No items match.").wait_for()
    assert visitor.page.locator(".item:visible img").count() == 0


def test_truth_and_predictions_are_browsed(browser, url):
    visitor = Visitor(browser, url, tab="Predictions", begins="1 of 2")
    text = visitor.read("1 of 2")
    assert "IoU 0.000 (generated)" in text and "test, question 0.png_0" in text
    for number, halves in enumerate(([COLORS[0], None], [None, COLORS[0]])):
        assert np.array_equal(without_borders(visitor.picture(number)), without_borders(tinted(0, halves)))
    number = visitor.page.get_by_label("Go to").last
    assert number.input_value() == "1"
    number.fill("2")
    number.press("Enter")
    assert "IoU 1.000 (generated)" in visitor.read("2 of 2")
    for number in range(2):
        assert np.array_equal(without_borders(visitor.picture(number)), without_borders(tinted(2, [None, COLORS[0]])))


def test_a_phone_shows_the_data_in_its_width(browser, url):
    visitor = Visitor(browser, url, width=390)
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert visitor.page.locator(".item:visible").bounding_box()["width"] > 300


def test_the_model_is_asked_on_the_other_tab_and_from_python(browser, url, tmp_path):
    from gradio_client import Client, handle_file

    image(40, 60).save(tmp_path / "photo.png")
    page = browser.new_context().new_page()
    page.goto(url)
    page.get_by_role("button", name="Ask", exact=True).wait_for()
    assert not page.get_by_role("button", name="Next").is_visible()
    client = Client(url, verbose=False)
    answer = client.predict(image=handle_file(tmp_path / "photo.png"), question="What?", api_name="/segment")
    assert answer["text"]
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/segment"]
