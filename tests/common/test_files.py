"""Files that somebody else may have made, and messages that name them."""

import os

import pytest

from dnal_dist.common.errors import InputError
from dnal_dist.common.files import read_regular


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"1234")
    assert read_regular(tmp_path / "file", 4) == b"1234"
    with pytest.raises(InputError, match="file: 4 bytes, expected at most 3"):
        read_regular(tmp_path / "file", 3)
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(InputError, match="not a regular file"):
            read_regular(path, 10)


def test_a_message_holds_nothing_that_a_terminal_obeys():
    assert str(InputError("\x1b[31mred\a: no file\nline")) == " [31mred : no file\nline"
