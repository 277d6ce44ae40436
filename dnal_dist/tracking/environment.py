"""The environment of a run: machine, code, SLURM job, and the software beneath torch."""

import contextlib
import os
import platform
import socket
from pathlib import Path

import pynvml
import torch

from dnal_dist.common import commands

CHECKOUT = Path(__file__).resolve().parents[2]


def facts(device: torch.device) -> dict[str, str | dict[str, str] | None]:
    """`host`, `code`, `slurm_job` and `environment`, as metrics.jsonl records them; None for what is missing."""
    beneath = {"os": platform.platform(), "cpus": str(os.cpu_count())}
    if device.type == "cuda":
        beneath |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
        with contextlib.suppress(AttributeError, RuntimeError):  # a build without NCCL
            beneath["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        beneath["driver"] = pynvml.nvmlSystemGetDriverVersion()
    job = os.environ.get("SLURM_JOB_ID")
    return {"host": socket.gethostname(), "code": code(), "slurm_job": job, "environment": beneath}


def code(checkout: Path = CHECKOUT) -> str | None:
    """Commit of the checkout that this package lies in, with "+" behind it if tracked files differ; None where it is in none."""
    # A virtual environment may lie in a checkout of something else.
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    return commands.output_of(command, 10, {"GIT_OPTIONAL_LOCKS": "0"}) or None
