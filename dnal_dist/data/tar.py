"""Tars as shards are made of: where samples begin and which members they have, however damaged or malicious the tar may be.

Neighbouring members with one key, the path up to the first dot of its last component, are a sample.
"""

import io
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from dnal_dist.common import errors

BLOCK = tarfile.BLOCKSIZE
# First bytes of what compresses a tar, and what undoes it.
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"(\xb5/\xfd": "unzstd"}
# A header of more bytes is none: whoever reads it would only fill the memory.
MOST_HEADER = 1 << 20


class _Headers:
    """A tar for tarfile, which reads headers only, and would read a header of any size that it claims to have."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if size > MOST_HEADER:
            raise tarfile.TarError(f"a header of {size} bytes")
        return self._read(size)


class _Tar(tarfile.TarFile):
    """Without what global headers say of all members behind them, which a sample by itself would not know."""

    pax_headers = property(lambda _: {}, lambda *_: None)


def boundaries(file: BinaryIO) -> tuple[list[int], list[tuple[int, str]]]:
    """Offsets at which the samples of the tar `file` begin and, as the last number, the end of the last one; and damage, as (byte,
    reason). Only headers are read. Behind damage the next whole header is searched for; a damaged stretch counts as a sample."""
    offsets, faults, last, end = [], [], None, 0
    size = file.seek(0, io.SEEK_END)
    for begin, key, until, reason in _walk(file, size):
        if begin > end and (reason or not _is_padding(file, end, begin)):
            faults.append((end, reason or "damaged"))
            if key != last:
                offsets.append(end)
                # A header that tarfile refuses belongs to the member behind it.
                last = key if reason else last
        if key is not None and key != last:
            offsets.append(begin)
            last = key
        end = until
    if not faults and not _is_padding(file, end, end + BLOCK):
        faults.append((min(end, size), "cut short or damaged behind its last whole member"))
    return [*offsets, min(end, size)], faults


def _walk(file: BinaryIO, size: int) -> Iterator[tuple[int, str | None, int, str]]:
    """First byte, key and end of each member that tarfile finds, and why it refused what lies before it."""
    at, reason = 0, ""
    while at < size:
        file.seek(at)
        try:
            # ignore_zeros: damage, and the blocks of zeros at the end, are stepped over block by block.
            tar = _Tar(fileobj=_Headers(file), ignore_zeros=True)
            while (member := tar.next()) is not None:
                tar.members = []
                if member.size < 0 or member.offset < at:
                    raise tarfile.TarError("a member of impossible size")
                # Not from its size: that of a sparse member is what it would unpack to.
                at = tar.offset
                yield member.offset, None if member.isdir() else key_of(member.name), at, reason
                reason = ""
            return
        except Exception as error:  # of many kinds, where a header means harm
            reason = errors.reason(error)
            at = _padded(max(at + 1, min(file.tell(), size)))


def _is_padding(file: BinaryIO, begin: int, end: int) -> bool:
    """Whether a stretch without members is one of zeros, or of headers about the whole archive."""
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


def compressed(file: BinaryIO) -> str:
    """What is to be said of a shard that is compressed, of which no sample could be read by itself; "" if it is not."""
    file.seek(0)
    head = file.read(8)
    tool = next((tool for magic, tool in COMPRESSED.items() if head.startswith(magic)), "")
    return f"it is compressed; {tool} it" if tool else ""


def key_of(name: str) -> str | None:
    """The key of a tar's member: its path up to the first dot of the last component; None if it is of no sample."""
    folder, slash, last = name.rpartition("/")
    stem, dot, _ = last.partition(".")
    if not stem or not dot or (not slash and name.startswith("__") and name.endswith("__")):
        return None
    return folder + slash + stem


def shown(key: str | None) -> str | None:
    """A key as it can be shown: it may hold what moves a terminal's cursor, or bytes that are no text."""
    return key if key is None or key.isprintable() else ascii(key)[1:-1]


def first_key(chunk: bytes) -> str | None:
    """The key of the sample that `chunk` begins with; None if its header does not hold it."""
    try:
        names = (name for name, kind, *_ in members(chunk) if kind != tarfile.DIRTYPE)
        return shown(next((key for name in names if (key := key_of(name)) is not None), None))
    except Exception:  # as in `parse`
        return None


def members(chunk: bytes) -> Iterator[tuple[str, bytes, int, int]]:
    """Name, type, first byte and size of each member. Raises one of many errors where a header is damaged."""
    at = 0
    while at < len(chunk):
        member, begin, records = _plain(chunk[at : at + BLOCK]), at + BLOCK, {}
        if member is None:
            records, begin = _extended(chunk, at)
            member = _plain(chunk[begin - BLOCK : begin]) if records else None
        if member is None:
            if chunk.count(0, at, at + BLOCK) < min(BLOCK, len(chunk) - at):
                yield from _by_tarfile(chunk, at)
            return
        name, kind, size = member
        name, size = records.get(b"path", name), int(records.get(b"size", size))
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
    """Records of a pax header at `at` (webdataset's own writer puts one before each member), and where the content of the member
    behind it begins; ({}, 0) if there is another header, or records that only tarfile understands."""
    found = _plain(chunk[at : at + BLOCK], tarfile.XHDTYPE)
    if found is None:
        return {}, 0
    records, record, end = {}, at + BLOCK, at + BLOCK + found[2]
    while record < end:
        digits, blank, _ = chunk[record : record + 20].partition(b" ")
        if not blank or not digits.isdigit() or not len(digits) < int(digits) <= end - record:
            return {}, 0
        key, _, value = chunk[record + len(digits) + 1 : record + int(digits) - 1].partition(b"=")
        if key.startswith(b"GNU.") or key == b"hdrcharset" or (key == b"size" and not value.isdigit()):
            return {}, 0
        records[key] = value.decode("utf-8", "surrogateescape") if key == b"path" else value
        record += int(digits)
    return records, at + BLOCK + _padded(found[2]) + BLOCK


def _by_tarfile(chunk: bytes, at: int) -> Iterator[tuple[str, bytes, int, int]]:
    end = at
    for member in (tar := _Tar(fileobj=io.BytesIO(chunk[at:]))):
        if member.size < 0:
            raise tarfile.TarError("a member of negative size")
        yield member.name, member.type, at + member.offset_data, member.size
        end = at + tar.offset
    if end < len(chunk) and chunk[end : end + BLOCK].count(0) != len(chunk[end : end + BLOCK]):
        # tarfile takes a damaged header for the end of the archive.
        raise tarfile.TarError("no header")
