"""The matrix of VLMs: its command writes the result of each check, and continues whatever a check does."""

import json
import os
import subprocess
import sys
import time

import matrix
import matrix_checks
import pytest
from matrix import COLUMNS, check_in_a_process, kind
from transformers.utils import is_torchvision_available

from lisa_hf.model import vlm_backbone


pytestmark = pytest.mark.skipif(not is_torchvision_available(), reason="most image processors need torchvision")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def run(*arguments: str) -> tuple[dict, str]:
        path = tmp_path / "results" / "matrix.json"
        monkeypatch.setattr(sys, "argv", ["matrix.py", "--json", str(path), *arguments])
        matrix.main()
        return json.loads(path.read_text()), capsys.readouterr().out

    return run


def test_two_types(run, tmp_path, monkeypatch):
    pytest.importorskip("timm")  # EdgeTAM, one of the mask models
    # In a separate process: a fork of this one may lack the threads of autograd, which earlier tests started.
    path = tmp_path / "results" / "matrix.json"
    command = [sys.executable, matrix.__file__, "--json", path, "--model_types", "llava,blip-2"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    results = json.loads(path.read_text())
    assert results["llava"] == dict.fromkeys(COLUMNS, "ok")
    assert results["blip-2"].keys() == set(COLUMNS)
    for verdict in results["blip-2"].values():
        assert verdict.startswith("refused: expected a VLM that answers token by token")
    assert f"| llava | {' | '.join('ok' for _ in COLUMNS)} |" in output
    assert f"| ok of 2 | {' | '.join('1' for _ in COLUMNS)} |" in output

    # Types that the file has are not checked again.
    monkeypatch.setattr(matrix, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", {"llava": None, "blip-2": None})
    assert run() == (results, output[output.index("| type") :])


def test_wrong_results_are_told_from_errors(monkeypatch):
    select = vlm_backbone._select_images
    monkeypatch.setattr(
        vlm_backbone, "_select_images", lambda features, lengths, images: select(features, lengths, [0] * len(images))
    )
    monkeypatch.setattr(
        matrix_checks, "CHECKS", {name: matrix_checks.CHECKS[name] for name in ("equality", "logits", "save")}
    )
    monkeypatch.setitem(matrix_checks.CHECKS, "train", lambda model: model.no_such_attribute)
    verdicts = dict(matrix_checks.run_checks("llava"))
    assert verdicts["construct"] == verdicts["save"] == "ok"
    assert verdicts["equality"].startswith("wrong: states of row 0 differ by up to")
    assert verdicts["logits"].startswith("wrong: logits of row 0 differ by up to")
    assert verdicts["train"] == "fail: AttributeError: 'Model' object has no attribute 'no_such_attribute'"


@pytest.mark.parametrize(
    "end, reason", [(lambda: time.sleep(60), "took more than 1 s"), (lambda: os._exit(11), "the process crashed")]
)
def test_a_hang_or_a_crash_is_a_row(end, reason, monkeypatch):
    def checks(model_type):
        yield "construct", "ok"
        end()

    monkeypatch.setattr(matrix, "run_checks", checks)
    verdicts = check_in_a_process("llava", seconds=1)
    assert verdicts.pop("construct") == "ok"
    assert set(verdicts.values()) == {f"fail: {reason}"} and kind(verdicts["forward"]) == "fail"
