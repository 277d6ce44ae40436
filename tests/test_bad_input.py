"""What is wrong with what a run was given is told in one line that names the file or key, with exit code 2 and no traceback."""

import io
import json
import os
import re
import resource
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

FEW = (
    "phases.pretrain.steps=2", "phases.search.steps=2", "phases.finetune.steps=2", "tracking.log_every=1",
    "tracking.tracker=none", "data.global_batch=8",
)  # fmt: skip


def png(grey: int = 100, size: int = 8, mode: str = "L") -> bytes:
    encoded = io.BytesIO()
    Image.new(mode, (size, size), grey).save(encoded, "PNG")
    return encoded.getvalue()


def samples(count: int = 16, **changes: bytes | None) -> dict[str, bytes]:
    """Members of a shard: pictures and classes of samples 00, 01, ...; `changes` replaces members (_05_cls is 05.cls) or leaves
    them out (None)."""
    members = {}
    for i in range(count):
        members |= {f"{i:02}.png": png(10 * (i % 20)), f"{i:02}.cls": str(i % 10).encode()}
    members |= {key[1:].replace("_", "."): value for key, value in changes.items()}
    return {name: content for name, content in members.items() if content is not None}


def write_tar(path: Path, members: dict[str, bytes], *others: tarfile.TarInfo) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in others:
            tar.addfile(member)


def write_index(folder: Path, *names: str, count: int = 16) -> None:
    entries = [{"file": name, "samples": count, "bytes": (folder / name).stat().st_size} for name in names]
    (folder / "index.json").write_text(json.dumps({"shards": entries, "classes": []}))


@pytest.fixture
def folder(tmp_path):
    """A folder with shards of 16 samples each, train-0.tar and val-0.tar, without an index."""
    write_tar(tmp_path / "train-0.tar", samples())
    write_tar(tmp_path / "val-0.tar", samples())
    return tmp_path


@pytest.fixture
def train(train_here, folder):
    """The command, on the shards in `folder`, into the run folder `folder`/run."""

    def run(*changes: str, recipe: str | Path = "recipes/digits.yaml"):
        shards = (f"data.train={folder}/train-*.tar", f"data.val={folder}/val-*.tar", f"output={folder}/run")
        return train_here(recipe, *shards, *FEW, *changes)

    return run


def refused(ended, told: str) -> None:
    """Exit code 2, and one line that matches `told`."""
    assert ended.code == 2, ended
    lines = ended.err.splitlines()
    assert len(lines) == 1 and re.match(rf"error: .*{told}", lines[0]), f"{told!r} expected, found:\n{ended.err}"


def records(folder: Path, kind: str) -> list[dict]:
    return [r for r in map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


# --- the recipe and its overrides


@pytest.mark.parametrize(
    "text, told",
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
def test_a_file_that_is_no_recipe(train, folder, text, told):
    (folder / "r.yaml").write_text(text)
    refused(train(recipe=folder / "r.yaml"), told)
    assert not Path("executed").exists() and not (folder / "run").exists()


@pytest.mark.parametrize(
    "name, told",
    [("no.yaml", "no such recipe; .*recipes/"), ("", r"cannot be read \(.*directory"), ("b.yaml", r"cannot be read \(")],
)
def test_a_recipe_that_cannot_be_read(train, folder, name, told):
    (folder / "b.yaml").write_bytes(b"\xff\xfe\x00name")
    refused(train(recipe=folder / name), rf"{re.escape(str(folder / name))}: {told}")


@pytest.mark.parametrize(
    "changes, told",
    [
        (["data.globl_batch=3"], r"digits\.yaml: unknown key 'data\.globl_batch' \(did you mean 'global_batch'\?\)"),
        (["nam=3"], r"unknown key 'nam' \(did you mean 'name'\?\); remove or rename it"),
        (["data.global_batch=eight"], r"key 'data\.global_batch': input should be a valid integer, found 'eight'"),
        (["phases.pretrain.epochs=-1"], r"key 'phases\.pretrain\.epochs': input should be greater than 0, found -1"),
        (["seed="], r"key 'seed': input should be a valid integer, found None"),
        (["seed"], r"override 'seed': expected key=value"),
        (["=3"], r"override '=3': expected key=value"),
        (["seed=["], r"override 'seed=\[': not a YAML value"),
        (["seed.x=1"], r"override 'seed\.x=1': 'seed' is a value, it has no keys"),
        (["model=vgg_digits"], r"key 'model': "),
        (["model.name=vgg_digit"], r"key 'model\.name': no network is called 'vgg_digit'; there are .*vgg_digits"),
        (["seed=-1", "nam=2", "data.workers=x"], r".*'seed'.*'data\.workers'.*'nam'"),
        (["data.image_size=7"], r"key 'data\.image_size': the network cannot take pictures of 7x7 pixels"),
        (["model.name=vgg16_cifar", "data.image_size=32", "data.global_batch=1"], r"key 'data\.global_batch': 1 .*BatchNorm"),
        (["data.global_batch=17"], r"key 'data\.global_batch': a step takes 17 pictures, but 'data\.train' holds 16; lower it"),
        (["data.train=nowhere/x-*.tar"], r"key 'data\.train': no shard matches 'nowhere/x-\*\.tar'; make shards with"),
        (["data.val=nowhere/x-{0..3}.tar"], r"key 'data\.val': no shard matches 'nowhere/x-0\.tar'"),
        (["data.train=''"], r"key 'data\.train': expected the path of shards"),
        (["data.train='x-{0..3.tar'"], r"key 'data\.train': 'x-\{0\.\.3\.tar' is not a pattern"),
        (["data.train=x-${NOWHERE}.tar"], r"key 'data\.train': 'x-\$\{NOWHERE\}\.tar' is not a pattern"),
        (["data.train=https://example.org/x.tar"], r"key 'data\.train': .* is not a local path"),
        (["data.train=/"], r"/: not a file; correct key 'data\.train'"),
    ],
)
def test_a_key_that_is_wrong(train, folder, changes, told):
    refused(train(*changes), told)
    assert not (folder / "run").exists()


def test_a_pipe_is_refused_and_not_run(train, folder):
    command = f"touch${{IFS}}{folder}/executed"
    refused(train(f"data.train='pipe:{command}'"), r"key 'data\.train': 'pipe:.* is not a local path")
    refused(train(f"data.train='{folder}/train-0.tar pipe:{command}'"), r"key 'data\.train': 'pipe:.* is not a local path")
    refused(train(f"data.train='{folder}/train-0.tar::pipe:{command}'"), r"key 'data\.train': ")
    assert not (folder / "executed").exists()


def test_one_of_several_named_shards_is_missing(train, folder):
    refused(train(f"data.train={folder}/train-{{0..1}}.tar"), r"key 'data\.train': no shard matches '.*/train-1\.tar'")


# --- shards


def truncate(path: Path, member: str, into: int) -> None:
    """Cut the tar at `path` short, `into` bytes behind the beginning of `member`'s header."""
    with tarfile.open(path) as tar:
        size = tar.getmember(member).offset + into
    os.truncate(path, size)


def corrupt(path: Path, member: str) -> None:
    with tarfile.open(path) as tar:
        offset = tar.getmember(member).offset
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 512)


UNREADABLE = {
    "no tar": lambda path: path.write_bytes(b"no tar at all " * 1000),
    "no bytes": lambda path: path.write_bytes(b""),
    "cut in a picture": lambda path: truncate(path, "09.png", 520),
    "cut in a header": lambda path: truncate(path, "09.png", 100),
    "cut between samples": lambda path: truncate(path, "09.png", 0),
    "cut between picture and class": lambda path: truncate(path, "09.cls", 0),
    "a damaged header": lambda path: corrupt(path, "09.png"),
}


@pytest.mark.parametrize("indexed", [False, True], ids=["without an index", "with an index"])
@pytest.mark.parametrize("fault", UNREADABLE)
def test_an_unreadable_shard(train, folder, fault, indexed):
    UNREADABLE[fault](folder / "train-0.tar")
    if indexed:
        # The damage was there when the index was made, so that only opening the shard shows it.
        write_index(folder, "train-0.tar", "val-0.tar")
    if fault == "no bytes" and indexed:
        told = "(not a readable tar shard|holds 0 samples)"
    else:
        told = r"not a readable tar shard \(.+\); make or copy it anew"
    refused(train(), rf".*/train-0\.tar: {told}")


def test_damage_after_the_index_was_made(train, folder):
    write_index(folder, "train-0.tar", "val-0.tar")
    truncate(folder / "train-0.tar", "09.png", 0)
    refused(train(), r".*/train-0\.tar: holds \d+ bytes, index\.json says \d+; make or copy the shard anew")


def test_an_unreadable_shard_is_told_by_loader_processes_too(train, folder):
    truncate(folder / "train-0.tar", "09.png", 0)
    write_index(folder, "train-0.tar", "val-0.tar")
    refused(train("data.workers=2"), r".*/train-0\.tar: not a readable tar shard")


def test_a_shard_without_a_sample(train, folder):
    write_tar(folder / "val-0.tar", {})
    refused(train(), r"key 'data\.val': .* hold no sample")


def test_a_shard_that_may_not_be_read(train, folder):
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    (folder / "train-0.tar").chmod(0)
    refused(train(), r".*/train-0\.tar: shard cannot be read \(Permission denied\); check the file and key 'data\.train'")
    write_index(folder, "train-0.tar", "val-0.tar")
    refused(train(), r".*/train-0\.tar: shard cannot be read \(Permission denied\); check the file and key 'data\.train'")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "[" * 100_000,
        '{"shards": 1}',
        '{"shards": [{"file": "train-0.tar"}]}',
        '{"shards": [{"file": "train-0.tar", "bytes": 1, "samples": "x"}]}',
        '{"shards": [{"file": "train-0.tar", "bytes": 1, "samples": -1}]}',
    ],
    ids=lambda text: text[:20] or "empty",
)
def test_a_broken_index(train, folder, text):
    (folder / "index.json").write_text(text)
    refused(train(), r".*/index\.json: not an index of shards \(.*\); remove it or make it anew")


@pytest.mark.parametrize("count", [15, 17, 8])
def test_an_index_with_a_wrong_count(train, folder, count):
    write_index(folder, "train-0.tar", "val-0.tar", count=count)
    refused(train(), r".*/train-0\.tar: holds 16 samples, index\.json says \d+; make the index anew")


def test_an_index_that_tells_of_a_shard_that_is_not_there(train, folder):
    shutil.copy(folder / "train-0.tar", folder / "train-1.tar")
    write_index(folder, "train-0.tar", "train-1.tar", "val-0.tar")
    (folder / "train-1.tar").unlink()
    refused(train(), r".*/train-1\.tar: no such shard, but index\.json tells of it")
    # A recipe that does not ask for it does not miss it.
    assert train(f"data.train={folder}/train-0.tar").code == 0


# --- samples


@pytest.mark.parametrize("indexed", [False, True], ids=["without an index", "with an index"])
@pytest.mark.parametrize(
    "change, told",
    [
        (
            {"_05_cls": b"10"},
            r"sample 05: label '10' is out of range, expected a whole number from 0 to 9 \(model\.num_classes is 10\)",
        ),
        ({"_05_cls": b"-1"}, r"sample 05: label '-1' is out of range"),
        ({"_05_cls": b"seven"}, r"sample 05: label 'seven' is out of range, expected a whole number"),
        ({"_05_cls": b"1.5"}, r"sample 05: label '1\.5' is out of range, expected a whole number"),
        ({"_05_cls": b"\xb2\n\x1b[31m"}, r"sample 05: label .* is out of range"),
        ({"_05_cls": b""}, r"sample 05: label '' is out of range"),
        ({"_05_cls": None}, r"sample 05: expected one picture \(png, jpg, jpeg\) and one class \(cls\), found 1 and 0"),
        ({"_05_png": None}, r"sample 05: expected one picture .* found 0 and 1"),
        ({"_05_jpg": png()}, r"sample 05: expected one picture .* found 2 and 1"),
        ({"_notes_txt": b"hello"}, r"sample notes: expected one picture .* found 0 and 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value)[:20],
)
def test_a_sample_that_is_none(train, folder, change, told, indexed):
    write_tar(folder / "train-0.tar", samples(**change))
    if indexed:
        write_index(folder, "train-0.tar", "val-0.tar")
    refused(train(), rf".*/train-0\.tar: {told}")


NO_PICTURES = {"cut": png()[:40], "words": b"words", "empty": b""}


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_picture_that_does_not_decode_is_skipped_and_named(train, folder, split):
    write_tar(folder / f"{split}-0.tar", samples(_03_png=png()[:40]))
    ended = train("data.max_bad_fraction=0.1")
    assert ended.code == 0, ended.err
    (warning,) = [r["message"] for r in records(folder, "warning") if "skipped" in r["message"]]
    assert re.match(rf"skipped 1 of 16 pictures of data\.{split}: .*/{split}-0\.tar: sample 03: \w.*", warning)
    assert f"warning: {warning}" in ended.out
    bad = sum(r["bad_samples"] for r in records(folder, "train"))
    # 6 iterations of 8 pictures are 3 epochs; validation sees the picture at each look.
    assert bad == (3 if split == "train" else 0)
    assert {r["samples"] for r in records(folder, "eval")} == {16 if split == "train" else 15}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_too_many_pictures_that_do_not_decode(train, folder, split, workers):
    changes = {f"_{i:02}_png": picture for i, picture in enumerate(NO_PICTURES.values(), 3)}
    write_tar(folder / f"{split}-0.tar", samples(**changes))
    told = rf".*/{split}-0\.tar: sample 0\d: .*[123] of 16 pictures of data\.{split} cannot be decoded, more than "
    refused(train("data.max_bad_fraction=0.1", f"data.workers={workers}"), told + r"data\.max_bad_fraction=0\.1 allows")


def test_bad_pictures_at_an_epochs_end_are_not_forgotten(train, folder):
    """The records do not come at the epochs' ends, and what was skipped in between still counts."""
    write_tar(folder / "train-0.tar", samples(_03_png=b"", _07_png=b""))
    ended = train("data.max_bad_fraction=0.2", "tracking.log_every=5", "phases.pretrain.steps=5", "data.global_batch=4")
    assert ended.code == 0, ended.err
    (warning,) = [r["message"] for r in records(folder, "warning") if "skipped" in r["message"]]
    assert "skipped 2 of 16" in warning and "sample 03: it is empty" in warning and "sample 07: it is empty" in warning


def test_no_picture_of_a_batch_decodes(train, folder):
    write_tar(folder / "train-0.tar", samples(**{f"_{i:02}_png": b"" for i in range(16)}))
    refused(
        train("data.max_bad_fraction=1"), r".*/train-0\.tar: sample \d\d: it is empty: no picture of a batch of 8 can be decoded"
    )


def test_pictures_of_other_kinds_are_pictures(train, folder):
    """16 bits, a palette, transparency, black and white: all of them decode, and none comes out as a foreign type."""
    kinds = {f"_{i:02}_png": png(1, mode=mode) for i, mode in enumerate(("I;16", "P", "RGBA", "LA", "1", "RGB"))}
    write_tar(folder / "train-0.tar", samples(**kinds))
    ended = train("data.max_bad_fraction=0")
    assert ended.code == 0, ended.err


def test_an_animation_is_no_picture(train, folder):
    encoded = io.BytesIO()
    frames = [Image.new("L", (8, 8), grey) for grey in (0, 200)]
    frames[0].save(encoded, "GIF", save_all=True, append_images=frames[1:])
    write_tar(folder / "train-0.tar", samples(_03_png=encoded.getvalue()))
    refused(train("data.max_bad_fraction=0"), r".*/train-0\.tar: sample 03: it is animated")


# --- shards that mean harm


class Harm:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_a_shard_is_unpickled(train, folder):
    import pickle

    harm = pickle.dumps(Harm(folder / "executed"))
    write_tar(folder / "train-0.tar", samples(_03_pyd=harm, _03_pickle=harm, _03_pkl=harm, _03_pth=harm, _03_json=b"{"))
    ended = train()
    assert ended.code == 0, ended.err
    assert not (folder / "executed").exists()


def link(name: str, target: Path | str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, str(target)
    return member


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE])
def test_members_that_are_no_files_are_no_pictures(train, folder, kind):
    (folder / "secret.png").write_bytes(png())
    write_tar(folder / "train-0.tar", samples(_03_png=None), link("03.png", folder / "secret.png", kind))
    refused(train(), r".*/train-0\.tar: sample 03: expected one picture .* found 0 and 1")


def test_names_that_climb_out_are_only_names(train, folder):
    outside = {"../../escaped.png": png(), "../../escaped.cls": b"1", "/escaped.png": png(), "/escaped.cls": b"2"}
    write_tar(folder / "train-0.tar", samples() | outside)
    before = {path for path in folder.parent.iterdir()}
    ended = train()
    assert ended.code == 0, ended.err
    assert {path for path in folder.parent.iterdir()} == before and not Path("/escaped.png").exists()
    assert "18 training" in ended.out


def test_names_cannot_write_to_the_terminal(train, folder):
    write_tar(folder / "train-0.tar", samples() | {"\x1b[2Jevil\n\udcff.cls": b"1"})
    ended = train()
    refused(ended, r".*/train-0\.tar: sample \\x1b\[2Jevil\\n\\udcff: expected one picture")
    assert "\x1b" not in ended.err


def test_sizes_that_are_lies(train, folder):
    sparse = tarfile.TarInfo("03.png")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 0
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    # Its real size, 12 octal digits from byte 483 on: 8 GiB.
    header[483:495] = b"77777777777\0"
    header[148:156] = b"%06o\0 " % sum(header[:148] + b" " * 8 + header[156:])
    path = folder / "train-0.tar"
    write_tar(path, samples(_03_png=None))
    path.write_bytes(bytes(header) + path.read_bytes())
    refused(train(), r".*/train-0\.tar: sample 03: expected one picture .* found 0 and 1")
    # A negative size would make a reader go back and forth for ever.
    negative = tarfile.TarInfo("99.png")
    header = bytearray(negative.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"
    header[148:156] = b"%06o\0 " % sum(header[:148] + b" " * 8 + header[156:])
    path.write_bytes(bytes(header) + path.read_bytes())
    refused(train(), r".*/train-0\.tar: not a readable tar shard \(")


# --- the run folder


@pytest.fixture
def old(folder):
    """What looks like another run in the run folder, and files that are not the run's."""
    run = folder / "run"
    for name in ("checkpoints/step-00000099", "compact", "wandb", "notes"):
        (run / name).mkdir(parents=True)
    for name in (
        "recipe.yaml",
        "metrics.jsonl",
        "report.html",
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
    told = (
        rf"key 'output': {old} already holds another run; go on with it by --resume, or replace it by --overwrite, or name another"
    )
    refused(train(), told)
    assert content(old) == before


def test_overwrite_replaces_what_the_run_wrote_and_nothing_else(train, old):
    assert train("--overwrite").code == 0
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
        ('"{}/\\0"', "embedded null byte"),
    ],
    ids=["a file", "below a file", "a long name", "a null byte"],
)
def test_a_folder_that_cannot_be_written(train, folder, output, why):
    (folder / "file").write_text("mine")
    output = output.format(folder)
    for option in ((), ("--overwrite",), ("--resume",)):
        refused(train(f"output={output}", *option), rf"key 'output': .* cannot be written \({why}\); name another folder")
    assert (folder / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written(train, folder):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (folder / "run").mkdir(mode=0o500)
    refused(train(), r"key 'output': .*/run cannot be written \(Permission denied\); name another folder")


def test_a_disk_that_is_full(train, folder):
    """Stood in for by a limit on the size of files, which the checkpoint's tensors exceed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        ended = train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(ended, r".*/run/checkpoints: checkpoint cannot be written \(.*\); make room, then go on with --resume")


def test_resume_and_overwrite_exclude_each_other(train):
    ended = train("--resume", "--overwrite")
    assert ended.code == 2 and "not allowed with" in ended.err


# --- the real command, and several processes


def test_the_command_ends_with_code_2_and_one_line(train_command):
    ended = train_command("recipes/none.yaml")
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr == "error: recipes/none.yaml: no such recipe; the ones that ship with the project are in recipes/\n"


def told_by_one(ended, told: str) -> None:
    """Under the launcher, whose own code is 1 and whose own traceback ends with a page about the process that failed."""
    assert ended.returncode != 0
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert errors and len(set(errors)) == 1 and re.match(f"error: {told}", errors[0]), ended.stderr
    assert "/train.py" not in ended.stderr and "RuntimeError" not in ended.stderr, ended.stderr
    # The page gives the code of each process, and the reason.
    assert re.search(r"exitcode +: 2 ", ended.stderr) and f"traceback : {errors[0]}" in ended.stderr


@pytest.mark.parametrize(
    "change, told",
    [
        (
            ["data.global_batch=7"],
            r"key 'data\.global_batch': 7 pictures cannot be divided evenly among 2 processes; .* is 8",
        ),
        (["output=recipes/digits.yaml/run"], r"key 'output': .* cannot be written \(Not a directory\)"),
    ],
    ids=["batch", "folder"],
)
def test_two_processes_refuse_as_one(train_command, folder, change, told):
    shards = (f"data.train={folder}/train-*.tar", f"data.val={folder}/val-*.tar", f"output={folder}/run")
    ended = train_command("recipes/digits.yaml", *shards, *FEW, *change, processes=2)
    told_by_one(ended, told)
    assert ended.stderr.count("\nerror: ") + ended.stderr.startswith("error: ") == 1


def test_a_fault_that_one_of_two_processes_meets_ends_both(train_command, folder):
    """Of batches of two pictures, one a process, the damaged shard's are met by one process first."""
    for i in range(1, 8):
        write_tar(folder / f"train-{i}.tar", samples())
    truncate(folder / "train-7.tar", "09.png", 0)
    write_index(folder, *(f"train-{i}.tar" for i in range(8)), "val-0.tar")
    shards = (f"data.train={folder}/train-*.tar", f"data.val={folder}/val-*.tar", f"output={folder}/run")
    ended = train_command("recipes/digits.yaml", *shards, *FEW, "data.global_batch=2", "phases.pretrain.steps=64", processes=2)
    told_by_one(ended, r".*/train-7\.tar: not a readable tar shard")
