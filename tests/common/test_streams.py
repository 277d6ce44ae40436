"""A command goes on, or ends with its code, whatever becomes of its standard streams."""

import subprocess
import sys

import pytest

PRINTS = """
import sys
from dnal_dist.common.door import door
@door
def main():
    for _ in range(3):
        print("x" * 100_000, flush=True)
        print("e", file=sys.stderr)
    open(sys.argv[1], "w").write("all of it")
    sys.exit(3)
main()
"""


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full", "| head -c 1"])
def test_a_command_outlives_its_standard_streams(tmp_path, streams):
    (tmp_path / "c.py").write_text(PRINTS)
    shell = f'"{sys.executable}" "{tmp_path}/c.py" "{tmp_path}/result" {streams}'
    # Of a pipe, its first program's code.
    code = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True).returncode
    assert code == 3 and (tmp_path / "result").read_text() == "all of it"


def test_a_folder_that_can_be_written_is_written(tmp_path):
    (tmp_path / "c.py").write_text(PRINTS)
    ended = subprocess.run([sys.executable, tmp_path / "c.py", tmp_path / "result"], capture_output=True, text=True)
    assert ended.stdout == ("x" * 100_000 + "\n") * 3 and ended.stderr == "e\n" * 3
