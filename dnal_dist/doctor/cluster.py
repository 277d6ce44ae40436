"""Checks of remote services: SLURM and Weights & Biases. Every request has a time limit."""

import getpass
import math
import os
import shutil
import socket
from importlib.util import find_spec
from urllib.parse import urlsplit

from dnal_dist.common.commands import output_of
from dnal_dist.common.text import duration
from dnal_dist.doctor.case import Case, Finding, bounded, fails, passes, warns
from dnal_dist.training import stopping

COMMANDS = ("sbatch", "squeue", "sinfo", "scontrol")
# Seconds for SLURM's controller and accounting, and for a connection to the tracker's server.
ANSWER, CONNECT = 5.0, 3.0


def slurm(case: Case) -> Finding:
    """The commands, and the partition, account and number of nodes of the job."""
    wanted = [name for name in ("partition", "account") if getattr(case, name)]
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if len(missing) == len(COMMANDS):
        if wanted:
            return fails("SLURM's commands are not installed here", f"use a login node of the cluster, or omit --{wanted[0]}")
        return passes("not installed, and not needed")
    if missing:
        return fails(f"{', '.join(missing)} of SLURM's commands are missing", "install slurm-client, or correct PATH")
    # A hidden partition may be named all the same.
    hidden = ["--all"] if case.partition else []
    answer = output_of(["sinfo", *hidden, "--noheader", "--format=%R|%l|%D|%a"], ANSWER)
    if answer is None:
        remedy = "`sinfo`, `scontrol ping`" if wanted else "`scontrol ping`, unless SLURM is not used"
        return (fails if wanted else warns)("the commands are here, but the controller does not answer", remedy)
    partitions = [line.split("|") for line in answer.splitlines() if line.count("|") == 3]
    if fault := _partition_fault(case, partitions) or _account_fault(case):
        return fault
    if case.partition:
        which = f"partition {' or '.join(_named(case))}"
    else:
        which = f"partitions {', '.join(dict.fromkeys(name for name, *_ in partitions))}"
    account = f", account {case.account}" if case.account else ""
    return passes(f"answers; {which}{account}" + (f" for {case.nodes} x {case.processes} processes" if wanted else ""))


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


def _account_fault(case: Case) -> Finding | None:
    if case.account is None:
        return None
    allowed = {name: _allowed(name) for name in _named(case)}
    if allowed and not any({"ALL", case.account} & {*accounts.split(",")} for accounts in allowed.values()):
        rules = ", ".join(f"partition {name} is for accounts {accounts}" for name, accounts in allowed.items())
        return fails(f"{rules}, not for {case.account}", "another --account or --partition")
    user = getpass.getuser()
    answer = output_of(["sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={user}", "format=account"], ANSWER)
    if answer is None:
        return warns(f"no answer whether {user} may use account {case.account}", "`sacctmgr show assoc`, by hand")
    if case.account not in (accounts := sorted(set(answer.split()))):
        known = ", ".join(accounts) or "none"
        return fails(f"{user} has no account {case.account} (but {known})", "--account with one of those, or request it")
    return None


def _allowed(partition: str) -> str:
    """The accounts that may use a partition, or ALL."""
    answer = output_of(["scontrol", "--all", "--oneliner", "show", "partition", partition], ANSWER) or ""
    return next((word.partition("=")[2] for word in answer.split() if word.startswith("AllowAccounts=")), "ALL")


def wandb(case: Case) -> Finding:
    tracking = case.settings.tracking
    if "wandb" not in tracking.tracker:
        return passes(f"not used, since tracking.tracker is {tracking.tracker}")
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes", "on"):
        return passes("off, by the environment variable WANDB_DISABLED")
    if find_spec("wandb") is None:
        return fails("not installed", "pip install wandb, or tracking.tracker=none")
    # A dependency of wandb's.
    from requests.utils import get_netrc_auth

    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    host = urlsplit(url).hostname
    known = bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(url))
    mode = tracking.mode or os.environ.get("WANDB_MODE") or ("online" if known else "offline")
    if mode != "online":
        login = "logged in" if known else "not logged in"
        return passes(f"{mode}, {login} to {host}; runs are kept in the run folder, and `wandb sync` uploads them")
    if not known:
        return fails(f"online, but not logged in to {host}", "wandb login, or tracking.mode=offline")

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
