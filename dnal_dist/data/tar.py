"""What a shard's bytes hold: samples of an ordinary webdataset tar, however damaged or malicious it may be.

Neighbouring members with one key, the path up to the first dot of its last component, are a sample. An image (png, jpg, jpeg) and
a class number (cls) are read of it. Nothing that a shard holds is ever executed, unpickled, or written to disk under a name that it
chose.
"""

import io
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

IMAGES = ("png", "jpg", "jpeg")
# As Pillow calls them. An image is what its content says, whatever its extension.
FORMATS = ("JPEG", "PNG", "GIF")
# Members that readers of webdataset shards are known to run programs from. A sample that has one is not used.
REFUSED = ("pyd", "pickle", "pkl", "pt", "pth", "dill")
BLOCK = tarfile.BLOCKSIZE


class Fault(Exception):
    """A sample that cannot be used, and why."""

    def __init__(self, reason: str, key: str | None = None, shard: str = "", offset: int = 0, index: int = -1):
        super().__init__(reason)
        self.reason, self.key, self.shard, self.offset, self.index = reason, key, shard, offset, index

    def __reduce__(self):
        return type(self), (self.reason, self.key, self.shard, self.offset, self.index)

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key or '?'} at byte {self.offset}: {self.reason}"


class Sample(NamedTuple):
    key: str
    image: bytes
    extension: str
    label: int


def boundaries(file: BinaryIO) -> tuple[list[int], list[tuple[int, str]]]:
    """Where each sample of the tar `file` begins and, as the last number, where the last one ends; and what is wrong, as (byte,
    reason). Only headers are read. Behind damage the next whole header is looked for; a damaged stretch counts as a sample."""
    offsets, faults, last, end = [], [], None, 0
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        # ignore_zeros: damage, and the blocks of zeros at the end, are stepped over block by block.
        tar = tarfile.TarFile(fileobj=file, ignore_zeros=True)
        for member in tar:
            if member.size < 0 or member.offset < end:
                raise tarfile.TarError("a member of impossible size")
            damaged = member.offset > end and not _is_padding(file, end, member.offset)
            key = None if member.isdir() else key_of(member.name)
            if damaged:
                faults.append((end, "damaged"))
                if key != last:
                    offsets.append(end)
            if key is not None and key != last:
                offsets.append(member.offset)
                last = key
            # Not from its size: that of a sparse member is what it would unpack to.
            end = tar.offset
    except Exception as error:  # of many kinds, where a header means harm
        faults.append((end, " ".join(str(error).split()) or type(error).__name__))
    if not faults and not _is_padding(file, end, end + BLOCK):
        faults.append((min(end, size), "cut short or damaged behind its last whole member"))
    return [*offsets, min(end, size)], faults


def _is_padding(file: BinaryIO, begin: int, end: int) -> bool:
    """Whether a stretch without members is one of zeros, or of headers that say something about all of the archive."""
    while begin < end:
        file.seek(begin)
        block = file.read(BLOCK)
        if not block:
            return False
        begin += BLOCK
        if block.count(0) != len(block):
            found = _plain(block, tarfile.XGLTYPE)
            if found is None:
                return False
            begin += _padded(found[2])
    return True


def key_of(name: str) -> str | None:
    """The key of a tar's member: its path up to the first dot of the last component; None if it is of no sample."""
    folder, slash, last = name.rpartition("/")
    stem, dot, _ = last.partition(".")
    if not stem or not dot or (not slash and name.startswith("__") and name.endswith("__")):
        return None
    return folder + slash + stem


def parse(chunk: bytes, num_classes: int | None = None) -> Sample:
    """The sample that `chunk`, its members in tar format, holds. Raises Fault for anything else than one image and one class
    number in [0, num_classes), and for members that mean harm."""
    images, labels, key = [], [], None
    try:
        for name, kind, begin, size in _members(chunk):
            if kind == tarfile.DIRTYPE or (this := key_of(name)) is None:
                continue
            key = this if key is None else key
            extension = name.rpartition("/")[2].partition(".")[2].lower()
            if kind not in tarfile.REGULAR_TYPES or kind == tarfile.GNUTYPE_SPARSE:
                raise Fault("it has a link or another special file, which is refused")
            if name.startswith("/") or ".." in name.split("/"):
                raise Fault("its name leads out of the shard, which is refused")
            if extension.rpartition(".")[2] in REFUSED:
                raise Fault(f"it has a .{extension}, which is refused: reading it could run any program")
            if begin + size > len(chunk):
                raise Fault("it is cut short")
            if extension in IMAGES:
                images.append((extension, begin, size))
            elif extension == "cls":
                labels.append(chunk[begin : begin + size])
        if len(images) != 1 or len(labels) != 1:
            raise Fault(f"expected one image ({', '.join(IMAGES)}) and one class (cls), found {len(images)} and {len(labels)}")
        text = labels[0].strip()
        if len(text) > 9 or not text.isdigit() or (num_classes is not None and int(text) >= num_classes):
            bound = f" from 0 to {num_classes - 1} (model.num_classes is {num_classes})" if num_classes else ""
            raise Fault(f"label {text.decode('latin-1')!a} is out of range, expected a whole number{bound}")
    except Fault as fault:
        fault.key = shown(key)
        raise
    extension, begin, size = images[0]
    return Sample(shown(key), chunk[begin : begin + size], extension, int(text))


def shown(key: str | None) -> str | None:
    """A key as it can be shown: it may hold what moves a terminal's cursor, or bytes that are no text."""
    return key if key is None or key.isprintable() else ascii(key)[1:-1]


def first_key(chunk: bytes) -> str | None:
    """The key of the sample that `chunk` begins with, if its header tells."""
    try:
        names = (name for name, kind, *_ in _members(chunk) if kind != tarfile.DIRTYPE)
        return shown(next((key for name in names if (key := key_of(name)) is not None), None))
    except Fault:
        return None


def _members(chunk: bytes) -> Iterator[tuple[str, bytes, int, int]]:
    """Name, type, first byte and size of each member. Raises Fault where a header is damaged."""
    at = 0
    while at < len(chunk):
        member, begin, told = _plain(chunk[at : at + BLOCK]), at + BLOCK, {}
        if member is None:
            told, begin = _extended(chunk, at)
            member = _plain(chunk[begin - BLOCK : begin]) if told else None
        if member is None:
            if chunk.count(0, at, at + BLOCK) < min(BLOCK, len(chunk) - at):
                yield from _by_tarfile(chunk, at)
            return
        name, kind, size = member
        name, size = told.get(b"path", name), int(told.get(b"size", size))
        yield name, kind, begin, size
        at = begin + _padded(size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _plain(header: bytes, kinds: bytes = b"0\x005") -> tuple[str, bytes, int] | None:
    """Name, type and size of a plain ustar header, which nearly all are; None for anything else. An eighth of tarfile's time."""
    if len(header) != BLOCK or header[345] or header[156:157] not in kinds or header[257:262] != b"ustar":
        return None
    try:
        wanted, size = int(header[148:156].rstrip(b" \0"), 8), int(header[124:136].rstrip(b" \0"), 8)
    except ValueError:
        return None
    # The low half of adler32 is one more than the sum of the bytes, modulo 65521, and a tenth of the time of adding them up here.
    if zlib.adler32(header) & 0xFFFF != (wanted - 256 + sum(header[148:156]) + 1) % 65521 or size < 0:
        return None
    return header[:100].rstrip(b"\0").decode("utf-8", "surrogateescape"), header[156:157], size


def _extended(chunk: bytes, at: int) -> tuple[dict, int]:
    """What a pax header at `at` tells of the member behind it (webdataset's own writer puts one before each), and where that
    member's content begins; ({}, 0) if it is anything else, or tells what only tarfile understands."""
    found = _plain(chunk[at : at + BLOCK], tarfile.XHDTYPE)
    if found is None:
        return {}, 0
    told, record, end = {}, at + BLOCK, at + BLOCK + found[2]
    while record < end:
        digits, blank, _ = chunk[record : record + 20].partition(b" ")
        if not blank or not digits.isdigit() or not len(digits) < int(digits) <= end - record:
            return {}, 0
        key, _, value = chunk[record + len(digits) + 1 : record + int(digits) - 1].partition(b"=")
        if key.startswith(b"GNU.") or key == b"hdrcharset" or (key == b"size" and not value.isdigit()):
            return {}, 0
        told[key] = value.decode("utf-8", "surrogateescape") if key == b"path" else value
        record += int(digits)
    return told, at + BLOCK + _padded(found[2]) + BLOCK


def _by_tarfile(chunk: bytes, at: int) -> Iterator[tuple[str, bytes, int, int]]:
    end = at
    try:
        tar = tarfile.TarFile(fileobj=io.BytesIO(chunk[at:]))
        for member in tar:
            if member.size < 0:
                raise tarfile.TarError("a member of negative size")
            yield member.name, member.type, at + member.offset_data, member.size
            end = at + tar.offset
    except Exception as error:  # of many kinds, where a header means harm
        raise Fault(f"its tar header is damaged ({' '.join(str(error).split())})") from None
    if end < len(chunk) and chunk[end : end + BLOCK].count(0) != len(chunk[end : end + BLOCK]):
        # tarfile takes a damaged header for the end of the archive.
        raise Fault("its tar header is damaged")
