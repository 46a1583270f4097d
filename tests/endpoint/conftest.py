"""What every test of the endpoint starts from."""

from pathlib import Path

import pytest

from endpoint.serving import Setup


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    """A sound bundle and an empty state directory."""
    return Setup(tmp_path)
