"""Images of folders are stored byte for byte, or smaller; those that training cannot use are left out and listed."""

import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import sources
from making import command, digests, members, new, refused, streamed
from PIL import Image

from data_tools import make_shards
from data_tools.images import Draw, ImageFile, resized
from dnal_dist.data.decoding import decode


@pytest.fixture
def images(tmp_path):
    """Folders of images with extensions as they occur, and beside them what is no image."""
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
    (inner / "boxes.txt").write_text("no image")
    (tmp_path / "in" / "train" / ".hidden").mkdir()
    (inner.parent / ".thumbnails").mkdir()
    (inner.parent / ".thumbnails" / "grey.JPEG").write_bytes(b"no image of the set")
    return tmp_path / "in"


def test_images_of_folders_are_stored_byte_for_byte(images, tmp_path, capsys):
    out = tmp_path / "shards"
    code, said = command(capsys, "folder", images, out, "--shard-samples", 8)
    assert code == 0 and said.endswith(f"{out}: 22 samples for train, 6 samples for val\n")
    for split in ("train", "val"):
        expected = [
            (
                path.suffix[1:].lower(),
                path.read_bytes(),
                ("n01440764", "n01443537", "z.last").index(path.relative_to(images).parts[1]),
            )
            for path in (images / split).rglob("*.*")
            if path.suffix in (".JPEG", ".jpg", ".png") and not {".thumbnails", "._grey.JPEG"} & {*path.parts}
        ]
        assert sorted(members(out, split)) == sorted(expected)
    assert len(streamed(out, "train", 8, 3)) == 22
    assert [path.name for path in sorted(out.glob("train-*"))] == [f"train-{i:06d}.tar" for i in range(3)]
    assert json.loads((out / "index.json").read_text())["classes"] == ["n01440764", "n01443537", "z.last"]


def test_images_like_those_of_imagenet_decode(tmp_path):
    """Grey ones, CMYK ones and a PNG that is called JPEG."""
    sources.imagenet(tmp_path / "in", 4)
    make_shards.image_folder(tmp_path / "in", new(tmp_path / "shards"))
    assert len(streamed(tmp_path / "shards", "train", 32, 4)) == 8


def test_the_seed_orders_training_images_and_nothing_else(images, tmp_path):
    folders = {}
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        folders[name] = new(tmp_path / name)
        make_shards.image_folder(images, folders[name], seed=seed)
    assert digests(folders["a"]) == digests(folders["again"])
    assert members(folders["a"], "val") == members(folders["b"], "val")
    assert members(folders["a"], "train") != members(folders["b"], "train")
    assert sorted(members(folders["a"], "train")) == sorted(members(folders["b"], "train"))
    labels = [label for *_, label in members(folders["a"], "train")]
    assert labels != sorted(labels)


def test_folders_that_do_not_fit_are_refused(images, tmp_path, capsys):
    def line(source=images):
        return refused(capsys, "folder", source, tmp_path / "shards")

    assert "nowhere/train: no such folder" in line(tmp_path / "nowhere")
    (images / "val" / "other").mkdir()
    assert "val/other: no such class among the 3" in line()
    (images / "val" / "other").rmdir()
    (images / "train" / "empty").mkdir()
    assert "train/empty: no image (png, jpg, jpeg, webp, bmp, tif, tiff, gif)" in line()
    flat = tmp_path / "flat"
    for split in ("train", "val"):
        (flat / split).mkdir(parents=True)
        (flat / split / "one.jpg").write_bytes(b"image")
    assert "flat/train: holds no folders" in line(flat)


@pytest.mark.parametrize("kind, extension", [("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tif"), ("TIFF", "TIFF")])
def test_a_gif_bmp_or_tiff_becomes_a_png_of_the_same_pixels(images, tmp_path, kind, extension):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11), np.uint8)
    for name in (f"a.{extension}", "b.jpg"):
        Image.fromarray(pixels).save(images / "val" / "z.last" / name, kind)
    make_shards.image_folder(images, new(tmp_path / "shards"))
    found = [encoded for extension, encoded, _ in members(tmp_path / "shards", "val") if extension == "png"]
    same = [one for one in found if (decode(one) == pixels[..., None]).all() and one.startswith(b"\x89PNG")]
    assert len(found) == 2 and len(same) == 2


def test_a_webp_is_stored_byte_for_byte(images, tmp_path):
    for name in ("a.webp", "b.jpg"):
        Image.new("RGB", (9, 11), "red").save(images / "val" / "z.last" / name, "WEBP")
    make_shards.image_folder(images, new(tmp_path / "shards"))
    found = [encoded for extension, encoded, _ in members(tmp_path / "shards", "val") if extension == "webp"]
    assert found == [(images / "val" / "z.last" / "a.webp").read_bytes()] * 2
    assert len(streamed(tmp_path / "shards", "val", 8, 3)) == 8


def test_links_are_followed_but_not_in_circles(images, tmp_path, capsys):
    (tmp_path / "elsewhere" / "inner").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "inner" / "far.jpg")
    for link in (images / "train" / "z.last" / "linked", images / "train" / "zz"):
        link.symlink_to(tmp_path / "elsewhere")
    make_shards.image_folder(images, new(tmp_path / "shards"))
    assert len(members(tmp_path / "shards", "train")) == 24
    (tmp_path / "elsewhere" / "inner" / "back").symlink_to(tmp_path / "elsewhere")
    said = refused(capsys, "folder", images, tmp_path / "other")
    assert "linked/inner/back: a link to a folder around it" in said


def test_a_folder_that_cannot_be_read_is_named(images, tmp_path, monkeypatch, capsys):
    secret, scandir = images / "train" / "n01440764" / "images", os.scandir

    def closed(path):
        if Path(path) == secret:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", closed)
        said = refused(capsys, "folder", images, tmp_path / "shards")
    assert f"{secret}: cannot be read (Permission denied); make it readable, or remove it" in said
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"\.JPEG: cannot be read \(Input/output error\)"):
        patch.setattr("os.pread", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        make_shards.image_folder(images, new(tmp_path / "io"))
    with pytest.raises(ValueError, match=r"gone\.jpg: cannot be read \(No such file .*; make it readable, or remove it"):
        Draw()(0, ImageFile(str(tmp_path / "gone.jpg"), 0, 9, "gone.jpg", 0))


SMOOTH = np.add.outer(np.arange(90), np.arange(120))[..., None].repeat(3, 2).astype(np.uint8)


@pytest.mark.parametrize(
    "mode, kind", [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("I;16", "PNG"), ("P", "PNG")]
)
def test_a_larger_image_becomes_a_smaller_jpeg_that_looks_the_same(mode, kind):
    source = Image.fromarray(SMOOTH[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(SMOOTH).convert(mode)
    out = io.BytesIO()
    source.save(out, kind, **({"quality": 95} if kind == "JPEG" else {}))
    with Image.open(io.BytesIO(resized(out.getvalue(), 45))) as small:
        assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (60, 45))
        expected = np.asarray(Image.fromarray(SMOOTH).resize((60, 45), Image.Resampling.LANCZOS), float)
        assert np.abs(np.asarray(small, float) - expected).mean() < 6
    assert resized(out.getvalue(), 90) is None and resized(out.getvalue(), 400) is None


def test_resizing_follows_no_orientation_and_drops_metadata():
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(SMOOTH).save(out, "JPEG", exif=exif, icc_profile=b"a profile of colours")
    with Image.open(io.BytesIO(resized(out.getvalue(), 30))) as small:
        assert small.size == (40, 30) and not small.getexif() and "icc_profile" not in small.info


def test_resize_leaves_small_images_as_they_are(images, tmp_path):
    Image.fromarray(SMOOTH).save(images / "val" / "z.last" / "large.png")
    make_shards.image_folder(images, new(tmp_path / "shards"), resize=30, quality=80)
    make_shards.image_folder(images, new(tmp_path / "as_they_are"))
    assert members(tmp_path / "shards", "train") == members(tmp_path / "as_they_are", "train")
    small, before = (dict(enumerate(members(tmp_path / name, "val"))) for name in ("shards", "as_they_are"))
    (changed,) = (i for i in small if small[i] != before[i])
    assert small[changed][0] == "jpg" and before[changed][0] == "png" and small[changed][2] == before[changed][2]
    with Image.open(io.BytesIO(small[changed][1])) as image:
        assert image.size == (40, 30)


def test_a_split_is_drawn_from_each_class_by_the_seed(images, tmp_path, capsys):
    def kept(name, *options) -> list:
        code, said = command(capsys, "folder", images / "train", tmp_path / name, "--split", 0.3, *options)
        assert code == 0 and "n01440764          6          2\n" in said, said
        assert said.endswith("16 samples for train, 6 samples for val\n")
        return members(tmp_path / name, "val")

    first = kept("a")
    assert [label for *_, label in first] == [0, 0, 1, 1, 2, 2]
    assert kept("again") == first != kept("b", "--seed", 1)
    assert not {image for _, image, _ in first} & {image for _, image, _ in members(tmp_path / "a", "train")}


def test_validation_images_are_found_elsewhere_or_drawn(images, tmp_path, capsys):
    def line(*options) -> str:
        return refused(capsys, "folder", images, tmp_path / "shards", *options)

    assert "val: validation images are there already; leave out --split 0.1" in line("--split", 0.1)
    (images / "val").rename(images / "test")
    assert "no folder val/ for validation; --val-from test takes test/ for validation, --split 0.1 draws" in line()
    assert "--split and --val-from name two sources" in line("--split", 0.1, "--val-from", "test")
    assert "--val-from train: these are the training images" in line("--val-from", "train")
    assert "nowhere: no such folder; --val-from wants the name of one" in line("--val-from", "nowhere")
    assert "no folder val/ for validation; --split 0.1 draws" in refused(capsys, "folder", images / "train", tmp_path / "shards")
    code, said = command(capsys, "folder", images, tmp_path / "shards", "--val-from", "test")
    assert code == 0 and said.endswith("22 samples for train, 6 samples for val\n")
    for folder in list((images / "train").iterdir()):
        folder.rename(images / folder.name)
    (images / "train").rmdir()
    assert "test: beside folders of classes, and named as images for validation" in line("--split", 0.1)
