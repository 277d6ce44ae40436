"""The content of a shard: samples of an ordinary webdataset tar, however damaged or malicious it may be.

Neighbouring members with one key, the path up to the first dot of its last component, are a sample. Its image and its label are
read; members of other kinds are left alone and listed. Nothing that a shard holds is ever executed, unpickled, or written to disk
under a name that it chose.
"""

import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple

# In lower case; an image is what its content says, whatever its extension.
IMAGES = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff")
# As Pillow calls them.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
# The first of them that a sample has holds its label.
LABELS = ("cls", "cls.txt", "txt")
# Members that readers of webdataset shards are known to run programs from. A sample that has one is not used.
REFUSED = ("pyd", "pickle", "pkl", "pt", "pth", "dill")
BLOCK = tarfile.BLOCKSIZE


class Fault(Exception):
    """A sample that cannot be used, and why."""

    def __init__(self, reason: str, key: str | None = None, shard: str = "", offset: int = 0, index: int = -1):
        super().__init__(reason)
        self.unread: set[str] = set()
        """Extensions of members without a reader that were met before."""
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
    unread: tuple[str, ...] = ()
    """Extensions of its other members, which have no reader."""


class LabelFormat(NamedTuple):
    """Where the label of a sample stands, and which labels there are."""

    num_classes: int | None = None
    """Labels are from 0 to num_classes - 1; any whole number if it is not known."""
    names: Mapping[str, int] = {}
    """Labels of the classes that may be given by name."""
    json_key: str | None = None
    """The label is the value of this key of the sample's .json; without one it is the text of a member in LABELS."""

    @property
    def extensions(self) -> tuple[str, ...]:
        return LABELS if self.json_key is None else ("json",)

    def read(self, content: bytes) -> int:
        """The label that a member holds. Raises Fault for what is none."""
        text = content.strip() if self.json_key is None else self._value(content)
        if text.isdigit() and len(text) <= 9 and (self.num_classes is None or int(text) < self.num_classes):
            return int(text)
        shown_text = text.decode("utf-8", "surrogateescape")
        if shown_text in self.names:
            return self.names[shown_text]
        bound = f" from 0 to {self.num_classes - 1} (model.num_classes is {self.num_classes})" if self.num_classes else ""
        named = f", or one of the {len(self.names)} names of classes in index.json" if self.names else ""
        raise Fault(f"label {text[:80].decode('latin-1')!a} is out of range, expected a whole number{bound}{named}")

    def _value(self, content: bytes) -> bytes:
        try:
            found = json.loads(content)
            value = found[self.json_key]
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            what = f"no key {self.json_key!r}" if isinstance(error, KeyError) else "no object of JSON"
            raise Fault(f"its .json has {what}, which data.label_key asks for") from None
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise Fault(f"the value of {self.json_key!r} in its .json is neither a whole number nor a text")
        return str(value).encode("utf-8", "surrogatepass").strip()


ANY_LABEL = LabelFormat()


def unreadable(extensions: tuple[str, ...]) -> str:
    """Text of the kinds of members that have no reader, such as ".json, .npy"."""
    return ", ".join(sorted({f".{shown(extension)}" for extension in extensions}))


def boundaries(file: BinaryIO) -> tuple[list[int], list[tuple[int, str]]]:
    """Offsets at which the samples of the tar `file` begin and, as the last number, the end of the last one; and damage, as (byte,
    reason). Only headers are read. Behind damage the next whole header is searched for; a damaged stretch counts as a sample."""
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


def key_of(name: str) -> str | None:
    """The key of a tar's member: its path up to the first dot of the last component; None if it is of no sample."""
    folder, slash, last = name.rpartition("/")
    stem, dot, _ = last.partition(".")
    if not stem or not dot or (not slash and name.startswith("__") and name.endswith("__")):
        return None
    return folder + slash + stem


def parse(chunk: bytes, labels: LabelFormat = ANY_LABEL) -> Sample:
    """The sample that `chunk`, its members in tar format, holds. Raises Fault for anything else than one image and one label as
    `labels` has them, and for members that mean harm."""
    images, found, unread, key = [], {}, [], None
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
            elif extension in labels.extensions:
                found.setdefault(extension, []).append(chunk[begin : begin + size])
            else:
                unread.append(extension)
        first = next((found[extension] for extension in labels.extensions if extension in found), [])
        if len(images) != 1 or len(first) != 1:
            expected = f"expected one image ({', '.join(IMAGES)}) and one label ({', '.join(labels.extensions)})"
            others = f", and {unreadable(tuple(unread))} without a reader" if unread else ""
            raise Fault(f"{expected}, found {len(images)} and {len(first)}{others}")
        label = labels.read(first[0])
    except Fault as fault:
        fault.key, fault.unread = shown(key), set(unread)
        raise
    extension, begin, size = images[0]
    return Sample(shown(key), chunk[begin : begin + size], extension, label, tuple(unread))


def shown(key: str | None) -> str | None:
    """A key as it can be shown: it may hold what moves a terminal's cursor, or bytes that are no text."""
    return key if key is None or key.isprintable() else ascii(key)[1:-1]


def first_key(chunk: bytes) -> str | None:
    """The key of the sample that `chunk` begins with; None if its header does not hold it."""
    try:
        names = (name for name, kind, *_ in _members(chunk) if kind != tarfile.DIRTYPE)
        return shown(next((key for name in names if (key := key_of(name)) is not None), None))
    except Fault:
        return None


def _members(chunk: bytes) -> Iterator[tuple[str, bytes, int, int]]:
    """Name, type, first byte and size of each member. Raises Fault where a header is damaged."""
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
