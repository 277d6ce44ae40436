"""Fixtures of the tests of data_tools."""

import pytest


@pytest.fixture
def own(tmp_path, digits):
    """Shards of the digits that a test may change."""
    folder = tmp_path / "own"
    folder.mkdir()
    for path in digits.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
