"""slurm/submit.py without a cluster: the script, refusals, sweeps, the site's file."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from dnal_dist import recipe
from dnal_dist.common import errors

ROOT = Path(__file__).parent.parent.parent
DIGITS = "recipes/digits.yaml"
JOB = ("--nodes", "2", "--gpus-per-node", "8", "--time", "12:00:00")


@pytest.fixture
def submit(tmp_path, monkeypatch, capsys):
    """The command in this process, in a home of its own and without SLURM on the path."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", "/usr/bin/nothing")
    monkeypatch.syspath_prepend(ROOT / "slurm")
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        command = ["slurm/submit.py", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        code = 0
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        return subprocess.CompletedProcess(command, code, *capsys.readouterr())

    return run


def script(found) -> str:
    assert found.returncode == 0, found.stderr
    return found.stdout


def directives(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def launch(text: str) -> list[str]:
    """The arguments of srun."""
    start = text.index("srun --export=ALL")
    return shlex.split(text[start : text.index(" &\n", start)].replace("\\\n", " "))


def is_bash(text: str) -> None:
    assert subprocess.run(["/bin/bash", "-n"], input=text, text=True).returncode == 0


def test_a_dry_run_prints_the_script_and_writes_nothing(submit, tmp_path):
    text = script(submit(DIGITS, *JOB, f"output={tmp_path}/run", "data.workers=3", "--account", "vision", "--dry-run"))
    is_bash(text)
    assert not (tmp_path / "run").exists()
    found = directives(text)
    assert (found["nodes"], found["ntasks-per-node"], found["gpus-per-node"], found["time"]) == ("2", "1", "8", "12:00:00")
    assert found["account"] == "vision" and "partition" not in found
    assert found["signal"] == "B:USR1@300" and found["open-mode"] == "append" and "requeue" in found
    assert found["cpus-per-task"] == "32", "a core for each of 8 processes and their 3 loaders"
    words = launch(text)
    assert "--cpus-per-task=32" in words, "srun does not take it over from sbatch"
    pairs = dict(pairwise(words))
    assert (pairs["--num_machines"], pairs["--num_processes"]) == ("2", "16")
    assert pairs["--main_process_ip"] == "$head" and pairs["-m"] == "dnal_dist.train"
    assert '--machine_rank "$SLURM_NODEID"' in pairs["-c"]


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_every_accelerate_config_is_launched(submit, tmp_path, backend):
    config = f"recipes/accelerate/{backend}.yaml"
    words = launch(script(submit(DIGITS, *JOB, f"output={tmp_path}/run", "--config-file", config, "--dry-run")))
    assert str(ROOT / config) in words
    assert ("--deepspeed_multinode_launcher" in words) == backend.startswith("zero")


def test_names_with_blanks_and_quotes_reach_bash_unchanged(submit, tmp_path):
    folder = tmp_path / "it's 100% `x` ; & (x) \\x"
    text = script(submit(DIGITS, *JOB, f"output={folder}", "--dry-run"))
    is_bash(text)
    (line,) = [line for line in text.splitlines() if line.startswith("run=")]
    output = subprocess.run(["/bin/bash", "-c", f'{line}; printf %s "$run"'], capture_output=True, text=True).stdout
    assert output == str(folder)
    assert "100%% " in directives(text)["output"], "a percent sign is a pattern of SLURM's"


def test_the_command_line_overrides_the_site_s_file(submit, tmp_path):
    site = tmp_path / "home" / ".config" / "dnal_dist" / "slurm.yaml"
    site.parent.mkdir(parents=True)
    settings = {"partition": "gpu", "account": "vision", "time": "1-00:00:00", "gpus_per_node": 4}
    site.write_text(yaml.safe_dump(settings | {"setup": ["module load cuda"], "sbatch": ["--qos=low"], "requeue": False}))
    text = script(submit(DIGITS, f"output={tmp_path}/run", "--account", "mine", "--setup", "ulimit -n 4096", "--dry-run"))
    found = directives(text)
    assert (found["partition"], found["account"], found["time"], found["qos"]) == ("gpu", "mine", "1-00:00:00", "low")
    assert "no-requeue" in found
    assert text.index("module load cuda\nulimit -n 4096\n") < text.index("srun ")
    other = tmp_path / "other.yaml"
    other.write_text("time: 12:00:00\ngpus_per_node: 1\n")
    found = directives(script(submit(DIGITS, f"output={tmp_path}/run", "--site", other, "--dry-run")))
    assert found["time"] == "12:00:00" and "partition" not in found, "YAML reads 43 200 there"


def test_containers_are_started_by_pyxis_or_apptainer(submit, tmp_path):
    run = (DIGITS, *JOB, f"output={tmp_path}/run", "--dry-run", "--container-mounts", "/data:/data", "--container")
    words = launch(script(submit(*run, "registry/image:1")))
    assert "--container-image=registry/image:1" in words and f"--container-mounts={ROOT}:{ROOT},/data:/data" in words
    text = script(submit(*run, "my image.sif"))
    is_bash(text)
    inner = launch(text)[launch(text).index("-c") + 1]
    assert shlex.split(inner)[:5] == ["exec", "apptainer", "exec", "--nv", "--bind"] and "my image.sif" in shlex.split(inner)


def test_a_sweep_is_one_job_for_each_combination(submit, tmp_path):
    sweep = tmp_path / "grid.yaml"
    sweep.write_text(
        f"recipe: {DIGITS}\noutput: {tmp_path}/grid\nset: {{data.workers: 0}}\n"
        "vary: {architecture.target.macs: [0.5x, 0.25x], seed: [0, 1, 2]}\n"
    )
    text = script(submit("--sweep", sweep, *JOB, "--max-parallel", "2", "tracking.tracker=none", "--dry-run"))
    is_bash(text)
    assert directives(text)["array"] == "0-5%2" and directives(text)["output"].endswith("log-%a.txt")
    runs = re.search(r"runs=\(\n(.*?)\n\)", text, re.DOTALL)[1].split()
    assert runs[0] == f"{tmp_path}/grid/macs=0.5x,seed=0" and runs[5] == f"{tmp_path}/grid/macs=0.25x,seed=2" and len(runs) == 6


def test_shipped_sweeps_are_valid(submit):
    for path in sorted((ROOT / "recipes" / "sweeps").glob("*.yaml")):
        is_bash(script(submit("--sweep", path.relative_to(ROOT), *JOB, "--dry-run")))


def test_the_sweep_of_resnet50_is_the_paper_s(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "slurm")
    import sweep

    _, members, pretrain = sweep.load(str(ROOT / "recipes/sweeps/resnet50_lambda.yaml"), [])
    published = yaml.safe_load((ROOT / "dnal_dist" / "report" / "published.yaml").read_text())["tables"]["resnet50_imagenet"][
        "rows"
    ]
    weights = sorted(float(row["penalty_weight"]) for row in published if "penalty_weight" in row)
    assert sorted(member.recipe.architecture.penalty_weight for member in members) == weights
    assert len({member.folder for member in members}) == 4
    # One pretrain, of the paper's length, where all of them begin.
    assert pretrain.recipe.phases.pretrain.epochs == 30 and pretrain.recipe.model.init_from is None
    assert {(m.recipe.model.init_from, m.recipe.phases.pretrain.epochs) for m in members} == {(str(pretrain.folder), 0)}


def test_a_shared_pretrain_is_a_job_of_its_own(submit, tmp_path):
    sweep = tmp_path / "grid.yaml"
    text = f"recipe: {DIGITS}\noutput: {tmp_path}/grid\nshare: pretrain\n"
    sweep.write_text(text + "vary: {architecture.penalty_weight: [0.01, 0.02]}\n")
    printed = script(submit("--sweep", sweep, *JOB, "--dry-run"))
    first, array = re.split(r"(?m)^(?=#!/bin/bash)", printed)[1:]
    is_bash(first)
    is_bash(array)
    assert "--until pretrain" in first and f"run={tmp_path}/grid/pretrain\n" in first and "array" not in directives(first)
    assert "--until" not in array and directives(array)["array"] == "0-1" and "'-search$'" in first
    sweep.write_text(text + "vary: {phases.pretrain.epochs: [1, 2]}\n")
    found = submit("--sweep", sweep, *JOB, "--dry-run")
    assert found.returncode == 2 and "key 'vary.phases.pretrain.epochs': runs that differ in it have no pretrain" in found.stderr


def test_a_shared_pretrain_of_another_recipe_is_not_taken(submit, tmp_path):
    sweep, done = tmp_path / "grid.yaml", tmp_path / "grid" / "pretrain"
    text = f"recipe: {DIGITS}\noutput: {tmp_path}/grid\nshare: pretrain\nvary: {{architecture.penalty_weight: [0.01, 0.02]}}\n"
    sweep.write_text(text)
    (done / "checkpoints" / "step-00000020-search").mkdir(parents=True)
    (done / "recipe.yaml").write_text(recipe.dump(recipe.load(DIGITS, ["phases.pretrain.optimizer.lr=0.5", f"output={done}"])))
    found = submit("--sweep", sweep, *JOB)
    assert found.returncode == 2 and "its pretrain is over and was of phases.pretrain.optimizer.lr 0.5, not" in found.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((DIGITS, "--time", "12:00:00"), ["--gpus-per-node"]),
        ((DIGITS, "--gpus-per-node", "8"), ["--time"]),
        ((DIGITS, *JOB[:4], "--time", "12h"), ["--time", "[DAYS-]HH:MM:SS", "12h"]),
        ((DIGITS, *JOB[:4], "--time", "00:08:00"), ["--grace", "lower it"]),
        ((DIGITS, *JOB, "--nodes", "none"), ["--nodes", "integer"]),
        ((DIGITS, *JOB, "--config-file", "nowhere.yaml"), ["--config-file nowhere.yaml", "recipes/accelerate/"]),
        ((DIGITS, *JOB, "--config-file", DIGITS), ["--config-file", "not an Accelerate config"]),
        ((DIGITS, *JOB, "data.worker=3"), [DIGITS, "data.worker", "did you mean"]),
        ((DIGITS, *JOB, "--setup", "a\nb"), ["--setup", "one line"]),
        (("nowhere.yaml", *JOB), ["nowhere.yaml", "no such recipe"]),
        (("--sweep", "nowhere.yaml", *JOB), ["nowhere.yaml", "recipes/sweeps/"]),
        (("--sweep", DIGITS, *JOB), [DIGITS, "recipe, output, vary, set, share"]),
        ((DIGITS, *JOB, "--site", "nowhere.yaml"), ["nowhere.yaml", "cannot be read"]),
    ],
)
def test_errors_are_one_line_with_the_remedy(submit, arguments, words):
    found = submit(*arguments, "--dry-run")
    assert found.returncode == 2 and found.stderr.startswith("error: ") and found.stderr.count("\n") == 1, found.stderr
    assert all(word in found.stderr for word in words), found.stderr


@pytest.mark.parametrize(
    "text, words",
    [
        ("vary: {seed: [0, 0]}", ["vary.seed", "different"]),
        ("vary: {seed: []}", ["vary.seed"]),
        ("vary: {}", ["vary"]),
        ("vary: {output: [a, b]}", ["output"]),
        ("vary: {seeds: [0]}", ["seeds"]),
        ("vary: {seed: 0}", ["vary.seed"]),
        ("", ["vary"]),
    ],
)
def test_an_invalid_sweep_is_refused(submit, tmp_path, text, words):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"recipe: {DIGITS}\noutput: {tmp_path}/sweep\n{text}\n")
    found = submit("--sweep", path, *JOB, "--dry-run")
    assert found.returncode == 2 and found.stderr.count("\n") == 1, found.stderr
    assert all(word in found.stderr for word in words), found.stderr


def test_an_unknown_key_of_the_site_s_file_is_refused(submit, tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("partitions: gpu\n")
    found = submit(DIGITS, *JOB, "--site", site, "--dry-run")
    assert found.returncode == 2 and f"{site}: unknown key 'partitions'" in found.stderr


def test_without_slurm_it_is_refused_and_nothing_is_written(submit, tmp_path):
    found = submit(DIGITS, *JOB, f"output={tmp_path}/run", "--skip-doctor")
    assert found.returncode == 2 and "squeue is not here" in found.stderr and "--dry-run" in found.stderr
    assert not (tmp_path / "run").exists()


def test_help_names_the_options_and_the_site_s_file():
    """In a process of its own, as users run the command."""
    found = script(subprocess.run([sys.executable, "slurm/submit.py", "--help"], capture_output=True, text=True, cwd=ROOT))
    assert "--chain" in found and "docs/slurm.md" in found and "~/.config/dnal_dist/slurm.yaml" in found
    assert errors.InputError.__name__ not in found


@pytest.mark.parametrize(
    "key, breaking",
    [("name", "\r"), ("name", "\u2028"), ("name", "\0"), ("output", "\n"), ("data.cache", "\n"), ("data.image", "\n")]
    + [(key, "\n") for key in ("name", "data.train", "tracking.project", "model.init_from", "model.name")],
    ids=ascii,
)
def test_no_value_of_a_recipe_is_a_line_of_the_script(submit, tmp_path, key, breaking):
    value = f"nice{breaking}touch PWNED{breaking}# "
    tree = yaml.safe_load(Path(DIGITS).read_text())
    inner = tree
    for part in key.split(".")[:-1]:
        inner = inner.setdefault(part, {})
    inner[key.split(".")[-1]] = value
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    for words in ((tmp_path / "recipe.yaml",), (DIGITS, f"{key}={yaml.safe_dump(value)}")):
        found = submit(*words, *JOB, "--dry-run")
        assert not re.search(r"(?m)^touch", found.stdout)
        if key != "data.train":
            assert found.returncode == 2 and found.stderr.count("\n") == 1, found.stderr
            assert f"key '{key}'" in found.stderr or "recipe.yaml" in found.stderr or "override" in found.stderr


@pytest.mark.parametrize("key", ["data.train", "data.cache", "data.image", "model.name", "model.init_from", "model.arguments"])
def test_no_secret_of_a_recipe_reaches_a_script(submit, tmp_path, key):
    value = f"https://AKIA{tmp_path.name}:hunter2@bucket/x.tar"
    value = {"url": [value]} if key == "model.arguments" else value
    found = submit(DIGITS, *JOB, f"output={tmp_path}/run", f"{key}={json.dumps(value)}", "--skip-doctor")
    assert found.returncode == 2 and found.stderr.count("\n") == 1 and f"key '{key}" in found.stderr
    assert "hunter2" not in found.stdout + found.stderr and not (tmp_path / "run").exists()


def test_no_name_outside_of_the_recipe_is_a_line_of_the_script(submit, tmp_path):
    sweep = tmp_path / "a\ntouch PWNED\n.yaml"
    sweep.write_text(yaml.safe_dump({"recipe": DIGITS, "output": str(tmp_path), "vary": {"seed": ["0", "1"]}}))
    found = submit("--sweep", sweep, *JOB, "--dry-run")
    assert found.returncode == 2 and found.stdout == "" and "the job's name" in found.stderr
    is_bash(script(submit(DIGITS, *JOB, "--dry-run", "name=$(touch PWNED) `x` ' \" \\ %j ;&|")))


def test_a_sweep_of_too_many_runs_is_refused_at_once(submit, tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"recipe": DIGITS, "output": "runs/x", "vary": {"seed": list(range(200_001))}}))
    found = submit("--sweep", path, *JOB, "--dry-run")
    assert found.returncode == 2 and "expected at most" in found.stderr and found.stderr.count("\n") == 1
    path.write_text(
        yaml.safe_dump({"recipe": DIGITS, "output": "x", "vary": {k: list(range(40)) for k in ("seed", "data.workers")}})
    )
    found = submit("--sweep", path, *JOB, "--dry-run")
    assert found.returncode == 2 and "key 'vary': 1,600 runs, expected at most 1,000" in found.stderr
