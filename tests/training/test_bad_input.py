"""What is wrong with what a run was given is one line that names the file or key, with exit code 2 and no traceback."""

import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import forks
import pytest
from faulty import FEW, records, refused, samples, write_tar

ROOT = Path(__file__).parents[2]

# --- the recipe and its overrides


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"r\.yaml: expected keys such as 'name: \.\.\.'"),
        ("- a\n", r"r\.yaml: expected keys .* found list"),
        ("just words\n", r"r\.yaml: expected keys .* found str"),
        ("name: [", r"r\.yaml: not valid YAML: .*line 1"),
        ("name: a\n  seed: 1\n", r"r\.yaml: not valid YAML: .*line 2"),
        ("name: a\nname: b\n", r"r\.yaml: not valid YAML: key 'name' is given twice"),
        ("name: !!python/object/apply:os.mkdir [executed]\n", r"r\.yaml: not valid YAML: "),
        ("name: \0\n", r"r\.yaml: not valid YAML: "),
        ("name: a\n", r"r\.yaml: key 'model' is missing; add it; key 'data\.image_size' is missing; add it; "),
    ],
)
def test_a_file_without_a_recipe_is_refused(train, folder, text, message):
    (folder / "r.yaml").write_text(text)
    refused(train(recipe=folder / "r.yaml"), message)
    assert not Path("executed").exists() and not (folder / "run").exists()


@pytest.mark.parametrize(
    "name, message",
    [
        ("no.yaml", "no such recipe; give a file, or the name of a packaged one: digits, "),
        ("", "not a regular file; put the file itself there"),
        ("b.yaml", r"cannot be read \("),
    ],
)
def test_an_unreadable_recipe_is_refused(train, folder, name, message):
    (folder / "b.yaml").write_bytes(b"\xff\xfe\x00name")
    refused(train(recipe=folder / name), rf"{re.escape(str(folder / name))}: {message}")


@pytest.mark.parametrize(
    "changes, message",
    [
        (["data.globl_batch=3"], r"digits\.yaml: unknown key 'data\.globl_batch' \(did you mean 'global_batch'\?\)"),
        (["nam=3"], r"unknown key 'nam' \(did you mean 'name'\?\); remove or rename it"),
        (["data.global_batch=eight"], r"key 'data\.global_batch': input should be a valid integer, found 'eight'"),
        (["phases.pretrain.epochs=-1"], r"key 'phases\.pretrain\.epochs': input should be greater than or equal to 0, found -1"),
        (["seed="], r"key 'seed': input should be a valid integer, found None"),
        (["seed"], r"override 'seed': expected key=value"),
        (["=3"], r"override '=3': expected key=value"),
        (["seed=["], r"override 'seed=\[': not a YAML value"),
        (["seed.x=1"], r"override 'seed\.x=1': 'seed' is a value, it has no keys"),
        (["model=vgg_digits"], r"key 'model': "),
        (["model.name=vgg_digit"], r"key 'model\.name': no network is called 'vgg_digit'; there are .*vgg_digits"),
        (["seed=-1", "nam=2", "data.workers=x"], r".*'seed'.*'data\.workers'.*'nam'"),
        (["data.image_size=7"], r"key 'data\.image_size': the network cannot take images of 7x7 pixels"),
        (["model.name=vgg16_cifar", "data.image_size=32", "data.global_batch=1"], r"key 'data\.global_batch': 1 .*BatchNorm"),
        (["data.global_batch=17"], r"key 'data\.global_batch': a step takes 17 images, but 'data\.train' holds 16; lower it"),
        (["data.train=nowhere/x-*.tar"], r"key 'data\.train': no shard matches 'nowhere/x-\*\.tar'; make shards with"),
        (["data.val=nowhere/x-{0..3}.tar"], r"key 'data\.val': no shard matches 'nowhere/x-0\.tar'"),
        (["data.train=''"], r"key 'data\.train': expected the path of shards"),
        (["data.train='x-{0..3.tar'"], r"key 'data\.train': 'x-\{0\.\.3\.tar' is not a pattern"),
        (["data.train=x-${NOWHERE}.tar"], r"key 'data\.train': the variable NOWHERE in 'x-"),
        (["data.train=ftp://example.org/x.tar"], r"key 'data\.train': shards are read from local paths, .*, not from 'ftp'"),
        (["data.train=https://me:secret@example.org/x.tar"], r"key 'data\.train': an address with a user or password in it"),
        (["data.train=/"], r"/: not a file; correct key 'data\.train'"),
    ],
)
def test_a_wrong_key_is_refused(train, folder, changes, message):
    refused(train(*changes), message)
    assert not (folder / "run").exists()


def test_a_pipe_is_refused_and_not_run(train, folder):
    command = f">{folder}/executed"
    refused(train(f"data.train='pipe:{command}'"), r"key 'data\.train': shards are read from local paths, .*, not from this kind")
    refused(
        train(f"data.train='{folder}/train-0.tar pipe:{command}'"),
        r"key 'data\.train': shards are read from local paths, .*, not from this kind",
    )
    refused(train(f"data.train='{folder}/train-0.tar::pipe:{command}'"), r"key 'data\.train': ")
    assert not (folder / "executed").exists()


def test_a_missing_one_of_several_named_shards_is_refused(train, folder):
    refused(train(f"data.train={folder}/train-{{0..1}}.tar"), r"key 'data\.train': no shard matches '.*/train-1\.tar'")


# --- the run folder


@pytest.fixture
def old(folder):
    """What looks like another run in the run folder, and files that are not the run's."""
    run = folder / "run"
    for name in ("checkpoints/step-00000099", "compact", "plots", "wandb", "notes"):
        (run / name).mkdir(parents=True)
    for name in (
        "recipe.yaml",
        "metrics.jsonl",
        "report.html",
        "report.md",
        "plots/old.svg",
        "checkpoints/step-00000099/state.json",
        "compact/weights.safetensors",
    ):
        (run / name).write_text("old")
    (run / "notes" / "mine.txt").write_text("mine")
    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_that_holds_another_run_is_refused_and_left_as_it_is(train, old):
    before = content(old)
    message = rf"key 'output': {old}/checkpoints/step-00000099: checkpoint is damaged \(.*\); none is left, so name another output="
    refused(train(), message)
    assert content(old) == before | {".lock": b""}


def test_overwrite_replaces_what_the_run_wrote_and_nothing_else(train, old):
    assert train("--overwrite", report=True).code == 0
    after = content(old)
    assert after.pop("notes/mine.txt") == b"mine"
    assert b"old" not in after.values() and "checkpoints/step-00000099/state.json" not in after
    assert {"recipe.yaml", "metrics.jsonl", "report.html", "compact/weights.safetensors"} <= after.keys()


def test_overwrite_follows_no_link(train, old, folder):
    shutil.rmtree(old / "compact")
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "weights.safetensors").write_text("mine")
    (old / "compact").symlink_to(folder / "elsewhere")
    assert train("--overwrite").code == 0
    assert (folder / "elsewhere" / "weights.safetensors").read_text() == "mine"
    assert not (old / "compact").is_symlink()


@pytest.mark.parametrize("option", [(), ("--overwrite",), ("--resume",)], ids=["plain", "overwrite", "resume"])
def test_a_folder_that_may_be_no_runs_is_left_alone(train, folder, option):
    """Somebody's checkpoints, but no metrics.jsonl."""
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "checkpoints" / "theirs.pt").write_text("theirs")
    refused(train(*option), r"key 'output': .*/run holds checkpoints, but no metrics\.jsonl")
    assert content(folder / "run") == {"checkpoints/theirs.pt": b"theirs"}


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl"])
def test_a_pipe_in_place_of_a_run_s_file_is_refused(train, folder, name):
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").touch()
    (folder / "run" / name).unlink(missing_ok=True)
    os.mkfifo(folder / "run" / name)
    refused(train(), rf"key 'output': .*/{name} is not a regular file; name another folder, or remove it")


def test_a_folder_with_other_files_is_no_obstacle(train, folder):
    (folder / "run").mkdir()
    (folder / "run" / "notes.txt").write_text("mine")
    assert train().code == 0
    assert (folder / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "output, why",
    [
        ("{}/file", "File exists"),
        ("{}/file/below", "Not a directory"),
        ("{}/" + "x" * 300, "File name too long"),
    ],
    ids=["a file", "below a file", "a long name"],
)
def test_a_folder_that_cannot_be_written(train, folder, output, why):
    (folder / "file").write_text("mine")
    output = output.format(folder)
    for option in ((), ("--overwrite",), ("--resume",)):
        refused(train(f"output={output}", *option), rf"key 'output': .* cannot be written \({why}\); name another folder")
    assert (folder / "file").read_text() == "mine"


def test_a_folder_without_permission_is_refused(train, folder):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (folder / "run").mkdir(mode=0o500)
    refused(train(), r"key 'output': .*/run cannot be written \(Permission denied\); name another folder")


def test_a_full_disk_is_refused(train, folder):
    """Stood in for by a limit on the size of files, which the tensors of checkpoints with momentum exceed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        ended = train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.code == 0 and "checkpoint cannot be written (File too large); the last good one" in ended.out, ended


def test_resume_and_overwrite_exclude_each_other(train):
    ended = train("--resume", "--overwrite")
    assert ended.code == 2 and "not allowed with" in ended.err


# --- the real command, and several processes


def test_the_command_ends_with_code_2_and_one_line(train_command):
    ended = train_command("recipes/none.yaml")
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.startswith("error: recipes/none.yaml: no such recipe; give a file, or the name of a packaged one: digits, ")
    assert ended.stderr.count("\n") == 1


def assert_reported_once(ended, message: str) -> None:
    """Under the launcher, whose own code is 1 and whose own traceback ends with a page about the process that failed."""
    assert ended.returncode != 0
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert errors and len(set(errors)) == 1 and re.match(f"error: {message}", errors[0]), ended.stderr
    assert "/train.py" not in ended.stderr and "RuntimeError" not in ended.stderr, ended.stderr
    # The page gives the code of each process, and the reason.
    assert re.search(r"exitcode +: 2 ", ended.stderr) and f"traceback : {errors[0]}" in ended.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        (
            ["data.global_batch=7"],
            r"key 'data\.global_batch': 7 images cannot be divided evenly among 2 processes; .* is 8",
        ),
        (["output=recipes/digits.yaml/run"], r"key 'output': .* cannot be written \(Not a directory\)"),
    ],
    ids=["batch", "folder"],
)
def test_two_processes_refuse_as_one(train_command, folder, change, message):
    shards = (f"data.train={folder}/train-*.tar", f"data.val={folder}/val-*.tar", f"output={folder}/run")
    ended = train_command("recipes/digits.yaml", *shards, *FEW, *change, processes=2)
    assert_reported_once(ended, message)
    assert ended.stderr.count("\nerror: ") + ended.stderr.startswith("error: ") == 1


def test_a_fault_that_one_of_two_processes_meets_ends_both(train_command, folder):
    """Of batches of two images, one a process, the bad one is met by one process alone, whose part is empty then."""
    write_tar(folder / "train-0.tar", samples(_09_png=b""))
    shards = (f"data.train={folder}/train-*.tar", f"data.val={folder}/val-*.tar", f"output={folder}/run")
    ended = train_command("recipes/digits.yaml", *shards, *FEW, "data.global_batch=2", "phases.pretrain.steps=64", processes=2)
    assert_reported_once(ended, r".*/train-0\.tar: sample 09 at byte \d+: it is empty: no image of a batch of 1 can be used")


def test_processes_stay_in_step_when_their_local_batches_lose_samples(train_command, folder):
    """Parts of other sizes on each process, none empty: the run goes on to its end, and its receipts tell every sample once."""
    write_tar(folder / "train-0.tar", samples(_09_png=b"", _10_cls=b"77", _11_pyd=b"x"))
    shards = (f"data.train={folder}/train-*.tar", f"data.val={folder}/val-*.tar", f"output={folder}/run")
    changes = (*FEW, "data.global_batch=16", "data.max_bad_fraction=0.2")
    ended = train_command("recipes/digits.yaml", *shards, *changes, processes=2)
    assert ended.returncode == 0, ended.stderr
    for receipt in records(folder, "receipt"):
        assert (receipt["samples"], [one[3] for one in receipt["skipped"]]) == (13, ["09", "10", "11"])
        assert receipt["batches"] == 1


def test_processes_that_find_other_shards_are_refused(forks_server, folder, tmp_path):
    """Each process in a folder of its own, as with disks of their own: the second one's two shards have changed places."""
    program = tmp_path / "elsewhere.py"
    program.write_text(
        "import os, sys\nfrom dnal_dist import train\nos.chdir(f'{sys.argv.pop(1)}/{os.environ[\"RANK\"]}')\ntrain.main()\n"
    )
    for rank, names in enumerate((("a", "b"), ("b", "a"))):
        (tmp_path / str(rank)).mkdir()
        for number, name in enumerate(names):
            write_tar(tmp_path / str(rank) / f"train-{number}.tar", {f"{name}{key}": content for key, content in samples().items()})
    given = ("data.train=train-*.tar", f"data.val={folder}/val-*.tar", f"output={tmp_path}/run", *FEW)
    command = forks.command("-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/ddp.yaml")
    command += ["--num_processes", "2", *forks.command(program, tmp_path, ROOT / "recipes/digits.yaml", *given)[1:]]
    environment = {**os.environ, **forks_server.environment()}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode != 0
    assert "error: key 'data.train': process 1 finds other shards than process 0 (train-0.tar, 16 samples" in ended.stderr


def test_a_shard_that_is_named_twice_is_refused(train, folder):
    (folder / "again").symlink_to(folder)
    for twice in (
        f"'{folder}/train-0.tar {folder}/train-*.tar'",
        f"{folder}/train-{{0,0}}.tar",
        f"{folder}/{{again/,}}train-0.tar",
    ):
        refused(train(f"data.train={twice}"), r"key 'data\.train': .*/train-0\.tar is named twice")
