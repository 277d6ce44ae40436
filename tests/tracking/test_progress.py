"""The progress line of a phase, on a terminal and without one."""

import io
import re
import sys
import time

import pytest
from rich.console import Console

from dnal_dist.tracking.progress import Pace, ProgressLine, brief


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_progress_line_fits_the_terminal(width):
    file = io.StringIO()
    line = ProgressLine(Console(file=file, force_terminal=True, width=width), "pretrain", 100_000, 99_000)
    words = f"120.5/160  eta {brief(59 * 60)}/{brief(47 * 3600)}  lr 0.00046  ce 2.302  train 54.2%  1234 im/s"
    line.update(words, 99_999)
    line.update("evaluation 30%")
    line.update(words)
    line.stop()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").split("\n")
    assert max(map(len, lines)) <= width
    last = next(line for line in reversed(lines) if line.strip())
    assert "pretrain" in last and "eta 59m/47h00m" in last and ("54.2%" in last) == (width >= 80)


def test_without_a_terminal_a_phase_prints_one_line_with_the_time(capsys):
    line = ProgressLine(Console(file=sys.stdout, force_terminal=False), "search", 100, 0)
    line.update("ce 2.3", 50)
    line.finish("val 99.72%")
    assert re.fullmatch(r"\d\d:\d\d:\d\d  search    val 99.72%\n", capsys.readouterr().out)


def test_durations_are_brief():
    assert [brief(s) for s in (0, 99, 100, 5990, 6000, 47 * 3600 + 60, 76 * 3600)] == [
        *("0s", "99s", "2m", "100m", "1h40m", "47h01m", "3d04h")
    ]


def test_what_is_left_follows_from_the_speed_so_far(monkeypatch):
    now = iter([100.0, 130.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    pace = Pace(step=10, steps=40, later=100)
    assert pace.left(10) is None and pace.left(20) == (60.0, 360.0)
