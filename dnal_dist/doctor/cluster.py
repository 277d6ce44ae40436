"""Checks of what is elsewhere: SLURM and the trackers' service. Every question has a time limit."""

import netrc
import os
import shutil
import socket
import threading
from importlib.util import find_spec
from urllib.parse import urlsplit

from dnal_dist.common.text import duration
from dnal_dist.doctor.case import Case, Finding, fails, output_of, passes, warns
from dnal_dist.training import stopping

COMMANDS = ("sbatch", "squeue", "sinfo", "scontrol")
# Seconds for the controller and for the accounting.
ANSWER = 5.0
# Seconds to see whether the trackers' service can be reached.
CONNECT = 3.0


def slurm(case: Case) -> Finding:
    """The commands, and the partition, account and number of nodes that the job asks for."""
    asked = [name for name in ("partition", "account") if getattr(case, name)]
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if len(missing) == len(COMMANDS):
        if asked:
            return fails("SLURM's commands are not here", f"ask on a login node of the cluster, or leave out --{asked[0]}")
        return passes("not here, and nothing of it is asked for")
    if missing:
        return fails(f"{', '.join(missing)} of SLURM's commands are not here", "install slurm-client, or mend PATH")
    # One that is hidden may be asked for by its name all the same.
    hidden = ["--all"] if case.partition else []
    told = output_of(["sinfo", *hidden, "--noheader", "--format=%R|%l|%D|%a"], ANSWER)
    if told is None:
        if asked:
            return fails("the commands are here, but the controller does not answer", "`sinfo`, `scontrol ping`")
        return warns("the commands are here, but the controller does not answer", "`scontrol ping`, unless SLURM is not used")
    partitions = [line.split("|") for line in told.splitlines() if line.count("|") == 3]
    fault = _partition(case, partitions) or _account(case)
    if fault is not None:
        return fault
    names = ", ".join(dict.fromkeys(name for name, *_ in partitions))
    of = f"partition {' or '.join(_named(case))}" if case.partition else f"partitions {names}"
    account = f", account {case.account}" if case.account else ""
    return passes(f"answers; {of}{account} take {case.nodes} x {case.processes} processes" if asked else f"answers; {of}")


def _named(case: Case) -> list[str]:
    """A job may name several partitions, and begins in the first that has room."""
    return [name.strip() for name in (case.partition or "").split(",") if name.strip()]


def _partition(case: Case, partitions: list[list[str]]) -> Finding | None:
    """The fault, if there is none that could take the job."""
    there = dict.fromkeys(name for name, *_ in partitions)
    named, known = _named(case) or list(there), ", ".join(there) or "none"
    if missing := [name for name in named if name not in there]:
        return fails(f"there is no partition {', '.join(missing)}", f"--partition with one of {known}")
    found = [one for one in partitions if one[0] in named and one[3] == "up"]
    if not found:
        states = next((state for name, *_, state in partitions if name in named), "not there")
        return fails(f"partition {case.partition or known} is {states}", f"--partition with another of {known}")
    if (nodes := max(int(one[2]) for one in found)) < case.nodes:
        return fails(
            f"{case.nodes} nodes are asked for, the largest partition has {nodes}", f"--nodes {nodes}, or another --partition"
        )
    limits = [_seconds(one[1]) for one in found if int(one[2]) >= case.nodes]
    if case.seconds is not None and all(limit is not None and limit < case.seconds for limit in limits):
        longest = max(limit for limit in limits if limit is not None)
        return fails(
            f"{duration(case.seconds)} are asked for, {case.partition or 'every partition'} gives {duration(longest)}",
            f"--time {_clock(longest)}, or another --partition",
        )
    return None


def _seconds(text: str) -> float | None:
    """Of sinfo's time limits: 1-00:00:00, 12:00:00, 30:00; None for infinite."""
    try:
        return stopping.duration(text if text.count(":") == 2 else f"0:{text}")
    except ValueError:
        return None


def _clock(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes // 60}:{minutes % 60:02d}:00"


def _account(case: Case) -> Finding | None:
    if case.account is None:
        return None
    allowed = {name: _allowed(name) for name in _named(case)}
    if allowed and not any({"ALL", case.account} & {*accounts.split(",")} for accounts in allowed.values()):
        told = ", ".join(f"partition {name} is for accounts {accounts}" for name, accounts in allowed.items())
        return fails(f"{told}, not for {case.account}", "another --account or --partition")
    told = output_of(["sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={_user()}", "format=account"], ANSWER)
    if told is None:
        return warns(f"whether {_user()} may use account {case.account} could not be asked", "`sacctmgr show assoc`, by hand")
    accounts = sorted(set(told.split()))
    if case.account not in accounts:
        known = ", ".join(accounts) or "none"
        return fails(f"{_user()} has no account {case.account} (but {known})", "--account with one of those, or ask for it")
    return None


def _allowed(partition: str) -> str:
    """The accounts that it is for, or ALL."""
    told = output_of(["scontrol", "--all", "--oneliner", "show", "partition", partition], ANSWER) or ""
    return next((word.partition("=")[2] for word in told.split() if word.startswith("AllowAccounts=")), "ALL")


def _user() -> str:
    import getpass

    return getpass.getuser()


def wandb(case: Case) -> Finding:
    tracking = case.settings.tracking
    if "wandb" not in tracking.tracker:
        return passes(f"not used, since tracking.tracker is {tracking.tracker}")
    if find_spec("wandb") is None:
        return fails("not installed", "pip install wandb, or tracking.tracker=none")
    host = _host()
    known = bool(os.environ.get("WANDB_API_KEY")) or _in_netrc(host)
    login = "logged in" if known else "not logged in"
    mode = tracking.mode or os.environ.get("WANDB_MODE") or ("online" if known else "offline")
    if mode != "online":
        return passes(f"{mode}, {login} to {host}; runs lie in the run folder, and `wandb sync` sends them")
    if not known:
        return fails(f"online, but not logged in to {host}", "wandb login, or tracking.mode=offline")
    if not _reached(host):
        return warns(
            f"online and logged in, but {host} is not reached from here within {CONNECT:.0f} s",
            "tracking.mode=offline, unless the nodes of the job reach it",
        )
    return passes(f"online, logged in to {host}, which is reached")


def _host() -> str:
    return urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname or "api.wandb.ai"


def _in_netrc(host: str) -> bool:
    """Whether there is a login for the host; what it is, is not looked at."""
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if name and host in netrc.netrc(os.path.expanduser(name)).hosts:
                return True
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
    return False


def _reached(host: str) -> bool:
    found = []

    def connect() -> None:
        try:
            with socket.create_connection((host, 443), CONNECT):
                found.append(True)
        except OSError:
            pass

    # Asking for its address has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT)
    return bool(found)
