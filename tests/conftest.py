from pathlib import Path

import pytest
from fixtures.golden_model import convert
from fixtures.tiny_training import build_model


@pytest.fixture
def tiny():
    """A LLaVA + SAM LISA with random weights, the same for every test, and its processor."""
    return build_model()


@pytest.fixture
def fail(capsys):
    """`recipes/convert_weights.py` where it must fail: gives its one line, and checks that nothing was left behind."""

    def run(output: Path, *arguments) -> str:
        with pytest.raises(SystemExit) as exit_info:
            convert(*arguments, "--output", output)
        assert exit_info.value.code == 2
        assert not list(output.parent.glob(f"{output.name}*"))
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run
