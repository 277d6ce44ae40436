"""The Markdown report of a campaign: kills by place, and the outcome of each check."""

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import jinja2

from dnal_dist.chaos.instrument import PLACES, STAGES
from dnal_dist.common.text import printable

CHECKS = {
    "end": "every start that was not killed came to its end, with the exit code of the uninterrupted run",
    "equal": "every run is bit-equal to the uninterrupted one: architecture, weights, and all records but for the clock",
    "folder": "nothing unfinished, removed or damaged is left in a run folder, and its compact network loads",
    "processes": "no process is left behind",
    "shared memory": "nothing is left in /dev/shm that is named after a process or port of a run",
    "temporary files": "nothing is left in the folder for temporary files, but after a kill what the next start removes",
}
# Instead of "equal" with several numbers of processes.
ALIKE = "every run took the samples and steps of the uninterrupted one, and its accuracy is within {:.2%} of that"


def markdown(args, name: str, tally, references: dict, seconds: float) -> str:
    """args: of the command line. tally: campaign.Tally. references: uninterrupted runs by number of processes."""
    ranks = " or ".join(map(str, references))
    launched = "started as torchrun starts them" if args.config_file is None else f"`accelerate launch` with {args.config_file}"
    facts = {
        "command": _cell(f"`python -m dnal_dist.chaos {shlex.join(sys.argv[1:])}`"),
        "recipe, seed of the kills": _cell(f"{name}, {args.seed}"),
        "processes": f"{ranks}, {launched}",
        "versions": f"Python {platform.python_version()}, " + ", ".join(f"{one} {version(one)}" for one in ("torch", "accelerate")),
        "machine": f"{platform.system()}, {os.cpu_count()} cores",
        "kills": f"{tally.kills}: {tally.everyone} of all processes, {tally.kills - tally.everyone} of one among several",
        "runs, starts": f"{tally.rounds}, {tally.starts}; {tally.missed} ended before the kill that was drawn",
        "runs compared": tally.compared,
        "uninterrupted run": ", ".join(f"{one.seconds:.1f} s" for one in references.values()),
        "longest from a start to its first step": f"{tally.longest_restart:.1f} s",
        "longest from a kill to the end of the others": f"{tally.longest_stop:.1f} s; {tally.forced} ignored SIGTERM for too long",
        "total time": f"{seconds / 60:.1f} minutes",
    }
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False)
    environment.filters["text"] = _cell
    template = environment.from_string(Path(__file__).with_name("summary.md.jinja").read_text())
    checks = _checks(args, tally, exact=len(references) == 1)
    return template.render(name=name, tally=tally, facts=facts, places=PLACES, stages=STAGES, checks=checks).rstrip()


def _cell(words: str) -> str:
    return printable(words).replace("|", "\\|")


def _checks(args, tally, exact: bool) -> list[dict]:
    checks, times = [], {"end": tally.ended, "equal": tally.compared, "folder": tally.compared}
    for check, held in (CHECKS if exact else CHECKS | {"equal": ALIKE.format(args.tolerance)}).items():
        findings = [finding for kind, finding in tally.faults if kind == check]
        outcome = "FAIL" if findings else "pass" if times.get(check, tally.starts) else "not checked"
        checks.append({"outcome": outcome, "property": held, "findings": findings})
    return checks
