"""Checks of remote services: SLURM and Weights & Biases. Every request has a time limit."""

import math
import os
import shutil
import socket
from importlib.util import find_spec
from urllib.parse import urlsplit

from dnal_dist.common.commands import output_of
from dnal_dist.common.text import duration
from dnal_dist.doctor.case import Case, Finding, bounded, fails, passes, warns
from dnal_dist.tracking.wandb import wandb_mode
from dnal_dist.training import stopping

COMMANDS = ("sbatch", "squeue", "sinfo", "scontrol")
# Seconds for SLURM's controller, and for a connection to the tracker's server.
ANSWER, CONNECT = 5.0, 3.0


def slurm(case: Case) -> Finding:
    """The commands, and the partition, time and number of nodes of the job. sbatch itself refuses an account."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if len(missing) == len(COMMANDS):
        if case.partition:
            return fails("SLURM's commands are not installed here", "use a login node of the cluster, or omit --partition")
        return passes("not installed, and not needed")
    if missing:
        return fails(f"{', '.join(missing)} of SLURM's commands are missing", "install slurm-client, or correct PATH")
    # A hidden partition may be named all the same.
    hidden = ["--all"] if case.partition else []
    answer = output_of(["sinfo", *hidden, "--noheader", "--format=%R|%l|%D|%a"], ANSWER)
    if answer is None:
        remedy = "`sinfo`, `scontrol ping`" if case.partition else "`scontrol ping`, unless SLURM is not used"
        return (fails if case.partition else warns)("the commands are here, but the controller does not answer", remedy)
    partitions = [line.split("|") for line in answer.splitlines() if line.count("|") == 3]
    if fault := _partition_fault(case, partitions):
        return fault
    if case.partition:
        return passes(f"answers; partition {' or '.join(_named(case))} for {case.nodes} x {case.processes} processes")
    return passes(f"answers; partitions {', '.join(dict.fromkeys(name for name, *_ in partitions))}")


def _named(case: Case) -> list[str]:
    """The partitions of the job, which starts in the first that has room."""
    return [name.strip() for name in (case.partition or "").split(",") if name.strip()]


def _partition_fault(case: Case, partitions: list[list[str]]) -> Finding | None:
    """Why no partition can take the job."""
    there = dict.fromkeys(name for name, *_ in partitions)
    named, known = _named(case) or list(there), ", ".join(there) or "none"
    if missing := [name for name in named if name not in there]:
        return fails(f"there is no partition {', '.join(missing)}", f"--partition with one of {known}")
    up = [one for one in partitions if one[0] in named and one[3] == "up"]
    if not up:
        state = next((state for name, *_, state in partitions if name in named), "missing")
        return fails(f"partition {case.partition or known} is {state}", f"--partition with another of {known}")
    if (nodes := max(int(one[2]) for one in up)) < case.nodes:
        return fails(
            f"the job needs {case.nodes} nodes, the largest partition has {nodes}", f"--nodes {nodes}, or another --partition"
        )
    limits = [math.inf if one[1] == "infinite" else seconds_of(one[1]) for one in up if int(one[2]) >= case.nodes]
    if case.seconds is not None and max(limits) < case.seconds:
        minutes = int(max(limits) // 60)
        return fails(
            f"the job needs {duration(case.seconds)}, {case.partition or 'every partition'} gives {duration(max(limits))}",
            f"--time {minutes // 60}:{minutes % 60:02d}:00, or another --partition",
        )
    return None


def seconds_of(text: str) -> float:
    """A time as sbatch and sinfo write it: 12:00:00, 1-12:00:00, 30:00, 1-12 or 90 (minutes). Raises ValueError for others."""
    if text.isdecimal() and int(text):
        return 60.0 * int(text)
    days, dash, rest = text.rpartition("-")
    fields = rest.split(":")
    if dash and len(fields) < 3:
        return stopping.duration(f"{days}-{':'.join([*fields, '00', '00'][:3])}")
    return stopping.duration(f"0:{text}" if text.count(":") == 1 else text)


def wandb(case: Case) -> Finding:
    tracking = case.settings.tracking
    if "wandb" not in tracking.tracker:
        return passes(f"not used, since tracking.tracker is {tracking.tracker}")
    if find_spec("wandb") is None:
        return fails("not installed", "pip install wandb, or tracking.tracker=none")
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    mode, remark = wandb_mode(tracking.mode)
    if mode == "disabled":
        return passes("off, by the environment")
    if remark:
        return fails(f"online, but not logged in to {host}", "wandb login, or tracking.mode=offline")
    if mode != "online":
        return passes(f"{mode}; runs are kept in the run folder, and `wandb sync` uploads them")

    def connect(_: Case) -> Finding:
        socket.create_connection((host, 443), CONNECT).close()
        return passes(f"online, logged in to {host}, which is reached")

    # The lookup of the address has no time limit of its own.
    if (finding := bounded(connect, case, CONNECT)).status == "pass":
        return finding
    return warns(
        f"online and logged in, but {host} is not reached from here within {CONNECT:.0f} s",
        "tracking.mode=offline, unless the nodes of the job reach it",
    )
