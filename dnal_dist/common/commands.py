"""Running other programs."""

import os
import subprocess
from collections.abc import Mapping, Sequence


def output_of(command: Sequence[str], seconds: float = 5.0, environment: Mapping[str, str] | None = None) -> str | None:
    """What a program prints on stdout, without its last newline; None if it is missing, fails, or does not answer within `seconds`.

    environment: variables set in addition to this process's own.
    """
    variables = None if environment is None else {**os.environ, **environment}
    options = {"capture_output": True, "text": True, "errors": "replace", "check": True, "env": variables}
    try:
        return subprocess.run(command, timeout=seconds, **options).stdout.rstrip("\n")
    except (OSError, subprocess.SubprocessError):
        return None
