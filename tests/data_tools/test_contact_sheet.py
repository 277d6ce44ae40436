"""The contact sheet shows samples of the shards, each with its own label."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from shards_made import ended, made, name_classes

from data_tools import make_shards, verify
from data_tools.images import png


def test_a_contact_sheet_that_cannot_be_written_is_refused_before_anything_is_read(own, monkeypatch, capsys):
    def never(*_):
        raise AssertionError("shards were read")

    monkeypatch.setattr(verify, "survey", never)
    for path in (own.parent / "none" / "sheet.png", own):
        code, out, err = ended(verify, capsys, own, "--contact-sheet", path)
        assert code == 2 and not out and f"--contact-sheet: {path} cannot be written" in err


def test_findings_are_printed_if_the_contact_sheet_fails(own, monkeypatch, capsys):
    (own / "index.json").unlink()
    monkeypatch.setattr(Image.Image, "save", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    code, out, err = ended(verify, capsys, own, "--contact-sheet", own.parent / "sheet.png")
    assert code == 2 and out.endswith("6 findings\n") and "no space left" in err


def test_the_contact_sheet_shows_what_the_seed_draws(tmp_path, capsys):
    out = tmp_path / "shards"
    out.mkdir()
    make_shards.synthetic(out, classes=3, train=70, val=3, size=40)
    sheets = {}
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        path = tmp_path / f"{name}.png"
        code, _, _ = ended(verify, capsys, out, "--contact-sheet", path, "--seed", seed)
        assert code == 0
        with Image.open(path) as sheet:
            sheets[name] = np.asarray(sheet)
    assert sheets["a"].shape == (8 * 180, 8 * 160, 3)
    assert (sheets["a"] == sheets["again"]).all() and (sheets["a"] != sheets["b"]).any()
    tiles = sheets["a"].reshape(8, 180, 8, 160, 3).transpose(0, 2, 1, 3, 4).reshape(64, 180, 160, 3)
    for tile in tiles:
        # An image in many colours, and below it a caption in black on white.
        assert len(np.unique(tile[:160].reshape(-1, 3), axis=0)) > 200 and tile[160:].min() < 80 and tile[160, 0].min() == 255


COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (200, 30, 200), (30, 200, 200), (120, 120, 120)]


@pytest.mark.parametrize("name", ["{}", "name {}"])
def test_each_tile_of_a_contact_sheet_shows_a_sample_and_its_own_label(tmp_path, capsys, name):
    """Class c is all COLOURS[c]; its caption is drawn here."""
    members = []
    for number in range(40):
        pixels = np.full((8, 8, 3), COLOURS[number % 7], np.uint8)
        pixels[0, 0, 0] = number
        members += [(f"{number:02d}.cls", b"%d" % (number % 7)), (f"{number:02d}.png", png(pixels))]
    folder = made(tmp_path / "own", 7, train=members)
    name_classes(folder, [name.format(c) for c in range(7)])
    assert ended(verify, capsys, folder, "--contact-sheet", tmp_path / "sheet.png")[0] == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 160, 5 * 180)
        shown, numbers = [], []
        for tile in range(40):
            left, top = tile % 8 * 160, tile // 8 * 180
            label = COLOURS.index(sheet.getpixel((left + 80, top + 80)))
            caption = Image.new("RGB", (160, 20), "white")
            text = f"{label} {name.format(label)}"
            ImageDraw.Draw(caption).text((4, 3), text, "black", font=ImageFont.load_default(11))
            assert (np.asarray(sheet.crop((left, top + 160, left + 160, top + 180))) == np.asarray(caption)).all(), text
            shown.append(label)
            numbers.append(sheet.getpixel((left + 6, top + 6))[0])
    assert sorted(numbers) == list(range(40)) and [number % 7 for number in numbers] == shown


def test_grey_of_16_bits_is_shown_as_training_sees_it(tmp_path, capsys):
    members = [("a.cls", b"0"), ("a.png", png(np.full((8, 8), 100 << 8, np.uint16)))]
    folder = made(tmp_path / "own", 1, train=members)
    assert ended(verify, capsys, folder, "--contact-sheet", tmp_path / "sheet.png")[0] == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.getpixel((80, 80)) == (100, 100, 100)


def test_a_contact_sheet_marks_images_that_cannot_be_decoded(tmp_path, capsys):
    folder = made(tmp_path / "own", 1, train=[("a.cls", b"0"), ("a.jpg", b"no image")])
    code, _, _ = ended(verify, capsys, folder, "--contact-sheet", tmp_path / "sheet.png")
    assert code == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 160, 180) and sheet.getpixel((80, 80)) == (255, 0, 0)
