"""Faults of shards and of what they hold: skipped, counted and named up to the recipe's share, then an error of one line."""

import io
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from faulty import corrupt, png, records, refused, samples, truncate, write_index, write_tar
from PIL import Image

# --- shards

ANY = "data.max_bad_fraction=1"


@pytest.mark.parametrize("content", [b"no tar at all " * 1000, b"", b"x"], ids=["no tar", "no bytes", "one byte"])
def test_a_file_that_is_no_shard_is_refused(train, folder, content):
    (folder / "train-0.tar").write_bytes(content)
    refused(train(ANY), r".*/train-0\.tar: not a readable tar shard \(.+\); make or copy it again")


CUTS = {"in an image": ("09.png", 520), "in a header": ("09.png", 100), "between samples": ("09.png", 0)}
CUTS["before a class"] = ("09.cls", 0)
INDEXED = pytest.mark.parametrize("indexed", [False, True], ids=["without an index", "with an index"])


# What an index says does not depend on where the cut is.
@pytest.mark.parametrize(("cut", "indexed"), [*((cut, False) for cut in CUTS), ("in a header", True)])
def test_the_rest_of_a_truncated_shard_is_used_and_its_loss_is_reported(train, folder, cut, indexed):
    if indexed:
        write_index(folder, "train-0.tar", "val-0.tar")
    truncate(folder / "train-0.tar", *CUTS[cut])
    ended = train(ANY)
    assert ended.code == 0, ended.err
    warnings = [r["message"] for r in records(folder, "warning")]
    reason = (
        r"its last 7 samples are lost: copy it again" if indexed else r"at byte \d+: .*; (9|10) samples were found: copy or make"
    )
    assert any(re.match(rf".*/train-0\.tar: .*{reason}", message) for message in warnings), warnings
    receipts = records(folder, "receipt")
    if indexed:
        # Each epoch asks for all 16, and the seven that are gone are skipped.
        assert all(len(one["skipped"]) + one["samples"] == 8 * one["batches"] for one in receipts)
        assert max(len(one["skipped"]) for one in receipts) in range(1, 8)
        refused(train("--overwrite"), r".*of 16 samples of data\.train cannot be used, more than ")


@INDEXED
def test_a_damaged_header_costs_its_sample_alone(train, folder, indexed):
    if indexed:
        write_index(folder, "train-0.tar", "val-0.tar")
    corrupt(folder / "train-0.tar", "09.png")
    ended = train("data.max_bad_fraction=0.2", "data.global_batch=4")
    assert ended.code == 0, ended.err
    skipped = {one[0] for receipt in records(folder, "receipt") for one in receipt["skipped"]}
    # Without an index its class, which is whole, is taken for a sample of its own.
    assert len(skipped) <= (1 if indexed else 2) and skipped


def test_a_shard_that_has_grown_is_refused(train, folder):
    write_index(folder, "train-0.tar", "val-0.tar")
    with (folder / "train-0.tar").open("ab") as file:
        file.write(bytes(512))
    refused(train(), r".*/train-0\.tar: holds \d+ bytes, index\.json says \d+; make or copy the shard again")


def test_a_shard_without_a_sample_is_refused(train, folder):
    write_tar(folder / "val-0.tar", {})
    refused(train(), r"key 'data\.val': .* hold no sample")


def test_an_unreadable_shard_is_refused(train, folder):
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
        '{"shards": [{"file": "train-0.tar", "bytes": 9, "samples": 1, "offsets": [0]}]}',
        '{"shards": [{"file": 5, "bytes": 9, "samples": 1}]}',
        '{"shards": [{"file": "../train-0.tar", "bytes": 9, "samples": 1}]}',
        '{"shards": [{"file": "train-0.tar", "bytes": 9, "samples": 1, "sha256": 5}]}',
        '{"shards": [{"file": "train-0.tar", "bytes": 9, "samples": 1, "sha256": "no digest"}]}',
        '{"shards": [{"file": "train-0.tar", "bytes": 9, "samples": 1, "offsets": [5, 3]}]}',
        '{"shards": [{"file": "train-0.tar", "bytes": 9, "samples": 1, "offsets": [0, 99]}]}',
        '{"shards": [{"file": "train-0.tar", "bytes": 9, "samples": 1, "offsets": [-9, 3]}]}',
        '{"shards": [{"file": "train-0.tar", "bytes": 9, "samples": 1, "offsets": [0.5, "a"]}]}',
        '{"shards": [{"file": "train-0.tar", "bytes": 9, "samples": 1, "offsets": [0, 1e99]}]}',
        '{"shards": [{"file": "train-0.tar", "bytes": 9, "samples": 1, "offsets": [[0], [1, 2]]}]}',
    ],
    ids=lambda text: text[-30:] or "empty",
)
def test_a_broken_index_is_refused(train, folder, text):
    (folder / "index.json").write_text(text)
    refused(train(), r".*/index\.json: not an index of shards \(.*\); remove it or make it again")


@pytest.mark.parametrize("count", [15, 17, 8])
def test_an_index_with_a_wrong_count_is_refused(train, folder, count):
    write_index(folder, "train-0.tar", "val-0.tar", count=count)
    refused(train(), r".*/train-0\.tar: holds 16 samples, index\.json says \d+; make the index again")


def test_an_index_with_a_missing_shard_is_refused(train, folder):
    shutil.copy(folder / "train-0.tar", folder / "train-1.tar")
    write_index(folder, "train-0.tar", "train-1.tar", "val-0.tar")
    (folder / "train-1.tar").unlink()
    refused(train(), r".*/train-1\.tar: no such shard, but index\.json lists it")
    # A recipe that does not ask for it does not miss it.
    assert train(f"data.train={folder}/train-0.tar").code == 0


# --- samples


UNUSABLE = {
    "10": ({"_05_cls": b"10"}, r"label '10' is out of range, expected a whole number from 0 to 9 \(model\.num_classes is 10\)"),
    "-1": ({"_05_cls": b"-1"}, r"label '-1' is out of range"),
    "seven": ({"_05_cls": b"seven"}, r"label 'seven' is out of range, expected a whole number"),
    "1.5": ({"_05_cls": b"1.5"}, r"label '1\.5' is out of range, expected a whole number"),
    "no text": ({"_05_cls": b"\xb2\n\x1b[31m"}, r"label .* is out of range"),
    "no digits": ({"_05_cls": b""}, r"label '' is out of range"),
    "no label": ({"_05_cls": None}, r"expected one image \(png, jpg, .*\) and one label \(cls, .*\), found 1 and 0"),
    "no image": ({"_05_png": None}, r"expected one image .* found 0 and 1"),
    "two images": ({"_05_jpg": png()}, r"expected one image .* found 2 and 1"),
    "neither": ({"_05_txt": b"hello", "_05_png": None, "_05_cls": None}, r"expected one image .* found 0 and 1"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_sample_is_refused(train, folder, kind):
    change, reason = UNUSABLE[kind]
    write_tar(folder / "train-0.tar", samples(**change))
    if list(UNUSABLE).index(kind) % 2:
        write_index(folder, "train-0.tar", "val-0.tar")
    refused(train(), rf".*/train-0\.tar: sample 05 at byte \d+: {reason}")


@INDEXED
def test_unusable_samples_are_skipped_and_named(train, folder, indexed):
    kinds = enumerate(UNUSABLE.values())
    changes = {name.replace("_05", f"_{n:02}"): content for n, (change, _) in kinds for name, content in change.items()}
    write_tar(folder / "train-0.tar", samples(**changes))
    if indexed:
        write_index(folder, "train-0.tar", "val-0.tar")
    ended = train("data.max_bad_fraction=0.7")
    assert ended.code == 0, ended.err
    skipped = {one[3]: one[4] for receipt in records(folder, "receipt") for one in receipt["skipped"]}
    assert len(skipped) == len(UNUSABLE)
    warnings = "\n".join(r["message"] for r in records(folder, "warning"))
    assert re.search(r"skipped \d+ of 16 samples of data\.train: .*/train-0\.tar: sample 0\d at byte \d+: ", warnings)
    for number, (_, reason) in enumerate(UNUSABLE.values()):
        assert re.match(reason, skipped[f"{number:02}"]), skipped


NO_IMAGES = {"cut": png()[:40], "words": b"words", "empty": b""}


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_that_does_not_decode_is_skipped_and_named(train, folder, split):
    write_tar(folder / f"{split}-0.tar", samples(_03_png=png()[:40]))
    ended = train("data.max_bad_fraction=0.1")
    assert ended.code == 0, ended.err
    (warning,) = [r["message"] for r in records(folder, "warning") if "skipped" in r["message"]]
    assert re.match(rf"skipped 1 of 16 samples of data\.{split}: .*/{split}-0\.tar: sample 03 at byte \d+: \w.*", warning)
    assert f"warning: {warning}" in ended.out
    bad = sum(r["bad_samples"] for r in records(folder, "train"))
    # 6 iterations of 8 images are 3 epochs; validation sees the image at each look.
    assert bad == (3 if split == "train" else 0)
    assert {r["samples"] for r in records(folder, "eval")} == {16 if split == "train" else 15}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_too_many_images_that_do_not_decode_end_the_run(train, folder, split, workers):
    changes = {f"_{i:02}_png": image for i, image in enumerate(NO_IMAGES.values(), 3)}
    write_tar(folder / f"{split}-0.tar", samples(**changes))
    reason = rf".*/{split}-0\.tar: sample 0\d at byte \d+: .*[123] of 16 samples of data\.{split} cannot be used, more than "
    refused(train("data.max_bad_fraction=0.1", f"data.workers={workers}"), reason + r"data\.max_bad_fraction=0\.1 allows")


def test_bad_images_at_an_epochs_end_are_not_forgotten(train, folder):
    """The records do not come at the epochs' ends, and what was skipped in between still counts."""
    write_tar(folder / "train-0.tar", samples(_03_png=b"", _07_png=b""))
    ended = train("data.max_bad_fraction=0.2", "tracking.log_every=5", "phases.pretrain.steps=5", "data.global_batch=4")
    assert ended.code == 0, ended.err
    (warning,) = [r["message"] for r in records(folder, "warning") if "skipped" in r["message"]]
    assert (
        "skipped 2 of 16" in warning
        and warning.count(": it is empty") == 2
        and "sample 03 at" in warning
        and "sample 07 at" in warning
    )


def test_a_batch_without_a_decodable_image_ends_the_run(train, folder):
    write_tar(folder / "train-0.tar", samples(**{f"_{i:02}_png": b"" for i in range(16)}))
    reason = r".*/train-0\.tar: sample \d\d at byte \d+: it is empty: no image of a batch of 8 can be used; mend the shards"
    refused(train(ANY), reason)


def test_images_of_other_kinds_are_images(train, folder):
    """16 bits, a palette, transparency, black and white: all of them decode, and none comes out as a foreign type."""
    kinds = {f"_{i:02}_png": png(1, mode=mode) for i, mode in enumerate(("I;16", "P", "RGBA", "LA", "1", "RGB"))}
    write_tar(folder / "train-0.tar", samples(**kinds))
    ended = train("data.max_bad_fraction=0")
    assert ended.code == 0, ended.err


def test_an_animation_is_no_image(train, folder):
    encoded = io.BytesIO()
    frames = [Image.new("L", (8, 8), grey) for grey in (0, 200)]
    frames[0].save(encoded, "GIF", save_all=True, append_images=frames[1:])
    write_tar(folder / "train-0.tar", samples(_03_png=encoded.getvalue()))
    refused(train("data.max_bad_fraction=0"), r".*/train-0\.tar: sample 03 at byte \d+: it is animated")


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
    kinds = ("pyd", "pickle", "pkl", "pth", "pt", "dill", "meta.pyd")
    for number, kind in enumerate(kinds):
        write_tar(folder / f"train-{number}.tar", samples(**{f"_03_{kind}": harm}, _04_json=b"{", _05_txt=harm))
    ended = train(ANY)
    assert ended.code == 0, ended.err
    assert not (folder / "executed").exists()
    (receipt, *_) = records(folder, "receipt")
    assert {one[3] for one in receipt["skipped"]} == {"03"}
    assert {one[4] for one in receipt["skipped"]} <= {
        f"it has a .{k}, which is refused: reading it could run any program" for k in kinds
    }
    refused(train("--overwrite"), r".*sample 03 at byte \d+: it has a \.[\w.]+, which is refused")


def link(name: str, target: Path | str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, str(target)
    return member


def test_members_that_are_no_files_are_refused(train, folder):
    (folder / "secret.png").write_bytes(png())
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
    others = [link(f"{number}.png", folder / "secret.png", kind) for number, kind in enumerate(kinds, 17)]
    write_tar(folder / "train-0.tar", samples(), *others)
    ended = train(ANY, "data.global_batch=20")
    assert ended.code == 0, ended.err
    assert [one[3:] for one in sorted(records(folder, "receipt")[0]["skipped"], key=lambda one: one[3])] == [
        [str(number), "it has a link or another special file, which is refused"] for number in range(17, 21)
    ]


def test_names_that_climb_out_are_refused_and_write_nothing(train, folder):
    outside = {"../../escaped.png": png(), "../../escaped.cls": b"1", "/escaped.png": png(), "/escaped.cls": b"2"}
    write_tar(folder / "train-0.tar", samples() | outside)
    before = {path for path in folder.parent.iterdir()}
    ended = train(ANY, "data.global_batch=18")
    assert ended.code == 0, ended.err
    assert {path for path in folder.parent.iterdir()} == before and not Path("/escaped.png").exists()
    assert {one[4] for one in records(folder, "receipt")[0]["skipped"]} == {"its name leads out of the shard, which is refused"}


def test_names_cannot_write_to_the_terminal(train, folder):
    write_tar(folder / "train-0.tar", samples() | {"\x1b[2Jevil\n\udcff.cls": b"1"})
    ended = train("data.global_batch=17")
    refused(ended, r".*/train-0\.tar: sample \\x1b\[2Jevil\\n\\udcff at byte \d+: expected one image")
    assert "\x1b" not in ended.err


def test_false_sizes_of_members_are_refused(train, folder):
    sparse = tarfile.TarInfo("17.png")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 0
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    # Its real size, 12 octal digits from byte 483 on: 8 GiB.
    header[483:495] = b"77777777777\0"
    header[148:156] = b"%06o\0 " % sum(header[:148] + b" " * 8 + header[156:])
    path = folder / "train-0.tar"
    path.write_bytes(bytes(header) + path.read_bytes())
    ended = train(ANY, "data.global_batch=17")
    assert ended.code == 0, ended.err
    assert "special file" in records(folder, "receipt")[0]["skipped"][0][4]
    # A negative size would make a reader go back and forth for ever.
    negative = tarfile.TarInfo("99.png")
    header = bytearray(negative.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"
    header[148:156] = b"%06o\0 " % sum(header[:148] + b" " * 8 + header[156:])
    path.write_bytes(bytes(header) + path.read_bytes())
    refused(train("--overwrite"), r".*/train-0\.tar: (not a readable tar shard \(|sample .*damaged)")
