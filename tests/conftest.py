import pytest
from fixtures.tiny_training import build_model


@pytest.fixture
def tiny():
    """A LLaVA + SAM LISA with random weights, the same for every test, and its processor."""
    return build_model()
