import pytest
import torch
from fixtures.golden_model import convert
from fixtures.original_checkpoints import sam_vit_b


@pytest.fixture
def output(tmp_path):
    """The directory that the conversion writes."""
    return tmp_path / "converted"


@pytest.fixture
def sam_file(tmp_path):
    """An original SAM checkpoint."""
    torch.save(sam_vit_b(), tmp_path / "sam.pth")
    return tmp_path / "sam.pth"


@pytest.fixture
def fail(capsys, output):
    """Runs a conversion that must fail; returns its one-line error and checks that it left nothing behind."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as exit_info:
            convert(*arguments, "--output", output)
        assert exit_info.value.code == 2
        assert not list(output.parent.glob(f"{output.name}*"))
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run
