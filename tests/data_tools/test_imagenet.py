"""ImageNet's tars come through byte for byte, with the labels that everybody gives them; what is not whole is refused by name."""

import io
import json
import shutil
import tarfile
from types import SimpleNamespace

import pytest
import sources
from making import command, digests, flipped, members, new, refused, scan, skipped, streamed
from PIL import Image

from data_tools import make_shards


@pytest.fixture
def ilsvrc(tmp_path):
    """ImageNet's three files, small, and what they hold."""
    folder = tmp_path / "ILSVRC"
    train, val = sources.imagenet_tars(folder)
    return SimpleNamespace(folder=folder, train=train, val=val)


LABELS = {"n01440764": 0, "n02012849": 1, "n03126707": 2, "n15075141": 3}


def test_images_of_the_original_tars_are_stored_byte_for_byte(ilsvrc, tmp_path, capsys):
    out = tmp_path / "shards"
    code, said = command(capsys, "imagenet", ilsvrc.folder, out, "--shard-samples", 70)
    assert code == 0 and f"{out}: 238 samples for train, 12 samples for val; 2 images left out" in said
    assert skipped(out).keys() == {"n01440764_8.JPEG", "n01440764_9.JPEG"}
    expected = [
        ("png" if content.startswith(b"\x89PNG") else "jpeg", content, LABELS[name.partition("_")[0]])
        for name, content in ilsvrc.train.items()
        if name not in skipped(out)
    ]
    assert sorted(members(out, "train")) == sorted(expected)
    assert members(out, "val") == [("jpeg", content, LABELS[wnid]) for _, content, wnid in ilsvrc.val]
    assert [len(scan(path)) for path in sorted(out.glob("train-*.tar"))] == [60, 60, 59, 59]
    classes = json.loads((out / "index.json").read_text())["classes"]
    assert classes == ["tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)", "toilet tissue"]
    assert len(streamed(out, "train", 16, 4)) == 238
    labels = [label for *_, label in members(out, "train")]
    assert labels != sorted(labels)
    # Nothing was unpacked beside the source.
    assert len(list(ilsvrc.folder.iterdir())) == 3


def test_imagenet_unpacked_gives_the_same_shards(ilsvrc, tmp_path):
    unpacked = new(tmp_path / "unpacked")
    for name, content in ilsvrc.train.items():
        folder = unpacked / "train" / name.partition("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (unpacked / "val").mkdir()
    for name, content, _ in ilsvrc.val:
        (unpacked / "val" / name).write_bytes(content)
    sources.unpack(ilsvrc.folder / "ILSVRC2012_devkit_t12.tar.gz", unpacked)
    for source, name in ((ilsvrc.folder, "tars"), (unpacked, "unpacked_shards")):
        make_shards.imagenet(source, new(tmp_path / name), max_bad=0.02)
    first, second = digests(tmp_path / "tars"), digests(tmp_path / "unpacked_shards")
    assert first.pop("skipped.json") and second.pop("skipped.json") and first == second
    # As others unpack it: a folder for each class in val too, and no devkit, so that the names of the classes are not known.
    for name, _, wnid in ilsvrc.val:
        (unpacked / "val" / wnid).mkdir(exist_ok=True)
        (unpacked / "val" / name).rename(unpacked / "val" / wnid / name)
    shutil.rmtree(unpacked / "ILSVRC2012_devkit_t12")
    make_shards.imagenet(unpacked, new(tmp_path / "by_folders"), max_bad=0.02)
    assert sorted(members(tmp_path / "by_folders", "val")) == sorted(members(tmp_path / "tars", "val"))
    assert json.loads((tmp_path / "by_folders" / "index.json").read_text())["classes"] == list(LABELS)


def test_workers_change_no_byte_of_imagenet(ilsvrc, tmp_path):
    for workers in (1, 2):
        make_shards.imagenet(ilsvrc.folder, new(tmp_path / f"{workers}"), workers=workers, shard_samples=80, resize=20)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    for _, content, _ in members(tmp_path / "1", "train"):
        with Image.open(io.BytesIO(content)) as image:
            assert min(image.size) <= 20


def test_other_ground_truths_give_the_same_labels(ilsvrc, tmp_path):
    wnids = [wnid for *_, wnid in ilsvrc.val]
    kaggle = "ImageId,PredictionString\n" + "".join(
        f"{name[:-5]},{wnid} 1 2 3 4 {wnid} 5 6 7 8\n" for name, _, wnid in ilsvrc.val[::-1]
    )
    ids = "".join(f"{sources.ILSVRC_IDS[wnid]}\n" for wnid in wnids)
    table = "".join(f"{wnid} {number} some_name\n" for wnid, number in sources.ILSVRC_IDS.items())
    make_shards.imagenet(ilsvrc.folder, new(tmp_path / "devkit"))
    for i, files in enumerate(
        (
            {"ILSVRC2012_validation_ground_truth": "\n".join(wnids)},
            {"ILSVRC2012_validation_ground_truth": ids, "map_clsloc": table},
            {"LOC_val_solution": kaggle},
        )
    ):
        if not i:
            (ilsvrc.folder / "ILSVRC2012_devkit_t12.tar.gz").rename(tmp_path / "devkit.tar.gz")
        for old in ilsvrc.folder.glob("*.[tc][xs]*"):
            old.unlink()
        for name, text in files.items():
            (ilsvrc.folder / f"{name}.{'csv' if name.startswith('LOC') else 'txt'}").write_text(text)
        make_shards.imagenet(ilsvrc.folder, new(tmp_path / f"{i}"))
        assert members(tmp_path / f"{i}", "val") == members(tmp_path / "devkit", "val")


wnid_of = {number: wnid for wnid, number in sources.ILSVRC_IDS.items()}


def devkit_lines(folder) -> list[str]:
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz") as tar:
        return tar.extractfile("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt").read().decode().split()


def renamed(content: bytes, old: bytes = b"n03126707.tar", new: bytes = b"cranes000.tar") -> bytes:
    """A tar with a member in it by another name of the same length, and the checksum that goes with it."""
    name = content.index(old)
    # Validation images are called ILSVRC2012_val_...
    at, content = name - 11 * old.startswith(b"val_"), bytearray(content)
    content[name : name + len(old)] = new
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    return bytes(content)


def _without(name):
    return lambda folder: (folder / name).unlink()


def _changed(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _truth(change_lines):
    """Another ground truth, of WordNet ids."""

    def change(folder):
        wnids = [wnid_of[int(line)] for line in devkit_lines(folder)]
        (folder / "ILSVRC2012_devkit_t12.tar.gz").unlink()
        (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(change_lines(wnids)))

    return change


@pytest.mark.parametrize(
    "change, said",
    [
        (_without("ILSVRC2012_img_train.tar"), "holds neither ILSVRC2012_img_train.tar nor train/"),
        (_without("ILSVRC2012_img_val.tar"), "holds neither ILSVRC2012_img_val.tar nor val/"),
        (_without("ILSVRC2012_devkit_t12.tar.gz"), "validation images without their classes; put ILSVRC2012_devkit_t12"),
        (_changed("ILSVRC2012_img_train.tar", lambda b: b[: len(b) // 2]), "img_train.tar: not a whole tar archive"),
        (_changed("ILSVRC2012_img_train.tar", lambda b: flipped(b, b.index(b"n03126707_7.JPEG"))), "(in n03126707.tar)"),
        (_changed("ILSVRC2012_img_train.tar", renamed), "holds 'cranes000.tar', expected one tar for each"),
        (_changed("ILSVRC2012_img_val.tar", lambda b: b[:5000]), "img_val.tar: not a whole tar archive"),
        (_changed("ILSVRC2012_devkit_t12.tar.gz", lambda b: b[:-300]), "devkit_t12.tar.gz: not a whole tar archive"),
        (_truth(lambda _: ["1"] * 12), "neither meta.mat nor map_clsloc.txt to look them up"),
        (_truth(lambda wnids: wnids[:-1]), "val_00000012.JPEG: it has no class in the ground truth"),
        (
            _truth(lambda wnids: [*wnids, wnids[0]]),
            "12 of 13 validation images, the first that is missing",
        ),
        (_truth(lambda wnids: [*wnids[:-1], "n00000001"]), "class n00000001 is in the ground truth, but not in training"),
        (_truth(lambda wnids: ["n01440764"] * 12), "class n02012849 is in training, but not in the ground truth"),
        (_changed("ILSVRC2012_img_val.tar", lambda b: renamed(b, b"val_00000012", b"val_00000003")), "val_00000003.JPEG twice"),
        (_changed("ILSVRC2012_img_train.tar", lambda b: renamed(b, b"n03126707_7", b"n03126707_6")), "n03126707_6.JPEG twice"),
        (_changed("ILSVRC2012_img_train.tar", lambda b: renamed(b, b"n03126707.tar", b"n02012849.tar")), "n02012849.tar twice"),
    ],
)
def test_an_incomplete_imagenet_is_refused(ilsvrc, tmp_path, capsys, change, said):
    change(ilsvrc.folder)
    line = refused(capsys, "imagenet", ilsvrc.folder, tmp_path / "shards")
    assert said in line
    assert not list((tmp_path / "shards").glob("*.tar"))


def test_a_meta_file_with_other_content_is_refused(ilsvrc, tmp_path, capsys):
    (ilsvrc.folder / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    (ilsvrc.folder / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n" * 12)
    for content in (b"", b"MATLAB 5.0" + bytes(200)):
        (ilsvrc.folder / "meta.mat").write_bytes(content)
        line = refused(capsys, "imagenet", ilsvrc.folder, tmp_path / "shards")
        assert "meta.mat" in line


@pytest.fixture
def unpacked(ilsvrc, tmp_path):
    """The same unpacked, without those that cannot be used, validation images loose; and the devkit."""
    folder = new(tmp_path / "unpacked")
    for name, content in ilsvrc.train.items():
        (folder / "train" / name.partition("_")[0]).mkdir(parents=True, exist_ok=True)
        if name not in ("n01440764_8.JPEG", "n01440764_9.JPEG"):
            (folder / "train" / name.partition("_")[0] / name).write_bytes(content)
    (folder / "val").mkdir()
    for name, content, _ in ilsvrc.val:
        (folder / "val" / name).write_bytes(content)
    shutil.copy(ilsvrc.folder / "ILSVRC2012_devkit_t12.tar.gz", folder)
    return folder


def test_validation_images_other_than_the_ground_truths_are_refused(ilsvrc, unpacked, tmp_path, capsys):
    def line():
        return refused(capsys, "imagenet", unpacked, tmp_path / "shards", "--workers", 1)

    name, content, wnid = ilsvrc.val[4]
    (unpacked / "val" / name).unlink()
    assert "11 of 12 validation images, the first that is missing is ILSVRC2012_val_00000005" in line()
    (unpacked / "val" / wnid).mkdir()
    (unpacked / "val" / wnid / name).write_bytes(content)
    assert "ILSVRC2012_val_00000001.JPEG: beside folders of WordNet ids" in line()
    for other, _, true in ilsvrc.val:
        (unpacked / "val" / true).mkdir(exist_ok=True)
        if other != name:
            (unpacked / "val" / other).rename(unpacked / "val" / true / other)
    (unpacked / "val" / "prepare.sh").write_text("no image")
    make_shards.imagenet(unpacked, new(tmp_path / "whole"))
    wrong = next(one for one in LABELS if one != wnid)
    (unpacked / "val" / wnid / name).rename(unpacked / "val" / wrong / name)
    assert f"{name}: the ground truth has another class" in line()
    (unpacked / "val" / wrong / name).unlink()
    assert "the first that is missing is ILSVRC2012_val_00000005" in line()
    (unpacked / "train" / "n02000000").mkdir()
    (unpacked / "train" / "n02000000" / "n02000000_1.JPEG").write_bytes(content)
    assert "the class n02000000 is in training, but not in the ground truth" in line()


def test_a_good_image_with_the_name_of_a_bad_one_is_kept(ilsvrc, tmp_path):
    """In the tars of two classes."""
    path = ilsvrc.folder / "ILSVRC2012_img_train.tar"
    path.write_bytes(renamed(path.read_bytes(), b"n03126707_9.JPEG", b"n01440764_9.JPEG"))
    make_shards.imagenet(ilsvrc.folder, new(tmp_path / "shards"))
    images = [content for _, content, _ in members(tmp_path / "shards", "train")]
    assert len(images) == 238 and ilsvrc.train["n03126707_9.JPEG"] in images


def test_folders_from_kaggle_are_read_as_they_are(ilsvrc, unpacked, tmp_path):
    top = tmp_path / "kaggle"
    (top / "ILSVRC" / "Data").mkdir(parents=True)
    (unpacked / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    unpacked.rename(top / "ILSVRC" / "Data" / "CLS-LOC")
    rows = [f"{name[:-5]},{wnid} 1 2 3 4" for name, _, wnid in ilsvrc.val]
    (top / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    (top / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} {name}\n" for wnid, name in sources.WORDS.items()))
    make_shards.imagenet(top, new(tmp_path / "shards"))
    make_shards.imagenet(ilsvrc.folder, new(tmp_path / "tars"))
    found, expected = digests(tmp_path / "shards"), digests(tmp_path / "tars")
    assert found["index.json"] == expected["index.json"] and found.items() <= expected.items()
    (top / "LOC_synset_mapping.txt").write_text("tench\n")
    with pytest.raises(ValueError, match=r"LOC_synset_mapping.txt: line 1: expected WordNet id and name, found 'tench'"):
        make_shards.imagenet(top, new(tmp_path / "other"))
