"""The record of an unfinished set of shards: its options, and the shards that are complete."""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dnal_dist.common.files import read_regular

MOST_BYTES = 1 << 30
# Raised when the same options give other bytes, so that shards of an earlier version are not continued.
FORMAT = 2
OURS = re.compile(r"(train|val)-\d{6}\.tar")
LEFT = re.compile(r"(train|val)-\d{6}\.tar\.unfinished|index\.json(\.unfinished)?|skipped\.json|making\.jsonl")


class Record:
    """FOLDER/making.jsonl: the options in its first line, then a line for each finished piece of work. It exists while the set is
    incomplete, so that the same command continues where it was stopped.

    Raises ValueError if `folder` holds a finished set, shards of unknown origin or an unfinished set of other options. With
    `overwrite` these are removed by `begin`, once the source is known to be good. Nothing is written before `begin` or `once`.
    """

    def __init__(self, folder: Path, options: dict[str, Any], overwrite: bool = False):
        self.folder, self.path = folder, folder / "making.jsonl"
        self.options = {"format": FORMAT, **options}
        self._replaces = overwrite
        self.shards: dict[str, dict] = {}
        self._known: dict[str, Any] = {}
        if overwrite:
            return
        if self.path.exists():
            self._read()
            return
        self._refuse_others()

    def _read(self) -> None:
        # The result of a line that was cut short is not known.
        lines = [line for line in read_regular(self.path, MOST_BYTES).splitlines(keepends=True) if line.endswith(b"\n")]
        try:
            found = [json.loads(line) for line in lines]
            options = dict(found[0]["options"]) if found else self.options
            for entry in found[1:]:
                if "file" in entry:
                    self.shards[entry["file"]] = entry
                else:
                    self._known |= entry
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self.path}: not a record of unfinished shards ({error!r}); --overwrite makes the shards again"
            ) from None
        if options != self.options and not self.shards:
            # No shard is lost, as when too many images were bad and some were mended.
            self._replaces, self._known = True, {}
            return
        for name in sorted({*options, *self.options}):
            if options.get(name) != self.options.get(name):
                change = f"{name} was {options.get(name)} and is now {self.options.get(name)}"
                if name == "source":
                    change = "its source has changed"
                raise ValueError(
                    f"{self.folder}: holds an unfinished set of other options ({change}); repeat the command that began it, "
                    f"take a new folder, or --overwrite makes all shards again"
                )
        self.path.write_bytes(b"".join(lines))

    def _refuse_others(self) -> None:
        if (self.folder / "index.json").exists():
            raise ValueError(
                f"{self.folder / 'index.json'}: the folder holds a finished set; take a new one, or --overwrite makes it again"
            )
        # The pattern for the new shards would match these too.
        if old := sorted(path.name for path in self.folder.glob("*.tar") if re.match("(train|val)-", path.name)):
            raise ValueError(
                f"{self.folder / old[0]}: a shard of unknown origin ({len(old)} in all); remove it or take a new folder"
            )

    def begin(self) -> None:
        """From now on all shards in `folder` are of this set."""
        if self._replaces:
            for path in list(self.folder.iterdir()):
                if OURS.fullmatch(path.name) or LEFT.fullmatch(path.name):
                    path.unlink()
            self._replaces = False
        if not self.path.exists() or not self.path.stat().st_size:
            for entry in ({"options": self.options}, *({name: found} for name, found in self._known.items())):
                self._append(entry)

    def _append(self, entry: dict) -> None:
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of `work()`, which JSON can hold; not done again if an earlier run of the same command did it."""
        if name not in self._known:
            if not self._replaces:
                self.begin()
            self._known[name] = work()
            if not self._replaces:
                self._append({name: self._known[name]})
        return self._known[name]

    def add(self, entry: dict) -> None:
        """Add the index entry of a complete shard."""
        if self.shards.get(entry["file"]) != entry:
            self.shards[entry["file"]] = entry
            self._append(entry)

    def finish(self) -> None:
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name this file in an OSError that names none, as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def digest(lines: Iterable[str | bytes]) -> str:
    """SHA-256 of a listing, or of content, to recognise a source that has changed."""
    found = hashlib.sha256()
    for line in lines:
        # A file name may hold any bytes.
        found.update(line if isinstance(line, bytes) else line.encode(errors="surrogateescape"))
        found.update(b"\n")
    return found.hexdigest()
