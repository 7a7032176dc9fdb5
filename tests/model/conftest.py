"""Families of tiny models."""

import pytest
from fixtures.tiny_models import FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]()
