"""A command that was stopped, killed or interrupted goes on where it was, and leaves no process behind."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from drawing import draw, holds_interrupts
from making import command, digests, made, new, refused

from data_tools import make_shards
from data_tools.workers import in_order


class Interrupted:
    """Draws until it comes to a reference for the first time; then it is as if Ctrl-C had been pressed."""

    def __init__(self, at: str):
        self.at, self.drawn = at, []

    def __call__(self, number: int, reference: str):
        if reference == self.at:
            self.at = ""
            raise KeyboardInterrupt
        self.drawn.append(reference)
        return draw(number, reference)


@pytest.fixture
def stopped(tmp_path):
    """A folder of a command stopped at the second sample of the third shard, and the folder of a whole one."""
    made(new(tmp_path / "whole"))
    drawing = Interrupted("t8")
    with pytest.raises(KeyboardInterrupt):
        made(new(tmp_path / "shards"), draw=drawing)
    return SimpleNamespace(folder=tmp_path / "shards", whole=tmp_path / "whole", drawing=drawing)


def test_a_stopped_command_continues(stopped):
    assert sorted(path.name for path in stopped.folder.iterdir()) == ["making.jsonl", "train-000000.tar", "train-000001.tar"]
    stopped.drawing.drawn.clear()
    made(stopped.folder, draw=stopped.drawing)
    assert stopped.drawing.drawn == ["t7", "t8", "t9", "v0", "v1"]
    assert digests(stopped.folder) == digests(stopped.whole)


@pytest.mark.parametrize("change", ["another byte", "cut short", "missing", "unknown"])
def test_a_shard_that_has_changed_is_made_again(stopped, change):
    path = stopped.folder / "train-000001.tar"
    content = path.read_bytes()
    if change == "another byte":
        path.write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])
    elif change == "cut short":
        path.write_bytes(content[:-512])
    elif change == "missing":
        path.unlink()
    else:  # the main process was killed between the shard's last byte and its line in the record
        record = stopped.folder / "making.jsonl"
        record.write_text(record.read_text()[:-10])
    stopped.drawing.drawn.clear()
    made(stopped.folder, draw=stopped.drawing)
    assert stopped.drawing.drawn == [f"t{i}" for i in range(4, 10)] + ["v0", "v1"]
    assert digests(stopped.folder) == digests(stopped.whole)


def test_an_unfinished_set_is_not_continued_with_other_options(stopped):
    before = digests(stopped.folder)
    with pytest.raises(ValueError, match=r"of other options \(seed was None and is now 1\); repeat the command that began it"):
        made(stopped.folder, options={"seed": 1})
    (stopped.folder / "making.jsonl").write_text("no record\n")
    with pytest.raises(ValueError, match=r"making.jsonl: not a record of unfinished shards .* --overwrite"):
        made(stopped.folder)
    (stopped.folder / "making.jsonl").unlink()
    os.mkfifo(stopped.folder / "making.jsonl")
    with pytest.raises(ValueError, match=r"making\.jsonl: not a regular file"):
        made(stopped.folder)
    (stopped.folder / "making.jsonl").unlink()
    with pytest.raises(ValueError, match=r"train-000000\.tar: a shard of unknown origin"):
        made(stopped.folder)
    assert {name: digest for name, digest in before.items() if name != "making.jsonl"} == digests(stopped.folder)


def test_a_finished_set_is_replaced_only_with_overwrite(stopped, tmp_path):
    before = digests(stopped.whole)
    with pytest.raises(ValueError, match=r"index.json: the folder holds a finished set; .* --overwrite"):
        made(stopped.whole, count=5)
    assert digests(stopped.whole) == before
    (stopped.whole / "notes.txt").write_text("mine")
    made(stopped.whole, count=5, shards=1, overwrite=True)
    made(new(tmp_path / "fresh"), count=5, shards=1)
    found = digests(stopped.whole)
    assert found.pop("notes.txt") and found == digests(tmp_path / "fresh")


def assert_gone(session: int) -> None:
    """No process of the session is left, or none a few seconds later."""
    for _ in range(1000):
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    os.killpg(session, signal.SIGKILL)
    raise AssertionError("processes went on for 10 seconds after the main one had ended")


def test_ctrl_c_ends_all_processes_and_the_same_command_continues(tmp_path, capsys):
    folder, apart = tmp_path / "shards", tmp_path / "apart"
    drawn = ["synthetic", "--classes", "5", "--train", "600", "--val", "50", "--size", "64", "--shard-samples", "50"]
    # Where the tests themselves run in the background of a shell, Ctrl-C is ignored, and that would be handed on.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True, "preexec_fn": heard}
    process = subprocess.Popen([sys.executable, "-m", "data_tools.make_shards", *drawn, folder, "--workers", "2"], **options)
    record = folder / "making.jsonl"
    while not (record.exists() and '"file"' in record.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130 and "stopped before all shards were made; the same command continues" in said
    assert "Traceback" not in said
    assert_gone(process.pid)
    left = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert "making.jsonl" in left and not any("unfinished" in name for name in left) and 2 <= len(left) < 14
    # In this process, which has imported what each of two workers would again.
    assert command(capsys, *drawn, folder)[0] == 0
    kept = json.loads((folder / "index.json").read_text())["shards"]
    assert sum(left.get(entry["file"]) == (folder / entry["file"]).stat().st_mtime_ns for entry in kept) >= 1
    assert command(capsys, *drawn, apart)[0] == 0
    assert digests(folder) == digests(apart)


def test_workers_ignore_ctrl_c_from_their_start_on():
    assert in_order(holds_interrupts, [0, 1], 2, "workers", None) == [True, True]
    assert not holds_interrupts(0, None)


def test_two_commands_do_not_write_to_one_folder(tmp_path, monkeypatch, capsys):
    said, digits = [], make_shards.digits

    def while_another_comes(folder, overwrite):
        monkeypatch.setattr(make_shards, "digits", digits)
        said.append(refused(capsys, "digits", folder))
        return digits(folder, overwrite)

    monkeypatch.setattr(make_shards, "digits", while_another_comes)
    assert command(capsys, "digits", tmp_path / "shards")[0] == 0
    assert said == [f"error: {tmp_path / 'shards'}: another command is making shards there; wait for it, or stop it\n"]
    assert (tmp_path / "shards" / "index.json").exists()


def test_workers_end_with_a_killed_main_process(tmp_path):
    drawn = ["synthetic", "--classes", "5", "--train", "9000", "--size", "200", "--shard-samples", "200", "--workers", "2"]
    command = [sys.executable, "-m", "data_tools.make_shards", *drawn, tmp_path]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(tmp_path.glob("*.tar")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert_gone(process.pid)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code, said = command(capsys, "digits", tmp_path / "file" / "digits")
    assert code == 2 and "file/digits" in said


def test_ctrl_c_names_the_way_to_continue(tmp_path, monkeypatch, capsys):
    def interrupted(folder, overwrite):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_shards, "digits", interrupted)
    code, said = command(capsys, "digits", tmp_path)
    assert code == 130 and said == f"\nstopped before all shards were made; the same command continues in {tmp_path}\n"
