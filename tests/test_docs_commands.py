"""Commands in README.md and the docs: their options exist, and they run, unless they say what they need."""

import argparse
import ast
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import PIL.Image
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from fixtures.documentation import PAGES, find_blocks, find_inline_commands, page_name, split_recipe
from fixtures.paths import ROOT, TREE
from fixtures.recipes import RUN, run_here
from fixtures.tiny_models import image, save_quantizable

import lisa_hf.training.arguments


BLOCKS = {page_name(path): find_blocks(path) for path in PAGES}
SHELL_BLOCKS = [block for blocks in BLOCKS.values() for block in blocks if block.language == "bash"]
PYTHON_BLOCKS = [block for blocks in BLOCKS.values() for block in blocks if block.language == "python"]
INLINE_COMMANDS = [command for path in PAGES for command in find_inline_commands(path)]
# Programs that are not ours, and what a shell does itself.
OTHER_PROGRAMS = {"source", "export", "cp", "curl", "lmms-eval"}
SERVER = "127.0.0.1:7860"


class Understood(BaseException):
    """Ends a recipe once it has understood its command line."""


def understand(script: str, arguments: list[str]) -> None:
    """Let a recipe read a command line, and stop it there."""

    def stop_after(function):
        def read(*args, **kwargs):
            result = function(*args, **kwargs)
            raise Understood(result)

        return read

    source = (ROOT / "recipes" / script).read_text()
    is_training = re.search(r"^from lisa_hf\.training\.arguments import .*\bparse_arguments\b", source, re.MULTILINE)
    owner, name = (
        (lisa_hf.training.arguments, "parse_arguments") if is_training else (argparse.ArgumentParser, "parse_args")
    )
    # What a recipe sets is checked against this machine, which may have no GPU.
    device = ["--use_cpu", "true"] if is_training else []
    with mock.patch.object(owner, name, stop_after(getattr(owner, name))), pytest.raises(Understood):
        run_here(script, *arguments, *device)


def check_command(words: list[str]) -> None:
    """Fail unless the program of a command is known and accepts its options."""
    if recipe := split_recipe(words):
        script, launcher, arguments = recipe
        arguments = ["recipes/configs/custom.yaml" if word == "mine.yaml" else word for word in arguments]
        understand(script, arguments)
        if launcher[:2] == ["accelerate", "launch"]:
            launch_command_parser().parse_args([*launcher[2:], script])
    elif words[0] == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[0] == "pip":
        setup = ConfigParser()
        setup.read(ROOT / "setup.cfg")
        extras = re.findall(r"\[(\w+)\]", " ".join(words))
        assert all(setup.has_option("options.extras_require", extra) for extra in extras)
    else:
        assert words[0] in OTHER_PROGRAMS or re.match(r"\w+=", words[0]), f"unknown program {words[0]}"


@pytest.mark.parametrize("block", [*SHELL_BLOCKS, *INLINE_COMMANDS], ids=str)
def test_options_exist(block, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for words in block.commands:
        try:
            check_command(words)
        except SystemExit:
            pytest.fail(f"{' '.join(words)}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=str)
def test_python_compiles_and_its_imports_exist(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(ast.unparse(node), {})


@pytest.mark.parametrize("page", [name for name in BLOCKS if name.startswith("docs/zh/")])
def test_a_chinese_page_has_the_commands_of_the_english_one(page):
    def code(name):
        return [
            block.commands if block.language == "bash" else ast.dump(ast.parse(block.text)) for block in BLOCKS[name]
        ]

    assert code(page) == code(page.replace("zh/", ""))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """All that the pages take for granted: models, a run, photos, data in LISA's layout and data of one's own."""
    directory = tmp_path_factory.mktemp("workplace")
    for name in ("recipes", "ds_configs", "data_scripts", "lisa_hf", "setup.cfg", "constraints.txt", "Makefile"):
        (directory / name).symlink_to(ROOT / name)
    (directory / "docs").mkdir()
    shutil.copytree(TREE, directory / "dataset")
    save_quantizable(directory)
    (directory / "vlm").rename(directory / "VLM")
    (directory / "sam").rename(directory / "MASK_MODEL")
    image(48, 64).save(directory / "photo.jpg")
    write_own_data(directory / "my_data")
    shutil.copytree(directory / "my_data" / "photos", directory / "photos")
    options = RUN | {"vlm": "VLM", "mask_model": "MASK_MODEL", "output_dir": "outputs/mine"}
    (directory / "recipe.yaml").write_text(json.dumps(options))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        run_here("train.py", "--config", "recipe.yaml")
    for name in ("quickstart", "other"):
        shutil.copytree(directory / "outputs" / "mine", directory / "outputs" / name)
    return directory


def write_own_data(directory: Path) -> None:
    """Write the files that custom.yaml names: masks of photos, and the same in the COCO format."""
    for name in ("photos", "masks"):
        (directory / name).mkdir(parents=True)
    mask = np.zeros((48, 64), dtype=np.uint8)
    mask[10:30, 20:50] = 255
    names = ["a", "b"]
    for index, name in enumerate(names):
        image(48, 64, seed=index).save(directory / "photos" / f"{name}.jpg")
        PIL.Image.fromarray(mask).save(directory / "masks" / f"{name}.png")
    line = {"image": "a.jpg", "mask": "a.png", "question": "What could break?"}
    (directory / "train.jsonl").write_text(json.dumps(line))
    line = {"image": "b.jpg", "mask": "b.png", "phrase": "the cracked handle"}
    (directory / "validation.jsonl").write_text(json.dumps(line))
    box = [20, 10, 50, 10, 50, 30, 20, 30]
    coco = {
        "images": [{"id": 0, "file_name": "a.jpg", "width": 64, "height": 48}],
        "categories": [{"id": 1, "name": "handle"}],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "segmentation": [box], "iscrowd": 0}],
    }
    (directory / "parts.json").write_text(json.dumps(coco))


def change_marked_lines(recipe: Path) -> None:
    """Do what custom.yaml asks of its readers, and let it run on a CPU for one step."""
    values = yaml.safe_load(recipe.read_text())
    values |= {"vlm": "VLM", "mask_model": "MASK_MODEL", "bf16": False, "use_cpu": True}
    values |= {"max_steps": 1, "warmup_steps": 0, "eval_steps": 1, "save_steps": 1}
    values |= {"dataloader_num_workers": 0, "dataloader_persistent_workers": False}
    recipe.write_text(yaml.safe_dump(values))


def runs_here(block) -> bool:
    """Whether this process can run a block: it needs no server, and no hours."""
    others = SERVER in block.text or "recipes/demo.py" in block.text
    return block.needs is None and not others


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if any(map(runs_here, blocks))])
def test_what_a_page_says_runs(page, workplace, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(workplace, tmp_path / "workplace", symlinks=True))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    namespace = {"__name__": "page"}
    for block in filter(runs_here, BLOCKS[page]):
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), namespace)
            continue
        for words in block.commands:
            if recipe := split_recipe(words):
                run_recipe(*recipe)
            elif words[0] == "cp":
                change_marked_lines(Path(shutil.copyfile(*words[1:])))


def run_recipe(script: str, launcher: list[str], arguments: list[str]) -> None:
    """Run a recipe in this process, without its launcher, where no earlier run is in its way."""
    if "--output_dir" in arguments:
        shutil.rmtree(arguments[arguments.index("--output_dir") + 1], ignore_errors=True)
    try:
        run_here(script, *arguments)
    except SystemExit as end:
        assert not end.code, f"{script} ended with {end.code}"


# The notebook


CELL = re.compile(r"^```{code-cell} python\n(?::[^\n]*\n\n)?(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_notebook_runs_on_a_tiny_model(workplace, tmp_path, monkeypatch):
    interactiveshell = pytest.importorskip("IPython.core.interactiveshell")

    def run_shell_command(command):
        script, _, arguments = split_recipe(shlex.split(command))
        run_here(script, *arguments, *(["--max_steps", "1"] if script == "train.py" else []))

    monkeypatch.chdir(shutil.copytree(workplace, tmp_path / "workplace", symlinks=True) / "docs")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    shell = interactiveshell.InteractiveShell()
    shell.system = run_shell_command
    cells = CELL.findall((ROOT / "docs/twelve_photos.md").read_text())
    assert len(cells) > 10
    for cell in cells:
        shell.run_cell(cell).raise_error()
    assert 0 <= shell.user_ns["iou"](shell.user_ns["after"], shell.user_ns["mask"]) <= 1
    assert (tmp_path / "workplace/exports/moons/model.safetensors").is_file()


# With the quick start's model, in processes of their own


@pytest.fixture(scope="module")
def quickstart_workplace(workplace, tmp_path_factory) -> Path:
    """The same with a trained model: that of this checkout, or one that is trained now."""
    directory = shutil.copytree(workplace, tmp_path_factory.mktemp("quickstart") / "workplace", symlinks=True)
    (directory / ".venv").symlink_to(sys.prefix)
    shutil.rmtree(directory / "outputs" / "quickstart")
    if (ROOT / "outputs/quickstart/config.json").is_file():
        shutil.copytree(ROOT / "outputs" / "quickstart", directory / "outputs" / "quickstart")
    else:
        shell(directory, "make quickstart", timeout=1800)
    return directory


def shell(directory: Path, text: str, timeout: float = 300) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "PATH": f"{directory}/.venv/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "MAKEFLAGS": "-o .venv/.lisa-hf-installed",  # the environment of this test is installed
    }
    result = subprocess.run(
        ["bash", "-e", "-c", text],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, f"{text}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result


@pytest.mark.slow
def test_the_notebook_teaches_the_quick_start_s_model_what_a_moon_is(quickstart_workplace, tmp_path):
    directory = shutil.copytree(quickstart_workplace, tmp_path / "workplace", symlinks=True)
    shutil.copyfile(ROOT / "docs/twelve_photos.md", directory / "docs/twelve_photos.md")
    execute = """
import sys, nbclient, nbformat
from myst_nb.core.read import read_myst_markdown_notebook
notebook = read_myst_markdown_notebook(open(sys.argv[1]).read())
nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": "docs"}}).execute()
nbformat.write(notebook, sys.argv[2])
"""
    (directory / "execute.py").write_text(execute)
    shell(directory, "python execute.py docs/twelve_photos.md executed.ipynb", timeout=1200)
    executed = (directory / "executed.ipynb").read_text()
    before, after = map(float, re.findall(r"\[SEG\]\. IoU ([\d.]+)", executed))
    assert before < 0.2 and after > 2 * before
    before, after = map(float, re.findall(r"Mean IoU ([\d.]+)", executed))  # of twelve photos
    assert before < 0.2 and after > 0.5
    assert json.loads((directory / "outputs/moons/eval_results.json").read_text())["eval_giou"] > 0.5


@pytest.fixture
def port(monkeypatch) -> int:
    """A free port, where a demo is served."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    monkeypatch.setenv("GRADIO_SERVER_PORT", str(number))
    return number


# What the tests of a page need not repeat, and a demo that serves while the page continues.
SHELL = """
make() { case $1 in install|quickstart|test) ;; demo) demo recipes/demo.py outputs/quickstart ;; *) return 2 ;; esac; }
pip() { :; }
python() { if [ "$1" = recipes/demo.py ]; then demo "$@"; else command python "$@"; fi; }
demo() {
    if [ -f demo.pid ]; then kill $(cat demo.pid); sleep 2; fi
    command python "$@" >demo.log 2>&1 & echo $! >demo.pid
    until grep -q "Running on local URL" demo.log; do kill -0 $!; sleep 0.2; done
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if any(not block.needs for block in blocks)])
def test_what_a_page_says_runs_in_a_shell(page, quickstart_workplace, tmp_path, monkeypatch, port):
    directory = shutil.copytree(quickstart_workplace, tmp_path / "workplace", symlinks=True)
    monkeypatch.chdir(directory)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    namespace = {"__name__": "page"}
    try:
        for block in BLOCKS[page]:
            text = block.text.replace("7860", str(port))
            if block.needs:
                continue
            if block.language == "python":
                exec(compile(text, str(block), "exec"), namespace)
                continue
            if "--output_dir outputs/mine" in text:
                shutil.rmtree(directory / "outputs" / "mine")
            shell(directory, SHELL + text, timeout=900)
            if (directory / "mine.yaml").is_file():
                change_marked_lines(directory / "mine.yaml")
    finally:
        if (directory / "demo.pid").is_file():
            os.kill(int((directory / "demo.pid").read_text()), signal.SIGTERM)
