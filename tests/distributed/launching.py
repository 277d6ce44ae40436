"""How the tests start real processes under `accelerate launch`, with the configs that ship."""

import os
import subprocess


def execute(*command, timeout: float = 900, **environment) -> subprocess.CompletedProcess:
    command = [str(word) for word in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in environment.items()}}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def succeed(found: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-6000:]
    return found
