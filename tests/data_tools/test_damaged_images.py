"""Images that training cannot use are left out of the shards, listed and counted; a source that changes is not continued."""

import io
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from making import command, digests, flipped, new, refused, scan, skipped, streamed
from PIL import Image

from data_tools import make_shards
from data_tools.images import MAX_PIXELS, Draw, files_in, listing
from data_tools.record import digest
from dnal_dist.data.decoding import ImageError, decode, refusal
from dnal_dist.recipe import Data


@pytest.fixture
def damaged(tmp_path):
    """Folders of 400 images, of which some are damaged each in its own way."""
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


def test_images_that_training_cannot_use_are_left_out_and_listed(damaged, tmp_path, capsys):
    (damaged.train / "001.jpg").write_bytes(b"")
    (damaged.train / "002.jpg").write_bytes(damaged.whole[:-100])
    (damaged.train / "003.jpg").write_bytes(b"RIFF" + bytes(100))
    # Damage in the middle of a PNG, for which torchvision would end the process.
    (damaged.train / "050.jpg").write_bytes(flipped((damaged.train / "050.jpg").read_bytes(), 150))
    out = tmp_path / "shards"
    code, said = command(capsys, "folder", damaged.folder, out, "--shard-samples", 100, "--max-bad", "0.02")
    assert code == 0
    assert said.endswith(f"{out}: 376 samples for train, 20 samples for val; 4 images left out, see {out / 'skipped.json'}\n")
    reasons = skipped(out)
    assert reasons.keys() == {"001.jpg", "002.jpg", "003.jpg", "050.jpg"}
    assert reasons["001.jpg"] == "it is empty" and "truncated" in reasons["002.jpg"]
    assert reasons["003.jpg"] == "it is none of JPEG, PNG, GIF, WEBP, BMP, TIFF (it begins with 52 49 46 46)"
    assert [len(scan(path)) for path in sorted(out.glob("train-*.tar"))] == [94] * 4
    assert len(streamed(out, "train", 8, 2)) == 376


def test_only_check_and_resize_decode_images_that_look_whole(damaged, tmp_path):
    """A JPEG with a damaged table of codes, for one, begins and ends as a whole one does."""
    tables = damaged.whole.index(b"\xff\xc4") + 6
    (damaged.train / "000.jpg").write_bytes(damaged.whole[:tables] + b"\xff" * 12 + damaged.whole[tables + 12 :])
    for name, options in (("quick", {}), ("check", {"check": True}), ("resize", {"resize": 8})):
        make_shards.image_folder(damaged.folder, new(tmp_path / name), **options)
    assert not (tmp_path / "quick" / "skipped.json").exists()
    assert skipped(tmp_path / "check").keys() == skipped(tmp_path / "resize").keys() == {"000.jpg"}


def test_a_source_with_many_bad_images_is_refused(damaged, tmp_path, capsys):
    for i in range(4):
        (damaged.train / f"{i:03d}.jpg").write_bytes(b"")
    line = refused(capsys, "folder", damaged.folder, tmp_path / "shards")
    assert "4 of 380 images for train cannot be used, more than 1.0%" in line and "000.jpg: it is empty" in line
    assert not list((tmp_path / "shards").glob("*.tar"))
    with pytest.raises(ValueError, match="all of"):
        for path in (damaged.folder / "val").rglob("*.jpg"):
            path.write_bytes(b"")
        make_shards.image_folder(damaged.folder, new(tmp_path / "none"), max_bad=1.0)


def test_a_changed_source_is_not_continued(damaged, tmp_path, monkeypatch):
    drawn, draw = [], Draw.__call__

    def stop(self, number, image):
        drawn.append(number)
        if len(drawn) > 150:
            raise KeyboardInterrupt
        return draw(self, number, image)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data_tools.images.Draw.__call__", stop)
        make_shards.image_folder(damaged.folder, new(tmp_path / "shards"), shard_samples=100)
    (damaged.train / "000.jpg").unlink()
    with pytest.raises(ValueError, match=r"of other options \(its source has changed\)"):
        make_shards.image_folder(damaged.folder, tmp_path / "shards", shard_samples=100)


def test_a_command_that_continues_does_not_check_again(damaged, tmp_path, monkeypatch):
    (damaged.train / "001.jpg").write_bytes(b"")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data_tools.images.Draw.__call__", stop)
        make_shards.image_folder(damaged.folder, new(tmp_path / "shards"))
    with monkeypatch.context() as patch:
        patch.setattr("data_tools.images.fault", stop)
        make_shards.image_folder(damaged.folder, tmp_path / "shards")
    make_shards.image_folder(damaged.folder, new(tmp_path / "at_once"))
    assert digests(tmp_path / "shards") == digests(tmp_path / "at_once")
    assert skipped(tmp_path / "shards") == {"001.jpg": "it is empty"}


def test_overwrite_removes_nothing_before_the_source_is_known_to_be_good(damaged, tmp_path, capsys):
    out = new(tmp_path / "shards")
    make_shards.image_folder(damaged.folder, out)
    before, whole = digests(out), {path: path.read_bytes() for path in damaged.train.glob("00*.jpg")}
    for path in whole:
        path.write_bytes(b"")
    assert "cannot be used" in refused(capsys, "folder", damaged.folder, out, "--overwrite", "--workers", 1)
    assert digests(out) == before
    for path, content in whole.items():
        path.write_bytes(content)
    make_shards.image_folder(damaged.folder, out, seed=1, overwrite=True)
    make_shards.image_folder(damaged.folder, new(tmp_path / "other"), seed=1)
    assert digests(out) == digests(tmp_path / "other") != before


def test_a_mended_source_is_used(damaged, tmp_path, capsys):
    whole = {path: path.read_bytes() for path in damaged.train.glob("00*.jpg")}
    for path in whole:
        path.write_bytes(b"")
    for _ in range(2):
        assert "mend the source" in refused(capsys, "folder", damaged.folder, tmp_path / "shards", "--workers", 1)
    for path, content in whole.items():
        path.write_bytes(content)
    assert command(capsys, "folder", damaged.folder, tmp_path / "shards", "--workers", 1)[0] == 0
    assert not (tmp_path / "shards" / "skipped.json").exists()


def spoiled(number: int) -> bytes:
    """An image that is cut short, or has a bit, a byte or forty bytes changed."""
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


def test_training_skips_exactly_the_images_left_out():
    """And a PNG with a wrong checksum, which Pillow decodes for training and other decoders do not."""
    verdicts = []
    for number in range(400):
        content = spoiled(number)
        try:
            decode(content)
        except ImageError:
            verdicts.append(False)
        else:
            verdicts.append(True)
        reason = refusal(content, MAX_PIXELS)[0]
        assert (not reason) == verdicts[-1], f"{number}: {reason}"
    assert 50 < sum(verdicts) < 350


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
def test_an_animation_is_left_out(kind):
    frames, out = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")], io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:])
    assert refusal(out.getvalue(), MAX_PIXELS)[0] == "it is animated, or has several pages"


def test_images_of_more_pixels_than_training_takes_are_left_out(damaged, tmp_path, monkeypatch):
    assert MAX_PIXELS == Data(train="-", val="-", image_size=8, global_batch=1).max_pixels == 100_000_000
    monkeypatch.setattr("data_tools.images.MAX_PIXELS", 1000)
    for number, (width, height) in enumerate(((40, 25), (40, 26))):
        Image.new("RGB", (width, height)).save(damaged.train / f"{number:03d}.jpg")
        Image.new("RGB", (width, height)).save(damaged.train / f"{number:03d}.png")
    make_shards.image_folder(damaged.folder, new(tmp_path / "shards"))
    said = "40 x 26 pixels, more than data.max_pixels (1000) allows"
    assert skipped(tmp_path / "shards") == {"001.jpg": said, "001.png": said}


def test_the_pixel_limit_is_ours_and_not_pillows():
    """Of 180 million pixels Pillow refuses an image; a whole one of 99 million is let pass."""
    out = io.BytesIO()
    Image.new("1", (9000, 11_000)).save(out, "PNG")
    assert refusal(out.getvalue(), MAX_PIXELS)[0] == ""
    out = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(out, "PNG")
    assert "20000 x 10000 pixels, more than data.max_pixels" in refusal(out.getvalue(), MAX_PIXELS)[0]


def test_other_kinds_and_broken_links_are_counted(damaged, tmp_path):
    Image.new("RGB", (8, 8)).save(damaged.train / "other.ppm")
    Image.new("F", (8, 8)).save(damaged.train / "other.TIFF")
    (damaged.train / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    make_shards.image_folder(damaged.folder, new(tmp_path / "shards"))
    reasons = skipped(tmp_path / "shards")
    assert reasons.keys() == {"other.ppm", "other.TIFF", "gone.jpg"}
    assert "none of JPEG, PNG, GIF" in reasons["other.ppm"] and reasons["gone.jpg"] == "it is a link to a missing file"
    assert "floating-point" in reasons["other.TIFF"]


def test_a_class_that_loses_all_its_images_is_refused(damaged, tmp_path):
    (damaged.folder / "train" / "c").mkdir()
    Image.new("RGB", (8, 8)).save(damaged.folder / "train" / "c" / "other.ppm")
    with pytest.raises(ValueError, match="none of the training images of 'c' can be used"):
        make_shards.image_folder(damaged.folder, new(tmp_path / "shards"))


def test_an_image_changed_to_one_of_the_same_size_is_noticed_and_a_move_is_not(damaged, tmp_path, monkeypatch):
    def content(source):
        found = files_in(source / "train" / "a", 0)
        return digest(listing({"train": found}, source))

    before, path = content(damaged.folder), damaged.train / "000.jpg"
    monkeypatch.chdir(tmp_path)
    assert content(Path("in")) == before
    path.write_bytes(flipped(path.read_bytes(), 300))
    os.utime(path, ns=(0, 1 + path.stat().st_mtime_ns))
    assert content(damaged.folder) != before
