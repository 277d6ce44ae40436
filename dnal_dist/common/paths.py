"""The one rule for paths in recipes, overrides and commands: `~` and `$VAR` are expanded, whatever the shell did."""

import os
import re

from dnal_dist.common.errors import InputError


def expanded(text: str, where: str = "") -> str:
    """`text` with ~, ~user, $VAR and ${VAR} expanded; where: what the message begins with, such as a key.

    Raises InputError for a variable that is not set, and for a $ without a variable: a shell would have made something else of it.
    """

    def value(found: re.Match) -> str:
        name = found[1] or found[2]
        if not os.environ.get(name):
            raise InputError(f"{where}the variable {name} in {text!r:.200} is not set; set it, or write the path in full")
        return os.environ[name]

    found = os.path.expanduser(re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, text, flags=re.ASCII))
    if "$" in found:
        raise InputError(f"{where}{text!r:.200} has a $ that is neither $NAME nor ${{NAME}}; write the path in full, without it")
    if found.startswith("~") and not os.path.lexists(found):
        raise InputError(f"{where}{text!r:.200} begins with ~, but there is no such home folder; write the path in full")
    return found
