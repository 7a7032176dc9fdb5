"""Training runs that are killed, stopped or run into trouble, and continue as if nothing had happened.

    pytest -m slow tests/training/test_endurance.py --log-cli-level INFO

says what each kill hit, and in how many seconds all processes had ended.
"""

import json
import os
import random
import re
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from fixtures.tiny_training import ENGINES, make_trainer
from workers.fault_worker import FINAL, NUM_STEPS, Fault, Progress, run_training

from lisa_hf.training.checkpointing import (
    MANIFEST,
    complete_save,
    find_checkpoint,
    find_fault,
    resolve_checkpoint,
    write_manifest,
)


KILLED_PHASES = ("training", "saving", "evaluating")


class Uninterrupted(NamedTuple):
    final: dict
    progress: Progress  # of the first process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A training without interruption, by its mode."""
    results = {}

    def run(engine: str, streaming: bool) -> Uninterrupted:
        if (engine, streaming) not in results:
            directory = tmp_path_factory.mktemp("uninterrupted")
            outcome = run_training(directory, engine, streaming)
            assert outcome.is_good, logs(directory)
            results[engine, streaming] = Uninterrupted(torch.load(directory / FINAL), outcome.progress[0])
        return results[engine, streaming]

    return run


def logs(directory: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(directory.glob("*.log")))


def assert_ends_alike(directory: Path, expected: dict):
    """Bit for bit: weights, losses, learning rates, gradient norms and figures of all steps, and the best score."""
    found = torch.load(directory / FINAL)
    weights = expected["weights"]
    assert [name for name in weights if not torch.equal(weights[name], found["weights"][name])] == []
    assert weights.keys() == found["weights"].keys() and all(weight.numel() for weight in weights.values())
    assert found["logs"] == expected["logs"]
    assert found["best"] == expected["best"]


def assert_survives(directory: Path, engine: str, streaming: bool, kills: list[Fault], expected: dict) -> Counter:
    """Kills a run, and another one when that is over, until all kills are done; returns what they hit, by phase."""
    runs = iter(directory / str(index) for index in range(len(kills) + 1))
    run, hits = next(runs), Counter()
    for kill in kills:
        run.mkdir(exist_ok=True)
        outcome = run_training(run, engine, streaming, kill)
        if outcome.is_good:  # the run was over before its moment came
            assert_ends_alike(run, expected)
            run = next(runs)
            run.mkdir()
            outcome = run_training(run, engine, streaming, kill)
        assert outcome.exit_codes[kill.rank] == -signal.SIGKILL, logs(run)
        hits[outcome.progress[kill.rank].phase] += 1
        if 0 in outcome.exit_codes:  # the killed process had done its part of the last step
            assert_ends_alike(run, expected)
            run = next(runs)
            run.mkdir()
    assert run_training(run, engine, streaming).is_good, logs(run)
    assert_ends_alike(run, expected)
    # `save_total_limit` directories are left, all of them complete: the last one and the best one, or the one before.
    best = expected["best"][1]
    left = {path.name for path in (run / "run").glob("checkpoint-*") if not find_fault(path)}
    assert left == {f"checkpoint-{step}" for step in (best if best < NUM_STEPS else NUM_STEPS - 1, NUM_STEPS)}
    assert len(list((run / "run").glob("checkpoint-*"))) == 2
    return hits


def random_kills(number: int, seed: str, progress: Progress, num_ranks: int) -> list[Fault]:
    """Equally many in each phase, at moments from its beginning to its usual end."""
    rng = random.Random(seed)
    phases = [KILLED_PHASES[index % len(KILLED_PHASES)] for index in range(number)]
    return [
        Fault("kill", phase, rng.randint(1, 2), rng.random() * progress.mean_seconds(phase), rng.randrange(num_ranks))
        for phase in phases
    ]


def test_three_kills(uninterrupted, tmp_path):
    final, progress = uninterrupted("plain", False)
    # Early: the uninterrupted run may have been several times slower than one that is killed.
    kills = [
        Fault("kill", phase, occurrence, 0.05 * progress.mean_seconds(phase))
        for phase, occurrence in (("training", 2), ("saving", 1), ("evaluating", 1))
    ]
    assert assert_survives(tmp_path, "plain", False, kills, final) == dict.fromkeys(KILLED_PHASES, 1)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("engine", ["plain", "zero2", "zero3", "fsdp2"])
def test_twelve_kills(engine, streaming, uninterrupted, tmp_path):
    final, progress = uninterrupted(engine, streaming)
    kills = random_kills(12, f"{engine} {streaming}", progress, num_ranks=1 if engine == "plain" else 2)
    hits = assert_survives(tmp_path, engine, streaming, kills, final)
    print(f"{engine}, {'streaming' if streaming else 'map-style'}: hit {dict(hits)}")
    assert hits.total() == 12 and min(hits[phase] for phase in KILLED_PHASES) >= 1


def test_a_signal_saves_and_ends_and_a_truncated_checkpoint_is_skipped(uninterrupted, tmp_path):
    assert run_training(tmp_path, fault=Fault("signal", occurrence=4)).is_good
    assert "SIGUSR1: stopping after step 4" in logs(tmp_path)
    newest = tmp_path / "run" / "checkpoint-4"
    assert find_checkpoint(tmp_path / "run") == str(newest)
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run_training(tmp_path).is_good
    assert re.search("checkpoint-4 is skipped: expected .* bytes in its adapter_model.safetensors", logs(tmp_path))
    assert_ends_alike(tmp_path, uninterrupted("plain", False).final)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("engine", ["plain", *ENGINES])
def test_a_signal_to_one_process_stops_all_at_one_step_and_resuming_is_exact(
    engine, streaming, uninterrupted, tmp_path
):
    fault = Fault("signal", occurrence=3, rank=0 if engine == "plain" else 1)
    assert run_training(tmp_path, engine, streaming, fault).is_good, logs(tmp_path)
    assert find_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-3")
    assert run_training(tmp_path, engine, streaming).is_good, logs(tmp_path)
    assert_ends_alike(tmp_path, uninterrupted(engine, streaming).final)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("engine", ["plain", *ENGINES])
def test_stopped_by_any_signal_to_all_processes_every_engine_goes_on_exactly(engine, number, uninterrupted, tmp_path):
    """As Ctrl-C, a scheduler and a power cut reach a run."""
    outcome = run_training(tmp_path, engine, fault=Fault("signal", occurrence=3, rank=None, number=number))
    is_killed = number == signal.SIGKILL
    assert outcome.exit_codes == [-number if is_killed else 0] * len(outcome.exit_codes), logs(tmp_path)
    assert find_checkpoint(tmp_path / "run") == str(tmp_path / "run" / f"checkpoint-{2 if is_killed else 3}")
    assert "Traceback" not in logs(tmp_path)
    assert run_training(tmp_path, engine).is_good, logs(tmp_path)
    assert_ends_alike(tmp_path, uninterrupted(engine, False).final)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Training logs by step of one process that takes four items in a step, as others share them."""
    directory = tmp_path_factory.mktemp("undisturbed")
    assert run_training(directory, items_per_step=4).is_good, logs(directory)
    return training_steps(directory)


def training_steps(directory: Path) -> dict[int, dict]:
    return {entry["step"]: entry for entry in torch.load(directory / FINAL)["logs"] if "loss" in entry}


def assert_changes_go_on(directory: Path, stages: list[tuple[str, int]], undisturbed: dict[int, dict]):
    """Each engine on its number of processes takes some steps from where the one before it stopped.

    Losses and gradient norms of all steps equal those of a training without a change, which would not be so with
    other items, another schedule or other states of Adam.
    """
    stops = [NUM_STEPS - 2 * number for number in reversed(range(len(stages)))]  # two steps each, the first ones more
    done, last = 0, None
    for (engine, num_ranks), stop in zip(stages, stops, strict=True):
        fault = None if stop == NUM_STEPS else Fault("signal", occurrence=stop - done)
        outcome = run_training(directory, engine, fault=fault, num_ranks=num_ranks, items_per_step=4)
        assert outcome.is_good, logs(directory)
        printed = (directory / "rank0.log").read_text()
        is_change = done > 0 and not engine == last == "fsdp2"  # whose shards are of any number of processes
        assert ("So do the optimizer's states" in printed) == is_change, logs(directory)
        (directory / "rank0.log").unlink()
        done, last = stop, engine
    found = training_steps(directory)
    assert found.keys() == undisturbed.keys() == set(range(1, NUM_STEPS + 1))
    for step, entry in undisturbed.items():
        assert found[step]["learning_rate"] == entry["learning_rate"]
        for key in ("loss", "grad_norm"):
            assert found[step][key] == pytest.approx(entry[key], rel=1e-6), (step, key)


PROCESSES = {"plain": 1, "ddp": 2, "zero2": 2, "zero3": 2, "fsdp2": 2}


@pytest.mark.parametrize(
    "saved, resumed",
    [
        ("plain", "zero3"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in [
                *(("plain", "zero2"), ("plain", "fsdp2"), ("zero2", "plain"), ("zero3", "plain"), ("fsdp2", "plain")),
                *(("ddp", "zero2"), ("ddp", "zero3"), ("zero2", "ddp"), ("zero2", "zero3"), ("zero3", "zero2")),
            ]
        ),
    ],
)
def test_another_engine_goes_on_with_all_states(saved, resumed, undisturbed, tmp_path):
    assert_changes_go_on(tmp_path, [(saved, PROCESSES[saved]), (resumed, PROCESSES[resumed])], undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_another_number_of_processes_goes_on_with_all_states(engine, undisturbed, tmp_path):
    assert_changes_go_on(tmp_path, [(engine, 2), (engine, 4), ("plain", 1)], undisturbed)


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("zero2", "zero3", "fsdp2"))]
)
def test_when_one_process_is_killed_all_end(engine, tmp_path):
    outcome = run_training(tmp_path, engine, fault=Fault("kill", occurrence=3, rank=1))
    assert outcome.exit_codes[1] == -signal.SIGKILL and outcome.exit_codes[0] > 0, logs(tmp_path)
    assert find_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")


class Payload:
    """An object whose pickle makes a directory where it is unpickled."""

    def __init__(self, directory: Path):
        self.directory = directory

    def __reduce__(self):
        return os.mkdir, (str(self.directory / "executed"),)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_resuming_runs_no_code_in_the_files_of_deepspeed(name, tmp_path):
    assert run_training(tmp_path, "zero2", fault=Fault("signal", occurrence=2), num_ranks=1).is_good, logs(tmp_path)
    checkpoint = Path(find_checkpoint(tmp_path / "run"))
    (file,) = checkpoint.glob(f"global_step*/*{name}")
    torch.save(torch.load(file, weights_only=False) | {"x": Payload(tmp_path)}, file)
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)
    assert run_training(tmp_path, "zero2", num_ranks=1).exit_codes == [2], logs(tmp_path)
    assert "expected a file with tensors only" in logs(tmp_path) and not (tmp_path / "executed").exists()


FAILURES = {
    "full_disk": (
        Fault("full_disk", "saving", occurrence=2),
        "checkpoint-2: expected to save a checkpoint, got .* GiB are free",
    ),
    "bad_row": (Fault("bad_row"), r"Row 'drawn/\d+' of 'drawn': cannot read the mask"),
    "worker_killed": (Fault("worker_killed"), "loader worker .* memory"),
}


@pytest.mark.parametrize(
    ("failure", "engine", "rank"),
    [("full_disk", "plain", 0), ("worker_killed", "plain", 0)]
    # Under DDP, the first process alone writes what is large.
    + [pytest.param(failure, "ddp", 0, marks=pytest.mark.slow) for failure in FAILURES]
    + [pytest.param(failure, "zero3", 1, marks=pytest.mark.slow) for failure in FAILURES],
)
def test_failures_give_one_line_and_leave_earlier_checkpoints(failure, engine, rank, tmp_path):
    fault, message = FAILURES[failure]
    outcome = run_training(tmp_path, engine, fault=replace(fault, rank=rank))
    assert outcome.exit_codes[rank] == 2 and 0 not in outcome.exit_codes, logs(tmp_path)
    text = (tmp_path / f"rank{rank}.log").read_text()
    lines = [line for line in text.splitlines() if ": error: " in line]
    assert len(lines) == 1 and "Traceback" not in text, logs(tmp_path)
    assert re.search(message, lines[0]), lines[0]
    if failure == "full_disk":
        assert find_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-1")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 0", OSError),
        ("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0", OSError),
        ("basic_ios::clear: iostream error", OSError),
        ("Connection closed by peer [127.0.0.1]:5", RuntimeError),  # another process has ended, and says why
    ],
)
def test_every_way_in_which_torch_reports_a_full_disk(message, expected, tiny, tmp_path):
    trainer = make_trainer(*tiny, tmp_path)
    with pytest.raises(expected, match=re.escape(message)):
        with complete_save(trainer, tmp_path / "checkpoint-1"):
            raise RuntimeError(message)


def test_a_checkpoint_keeps_the_record_of_its_run(tiny, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    checkpoint = tmp_path / "checkpoint-1"
    with complete_save(make_trainer(*tiny, tmp_path), checkpoint):
        checkpoint.mkdir()
    assert "run.json" in json.loads((checkpoint / MANIFEST).read_text())["files"]


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
        (four, "expected 6 bytes in its global_step/optimizer.pt, got 4"),
        (three, "its model.safetensors is missing"),
        (two, "its manifest.json is damaged"),
    ):
        assert find_fault(directory).startswith(fault)
        with pytest.raises(ValueError, match=f"{directory.name}: expected a complete checkpoint, but {fault}"):
            resolve_checkpoint(str(directory), str(tmp_path))
    assert resolve_checkpoint("auto", str(tmp_path)) == resolve_checkpoint(True, str(tmp_path)) == str(one)
    assert resolve_checkpoint(str(one), str(tmp_path)) == str(one)
    assert resolve_checkpoint(None, str(tmp_path)) is None


def test_without_a_complete_checkpoint_auto_starts_anew_and_true_is_an_error(tmp_path):
    assert resolve_checkpoint("auto", str(tmp_path)) is None
    with pytest.raises(ValueError, match="got none. Start without"):
        resolve_checkpoint(True, str(tmp_path))
