"""The doctor's checks in their order, and their table."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable

import torch

from dnal_dist import recipe
from dnal_dist.common.console import printer
from dnal_dist.common.errors import InputError
from dnal_dist.common.shipped import shipped
from dnal_dist.common.text import bytes_of
from dnal_dist.doctor import cluster, data, disk, machine, network
from dnal_dist.doctor.case import Case, Finding, bounded, fails, read_config, warns
from dnal_dist.doctor.launch import Launch

# Seconds for all checks together, for any but the launch, and those that the launch leaves to the check after it.
LIMIT, EACH, SAVING = 55.0, 20.0, 12.0
# Where one of these is late, this machine is busy.
COMPUTED = (network.network, network.memory)
COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red"}
SHIPPED = shipped("recipes") / "accelerate" / "ddp.yaml"

CHECKS: dict[str, Callable[[Case], Finding]] = {
    "recipe": network.network,
    "training shards": data.train_shards,
    "validation shards": data.val_shards,
    "labels": data.labels,
    "images": data.images,
    "shard cache": data.cache,
    "run folder": disk.run_folder,
    "signal": network.signal,
    "disk space": disk.disk,
    "versions": machine.versions,
    "GPU": machine.gpus,
    "open files": machine.open_files,
    "shared memory": machine.shared_memory,
    "cores": machine.cores,
    "W&B": cluster.wandb,
    "SLURM": cluster.slurm,
    "device memory": network.memory,
    # Last, when the launch no longer uses the disk and the cores.
    "saving": disk.saving,
}


def examine(case: Case, limit: float = LIMIT) -> dict[str, Finding]:
    """The finding of each check, by its name, in the order of the table, within `limit` seconds unless something hangs in the
    kernel. No file that was written stays."""
    until, findings = time.monotonic() + limit, {}
    try:
        with Launch(case) as launch:
            for name, check in CHECKS.items():
                if name == "saving":
                    findings["launch"] = launch.finding(until - time.monotonic() - SAVING)
                late = warns if check in COMPUTED else fails
                findings[name] = bounded(check, case, min(EACH, until - time.monotonic()), late)
    finally:
        case.close()
    return findings


def case_of(args: argparse.Namespace) -> Case:
    """Raises InputError for a recipe or an option that cannot be read."""
    settings = recipe.load(args.recipe, args.overrides)
    config = None if args.config_file is None else read_config(args.config_file)
    for option in ("nodes", "processes_per_node"):
        if (number := getattr(args, option)) is not None and number < 1:
            raise InputError(f"--{option.replace('_', '-')} {number}: expected at least 1")
    if args.grace is not None and not 0 < args.grace < float("inf"):
        raise InputError(f"--grace {args.grace}: expected seconds, more than 0")
    processes = args.processes_per_node or (
        config.processes if config else max(1, torch.cuda.device_count() if args.nodes > 1 and not args.cpu else 1)
    )
    if config is None and args.nodes * processes > 1 and SHIPPED.is_file():
        config = read_config(SHIPPED)
    if config is not None and args.mixed_precision is not None:
        config = config._replace(precision=args.mixed_precision)
    try:
        seconds = None if args.time is None else cluster.seconds_of(args.time)
    except ValueError as error:
        raise InputError(f"--time: {error}") from None
    memory = None if args.device_memory is None else bytes_of(args.device_memory)
    return Case(settings, args.nodes, processes, config, seconds, args.grace, memory, args.cpu, args.partition, args.quick)


def show(findings: dict[str, Finding], seconds: float) -> None:
    say, width = printer(), max(map(len, findings))
    count = {status: sum(one.status == status for one in findings.values()) for status in COLOURS}
    worst = next(status for status in ("fail", "warn", "pass") if count[status])
    line = f"{len(findings)} checks in {seconds:.0f} s: {count['pass']} passed, {count['warn']} warned, {count['fail']} failed"
    for name, (status, found, remedy) in findings.items():
        say((status, COLOURS[status]), f"  {name:<{width}}  {found}")
        if remedy:
            say(f"{'':{width + 8}}remedy: {remedy}")
    say((line, COLOURS[worst]))


def run(args: argparse.Namespace, begun: float) -> None:
    """Check and print, and leave the process. begun: when it was started, on the monotonic clock. Raises InputError."""
    # So that files are removed then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    case = case_of(args)
    # On a busy login node, threads that wait for one another take many times as long as one does.
    torch.set_num_threads(1)
    try:
        findings = examine(case, LIMIT - (time.monotonic() - begun))
    except (SystemExit, KeyboardInterrupt) as ended:
        # Without Python's own end, which waits for a check that hangs in a disk or a server.
        os._exit(128 + signal.SIGINT if isinstance(ended, KeyboardInterrupt) else ended.code)
    if args.json:
        print(json.dumps([{"check": name, **one._asdict()} for name, one in findings.items()], indent=1))
    else:
        show(findings, time.monotonic() - begun)
    sys.stdout.flush()
    os._exit(int(any(one.status == "fail" for one in findings.values())))
