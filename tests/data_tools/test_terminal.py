"""What index and verify print of a shard holds nothing that a terminal obeys."""

import os
import sys

import pytest
from faulty import png, write_tar

from data_tools import index, verify

BELL = "\x1b]0;owned\x07\x1b[31m\r\x9b2J"


@pytest.fixture
def hostile(tmp_path):
    """A folder, a shard, keys, extensions and labels with control characters."""
    folder = tmp_path / f"set{BELL}"
    folder.mkdir()
    members = {f"{i}.{kind}": one for i in range(4) for kind, one in (("png", png(i)), ("cls", b"1"))}
    members |= {f"a{BELL}.png": png(9), f"a{BELL}.cls": b"1", f"b.{BELL}json": b"{}", "b.png": png(8), "b.cls": b"1"}
    members |= {"c.png": png(7), "c.cls": BELL.encode(), f"d.png{BELL}.png": png(6), f"d.{BELL}.pkl": b"", "e.png": png(5)}
    members |= {"f.png": BELL.encode(), "f.cls": b"1"}
    write_tar(folder / "train-0.tar", members)
    return folder


@pytest.mark.parametrize("more", [(), ("--json",), ("--decode",)])
def test_no_command_of_a_terminal_is_printed(hostile, monkeypatch, capsys, more):
    for module, words in ((verify, more), (index, ()), (verify, more)) if not more else ((verify, more),):
        monkeypatch.setattr(sys, "argv", [module.__name__, str(hostile), "--workers", "1", *words])
        try:
            module.main()
        except SystemExit as ended:
            assert ended.code == 1
        said = capsys.readouterr()
        assert "without a reader" in said.out + said.err or more == ("--json",)
        assert all(one.isprintable() for one in (said.out + said.err).split("\n")), said


def test_a_pipe_in_place_of_a_shard_is_refused(hostile, monkeypatch, capsys):
    os.mkfifo(hostile / "train-1.tar")
    for module in (index, verify):
        monkeypatch.setattr(sys, "argv", [module.__name__, str(hostile), "--workers", "1"])
        with pytest.raises(SystemExit, match="2"):
            module.main()
        assert "no regular file; leave it out" in capsys.readouterr().err


def test_a_shard_of_such_a_name_is_read_and_not_indexed(hostile, monkeypatch, capsys):
    (hostile / "train-0.tar").rename(hostile / f"{BELL}.tar")
    for module, message in ((index, "its name has control characters, which no index may hold; rename it"), (verify, "not in any")):
        monkeypatch.setattr(sys, "argv", [module.__name__, str(hostile), "--workers", "1"])
        with pytest.raises(SystemExit):
            module.main()
        said = capsys.readouterr()
        assert message in said.out + said.err and all(one.isprintable() for one in (said.out + said.err).split("\n"))
    assert not (hostile / "index.json").exists()
