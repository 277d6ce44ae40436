"""A command in the test's own process, which spares the seconds of its imports."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def called(main: Callable[[], None], capsys, *arguments) -> Ended:
    """Exit code, output and errors of the command whose function is `main`."""
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    return Ended(code, *capsys.readouterr())
