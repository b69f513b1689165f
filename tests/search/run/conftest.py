"""A run directory with a history."""

from pathlib import Path

import pytest

from tests.search.run.small import advance, opened


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has searched one generation."""
    advance(opened(tmp_path / "run"), 0, 1.0)
    return tmp_path / "run"
