"""What all commands have in common: how they begin and end, and the types of their arguments."""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dnal_dist.common import streams
from dnal_dist.common.errors import InputError
from dnal_dist.common.paths import expanded


def door(main: Callable[[], None]) -> Callable[[], None]:
    """Decorator of a command's `main`: its standard streams last, wrong input is one line on stderr and exit code 2, and Ctrl-C
    leaves no traceback."""

    @functools.wraps(main)
    def opened() -> None:
        streams.settle()
        try:
            main()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return opened


def parser_of(command: str, text: str, **more: str) -> argparse.ArgumentParser:
    """The parser of `python -m COMMAND`. text: of its help, printed as it is; more: as argparse takes it."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {command}", description=text, formatter_class=raw, **more)


def argument(text: str) -> Path:
    """A path, for argparse's `type`, as the others below."""
    try:
        return Path(expanded(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole(least: int = 1, most: int | None = None) -> Callable[[str], int]:
    """A whole number within bounds."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            bounds = f"of {least} or more" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"expected a whole number {bounds}, found {text!r}")
        return int(text)

    return read


def among(names: tuple[str, ...]) -> Callable[[str], str]:
    """One of several names."""

    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(names)}, separated by commas")
        return text

    return read


def several(one: Callable[[str], Any]) -> Callable[[str], list]:
    """Arguments of one type, separated by commas, each once."""
    return lambda text: list(dict.fromkeys(one(word) for word in text.split(",")))
