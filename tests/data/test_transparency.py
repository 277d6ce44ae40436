"""What is transparent shows the recipe's background, and is counted."""

import io
import struct
import zlib

import numpy as np
import pytest
from faulty import png, records, write_tar
from PIL import Image

from data_tools.images import Draw, ImageFile
from dnal_dist.data.decoding import decode, read_header
from dnal_dist.data.pipeline import stream


def rgba(alpha: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (size, size), (0, 0, 0, alpha)).save(file, "PNG")
    return file.getvalue()


def test_what_is_transparent_shows_the_recipes_background(tmp_path):
    write_tar(
        tmp_path / "s.tar", {"a.png": rgba(0), "a.cls": b"1", "b.png": rgba(255), "b.cls": b"1", "c.png": png(7), "c.cls": b"1"}
    )
    for named, colour in (({}, [255, 255, 255]), ({"background": (10, 20, 30)}, [10, 20, 30])):
        (batch,) = stream(f"{tmp_path}/s.tar", image_size=8, global_batch=3, train=False, **named)
        assert batch.images[:, :, 0, 0].tolist() == [colour, [0, 0, 0], [7, 7, 7]]
        assert batch.with_alpha == 2


def test_half_transparent_pixels_are_mixed(tmp_path):
    write_tar(tmp_path / "s.tar", {"a.png": rgba(128), "a.cls": b"1"})
    (batch,) = stream(f"{tmp_path}/s.tar", image_size=8, global_batch=1, train=False, background=(200, 100, 0))
    assert np.abs(batch.images[0, :, 0, 0].numpy() - np.array([100.0, 50, 0])).max() <= 1


def png_of_16_bits(colours: int, *values: int, transparent: tuple[int, ...]) -> bytes:
    """A PNG of one row with 1 or 3 values a pixel, of which one colour is transparent."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", len(values) // colours, 1, 16, 0 if colours == 1 else 2, 0, 0, 0)),
        (b"tRNS", struct.pack(f">{colours}H", *transparent)),
        (b"IDAT", zlib.compress(b"\0" + struct.pack(f">{len(values)}H", *values))),
        (b"IEND", b""),
    ]
    chunks = (struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_transparent_colour_of_16_bits_is_transparent():
    grey = png_of_16_bits(1, 0x1234, 0x1235, transparent=(0x1234,))
    assert read_header(grey).alpha and decode(grey, background=(1, 2, 3)).tolist() == [[[1, 2, 3], [0x12] * 3]]
    rgb = png_of_16_bits(3, 0xFF01, 2, 0x0300, 0xFE01, 2, 0x0300, transparent=(0xFF01, 2, 0x0300))
    assert read_header(rgb).alpha and decode(rgb, background=(1, 2, 3)).tolist() == [[[1, 2, 3], [0xFE, 0, 3]]]


def bmp(alpha: int) -> bytes:
    """Two pixels with room for alpha."""
    head = struct.pack("<IiiHHIIiiII", 108, 2, 1, 1, 32, 3, 8, 0, 0, 0, 0)
    head += struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + 8, 0, 0, 14 + len(head)) + head + bytes([30, 20, 10, alpha] * 2)


@pytest.mark.parametrize("alpha, seen", [(0, [10, 20, 30]), (255, [10, 20, 30]), (51, [206, 208, 210])])
def test_a_bmp_whose_alpha_is_empty_has_none(tmp_path, alpha, seen):
    assert decode(bmp(alpha)).tolist() == [[seen] * 2]
    (tmp_path / "a.bmp").write_bytes(bmp(alpha))
    _, stored, kind, _ = Draw()(0, ImageFile(str(tmp_path / "a.bmp"), 0, len(bmp(alpha)), "a.bmp", 0, 0))
    assert kind == "png" and decode(stored).tolist() == [[seen] * 2]


def test_training_tells_how_many_images_are_transparent(train, folder):
    write_tar(folder / "train-0.tar", {f"{i:02}.{k}": one for i in range(16) for k, one in (("png", rgba(90)), ("cls", b"1"))})
    assert train("data.background=[9, 8, 7]").code == 0
    messages = [one["message"] for one in records(folder, "warning") if "alpha" in one["message"]]
    assert messages == [
        "key 'data.train': 16 images so far have an alpha channel; what is transparent in them shows key "
        "'data.background' (9, 8, 7)"
    ]
