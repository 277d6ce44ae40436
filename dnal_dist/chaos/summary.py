"""The page that chaos ends with: what was killed where, and what held."""

import os
import platform
import shlex
import sys
from importlib.metadata import version

from dnal_dist.chaos.instrument import PLACES, STAGES

CHECKS = {
    "end": "every start that was not killed came to its end, with the exit code of the uninterrupted run",
    "equal": "",
    "folder": "nothing unfinished, removed or damaged is left in a run folder, and its compact network loads",
    "processes": "no process is left behind",
    "shared memory": "nothing is left in /dev/shm that is named after a process or port of a run",
    "temporary files": "nothing is left in the folder for temporary files, but after a kill what the next start removes",
}
EXACT = "every run is bit-equal to the uninterrupted one: architecture, weights, and all records but for the clock"
ALIKE = "every run took the samples and steps of the uninterrupted one, and its accuracy is within {:.2%} of that"


def markdown(args, name: str, tally, references: dict, seconds: float) -> str:
    """args: of the command line. tally: chaos.Tally. references: uninterrupted runs by number of processes."""
    ranks = " or ".join(map(str, references))
    launched = "started as torchrun starts them" if args.config_file is None else f"`accelerate launch` with {args.config_file}"
    whole = ", ".join(f"{one.seconds:.1f} s" for one in references.values())
    facts = {
        "command": f"`python -m dnal_dist.chaos {shlex.join(sys.argv[1:])}`",
        "recipe, seed of the kills": f"{name}, {args.seed}",
        "processes": f"{ranks}, {launched}",
        "versions": f"Python {platform.python_version()}, " + ", ".join(f"{one} {version(one)}" for one in ("torch", "accelerate")),
        "machine": f"{platform.system()}, {os.cpu_count()} cores",
        "kills": f"{tally.kills}: {tally.everyone} of all processes, {tally.kills - tally.everyone} of one among several",
        "runs, starts": f"{tally.rounds}, {tally.starts}; {tally.missed} ended before the kill that was drawn",
        "runs compared": tally.compared,
        "uninterrupted run": whole,
        "longest from a start to its first step": f"{tally.longest_restart:.1f} s",
        "longest from a kill to the end of the others": f"{tally.longest_stop:.1f} s; {tally.forced} did not heed SIGTERM in time",
        "all of it": f"{seconds / 60:.1f} minutes",
    }
    places = [
        (place, tally.aimed[place], tally.hit_by_aim[place], tally.hit_by_clock[place])
        for place in PLACES
        if tally.aimed[place] or tally.hit_by_aim[place] or tally.hit_by_clock[place]
    ]
    stages = [(stage if n else "the beginning", tally.resumed[stage]) for n, stage in enumerate(STAGES) if tally.resumed[stage]]
    lines = [f"# {'FAIL' if tally.faults else 'PASS'}: {tally.kills} kills of {name}", ""]
    lines += [*_table(("", ""), facts.items()), ""]
    lines += [*_table(("place", "aimed at", "hit by aim", "hit by the clock"), places), ""]
    lines += [*_table(("went on from", "times"), stages), ""]
    lines += _checks(args, tally, exact=len(references) == 1)
    return "\n".join(lines)


def _table(head: tuple, rows) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def _checks(args, tally, exact: bool) -> list[str]:
    lines, times = [], {"end": tally.ended, "equal": tally.compared, "folder": tally.compared}
    for check, told in CHECKS.items():
        found = [text for kind, text in tally.faults if kind == check]
        told = told or (EXACT if exact else ALIKE.format(args.tolerance))
        held = "pass" if times.get(check, tally.starts) else "not checked"
        lines.append(f"- {'FAIL' if found else held}: {told}")
        lines += [f"  - {text}" for text in found]
    return lines
