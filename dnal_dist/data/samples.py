"""Samples of a shard: which of their members are the image and the label, and what keeps a sample from being used.

Members of other kinds are left alone and listed, but a second image or label is a fault: which is meant, only the recipe can say.
Nothing that a shard holds is ever executed, unpickled, or written to disk under a name that it chose. Whatever `parse` meets is a
Fault of that sample.
"""

import codecs
import contextlib
import json
import tarfile
from collections.abc import Mapping
from typing import NamedTuple

from dnal_dist.common.errors import reason
from dnal_dist.common.text import printable
from dnal_dist.data.tar import first_key, key_of, members, shown

# In lower case; an image is what its content says, whatever its extension.
IMAGES = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff")
# The first of them that a sample has holds its label.
LABELS = ("cls", "cls.txt", "txt")
# Members that readers of webdataset shards are known to run programs from. A sample that has one is not used.
REFUSED = ("pyd", "pickle", "pkl", "pt", "pth", "dill")
# A sample of more bytes is no image: the headers are damaged, or mean harm.
MOST_BYTES = 1 << 28
# Bytes of such a sample that are read, to say what it is.
HEAD = 1 << 24


class Fault(Exception):
    """A sample that cannot be used, and why."""

    def __init__(self, reason: str, key: str | None = None, shard: str = "", offset: int = 0, index: int = -1):
        # A reason quotes what a shard holds, and a terminal obeys control characters.
        reason = printable(reason)
        super().__init__(reason)
        self.unread: set[str] = set()
        """Extensions of members without a reader that were met before."""
        self.ambiguous = False
        """Whether it has several images or labels, of which the recipe can name one."""
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


class SampleFormat(NamedTuple):
    """Which members of a sample are its image and its label, and which labels there are."""

    num_classes: int | None = None
    """Labels are from 0 to num_classes - 1; any whole number if it is not known."""
    names: Mapping[str, int] = {}
    """Labels of the classes that may be given by name."""
    json_key: str | None = None
    """The label is the value of this key of the sample's .json; without one it is the text of a member in LABELS."""
    image: str | None = None
    """What follows the key's dot in the name of the image; by default one of IMAGES."""
    label: str | None = None
    """Likewise of the label."""

    @property
    def images(self) -> tuple[str, ...]:
        return IMAGES if self.image is None else (self.image.lower(),)

    @property
    def labels(self) -> tuple[str, ...]:
        if self.label is not None:
            return (self.label.lower(),)
        return LABELS if self.json_key is None else ("json",)

    def role(self, extension: str) -> str:
        """ "image", "label" or "" for a member with this extension. Members such as .crop2.png and .crop2.cls are an image and a
        label too, of which there are then several, unless the recipe names one."""
        if extension in self.images or (self.image is None and extension.rpartition(".")[2] in IMAGES):
            return "image"
        further = self.label is None and self.json_key is None and extension.endswith((".cls", ".cls.txt"))
        return "label" if extension in self.labels or further else ""

    def read(self, content: bytes) -> int:
        """The label that a member holds. Raises Fault for what is none."""
        text = _without_mark(content).strip() if self.json_key is None else self._value(content)
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


ANY_FORMAT = SampleFormat()


def _without_mark(text: bytes) -> bytes:
    """A text as UTF-8 without the byte-order mark that some editors and shells put before it."""
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return text.decode("utf-16", "replace").encode()
    return text.removeprefix(codecs.BOM_UTF8)


def listed(extensions: list[str]) -> str:
    """Text of some kinds of members, such as ".json, .npy"."""
    found = sorted({f".{extension}" for extension in extensions})
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def parse(chunk: bytes, form: SampleFormat = ANY_FORMAT) -> Sample:
    """The sample that `chunk`, its members in tar format, holds. Raises Fault for anything else than one image and one label as
    `form` has them, and for members that mean harm."""
    unread, keys = [], []
    try:
        return _parsed(chunk, form, unread, keys)
    except Exception as error:  # of many kinds, where a header means harm
        fault = error if isinstance(error, Fault) else Fault(f"its tar header is damaged ({reason(error)})")
    fault.key, fault.unread = shown(keys[0] if keys else None), set(unread)
    raise fault from None


def oversized(head: bytes, size: int, form: SampleFormat = ANY_FORMAT) -> Fault:
    """What is wrong with a sample of more than MOST_BYTES that begins with `head`: most often names with dots, which make one
    sample of a whole shard."""
    whole = 0
    with contextlib.suppress(Exception):  # of many kinds, as in `parse`
        for *_, begin, length in members(head):
            whole = begin + length if begin + length <= len(head) else whole
    try:
        parse(head[:whole], form)
    except Fault as fault:
        if fault.ambiguous:
            return fault
    return Fault(f"it takes {size} bytes, more than any image", first_key(head))


def _parsed(chunk: bytes, form: SampleFormat, unread: list[str], keys: list[str]) -> Sample:
    images, labels = [], []
    for name, kind, begin, size in members(chunk):
        if kind == tarfile.DIRTYPE or (key := key_of(name)) is None:
            continue
        keys.append(key)
        extension = shown(name.rpartition("/")[2].partition(".")[2].lower())
        if kind not in tarfile.REGULAR_TYPES or kind == tarfile.GNUTYPE_SPARSE:
            raise Fault("it has a link or another special file, which is refused")
        if name.startswith("/") or ".." in name.split("/"):
            raise Fault("its name leads out of the shard, which is refused")
        if extension.rpartition(".")[2] in REFUSED:
            raise Fault(f"it has a .{extension}, which is refused: reading it could run any program")
        if begin + size > len(chunk):
            raise Fault("it is cut short")
        role = form.role(extension)
        (images if role == "image" else labels if role == "label" else unread).append(
            (extension, begin, size) if role else extension
        )
    # Of .cls, .cls.txt and .txt one is enough, and the first counts.
    best = next((extension for extension in form.labels if any(extension == one[0] for one in labels)), None)
    labels = [one for one in labels if one[0] == best or one[0] not in form.labels]
    if len(images) != 1 or len(labels) != 1:
        raise _not_one_each(form, images, labels, unread)
    (extension, begin, size), (_, at, length) = images[0], labels[0]
    return Sample(shown(keys[0]), chunk[begin : begin + size], extension, form.read(chunk[at : at + length]), tuple(unread))


def _not_one_each(form: SampleFormat, images: list[tuple], labels: list[tuple], unread: list[str]) -> Fault:
    expected = f"expected one image ({', '.join(form.images)}) and one label ({', '.join(form.labels)})"
    others = f", and {listed(unread)} without a reader" if unread else ""
    remedies = [
        f"of {listed([one[0] for one in found])} name one by key 'data.{what}'"
        for what, found in (("image", images), ("label", labels))
        if len({one[0] for one in found}) > 1
    ]
    if several := bool(remedies):
        remedies.append("or rename the files: a key ends at the first dot of a name")
    elif not images or not labels:
        remedies.append("the members of a sample must be neighbours in the tar (tar --sort=name)")
    fault = Fault(f"{expected}, found {len(images)} and {len(labels)}{others}" + "".join(f"; {one}" for one in remedies))
    fault.ambiguous = several
    return fault
