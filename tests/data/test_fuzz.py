"""Readers of shards, indices and images under random damage, drawn by a seed: a named fault or a right answer, and nothing else."""

import io
import json
import os
import random
import struct
import subprocess
import sys
import tarfile
import zlib
from itertools import pairwise

import numpy as np
import pytest
from faulty import png, write_tar
from PIL import Image

from dnal_dist.common.errors import InputError
from dnal_dist.data.classes import class_names
from dnal_dist.data.decoding import ImageError, decode, read_header, refusal
from dnal_dist.data.pipeline import stream
from dnal_dist.data.samples import Fault, SampleFormat, parse
from dnal_dist.data.shards import Shards
from dnal_dist.data.tar import boundaries

VALUES = (None, True, -1, 0, 3, 1 << 70, 0.5, "", "x", "../x", "\x1b[2J", [], [[]], {}, {"file": 1}, [None], "9" * 5000, 1e300)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """With bytes replaced, cut out, doubled or cut off."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(max(1, len(content)))
        kind = draw.randrange(5)
        if kind == 0 and content:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            length = draw.choice((1, 12, 512))
            content[at : at + length] = draw.randbytes(length)
        elif kind == 2:
            del content[at : at + draw.choice((1, 100, 512))]
        elif kind == 3:
            content[at:at] = content[at : at + 700]
        elif len(content) > 600:
            del content[at | 256 :]
    return bytes(content)


def tar(kind: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as out:
        for i in range(6):
            for extension, content in (("png", png(i)), ("cls", b"1"), ("json", b'{"a": 1}')):
                member = tarfile.TarInfo(f"{'long' * 30 * (i % 2 and kind > 0)}{i}.{extension}")
                member.size, member.pax_headers = len(content), {"comment": "é"} if kind == tarfile.PAX_FORMAT else {}
                out.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_damaged_tar_gives_samples_and_faults(kind):
    draw, whole, seen = random.Random(kind), tar(kind), set()
    for _ in range(100):
        content = damaged(whole, draw)
        offsets, damage = boundaries(io.BytesIO(content))
        assert offsets == sorted(offsets) and offsets[0] >= 0 and offsets[-1] <= len(content)
        assert all(0 <= at <= len(content) and reason.isprintable() for at, reason in damage)
        for begin, end in pairwise(offsets):
            try:
                seen.add(type(parse(content[begin:end], SampleFormat(10))))
            except Fault as fault:
                seen.add(Fault)
                assert str(fault).isprintable() and len(fault.reason) < 600
    assert len(seen) == 2


def test_pax_records_of_every_kind_give_samples_and_faults():
    """Keys that tarfile gives a meaning to, with values that mean harm."""
    draw = random.Random(1)
    keys = ("size", "path", "linkpath", "uid", "mtime", "hdrcharset", "GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.major", "")
    values = ("9" * 5000, "-1", "1e9", "", "é", "0,0,0", "BINARY", "nan", "../x", str(1 << 63))
    for _ in range(100):
        records = b""
        for _ in range(draw.randint(1, 3)):
            record = f" {draw.choice(keys)}={draw.choice(values)}\n".encode()
            records += str(draw.choice((len(record) + 2, len(record) + 4, 0, 10**30))).encode() + record
        head, member = tarfile.TarInfo("pax"), tarfile.TarInfo("a.png")
        head.type, head.size = draw.choice((tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)), len(records)
        content = head.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // 512) * 512, b"\0")
        content += member.tobuf(tarfile.USTAR_FORMAT) + tar(tarfile.USTAR_FORMAT)
        offsets, _ = boundaries(io.BytesIO(content))
        for begin, end in pairwise(offsets):
            try:
                parse(content[begin:end])
            except Fault as fault:
                assert str(fault).isprintable()
        # Whatever was before them, most samples of the rest are found.
        assert len(offsets) >= 6, (content[:1024], offsets)


def mutated(tree, draw: random.Random):
    """The tree of JSON with one part of it replaced or left out."""
    if isinstance(tree, dict) and tree and draw.random() < 0.9:
        key = draw.choice(sorted(tree))
        return {k: mutated(v, draw) if k == key else v for k, v in tree.items() if k != key or draw.random() < 0.9}
    if isinstance(tree, list) and tree and draw.random() < 0.8:
        at = draw.randrange(len(tree))
        return [*tree[:at], mutated(tree[at], draw), *tree[at + 1 :]]
    return draw.choice(VALUES)


def test_a_damaged_index_is_used_or_refused_in_one_line(tmp_path):
    write_tar(tmp_path / "s.tar", {f"{i}.{kind}": one for i in range(4) for kind, one in (("png", png(i)), ("cls", b"1"))})
    with (tmp_path / "s.tar").open("rb") as file:
        offsets, _ = boundaries(file)
    entry = {"file": "s.tar", "samples": 4, "bytes": (tmp_path / "s.tar").stat().st_size, "sha256": "0" * 64, "offsets": offsets}
    draw, outcomes = random.Random(3), {True: 0, False: 0}
    for number in range(200):
        text = json.dumps(mutated({"version": 1, "classes": ["a", "b"], "shards": [entry]}, draw)).encode()
        (tmp_path / "index.json").write_bytes(damaged(text, draw) if number % 4 == 0 else text)
        try:
            shards = Shards(f"{tmp_path}/s.tar", "data.train", 10)
            for index in range(shards.samples):
                try:
                    shards[index]
                except Fault as fault:
                    assert str(fault).isprintable()
            shards.close()
        except InputError as error:
            assert str(error).isprintable() and len(str(error)) < 800
            outcomes[False] += 1
        else:
            outcomes[True] += 1
        assert all(isinstance(name, str) for name in class_names(tmp_path))
    assert min(outcomes.values()) > 20


def test_a_pipe_or_a_device_is_no_index(tmp_path):
    write_tar(tmp_path / "s.tar", {"a.png": png(), "a.cls": b"1"})
    index = tmp_path / "index.json"
    os.mkfifo(index)
    with pytest.raises(InputError, match=r"index\.json: not a regular file"):
        Shards(f"{tmp_path}/s.tar", "data.train", 10)
    index.unlink()
    index.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"index\.json: not a regular file"):
        Shards(f"{tmp_path}/s.tar", "data.train", 10)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_damaged_image_is_decoded_or_refused_in_one_line(kind):
    draw, file, outcomes = random.Random(5), io.BytesIO(), {True: 0, False: 0}
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 72, 3), np.uint8)).save(file, kind, exif=exif)
    for number in range(150):
        # More often in the header, where the readers differ.
        whole = file.getvalue()
        content = damaged(whole[:64], draw) + whole[64:] if number % 2 else damaged(whole, draw)
        try:
            header = read_header(content, exif=True)
            if header.height * header.width < 1 << 20:
                assert decode(content, header).shape == (header.height, header.width, 3)
            outcomes[True] += 1
        except ImageError as error:
            assert str(error).isprintable() and len(str(error)) < 400
            outcomes[False] += 1
        assert refusal(content, 1 << 20)[0].isprintable()
    assert outcomes[False] > 5


def line(width: int, height: int) -> bytes:
    """A black PNG of 8 bits grey, whose file is a thousandth of its pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = zlib.compress(bytes((width + 1) * height), 9)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


def test_an_image_of_few_pixels_and_a_long_side_is_refused(tmp_path):
    """Its rows would take sixteen times the memory of its pixels."""
    write_tar(tmp_path / "s.tar", {"a.png": line(1, 70_000), "a.cls": b"1", "b.png": line(8, 8), "b.cls": b"1"})
    (batch,) = stream(f"{tmp_path}/s.tar", image_size=8, global_batch=2, train=False)
    assert [fault.key for fault in batch.bad] == ["a"] and batch.keys == ["b"]
    assert batch.bad[0].reason == "1 x 70000 pixels, and no side may have more than 65535"


def test_the_largest_image_takes_a_bounded_amount_of_memory():
    """Seven bytes a pixel beside what the process had."""
    program = """
import resource, sys
from dnal_dist.data.images import Transform
from dnal_dist.recipe import Data
sys.path.insert(0, "tests/data")
from test_fuzz import line
content, transform = line(1000, 20_000), Transform(Data(train="-", val="-", image_size=32, global_batch=1), 0, False)
transform(line(8, 8), 0, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
transform(content, 0, 0)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 20e6)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": "tests"}
    )
    assert float(ended.stdout) < 16, ended.stderr
