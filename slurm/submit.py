"""Train on a SLURM cluster: write the batch script of a run, or of a sweep of runs, and submit it.

python slurm/submit.py recipes/proxyless.yaml --nodes 2 --gpus-per-node 8 --time 12:00:00 --account vision
python slurm/submit.py recipes/proxyless.yaml --nodes 2 --gpus-per-node 8 --time 12:00:00 architecture.penalty_weight=5e-5 --dry-run
python slurm/submit.py --sweep recipes/sweeps/resnet50_lambda.yaml --gpus-per-node 8 --time 12:00:00 --max-parallel 2

The job saves and queues itself again when it is preempted or its time is over, until the run is done. What your site always wants
goes into a file, ~/.config/dnal_dist/slurm.yaml, by the same names: partition: gpu, setup: [module load cuda]. See docs/slurm.md.
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
from sweep import Member

from dnal_dist import recipe
from dnal_dist.common.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    args = _arguments()
    try:
        options = options_of.read(args)
        name, place, members = _asked(args)
        if options.cpus_per_node is None and options.gpus_per_node:
            options.cpus_per_node = options.processes * (1 + max(m.recipe.data.workers for m in members))
        if args.dry_run:
            print(_render(options, name, place / "submit" / "001", members, args.sweep), end="")
            return
        members = _unfinished(members)
        _check_folders(members)
        if not args.skip_doctor:
            _ask_doctor(args.recipe or _recipe_of(args.sweep), members[0], options)
        jobs, submission = _submit(options, name, place, members, bool(args.sweep))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    with contextlib.suppress(BrokenPipeError):
        _tell(jobs, submission, place, members, bool(args.sweep))


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


def _asked(args: argparse.Namespace) -> tuple[str, Path, list[Member]]:
    """Name of the job, the folder that its submissions are kept in, and its runs."""
    if args.sweep:
        asked, members = sweep.load(args.sweep, args.overrides)
        return Path(args.sweep).stem, Path(asked.output).absolute(), members
    settings = recipe.load(args.recipe, args.overrides)
    member = Member(settings, args.overrides)
    return settings.name, member.folder, [member]


def _recipe_of(path: str) -> str:
    return sweep.load(path, [])[0].recipe


def _render(options: Options, name: str, place: Path, members: list[Member], array: bool) -> str:
    command = ["python", *sys.argv]
    return script.render(options, name, [member.folder for member in members], place, command, bool(array))


def _unfinished(members: list[Member]) -> list[Member]:
    """Those that are not trained yet. Raises InputError if all are."""
    done = [member.folder for member in members if _is_finished(member.folder)]
    if len(done) == len(members):
        raise InputError(f"{done[0]}: this run is finished; name another output=..., or remove the folder to train it anew")
    for folder in done:
        print(f"{folder} is finished and left out")
    return [member for member in members if member.folder not in done]


def _is_finished(folder: Path) -> bool:
    with contextlib.suppress(OSError), (folder / "metrics.jsonl").open("rb") as lines:
        return any(b'"kind": "end"' in line for line in lines)
    return False


def _check_folders(members: list[Member]) -> None:
    """Raise InputError if a run's folder cannot be written, or a job of it is in the queue."""
    for member in members:
        # The folder itself, or what it would be made in.
        nearest = next(folder for folder in (member.folder, *member.folder.parents) if folder.exists())
        try:
            tempfile.TemporaryFile(dir=nearest).close()
        except OSError as error:
            raise InputError(
                f"key 'output': {member.folder} cannot be written ({error.strerror or error}); name a folder that all machines of "
                "the cluster share"
            ) from None
    mine = _queued()
    for member in members:
        if waiting := [job for job in _jobs(member.folder) if job in mine]:
            raise InputError(f"{member.folder}: job {waiting[-1]} for this run is in the queue; wait, or scancel {waiting[-1]}")


def _jobs(folder: Path) -> list[str]:
    found = []
    with contextlib.suppress(OSError), (folder / "submit" / "jobs.jsonl").open() as lines:
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                found.append(str(json.loads(line)["job"]))
    return found


def _queued() -> set[str]:
    """The jobs that wait or run; an array's one by one."""
    return set(_slurm("squeue", "--noheader", "--me", "--array", "--format", "%i").split())


def _slurm(*command: str) -> str:
    """What a command of SLURM's prints. Raises InputError."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise InputError(f"{command[0]} is not here: run this where the cluster is, or look at the script by --dry-run") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"{command[0]} did not answer within a minute; try again") from None
    if found.returncode:
        raise InputError(_refusal(command[0], found.stderr))
    return found.stdout.strip()


def _refusal(command: str, told: str) -> str:
    why = " ".join(re.sub(rf"(?m)^{command}: (error: )?", "", told).split()) or "no reason given"
    remedy = ""
    if "partition" in why.lower():
        names = subprocess.run(["sinfo", "--noheader", "--format", "%R"], capture_output=True, text=True, timeout=60).stdout
        remedy = f"; --partition: there are {', '.join(sorted({*names.split()}))}" if names else ""
    if "account" in why.lower():
        remedy += "; --account: `sacctmgr show associations user=$USER format=account` shows yours, where the site keeps accounts"
    if re.search(r"gres|configuration is not available", why):
        remedy += "; no node has what was asked for: --gpus-per-node, --cpus-per-node (1 + data.workers for each process), --mem"
    return f"{command}: {why}{remedy}"


def _ask_doctor(path: str, member: Member, options: Options) -> None:
    """Raise InputError if a check of the first run failed. Those of a sweep differ in their settings only."""
    command = [sys.executable, "-m", "dnal_dist.doctor", path, *member.overrides, "--nodes", str(options.nodes)]
    command += [
        "--processes-per-node",
        str(options.processes),
        "--config-file",
        str(script.config_file(options)),
        "--time",
        options.time,
    ]
    for option in ("mixed_precision", "partition", "account", "device_memory"):
        if value := getattr(options, option):
            command += [f"--{option.replace('_', '-')}", value]
    command += ["--grace", str(options.grace), *([] if options.gpus_per_node else ["--cpu"])]
    if subprocess.run(command).returncode:
        raise InputError("the doctor has found a fault (above); mend it, or submit by --skip-doctor")


def _submit(options: Options, name: str, place: Path, members: list[Member], array: bool) -> tuple[list[str], Path]:
    """The jobs, and the folder with what was submitted. If SLURM refuses, nothing is left. Raises InputError."""
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
        (submission / "train.sbatch").write_text(_render(options, name, submission, members, array), encoding="utf-8")
        for number, member in enumerate(members):
            (submission / f"{number}.yaml").write_text(recipe.dump(member.recipe), encoding="utf-8")
        _snapshot_code(submission)
        for _ in range(options.chain):
            after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
            jobs.append(_slurm("sbatch", "--parsable", *after, str(submission / "train.sbatch")).partition(";")[0])
            _note(jobs[-1], submission, members, array)
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


def _note(job: str, submission: Path, members: list[Member], array: bool) -> None:
    """In each run's jobs.jsonl, which `python -m dnal_dist.runs` reads."""
    for number, member in enumerate(members):
        line = {"job": f"{job}_{number}" if array else job, "time": round(time.time(), 3), "submission": str(submission)}
        with (member.folder / "submit" / "jobs.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")


def _snapshot_code(submission: Path) -> None:
    """code.txt: commit and installed packages; code.patch: what the checkout has beyond its commit."""

    def git(*words: str) -> str:
        try:
            found = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, errors="replace", timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return found.stdout if found.returncode == 0 else ""

    changed = git("status", "--porcelain")
    packages = sorted({f"{found.name}=={found.version}" for found in distributions() if found.name})
    head = [f"commit: {git('rev-parse', 'HEAD').strip() or 'unknown'}{' with changes, see code.patch' if changed else ''}"]
    (submission / "code.txt").write_text("\n".join([*head, f"python: {sys.version.split()[0]}", *packages, ""]), encoding="utf-8")
    if changed:
        (submission / "code.patch").write_text(changed + "\n" + git("diff", "HEAD"), encoding="utf-8")


def _tell(jobs: list[str], submission: Path, place: Path, members: list[Member], array: bool) -> None:
    log, quoted = submission / ("log-*.txt" if array else "log.txt"), shlex.quote(str(place))
    many = f"{len(members)} runs, " if array else ""
    print(f"submitted: {many}job{'s' if len(jobs) > 1 else ''} {', '.join(jobs)}")
    print(f"script, recipe and code: {submission}")
    print("watch:")
    print(f"    squeue --jobs {','.join(jobs)}")
    print(f"    tail -F {shlex.quote(str(log)) if not array else log}")
    print(f"    python -m dnal_dist.runs {quoted if array else shlex.quote(str(place.parent))}")
    if not array:
        print(f"stop, and keep what is there: touch {shlex.quote(str(place / 'stop'))}")
    print(f"cancel: scancel {' '.join(jobs)}", flush=True)


if __name__ == "__main__":
    main()
