"""The progress line of a phase, on a terminal and without one."""

import io
import re
import sys

import pytest
from rich.console import Console

from dnal_dist.tracking.progress import ProgressLine


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_progress_line_fits_the_terminal(width):
    file = io.StringIO()
    line = ProgressLine(Console(file=file, force_terminal=True, width=width), "pretrain", 100_000, 99_000)
    line.update(99_999, "loss 2.3022  gates open 54.2%  12345 images/s")
    line.finish("accuracy 99.72%  loss 0.1234  gates open 54.2%  123 s")
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").split("\n")
    assert max(map(len, lines)) <= width
    last = next(line for line in reversed(lines) if line.strip())
    assert "100000/100000" in last and "accuracy 99.72%" in last and ("gates open 5" in last) == (width >= 80)


def test_without_a_terminal_a_phase_prints_one_line(capsys):
    line = ProgressLine(Console(file=sys.stdout, force_terminal=False), "search", 100, 0)
    line.update(50, "loss 2.3")
    line.finish("accuracy 99.72%")
    assert capsys.readouterr().out == "search    100/100  accuracy 99.72%\n"
