"""Starts, stops and restarts of train.py in an output directory that matters."""

import os
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import datasets
import PIL.Image
import pytest
import torch
from fixtures.golden_model import converted_directory, original_directory
from fixtures.paths import GOLDEN, ROOT
from fixtures.recipes import run, run_here, write_config

from lisa_hf.errors import report_user_errors
from lisa_hf.training.arguments import LisaTrainingArguments
from lisa_hf.training.callbacks import StopOnSignal
from lisa_hf.training.checkpointing import claim_output_dir, write_manifest
from lisa_hf.training.trainer import LisaTrainer


@pytest.fixture
def config(tmp_path) -> Path:
    return write_config(
        tmp_path / "tiny.yaml", eval_sources=None, save_strategy="steps", save_steps=1, save_total_limit=2
    )


def start(config: Path, *arguments) -> subprocess.Popen:
    """Start a training of many steps in `run`."""
    command = [sys.executable, ROOT / "recipes" / "train.py", "--config", config, "--output_dir", "run"]
    return subprocess.Popen(
        list(map(str, [*command, "--max_steps", 5000, "--save_steps", 1000, *arguments])),
        cwd=config.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(process: subprocess.Popen, text: str) -> str:
    """Return what a process prints up to a text."""
    printed = ""
    while text not in printed:
        line = process.stdout.readline()
        assert line, printed
        printed += line
    return printed


@pytest.mark.slow
def test_a_second_start_asks_before_it_trains_over_checkpoints(config, tmp_path):
    arguments = ("train.py", "--config", config, "--output_dir", "run")
    run(*arguments, cwd=tmp_path)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}
    assert len(files) == 3  # of two checkpoints, and the model

    result = run(*arguments, cwd=tmp_path, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "with checkpoint-2. Continue with `--resume_from_checkpoint auto`" in result.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")} == files

    result = run(*arguments, "--resume_from_checkpoint", "auto", "--max_steps", 3, cwd=tmp_path)
    assert "Resuming from run/checkpoint-2" in result.stderr and "Resuming: max_steps 2 -> 3" in result.stderr
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]

    result = run(*arguments, "--overwrite_output_dir", "--max_steps", 1, cwd=tmp_path)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.slow
def test_one_run_at_a_time_and_ctrl_c_saves(config, tmp_path):
    process = start(config)
    read_until(process, "'loss'")
    result = run("train.py", "--config", config, "--output_dir", "run", cwd=tmp_path, check=False)
    assert result.returncode == 2 and "where one is training" in result.stderr

    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in printed
    assert "Ctrl-C: saving after this step. Press it again to quit now." in printed
    assert "Stopped by SIGINT. Resume with --resume_from_checkpoint auto." in printed
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / "manifest.json").exists()

    # The lock of a killed process does not stay.
    process = start(config, "--resume_from_checkpoint", "auto")
    assert f"Resuming from run/{checkpoint.name}" in read_until(process, "'loss'")
    process.kill()
    process.communicate()
    process = start(config, "--resume_from_checkpoint", "auto")
    read_until(process, "'loss'")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_an_output_dir_with_a_run_is_not_claimed_unless_it_goes_on_or_is_to_be_replaced(tmp_path, caplog):
    def claim(**arguments):
        return claim_output_dir(LisaTrainingArguments(str(tmp_path), use_cpu=True, **arguments))

    with claim():
        (tmp_path / "checkpoint-2").mkdir()
        with pytest.raises(ValueError, match="where one is training"), claim():
            pass
    with pytest.raises(ValueError, match="with checkpoint-2. Continue with"), claim():
        pass
    with claim(resume_from_checkpoint="auto"):
        assert (tmp_path / "checkpoint-2").exists()
    write_manifest(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-1").mkdir()
    for older in (False, True):
        with claim(resume_from_checkpoint=str(tmp_path / f"checkpoint-{1 if older else 2}")):
            assert ("checkpoint-1 is not the newest checkpoint" in caplog.text) == older
    with claim(dry_run=True):  # has its own directory
        assert (tmp_path / "checkpoint-2").exists()
    with claim(overwrite_output_dir=True):
        assert not (tmp_path / "checkpoint-2").exists()
    for name in ("model.safetensors", "pytorch_model.bin", "config.json"):  # of a run, or of a downloaded model
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"with {name}"), claim():
            pass
        (tmp_path / name).unlink()


def test_the_model_is_saved_if_its_last_evaluation_does_not_end(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", "datasets_cache")
    monkeypatch.setattr(LisaTrainer, "evaluate", lambda trainer: signal.raise_signal(signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            run_here("train.py", "--config", write_config(config), "--output_dir", "run", "--save_strategy", "no")
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stop.value.code == 143
    assert len(list(Path("run").glob("*.safetensors"))) == 1


@pytest.mark.parametrize(("world_size", "shards", "is_saved"), [(1, True, True), (2, True, False), (2, False, True)])
def test_a_failed_last_evaluation_waits_for_no_other_process(world_size, shards, is_saved, monkeypatch, tmp_path):
    recipe = runpy.run_path(str(ROOT / "recipes" / "train.py"))
    evaluate_and_save, saved = recipe["evaluate_and_save"], []
    monkeypatch.setitem(evaluate_and_save.__globals__, "save_final_model", saved.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    trainer = mock.Mock(num_skipped_rows=0, **{"evaluate.side_effect": ValueError("a bad row")})
    trainer.args = mock.Mock(world_size=world_size, shards_weights=shards, output_dir=str(tmp_path))
    trainer.model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="a bad row"):
        evaluate_and_save(trainer)
    assert bool(saved) == is_saved


def test_a_second_ctrl_c_quits_at_once(capfd):
    process = os.fork()
    if process == 0:
        StopOnSignal(None).on_train_begin(None, None, None)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGINT
    first, second = capfd.readouterr().err.split("\n\n")
    assert first.strip() == "Ctrl-C: saving after this step. Press it again to quit now."
    assert second.strip() == "Ctrl-C: quitting now."


def test_ctrl_c_outside_of_training_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop, report_user_errors():
        raise KeyboardInterrupt
    assert stop.value.code == 130 and capsys.readouterr().err.endswith(": interrupted\n")


SHAPES_ALONE = "{shapes: {num_train_scenes: 2, num_validation_scenes: 1, image_size: 64}}"
# A recipe with its arguments, and the file of the user's that lies where it writes.
WRITERS = [
    ("train.py --config tiny.yaml --output_dir out", "out/config.json"),
    ("train.py --config tiny.yaml --output_dir out", "out/pytorch_model.bin"),
    (f"eval.py MODEL --eval_sources '{SHAPES_ALONE}' --use_cpu true --output_dir out", "out/evaluation.json"),
    ("compare.py somewhere --output report.md", "report.md"),
    ("compare.py somewhere --json comparison.json", "comparison.json"),
    ("export.py MODEL --output out", "out/notes.txt"),
    ("export.py MODEL --output out", "out"),
    ("convert_weights.py lisa --checkpoint ORIGINAL --vision_tower CLIP --output out", "out/notes.txt"),
    ("predict.py MODEL --image a.png --question x --output_dir .", "overlay.png"),
    ("predict.py MODEL --image a.png --question x y --output_dir out", "out/a.png/notes.txt"),
    ("predict.py MODEL --image a.png --question x --format coco --output_dir .", "instances.json"),
    ("predict.py MODEL --image a.png --question x --format labelme --output_dir .", "a.json"),
    ("predict.py MODEL --image a.png --question x --format jsonl --output_dir .", "predictions.jsonl"),
    ("prepare_data.py preview --config tiny.yaml --output_dir out", "out/shapes_train.png"),
    ("prepare_data.py convert --config tiny.yaml --output_dir out", "out/README.md"),
    ("prepare_data.py convert --config tiny.yaml --output_dir out", "out/shapes/data/train-00000-of-00001.parquet"),
    ("prepare_data.py convert --config tiny.yaml --output_dir out", "out/shapes/data/train-00000-of-00002.parquet"),
    ("benchmarks/step.py --json step.json", "step.json"),
    ("benchmarks/step.py --growth out", "out/growth.json"),
]


@pytest.mark.parametrize("command, file", WRITERS, ids=[f"{command.split()[0]}-{file}" for command, file in WRITERS])
def test_no_command_replaces_a_file_of_the_user(command, file, config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    PIL.Image.new("RGB", (8, 8)).save("a.png")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("mine")
    paths = {"MODEL": converted_directory(), "ORIGINAL": original_directory(), "CLIP": GOLDEN / "clip_tiny"}
    with pytest.raises(SystemExit) as stop:
        run_here(*(paths.get(word, word) for word in shlex.split(command)))
    message = capsys.readouterr().err if stop.value.code == 2 else stop.value.code
    assert file.split("/")[0] in message and ("--overwrite" in message or "Name another" in message)
    assert Path(file).read_text() == "mine"


@pytest.mark.parametrize("command, file", [writer for writer in WRITERS if "prepare_data" in writer[0]])
def test_overwrite_replaces_it(command, file, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("mine")
    run_here(*shlex.split(command), "--overwrite")
    assert not Path(file).exists() or Path(file).read_bytes() != b"mine"
    if "convert" in command:
        run_here(*shlex.split(command))  # what it wrote itself is no obstacle to going on
