"""Fixtures that several rooms' tests share."""

import pytest

from data_tools import make_shards


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Folder with the shards of the demo."""
    folder = tmp_path_factory.mktemp("digits")
    make_shards.digits(folder)
    return folder
