"""Trainings that are killed, stopped or run into trouble, and go on as if nothing had happened."""

import json
import random
import re
import signal
from pathlib import Path

import pytest
import torch
from fault_worker import FINAL, NUM_STEPS, Fault, run_training

from lisa_hf.checkpointing import MANIFEST, find_checkpoint, find_fault, resolve_checkpoint, write_manifest


METHODS = ("training_step", "_save_checkpoint", "prediction_step")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a training without interruption ends with, by its mode."""
    results = {}

    def result(engine: str, streaming: bool) -> dict:
        if (engine, streaming) not in results:
            directory = tmp_path_factory.mktemp("uninterrupted")
            assert set(run_training(directory, engine, streaming)) == {0}, logs(directory)
            results[engine, streaming] = torch.load(directory / FINAL)
        return results[engine, streaming]

    return result


def logs(directory: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(directory.glob("*.log")))


def assert_ends_alike(directory: Path, expected: dict):
    found = torch.load(directory / FINAL)
    weights = expected["weights"]
    assert [name for name in weights if not torch.equal(weights[name], found["weights"][name])] == []
    assert found["logs"] == expected["logs"]
    assert found["best"] == expected["best"]


def assert_survives(directory: Path, engine: str, streaming: bool, kills: list[Fault], expected: dict):
    """Kills a run, and another one when that is over, until all kills are done."""
    runs = iter(directory / str(index) for index in range(len(kills) + 1))
    run = next(runs)
    for kill in kills:
        run.mkdir(exist_ok=True)
        codes = run_training(run, engine, streaming, kill)
        if set(codes) == {0}:  # the run was over before its moment came
            assert_ends_alike(run, expected)
            run = next(runs)
            run.mkdir()
            codes = run_training(run, engine, streaming, kill)
        assert codes[kill.rank] == -signal.SIGPROF, logs(run)
    assert set(run_training(run, engine, streaming)) == {0}, logs(run)
    assert_ends_alike(run, expected)
    # `save_total_limit` directories are left, all of them complete: the last one and the best one, or the one before.
    best = expected["best"][1]
    left = {path.name for path in (run / "run").glob("checkpoint-*") if not find_fault(path)}
    assert left == {f"checkpoint-{step}" for step in (best if best < NUM_STEPS else NUM_STEPS - 1, NUM_STEPS)}
    assert len(list((run / "run").glob("checkpoint-*"))) == 2


def test_three_kills(uninterrupted, tmp_path):
    kills = [
        Fault("kill", "training_step", 2, 0.02),
        Fault("kill", "_save_checkpoint", 1, 0.03),
        Fault("kill", "prediction_step", 1, 0.005),
    ]
    assert_survives(tmp_path, "plain", False, kills, uninterrupted("plain", False))


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("engine", ["plain", "zero2"])
def test_twelve_kills(engine, streaming, uninterrupted, tmp_path):
    rng, num_ranks = random.Random(f"{engine} {streaming}"), 1 if engine == "plain" else 2
    kills = [
        Fault("kill", METHODS[index % 3], rng.randint(1, 2), rng.uniform(0, 0.1), rng.randrange(num_ranks))
        for index in range(12)
    ]
    assert_survives(tmp_path, engine, streaming, kills, uninterrupted(engine, streaming))


def test_a_signal_saves_and_ends_and_a_truncated_checkpoint_is_passed_over(uninterrupted, tmp_path):
    assert run_training(tmp_path, fault=Fault("signal", occurrence=4)) == [0]
    assert "SIGUSR1: stopping after step 4" in logs(tmp_path)
    newest = tmp_path / "run" / "checkpoint-4"
    assert find_checkpoint(tmp_path / "run") == str(newest)
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run_training(tmp_path) == [0]
    assert "checkpoint-4 is passed over: its adapter_model.safetensors has" in logs(tmp_path)
    assert_ends_alike(tmp_path, uninterrupted("plain", False))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(uninterrupted, tmp_path):
    assert run_training(tmp_path, "zero2", fault=Fault("signal", occurrence=3, rank=1)) == [0, 0]
    assert find_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-3")
    assert run_training(tmp_path, "zero2") == [0, 0]
    assert_ends_alike(tmp_path, uninterrupted("zero2", False))


FAILURES = {
    "full_disk": (Fault("full_disk", "_save_checkpoint", 2), "checkpoint-2 could not be saved: .* GiB are free"),
    "bad_row": (Fault("bad_row"), r"Row 'drawn/\d+' of 'drawn': cannot read the mask"),
    "worker_killed": (Fault("worker_killed"), "loader worker .* memory"),
}


@pytest.mark.parametrize(
    ("failure", "engine"),
    [("full_disk", "plain"), ("worker_killed", "plain")]
    + [pytest.param(failure, "ddp", marks=pytest.mark.slow) for failure in FAILURES],
)
def test_failures_give_one_line_and_leave_earlier_checkpoints(failure, engine, tmp_path):
    fault, message = FAILURES[failure]
    codes = run_training(tmp_path, engine, fault=fault)
    assert codes[0] == 2 and 0 not in codes, logs(tmp_path)
    lines = [line for line in (tmp_path / "rank0.log").read_text().splitlines() if ": error: " in line]
    assert len(lines) == 1
    assert "Traceback" not in (tmp_path / "rank0.log").read_text()

    assert re.search(message, lines[0]), lines[0]
    if failure == "full_disk":
        assert find_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-1")


# ---- manifests ------------------------------------------------------------------------------------------------------


def make_checkpoint(directory: Path, step: int) -> Path:
    checkpoint = directory / f"checkpoint-{step}"
    (checkpoint / "global_step").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "global_step" / "optimizer.pt").write_bytes(b"states")
    write_manifest(checkpoint)
    return checkpoint


def test_what_does_not_agree_with_its_manifest_is_no_checkpoint(tmp_path):
    one, two, three, four, ten = (make_checkpoint(tmp_path, step) for step in (1, 2, 3, 4, 10))
    assert json.loads((one / MANIFEST).read_text()) == {
        "files": {"global_step/optimizer.pt": 6, "model.safetensors": 7}
    }
    assert find_checkpoint(tmp_path) == str(ten)  # not by the alphabet
    (ten / MANIFEST).unlink()
    (four / "global_step" / "optimizer.pt").write_bytes(b"stat")
    (three / "model.safetensors").unlink()
    (two / MANIFEST).write_text('{"files": ')
    for directory, fault in (
        (ten, "it has no manifest.json, so its save was not finished"),
        (four, "its global_step/optimizer.pt has 4 bytes, expected 6"),
        (three, "its model.safetensors is missing"),
        (two, "its manifest.json is damaged"),
    ):
        assert find_fault(directory).startswith(fault)
        with pytest.raises(ValueError, match=f"{directory.name} is no complete checkpoint: {fault}"):
            resolve_checkpoint(str(directory), str(tmp_path))
    assert resolve_checkpoint("auto", str(tmp_path)) == resolve_checkpoint(True, str(tmp_path)) == str(one)
    assert resolve_checkpoint(str(one), str(tmp_path)) == str(one)
    assert resolve_checkpoint(None, str(tmp_path)) is None


def test_without_a_complete_checkpoint_auto_starts_anew_and_true_is_an_error(tmp_path):
    assert resolve_checkpoint("auto", str(tmp_path)) is None
    with pytest.raises(ValueError, match="no complete checkpoint. Start anew"):
        resolve_checkpoint(True, str(tmp_path))
