"""Train on a SLURM cluster: write the batch script of a run, or of a sweep of runs, and submit it.

python slurm/submit.py recipes/proxyless.yaml --nodes 2 --gpus-per-node 8 --time 12:00:00 --account vision
python slurm/submit.py recipes/proxyless.yaml --nodes 2 --gpus-per-node 8 --time 12:00:00 architecture.penalty_weight=5e-5 --dry-run
python slurm/submit.py --sweep recipes/sweeps/resnet50_lambda.yaml --gpus-per-node 8 --time 12:00:00 --max-parallel 2

The job saves and requeues itself when it is preempted or reaches its time limit, until the run is done. Defaults for your site go
into a file, ~/.config/dnal_dist/slurm.yaml, by the same names: partition: gpu, setup: [module load cuda]. See docs/slurm.md.
"""

import argparse
import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path

import options as options_of
import script
import sweep
from options import Options
from sweep import OF_PRETRAIN, Member

from dnal_dist import recipe
from dnal_dist.common.commands import output_of
from dnal_dist.common.door import door
from dnal_dist.common.errors import InputError
from dnal_dist.common.files import read_regular
from dnal_dist.report.records import MOST_RECORDS
from dnal_dist.report.run_list import jobs_of

ROOT = Path(__file__).resolve().parent.parent


@door
def main() -> None:
    args = _arguments()
    try:
        options = options_of.read(args)
        path, name, place, members, pretrain = _runs(args)
        if options.cpus_per_node is None and options.gpus_per_node:
            options.cpus_per_node = options.processes * (1 + max(m.recipe.data.workers for m in members))
        if args.dry_run:
            if pretrain:
                print(_render(options, f"{name}_pretrain", pretrain.folder / "submit" / "001", [pretrain], False, True), end="\n\n")
            print(_render(options, name, place / "submit" / "001", members, bool(args.sweep)), end="")
            return
        members = _unfinished(members)
        if pretrain and _is_pretrained(pretrain):
            print(f"{pretrain.folder} is finished: its network is where the others begin")
            pretrain = None
        _check_folders([*filter(None, [pretrain]), *members])
        if not args.skip_doctor:
            _run_doctor(path, pretrain or members[0], options)
        after = None
        if pretrain:
            first, submission = _submit(options, f"{name}_pretrain", pretrain.folder, [pretrain], False, pretrain=True)
            _print_summary(first, submission, pretrain.folder, [pretrain], False)
            after = first[-1]
        jobs, submission = _submit(options, name, place, members, bool(args.sweep), after)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    with contextlib.suppress(BrokenPipeError):
        _print_summary(jobs, submission, place, members, bool(args.sweep))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python slurm/submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="a YAML file such as recipes/resnet50_imagenet.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe: dotted keys, YAML values")
    parser.add_argument("--sweep", metavar="YAML", help="in place of a recipe: a file of recipes/sweeps/, an array of jobs")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script; nothing is written or submitted")
    parser.add_argument("--skip-doctor", action="store_true", help="submit without `python -m dnal_dist.doctor`'s checks")
    options_of.add_to(parser)
    # Options may stand between overrides.
    args = parser.parse_intermixed_args()
    if args.sweep and args.recipe:
        args.overrides.insert(0, args.recipe)
        args.recipe = None
    if not (args.recipe or args.sweep):
        parser.error("give a recipe, or --sweep")
    return args


def _runs(args: argparse.Namespace) -> tuple[str, str, Path, list[Member], Member | None]:
    """Path of the recipe, name of the job, the folder of its submissions, its runs, and the run whose pretrain these share, if they
    do. Raises InputError."""
    if args.sweep:
        grid, members, pretrain = sweep.load(args.sweep, args.overrides)
        return grid.recipe, Path(args.sweep).stem, Path(grid.output).absolute(), members, pretrain
    member = Member(recipe.load(args.recipe, args.overrides), args.overrides)
    return args.recipe, member.recipe.name, member.folder, [member], None


def _render(options: Options, name: str, place: Path, members: list[Member], array: bool, pretrain: bool = False) -> str:
    return script.render(options, name, [member.folder for member in members], place, ["python", *sys.argv], array, pretrain)


def _unfinished(members: list[Member]) -> list[Member]:
    """Raises InputError if all are finished."""
    done = [member.folder for member in members if _is_finished(member.folder)]
    if len(done) == len(members):
        raise InputError(f"{done[0]}: this run is finished; name another output=..., or remove the folder to train it again")
    for folder in done:
        print(f"{folder} is finished and left out")
    return [member for member in members if member.folder not in done]


def _is_finished(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return b'"kind": "end"' in read_regular(folder / "metrics.jsonl", MOST_RECORDS)
    return False


def _is_pretrained(pretrain: Member) -> bool:
    """Whether the pretrain is done. Raises InputError if it was another recipe's."""
    if not any((pretrain.folder / "checkpoints").glob("step-*-search")):
        return False
    before, now = (
        recipe.flat(one.model_dump(mode="json")) for one in (recipe.load(pretrain.folder / "recipe.yaml"), pretrain.recipe)
    )
    free = recipe.free_keys("resume")
    for key in before | now:
        of_it = key == "seed" or any(key.startswith(f"{part}.") for part in OF_PRETRAIN)
        if of_it and not recipe.is_free(key, free) and before.get(key) != now.get(key):
            raise InputError(
                f"{pretrain.folder}: its pretrain is over and was of {key} {before.get(key)}, not {now.get(key)}; "
                "name another output in the sweep, or remove that folder"
            )
    return True


def _check_folders(members: list[Member]) -> None:
    """Raise InputError if a run's folder cannot be written, or a job for it is in the queue."""
    for member in members:
        # The folder itself, or its nearest parent that exists.
        nearest = next(folder for folder in (member.folder, *member.folder.parents) if folder.exists())
        try:
            tempfile.TemporaryFile(dir=nearest).close()
        except OSError as error:
            raise InputError(
                f"key 'output': {member.folder} cannot be written ({error.strerror or error}); name a folder that all machines of "
                "the cluster share"
            ) from None
    # The tasks of an array one by one.
    queued = set(_slurm("squeue", "--noheader", "--me", "--array", "--format", "%i").split())
    for member in members:
        if waiting := [job for job in jobs_of(member.folder) if job in queued]:
            raise InputError(f"{member.folder}: job {waiting[-1]} for this run is in the queue; wait, or scancel {waiting[-1]}")


def _slurm(*command: str) -> str:
    """The output of one of SLURM's commands. Raises InputError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise InputError(f"{command[0]} is not here: run this where the cluster is, or print the script by --dry-run") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"{command[0]} did not answer within a minute; try again") from None
    if done.returncode:
        raise InputError(_refusal(command[0], done.stderr))
    return done.stdout.strip()


def _refusal(command: str, message: str) -> str:
    reason = " ".join(re.sub(rf"(?m)^{command}: (error: )?", "", message).split()) or "no reason given"
    remedy = ""
    if "partition" in reason.lower() and (names := output_of(["sinfo", "--noheader", "--format", "%R"], 60)):
        remedy = f"; --partition: there are {', '.join(sorted({*names.split()}))}"
    if "account" in reason.lower():
        remedy += "; --account: `sacctmgr show associations user=$USER format=account` shows yours, where the site keeps accounts"
    if re.search(r"gres|configuration is not available", reason):
        remedy += "; no node has that: --gpus-per-node, --cpus-per-node (1 + data.workers for each process), --mem"
    return f"{command}: {reason}{remedy}"


def _run_doctor(path: str, member: Member, options: Options) -> None:
    """Raise InputError if a check of the first run failed. The others of a sweep differ in their settings only."""
    given = {"nodes": options.nodes, "processes_per_node": options.processes, "config_file": script.config_file(options)}
    for option in ("time", "grace", "mixed_precision", "partition", "device_memory"):
        given[option] = getattr(options, option)
    command = [sys.executable, "-m", "dnal_dist.doctor", path, *member.overrides, *([] if options.gpus_per_node else ["--cpu"])]
    for option, value in given.items():
        if value:
            command += [f"--{option.replace('_', '-')}", str(value)]
    if subprocess.run(command).returncode:
        raise InputError("a check of the doctor failed (above); correct it, or submit by --skip-doctor")


def _submit(
    options: Options,
    name: str,
    place: Path,
    members: list[Member],
    array: bool,
    first: str | None = None,
    pretrain: bool = False,
) -> tuple[list[str], Path]:
    """The jobs, and the folder with what was submitted. If SLURM refuses, nothing is left. first: the job that must have succeeded
    before; pretrain: the run goes no further than that phase. Raises InputError."""
    kept = dict.fromkeys([place / "submit", *(member.folder / "submit" for member in members)])
    new = [folder for folder in kept if not folder.exists()]
    jobs: list[str] = []
    submission = None
    try:
        for folder in new:
            folder.mkdir(parents=True)
        taken = [int(old.name) for old in (place / "submit").iterdir() if old.name.isdecimal()]
        submission = place / "submit" / f"{max(taken, default=0) + 1:03d}"
        submission.mkdir()
        (submission / "train.sbatch").write_text(_render(options, name, submission, members, array, pretrain), encoding="utf-8")
        for number, member in enumerate(members):
            (submission / f"{number}.yaml").write_text(recipe.dump(member.recipe), encoding="utf-8")
        _snapshot_code(submission)
        for _ in range(options.chain):
            # Of a pretrain that failed nothing would ever begin.
            before = [*([f"afterok:{first}"] if first else []), *([f"afterany:{jobs[-1]}"] if jobs else [])]
            after = [f"--dependency={','.join(before)}"] if before else []
            after += ["--kill-on-invalid-dep=yes"] if first else []
            jobs.append(_slurm("sbatch", "--parsable", *after, str(submission / "train.sbatch")).partition(";")[0])
            _record(jobs[-1], submission, members, array)
    except (OSError, ValueError) as error:
        if jobs:
            raise InputError(f"{error}; of the chain {', '.join(jobs)} are submitted") from None
        if submission is not None:
            shutil.rmtree(submission, ignore_errors=True)
        for folder in (*new, *(folder.parent for folder in new), place):
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty
        raise InputError(str(error)) from None
    return jobs, submission


def _record(job: str, submission: Path, members: list[Member], array: bool) -> None:
    """Append the job to each run's jobs.jsonl, which `python -m dnal_dist.runs` reads."""
    for number, member in enumerate(members):
        line = {"job": f"{job}_{number}" if array else job, "time": round(time.time(), 3), "submission": str(submission)}
        with (member.folder / "submit" / "jobs.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")


def _snapshot_code(submission: Path) -> None:
    """code.txt: commit and installed packages; code.patch: changes of the checkout since its commit."""

    def git(*words: str) -> str:
        return output_of(["git", "-C", str(ROOT), *words], 60) or ""

    changed = git("status", "--porcelain")
    packages = sorted({f"{found.name}=={found.version}" for found in distributions() if found.name})
    head = [f"commit: {git('rev-parse', 'HEAD') or 'unknown'}{' with changes, see code.patch' if changed else ''}"]
    (submission / "code.txt").write_text("\n".join([*head, f"python: {sys.version.split()[0]}", *packages, ""]), encoding="utf-8")
    if changed:
        (submission / "code.patch").write_text(f"{changed}\n\n{git('diff', 'HEAD')}\n", encoding="utf-8")


def _print_summary(jobs: list[str], submission: Path, place: Path, members: list[Member], array: bool) -> None:
    log, quoted = submission / ("log-*.txt" if array else "log.txt"), shlex.quote(str(place))
    many = f"{len(members)} runs, " if array else ""
    print(f"submitted: {many}job{'s' if len(jobs) > 1 else ''} {', '.join(jobs)}")
    print(f"script, recipe and code: {submission}")
    print("watch:")
    print(f"    squeue --jobs {','.join(jobs)}")
    print(f"    tail -F {shlex.quote(str(log)) if not array else log}")
    print(f"    python -m dnal_dist.runs {quoted if array else shlex.quote(str(place.parent))}")
    if not array:
        print(f"save and stop: touch {shlex.quote(str(place / 'stop'))}")
    print(f"cancel: scancel {' '.join(jobs)}", flush=True)


if __name__ == "__main__":
    main()
