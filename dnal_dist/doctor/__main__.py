"""Look for what would fail later, before a GPU is spent on it.

python -m dnal_dist.doctor recipes/digits.yaml
python -m dnal_dist.doctor recipes/resnet50_imagenet.yaml --nodes 2 --processes-per-node 8 \\
    --config-file recipes/accelerate/ddp.yaml --time 12:00:00 --device-memory 80GB data.workers=8

Within a minute, and without a trace: what is written for a check is taken away again, and the run folder is not made. Exit code 0:
nothing failed, though there may be warnings; 1: something did; 2: the recipe or the command line cannot be read.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from dnal_dist import recipe
from dnal_dist.common.errors import InputError
from dnal_dist.common.text import bytes_of
from dnal_dist.doctor import cluster, data, disk, machine, network
from dnal_dist.doctor.case import PRECISIONS, Case, Finding, bounded, fails, read_config, warns
from dnal_dist.doctor.launch import Launch
from dnal_dist.training import stopping

# Seconds that all checks may take together, and any but the launch.
LIMIT, EACH = 55.0, 20.0
# What the launch leaves of them to the check behind it.
SAVING = 12.0
LAUNCH = "launch"
# Too late they only tell that this machine is busy.
COMPUTED = (network.network, network.memory)
COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red"}
SHIPPED = network.CHECKOUT / "recipes" / "accelerate" / "ddp.yaml"

CHECKS: dict[str, Callable[[Case], Finding]] = {
    "recipe": network.network,
    "code": network.code,
    "training shards": data.train_shards,
    "validation shards": data.val_shards,
    "labels": data.labels,
    "pictures": data.images,
    "shard cache": data.cache,
    "run folder": disk.run_folder,
    "disk space": disk.disk,
    "clock": disk.clock,
    "versions": machine.versions,
    "GPU": machine.gpus,
    "open files": machine.open_files,
    "shared memory": machine.shared_memory,
    "cores": machine.cores,
    "W&B": cluster.wandb,
    "SLURM": cluster.slurm,
    "device memory": network.memory,
    # Last, when the launch no longer takes the disk's and the processors' time.
    "saving": disk.saving,
}


def examine(asked: Case, limit: float = LIMIT) -> dict[str, Finding]:
    """What each check finds, by its name, in the order of the table. No longer than `limit` seconds, if nothing hangs in the
    kernel. Nothing that was written stays."""
    until, found = time.monotonic() + limit, {}
    try:
        with Launch(asked) as launch:
            for name, check in CHECKS.items():
                if name == "saving":
                    found[LAUNCH] = launch.finding(until - time.monotonic() - SAVING)
                late = warns if check in COMPUTED else fails
                found[name] = bounded(check, asked, min(EACH, until - time.monotonic()), late)
    finally:
        asked.close()
    return found


def case_of(args: argparse.Namespace) -> Case:
    """Raises InputError for what cannot be read."""
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
        seconds = None if args.time is None else _minutes(args.time)
    except ValueError as error:
        raise InputError(f"--time: {error}") from None
    memory = None if args.device_memory is None else bytes_of(args.device_memory)
    places = {"partition": args.partition, "account": args.account}
    return Case(settings, args.nodes, processes, config, seconds, args.grace, memory, args.cpu, **places, quick=args.quick)


def _minutes(text: str) -> float:
    """Seconds of a time as sbatch takes it: also 90 (minutes), 30:00 and 1-12. Raises ValueError."""
    if text.isdecimal() and int(text):
        return 60.0 * int(text)
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if dash and len(parts) < 3:
        return stopping.duration(f"{days}-{':'.join([*parts, '00', '00'][:3])}")
    return stopping.duration(f"0:{text}" if text.count(":") == 1 else text)


def _tell(found: dict[str, Finding], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if console.is_terminal:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("", "check", "found", "remedy"):
            table.add_column(name, overflow="fold", no_wrap=name in ("", "check"))
        for name, (status, words, remedy) in found.items():
            table.add_row(Text(status, COLOURS[status]), Text(name), Text(words), Text(remedy))
        console.print(table)
    else:
        width = max(map(len, found))
        for name, (status, words, remedy) in found.items():
            print(f"{status}  {name:<{width}}  {words}" + (f"\n{'':{width + 8}}remedy: {remedy}" if remedy else ""))
    count = {status: sum(one.status == status for one in found.values()) for status in COLOURS}
    line = f"{len(found)} checks in {seconds:.0f} s: {count['pass']} passed, {count['warn']} warned, {count['fail']} failed"
    if console.is_terminal:
        console.print(Text(line, COLOURS["fail" if count["fail"] else "warn" if count["warn"] else "pass"]), soft_wrap=True)
    else:
        print(line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dnal_dist.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file such as recipes/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe: dotted keys, YAML values")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines that train (default 1)")
    parser.add_argument(
        "--processes-per-node", type=int, metavar="P", help="one a GPU (default: as the Accelerate config says, else 1)"
    )
    parser.add_argument(
        "--config-file", type=Path, metavar="YAML", help="Accelerate config, for example recipes/accelerate/fsdp2.yaml"
    )
    parser.add_argument("--mixed-precision", choices=PRECISIONS, help="in place of the Accelerate config's")
    parser.add_argument("--time", metavar="TIME", help="time limit of the job, as sbatch takes it: 12:00:00, 1-12:00:00, 90")
    parser.add_argument(
        "--grace", type=float, metavar="SECONDS", help="how long before its end the job is told to save, as slurm/submit.py's"
    )
    parser.add_argument("--cpu", action="store_true", help="the job has no GPUs: look for none, and at the memory of this machine")
    parser.add_argument("--device-memory", metavar="AMOUNT", help="of one device of the job: 80GB, 24GiB")
    parser.add_argument("--partition", help="SLURM's, which has to be there")
    parser.add_argument("--account", help="likewise")
    parser.add_argument("--quick", action="store_true", help="start no processes and write no checkpoint")
    parser.add_argument("--json", action="store_true", help="print [{check, status, found, remedy}] instead of a table")
    return parser.parse_intermixed_args()


def main() -> None:
    # With what Python itself and its imports took.
    begun = time.monotonic() - (time.time() - psutil.Process().create_time())
    args = _arguments()
    # A name that the terminal's encoding lacks is no reason to fail.
    sys.stdout.reconfigure(errors="replace")
    # What was written is taken away then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        asked = case_of(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    # On a login node others are at work, and threads that wait for one another then take many times as long as one does.
    torch.set_num_threads(1)
    try:
        found = examine(asked, LIMIT - (time.monotonic() - begun))
    except (SystemExit, KeyboardInterrupt) as ended:
        # Without Python's own end, which waits for a check that hangs in a disk or a server.
        os._exit(128 + signal.SIGINT if isinstance(ended, KeyboardInterrupt) else ended.code)
    # Who closes the pipe early, as head does, has read enough.
    with contextlib.suppress(BrokenPipeError):
        if args.json:
            print(json.dumps([{"check": name, **one._asdict()} for name, one in found.items()], indent=1))
        else:
            _tell(found, time.monotonic() - begun)
        sys.stdout.flush()
    os._exit(int(any(one.status == "fail" for one in found.values())))


if __name__ == "__main__":
    main()
