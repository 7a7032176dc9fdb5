"""Starts, stops and restarts of train.py in an output directory that matters."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.paths import ROOT
from fixtures.recipes import run, write_config

from lisa_hf.errors import report_user_errors
from lisa_hf.training.arguments import LisaTrainingArguments
from lisa_hf.training.callbacks import StopOnSignal
from lisa_hf.training.checkpointing import claim_output_dir


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
    assert "with checkpoint-2. Go on with `--resume_from_checkpoint auto`" in result.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")} == files

    result = run(*arguments, "--resume_from_checkpoint", "auto", "--max_steps", 3, cwd=tmp_path)
    assert "Resuming from run/checkpoint-2" in result.stderr
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]

    result = run(*arguments, "--overwrite_output_dir", "--max_steps", 1, cwd=tmp_path)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.slow
def test_one_run_at_a_time_and_ctrl_c_saves(config, tmp_path):
    process = start(config)
    read_until(process, "'loss'")
    result = run("train.py", "--config", config, "--output_dir", "run", cwd=tmp_path, check=False)
    assert result.returncode == 2 and "in which one is training" in result.stderr

    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in printed
    assert "Ctrl-C: saving after this step. Press it again to quit at once." in printed
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


def test_an_output_dir_with_a_run_is_not_claimed_unless_it_goes_on_or_is_to_be_replaced(tmp_path):
    def claim(**arguments):
        return claim_output_dir(LisaTrainingArguments(str(tmp_path), use_cpu=True, **arguments))

    with claim():
        (tmp_path / "checkpoint-2").mkdir()
        with pytest.raises(ValueError, match="in which one is training"), claim():
            pass
    with pytest.raises(ValueError, match="with checkpoint-2. Go on with"), claim():
        pass
    with claim(resume_from_checkpoint="auto"):
        assert (tmp_path / "checkpoint-2").exists()
    with claim(dry_run=True):  # has a directory of its own
        assert (tmp_path / "checkpoint-2").exists()
    with claim(overwrite_output_dir=True):
        assert not (tmp_path / "checkpoint-2").exists()
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="with model.safetensors"), claim():
        pass


def test_a_second_ctrl_c_quits_at_once(capfd):
    process = os.fork()
    if process == 0:
        StopOnSignal().on_train_begin(None, None, None)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGINT
    first, second = capfd.readouterr().err.split("\n\n")
    assert first.strip() == "Ctrl-C: saving after this step. Press it again to quit at once."
    assert second.strip() == "Ctrl-C: quitting at once."


def test_ctrl_c_outside_of_training_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop, report_user_errors():
        raise KeyboardInterrupt
    assert stop.value.code == 130 and capsys.readouterr().err.endswith(": interrupted\n")
