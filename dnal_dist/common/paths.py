"""The one rule for paths in recipes, overrides and commands: `~` and `$VAR` are expanded, whatever the shell did."""

import argparse
import os
import re
from pathlib import Path


def expanded(text: str) -> str:
    """`text` with ~, ~user, $VAR and ${VAR} expanded. Raises ValueError for a variable that is not set."""
    for name in re.findall(r"\$(?:(\w+)|\{(\w+)\})", text):
        name = "".join(name)
        if not os.environ.get(name):
            raise ValueError(f"the variable {name} in {text!r:.200} is not set; set it, or write the path in full")
    found = os.path.expanduser(os.path.expandvars(text))
    if found.startswith("~") and not os.path.lexists(found):
        raise ValueError(f"{text!r:.200} begins with ~, but there is no such home folder; write the path in full")
    return found


def argument(text: str) -> Path:
    """A path as an argument of a command, for argparse's `type`."""
    try:
        return Path(expanded(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
