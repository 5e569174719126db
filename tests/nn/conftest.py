"""What the tests of modules share."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tensors here are too small to share."""
