"""The record of a making that is under way: what it was asked for, and the shards that are complete."""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# Raised when the same options come to mean other bytes: shards of an earlier version are then not gone on with.
FORMAT = 1
OURS = re.compile(r"(train|val)-\d{6}\.tar")
LEFT = re.compile(r"(train|val)-\d{6}\.tar\.unfinished|index\.json(\.unfinished)?|skipped\.json|making\.jsonl")


class Record:
    """FOLDER/making.jsonl: the options in its first line, then whatever was finished, a line each. It is there as long as the
    making is not complete, so that the same command goes on where it was stopped.

    Raises ValueError if `folder` holds a finished set, shards of unknown origin or a making by other options, unless `overwrite`:
    they are then removed by `begin`, once the source is known to be good. Nothing is written before `begin` or `once`.
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
        # A line that was cut short is one whose result was not yet known.
        lines = [line for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        try:
            found = [json.loads(line) for line in lines]
            options = dict(found[0]["options"]) if found else self.options
            for entry in found[1:]:
                if "file" in entry:
                    self.shards[entry["file"]] = entry
                else:
                    self._known |= entry
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.path}: not the record of a making ({error!r}); --overwrite makes the shards anew") from None
        if options != self.options and not self.shards:
            # Nothing is lost: as when too many images were bad, and some were mended.
            self._replaces, self._known = True, {}
            return
        for name in sorted({*options, *self.options}):
            if options.get(name) != self.options.get(name):
                said = f"{name} was {options.get(name)} and is now {self.options.get(name)}"
                if name == "source":
                    said = "its source has changed"
                raise ValueError(
                    f"{self.folder}: holds an unfinished set that was made otherwise ({said}); repeat the command that "
                    f"began it, take a new folder, or --overwrite makes all shards anew"
                )
        self.path.write_bytes(b"".join(lines))

    def _refuse_others(self) -> None:
        if (self.folder / "index.json").exists():
            raise ValueError(
                f"{self.folder / 'index.json'}: the folder holds a finished set; take a new one, or --overwrite makes it anew"
            )
        # The pattern that finds the new shards would find these too.
        if old := sorted(path.name for path in self.folder.glob("*.tar") if re.match("(train|val)-", path.name)):
            raise ValueError(
                f"{self.folder / old[0]}: a shard of unknown origin ({len(old)} in all); remove it or take a new folder"
            )

    def _remove_all(self) -> None:
        for path in list(self.folder.iterdir()):
            if OURS.fullmatch(path.name) or LEFT.fullmatch(path.name):
                path.unlink()

    def begin(self) -> None:
        """From now on whatever `folder` holds is known to be of this making."""
        if self._replaces:
            self._remove_all()
            self._replaces = False
        if not self.path.exists() or not self.path.stat().st_size:
            for entry in ({"options": self.options}, *({name: found} for name, found in self._known.items())):
                self._append(entry)

    def _append(self, entry: dict) -> None:
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work()` returns, of JSON's kinds; not done again if an earlier run of the same command has done it."""
        if name not in self._known:
            if not self._replaces:
                self.begin()
            self._known[name] = work()
            if not self._replaces:
                self._append({name: self._known[name]})
        return self._known[name]

    def add(self, entry: dict) -> None:
        """A shard that is complete, as the index will tell of it."""
        if self.shards.get(entry["file"]) != entry:
            self.shards[entry["file"]] = entry
            self._append(entry)

    def finish(self) -> None:
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that names no file, as that of a full disk, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def digest(lines: Iterable[str | bytes]) -> str:
    """SHA-256 of a listing, or of content, by which a source that has changed is recognised."""
    found = hashlib.sha256()
    for line in lines:
        # A file's name may be of any bytes.
        found.update(line if isinstance(line, bytes) else line.encode(errors="surrogateescape"))
        found.update(b"\n")
    return found.hexdigest()
