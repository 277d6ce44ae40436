"""Pictures of folders come through byte for byte, or smaller; those that training cannot use are left out and listed."""

import io
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import sources
from making import command, digests, flipped, members, new, refused, scan, skipped, streamed
from PIL import Image

from data_tools import make_shards
from data_tools.pictures import decoding_fault, resized
from dnal_dist.pictures import PictureError, decode


@pytest.fixture
def pictures(tmp_path):
    """Folders of pictures with extensions as they occur, and beside them what is no picture."""
    random.seed(0)
    for split, count in (("train", 7), ("val", 2)):
        for c, name in enumerate(("n01440764", "n01443537", "z.last")):
            (tmp_path / "in" / split / name).mkdir(parents=True)
            for i in range(count):
                extension = ("JPEG", "jpg", "png")[i % 3]
                image = Image.new("RGB", (random.randint(8, 20), random.randint(8, 20)), (c, i, 255))
                image.save(tmp_path / "in" / split / name / f"{name}_{i}.{extension}", "PNG" if extension == "png" else "JPEG")
    inner = tmp_path / "in" / "train" / "n01440764" / "images"
    inner.mkdir()
    Image.new("RGB", (9, 9)).save(inner / "grey.v2.JPEG", "JPEG")
    (inner / "._grey.JPEG").write_bytes(b"of a Mac")
    (inner / "boxes.txt").write_text("no picture")
    (tmp_path / "in" / "train" / ".hidden").mkdir()
    (inner.parent / ".thumbnails").mkdir()
    (inner.parent / ".thumbnails" / "grey.JPEG").write_bytes(b"no picture of the set")
    return tmp_path / "in"


def test_pictures_of_folders_come_through_byte_for_byte(pictures, tmp_path, monkeypatch, capsys):
    out = tmp_path / "shards"
    code, said = command(monkeypatch, capsys, "folder", pictures, out, "--shard-samples", 8)
    assert (code, said) == (0, f"{out}: 22 samples for train, 6 samples for val\n")
    for split in ("train", "val"):
        expected = [
            (
                path.suffix[1:].lower(),
                path.read_bytes(),
                ("n01440764", "n01443537", "z.last").index(path.relative_to(pictures).parts[1]),
            )
            for path in (pictures / split).rglob("*.*")
            if path.suffix in (".JPEG", ".jpg", ".png") and not {".thumbnails", "._grey.JPEG"} & {*path.parts}
        ]
        assert sorted(members(out, split)) == sorted(expected)
    assert len(streamed(out, "train", 8, 3)) == 22
    assert [path.name for path in sorted(out.glob("train-*"))] == [f"train-{i:06d}.tar" for i in range(3)]
    assert json.loads((out / "index.json").read_text())["classes"] == ["n01440764", "n01443537", "z.last"]


def test_pictures_such_as_imagenet_has_decode(tmp_path):
    """Grey ones, CMYK ones and a PNG that is called JPEG."""
    sources.imagenet(tmp_path / "in", 4)
    make_shards.image_folder(tmp_path / "in", new(tmp_path / "shards"))
    assert len(streamed(tmp_path / "shards", "train", 32, 4)) == 8


def test_the_seed_orders_training_pictures_and_nothing_else(pictures, tmp_path):
    folders = {}
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        folders[name] = new(tmp_path / name)
        make_shards.image_folder(pictures, folders[name], seed=seed)
    assert digests(folders["a"]) == digests(folders["again"])
    assert members(folders["a"], "val") == members(folders["b"], "val")
    assert members(folders["a"], "train") != members(folders["b"], "train")
    assert sorted(members(folders["a"], "train")) == sorted(members(folders["b"], "train"))
    labels = [label for *_, label in members(folders["a"], "train")]
    assert labels != sorted(labels)


def test_folders_that_do_not_fit_are_refused(pictures, tmp_path, monkeypatch, capsys):
    def line(source=pictures):
        return refused(monkeypatch, capsys, "folder", source, tmp_path / "shards")

    assert "nowhere/train: no such folder" in line(tmp_path / "nowhere")
    (pictures / "val" / "other").mkdir()
    assert "val/other: no such class among the 3" in line()
    (pictures / "val" / "other").rmdir()
    (pictures / "train" / "empty").mkdir()
    assert "train/empty: no picture (png, jpg, jpeg)" in line()
    flat = tmp_path / "flat"
    for split in ("train", "val"):
        (flat / split).mkdir(parents=True)
        (flat / split / "one.jpg").write_bytes(b"picture")
    assert "flat/train: holds no folders" in line(flat)


@pytest.fixture
def damaged(tmp_path):
    """Folders of 400 pictures, of which some are damaged each in its own way."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 190), ("val", 10)):
        for name in ("a", "b"):
            folder = tmp_path / "in" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
                pixels.save(folder / f"{i:03d}.jpg", "PNG" if i == 50 else "JPEG")
    train = tmp_path / "in" / "train" / "a"
    return SimpleNamespace(folder=tmp_path / "in", train=train, whole=(train / "000.jpg").read_bytes())


def test_pictures_that_training_cannot_use_are_left_out_and_listed(damaged, tmp_path, monkeypatch, capsys):
    (damaged.train / "001.jpg").write_bytes(b"")
    (damaged.train / "002.jpg").write_bytes(damaged.whole[:-100])
    (damaged.train / "003.jpg").write_bytes(b"GIF89a" + bytes(100))
    # Damage in the middle of a PNG, for which torchvision would end the process.
    (damaged.train / "050.jpg").write_bytes(flipped((damaged.train / "050.jpg").read_bytes(), 150))
    out = tmp_path / "shards"
    code, said = command(monkeypatch, capsys, "folder", damaged.folder, out, "--shard-samples", 100, "--max-bad", "0.02")
    assert code == 0
    assert said == f"{out}: 376 samples for train, 20 samples for val; 4 pictures left out, see {out / 'skipped.json'}\n"
    reasons = skipped(out)
    assert reasons.keys() == {"001.jpg", "002.jpg", "003.jpg", "050.jpg"}
    assert reasons["001.jpg"] == "it is empty" and "truncated" in reasons["002.jpg"]
    assert reasons["003.jpg"] == "it is neither JPEG nor PNG (it begins with 47 49 46 38)"
    assert [len(scan(path)) for path in sorted(out.glob("train-*.tar"))] == [94] * 4
    assert len(streamed(out, "train", 8, 2)) == 376


def test_only_check_and_resize_decode_what_looks_whole(damaged, tmp_path):
    """A JPEG with a damaged table of codes, for one, begins and ends as a whole one does."""
    tables = damaged.whole.index(b"\xff\xc4") + 6
    (damaged.train / "000.jpg").write_bytes(damaged.whole[:tables] + b"\xff" * 12 + damaged.whole[tables + 12 :])
    for name, options in (("quick", {}), ("check", {"check": True}), ("resize", {"resize": 8})):
        make_shards.image_folder(damaged.folder, new(tmp_path / name), **options)
    assert not (tmp_path / "quick" / "skipped.json").exists()
    assert skipped(tmp_path / "check").keys() == skipped(tmp_path / "resize").keys() == {"000.jpg"}


def test_a_source_with_many_bad_pictures_is_refused(damaged, tmp_path, monkeypatch, capsys):
    for i in range(4):
        (damaged.train / f"{i:03d}.jpg").write_bytes(b"")
    line = refused(monkeypatch, capsys, "folder", damaged.folder, tmp_path / "shards")
    assert "4 of 380 pictures for train cannot be used, more than 1.0%" in line and "000.jpg: it is empty" in line
    assert not list((tmp_path / "shards").glob("*.tar"))
    with pytest.raises(ValueError, match="all of"):
        for path in (damaged.folder / "val").rglob("*.jpg"):
            path.write_bytes(b"")
        make_shards.image_folder(damaged.folder, new(tmp_path / "none"), max_bad=1.0)


def test_a_source_that_changed_is_not_gone_on_with(damaged, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data_tools.pictures.Draw.__call__", stop)
        make_shards.image_folder(damaged.folder, new(tmp_path / "shards"))
    (damaged.train / "000.jpg").unlink()
    with pytest.raises(ValueError, match=r"made otherwise \(its source has changed\)"):
        make_shards.image_folder(damaged.folder, tmp_path / "shards")


def test_what_was_checked_is_not_checked_again_by_a_command_that_goes_on(damaged, tmp_path, monkeypatch):
    (damaged.train / "001.jpg").write_bytes(b"")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data_tools.pictures.Draw.__call__", stop)
        make_shards.image_folder(damaged.folder, new(tmp_path / "shards"))
    with monkeypatch.context() as patch:
        patch.setattr("data_tools.pictures.fault", stop)
        make_shards.image_folder(damaged.folder, tmp_path / "shards")
    make_shards.image_folder(damaged.folder, new(tmp_path / "at_once"))
    assert digests(tmp_path / "shards") == digests(tmp_path / "at_once")
    assert skipped(tmp_path / "shards") == {"001.jpg": "it is empty"}


def spoiled(number: int) -> bytes:
    """A picture that is cut short, or has a bit, a byte or forty bytes changed."""
    rng, out = np.random.default_rng(number), io.BytesIO()
    kinds = ("JPEG", "RGB", {}), ("JPEG", "CMYK", {}), ("JPEG", "RGB", {"progressive": True}), ("PNG", "RGB", {})
    kind, mode, options = kinds[number % 4]
    Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).convert(mode).save(out, kind, **options)
    content = bytearray(out.getvalue())
    at = int(rng.integers(1, len(content) - 40))
    if number // 4 % 4 == 0:
        return bytes(content[:at])
    if number // 4 % 4 == 3:
        content[at : at + 40] = bytes(40)
    else:
        at = at if number // 4 % 4 == 1 else at % 300
        content[at] ^= int(rng.integers(1, 256))
    return bytes(content)


def test_what_is_left_out_is_what_training_skips():
    """And a PNG with a wrong checksum, which Pillow decodes for training and other decoders do not."""
    verdicts = []
    for number in range(400):
        content = spoiled(number)
        try:
            decode(content)
        except PictureError:
            verdicts.append(False)
        else:
            verdicts.append(True)
        reason = decoding_fault(content)[0]
        assert (reason is None) == verdicts[-1] or (verdicts[-1] and content.startswith(b"\x89PNG")), f"{number}: {reason}"
    assert 50 < sum(verdicts) < 350


def test_an_animation_is_left_out():
    frames, out = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")], io.BytesIO()
    frames[0].save(out, "PNG", save_all=True, append_images=frames[1:])
    assert decoding_fault(out.getvalue())[0] == "it is animated"


SMOOTH = np.add.outer(np.arange(90), np.arange(120))[..., None].repeat(3, 2).astype(np.uint8)


@pytest.mark.parametrize(
    "mode, kind", [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("I;16", "PNG"), ("P", "PNG")]
)
def test_a_larger_picture_becomes_a_smaller_jpeg_of_the_same_looks(mode, kind):
    source = Image.fromarray(SMOOTH[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(SMOOTH).convert(mode)
    out = io.BytesIO()
    source.save(out, kind, **({"quality": 95} if kind == "JPEG" else {}))
    with Image.open(io.BytesIO(resized(out.getvalue(), 45))) as small:
        assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (60, 45))
        expected = np.asarray(Image.fromarray(SMOOTH).resize((60, 45), Image.Resampling.LANCZOS), float)
        assert np.abs(np.asarray(small, float) - expected).mean() < 6
    assert resized(out.getvalue(), 90) is None and resized(out.getvalue(), 400) is None


def test_resizing_follows_no_orientation_and_drops_what_training_does_not_look_at():
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(SMOOTH).save(out, "JPEG", exif=exif, icc_profile=b"a profile of colours")
    with Image.open(io.BytesIO(resized(out.getvalue(), 30))) as small:
        assert small.size == (40, 30) and not small.getexif() and "icc_profile" not in small.info


def test_resize_leaves_small_pictures_as_they_are(pictures, tmp_path):
    Image.fromarray(SMOOTH).save(pictures / "val" / "z.last" / "large.png")
    make_shards.image_folder(pictures, new(tmp_path / "shards"), resize=30, quality=80)
    make_shards.image_folder(pictures, new(tmp_path / "as_they_are"))
    assert members(tmp_path / "shards", "train") == members(tmp_path / "as_they_are", "train")
    small, before = (dict(enumerate(members(tmp_path / name, "val"))) for name in ("shards", "as_they_are"))
    (changed,) = (i for i in small if small[i] != before[i])
    assert small[changed][0] == "jpg" and before[changed][0] == "png" and small[changed][2] == before[changed][2]
    with Image.open(io.BytesIO(small[changed][1])) as picture:
        assert picture.size == (40, 30)
