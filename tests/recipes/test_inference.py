"""chat.py in a terminal and predict.py over many images, as a user runs them."""

import base64
import io
import json
import os
import pty
import re
import runpy
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image
import pytest
from fixtures.paths import ROOT
from fixtures.recipes import run
from fixtures.tiny_models import image, save_talkative


CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture(scope="module")
def talkative(tmp_path_factory) -> Path:
    return save_talkative(tmp_path_factory.mktemp("talkative"))


class Terminal:
    """A recipe in a pseudo-terminal, where Ctrl-C reaches it as it does a user's."""

    def __init__(self, *command, cwd: Path):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "DISPLAY": "",
            "TERM_PROGRAM": "",
        }
        self.process, self.file = pty.fork()
        if self.process == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # pytest-xdist's processes ignore it, and so would this one
            os.chdir(cwd)
            os.execve(sys.executable, [sys.executable, *map(str, command)], environment)

    def read_until(self, text: str, seconds: float = 60) -> str:
        output, end = "", time.monotonic() + seconds
        while text not in output and time.monotonic() < end:
            if select.select([self.file], [], [], 0.1)[0]:
                try:
                    output += os.read(self.file, 4096).decode()
                except OSError:  # the process has ended
                    break
        assert text in output, output
        return output

    def read_now(self) -> str:
        """Return what has been printed in the last second."""
        output = ""
        while select.select([self.file], [], [], 1)[0]:
            output += os.read(self.file, 4096).decode()
        return output

    def type(self, keys: str, until: str = "\n> ") -> str:
        os.write(self.file, keys.encode())
        return self.read_until(until)


@pytest.fixture
def terminal(talkative, tmp_path):
    """A chat about the first of two images."""
    image(40, 60).save(tmp_path / "first.png")
    image(64, 32, seed=1).save(tmp_path / "second.png")
    options = ("--image", "first.png", "--max_new_tokens", 2000)
    terminal = Terminal(ROOT / "recipes" / "chat.py", talkative, *options, cwd=tmp_path)
    yield terminal
    with suppress(ProcessLookupError):  # it has ended
        os.kill(terminal.process, signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_chat_in_a_terminal(terminal, tmp_path):
    assert "60 x 40 pixels" in terminal.read_until("> ")
    assert "has no [SEG]" in terminal.type("/mask\n")

    # Ctrl-C stops an answer and not the program. What there is of the answer stays, with its masks.
    for turn in range(3):
        assert "\033[1;97;48;2;230;25;75m[SEG]" in terminal.type("What is red?\n", until="[SEG]")
        assert "(stopped)" in terminal.type(CTRL_C)
    assert "Saved: " in terminal.type("/mask\n")
    printed = ""
    for _ in range(10):  # one between the prompt and the reading of keys waits for the next key
        os.write(terminal.file, CTRL_C.encode())
        printed += terminal.read_now()
        if "Ctrl-D leaves" in printed:
            break
    assert "Ctrl-D leaves" in printed
    assert "Saved: " in terminal.type("/save talk\n")
    turns = json.loads((tmp_path / "talk" / "conversation.json").read_text("utf-8"))
    assert [turn["question"] for turn in turns] == ["What is red?"] * 3
    for number, turn in enumerate(turns):
        assert len(turn["masks"]) == turn["text"].count("[SEG]") > 0
        assert PIL.Image.open(tmp_path / "talk" / f"turn_{number}" / "mask_0.png").size == (60, 40)

    assert "that can be read, got nowhere.png: No such file" in terminal.type("/image nowhere.png\n")
    assert "expected a command, got /imge" in terminal.type("/imge second.png\n")
    assert "expected /image FILE or URL, got /image alone" in terminal.type("/image\n")
    assert "60 x 40 pixels" in terminal.type("/image first.png\n")
    assert "32 x 64 pixels" in terminal.type(f"'{tmp_path / 'second.png'}' \n")  # dropped
    assert "is not empty" in terminal.type("/save talk\n")
    terminal.type("What is it?\n", until="[SEG]")
    terminal.type(CTRL_C)
    terminal.type("/reset\n")
    terminal.type("/save second\n")
    assert json.loads((tmp_path / "second" / "conversation.json").read_text("utf-8")) == []
    terminal.type(CTRL_D, until="\n")
    assert os.waitpid(terminal.process, 0)[1] == 0


def test_paths_are_read_as_people_type_paste_and_drop_them(tmp_path, monkeypatch):
    chat = runpy.run_path(str(ROOT / "recipes" / "chat.py"))
    path = tmp_path / "it's my ü.png"
    image(8, 8).save(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    escaped = str(path).replace("'", "\\'").replace(" ", "\\ ")
    for text in (f"{path}", f'"{path}"', escaped, f"~/{path.name}", f'"~/{path.name}"', path.as_uri()):
        assert chat["read_path"](text) == str(path) and chat["is_image"](text), text
    assert chat["is_image"]("https://example.com/a.png") and chat["read_path"]("https://a.b/c d") == "https://a.b/c d"
    for text in (
        "What is red?",
        "It's red",
        "https://example.com/a.png shows what?",
        str(tmp_path),
        "x\0",
        "x" * 5000,
    ):
        assert not chat["is_image"](text), text
    monkeypatch.setattr("sys.platform", "win32")
    assert chat["read_path"](r'"C:\my photos\a.png"') == r"C:\my photos\a.png"


def test_chat_without_a_terminal(talkative, tmp_path, monkeypatch):
    image(40, 60).save(tmp_path / "first.png")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    command = [
        sys.executable,
        ROOT / "recipes" / "chat.py",
        talkative,
        "--image",
        "first.png",
        "--max_new_tokens",
        "20",
    ]
    result = subprocess.run(command, cwd=tmp_path, input="What?\nWhy?\n", capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "error" not in result.stdout
    assert len(result.stdout.splitlines()) == 3 and ">" not in result.stdout[:60] and "[SEG]" in result.stdout
    result = subprocess.run(
        [*command[:2], "no_model", "--image", "none.png"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (
        result.stderr
        == "chat.py: error: expected an image that can be read, got none.png: No such file or directory\n"
    )


@pytest.mark.parametrize(
    "name, value", [("TERM_PROGRAM", "iTerm.app"), ("TERM_PROGRAM", "WezTerm"), ("TERM", "xterm-kitty")]
)
@pytest.mark.parametrize("size", [(40, 30), (400, 90), (1500, 2000)])
def test_a_terminal_that_can_gets_the_picture_itself(monkeypatch, name, value, size):
    for other in ("TERM", "TERM_PROGRAM"):
        monkeypatch.setenv(other, "")
    chat = runpy.run_path(str(ROOT / "recipes" / "chat.py"))
    picture = image(*size[::-1])
    assert chat["picture_in_terminal"](picture) is None
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "40")
    sequence = chat["picture_in_terminal"](picture)
    if name == "TERM_PROGRAM":
        data = re.fullmatch(r"\033\]1337;File=inline=1;height=50%:([\w+/=]+)\a", sequence)[1]
    else:
        parts = re.findall(r"\033_G([\w,=]+);([\w+/=]+)\033\\", sequence)
        assert "".join(f"\033_G{keys};{chunk}\033\\" for keys, chunk in parts) == sequence
        # At most 4096 bytes each; all but the last say that more follow.
        assert max(len(chunk) for _, chunk in parts) <= 4096
        first = f"a=T,f=100,{'c=80' if size == (400, 90) else 'r=20'},m="
        assert [keys for keys, _ in parts] == [
            f"{first if number == 0 else 'm='}{int(number < len(parts) - 1)}" for number in range(len(parts))
        ]
        data = "".join(chunk for _, chunk in parts)
    shown = PIL.Image.open(io.BytesIO(base64.b64decode(data)))
    if max(size) <= 1280:
        assert np.array_equal(shown, picture)
    else:
        assert shown.size == (960, 1280)


def test_questions_have_labels():
    predict = runpy.run_path(str(ROOT / "recipes" / "predict.py"))

    def ask(*options):
        with mock.patch.object(sys, "argv", ["predict.py", "model", "--image", "photos", *options]):
            return predict["ask"](predict["parse_arguments"]())

    assert ask("--question", "Where is rust?", "A crack?", "--label", "rust", "crack") == [
        {"question": "Where is rust?", "label": "rust"},
        {"question": "A crack?", "label": "crack"},
    ]
    assert ask("--question", "Where is rust?") == [{"question": "Where is rust?"}]
    with pytest.raises(ValueError, match="one for each of 2 questions, got 1"):
        ask("--question", "Where is rust?", "A crack?", "--label", "rust")
    with pytest.raises(ValueError, match="none with --questions"):
        ask("--questions", "questions.jsonl", "--label", "rust")


@pytest.mark.slow
def test_two_processes_label_as_one_does(talkative, tmp_path):
    for index in range(9):  # one process gets three batches, the other two
        image(20 + index, 40, seed=index).save(tmp_path / f"{index}.png")
    (tmp_path / "4.png").write_bytes(b"no picture")
    arguments = [talkative, "--image", "*.png", "--question", "What is red?", "And blue?", "--max_new_tokens", 6]
    arguments += ["--batch_size", 2, "--format", "coco", "--device", "cpu"]
    run("predict.py", *arguments, "--output_dir", "one", cwd=tmp_path)
    launcher = ["--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", 1]
    command = ["accelerate.commands.launch", *launcher, ROOT / "recipes" / "predict.py", *arguments]
    result = subprocess.run(
        [sys.executable, "-m", *map(str, command), "--output_dir", "two"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Saved 16 answers") == 1 and result.stdout.count("4.png: skipped") == 1
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "instances.json",
        "predictions.jsonl",
        "settings.json",
    ]
    for name in ("predictions.jsonl", "instances.json", "settings.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.slow
def test_200_images_are_labeled_although_the_process_is_killed_twice(talkative, tmp_path):
    """The predictions are those of an undisturbed run; batches take less time per image than single calls."""
    for index in range(200):
        directory = tmp_path / "photos" / str(index % 7)
        directory.mkdir(parents=True, exist_ok=True)
        image(20 + index % 30, 40, seed=index).save(directory / f"{index}.png")
    arguments = [talkative, "--image", "photos", "--question", "What is red?", "And blue?", "Is it a circle?"]
    arguments += ["--max_new_tokens", 6, "--batch_size", 8, "--format", "coco"]
    run("predict.py", *arguments, "--output_dir", "whole", cwd=tmp_path)

    written = tmp_path / "killed" / "predictions.0.jsonl"
    for num_lines in (100, 300):
        command = [sys.executable, ROOT / "recipes" / "predict.py", *map(str, arguments), "--output_dir", "killed"]
        process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
        while not written.exists() or written.read_bytes().count(b"\n") < num_lines:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    resumed = run("predict.py", *arguments, "--output_dir", "killed", cwd=tmp_path)
    assert "/200" not in resumed.stderr  # it did not start over
    for name in ("predictions.jsonl", "instances.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "whole" / "predictions.jsonl").read_bytes().count(b"\n") == 600
