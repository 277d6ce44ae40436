"""Small shards with faults, and what a run must say of them."""

import io
import json
import os
import re
import tarfile
from pathlib import Path

from PIL import Image

from dnal_dist.data.tar import boundaries

FEW = (
    "phases.pretrain.steps=2", "phases.search.steps=2", "phases.finetune.steps=2", "tracking.log_every=1",
    "tracking.tracker=none", "tracking.plots=false", "data.global_batch=8", "architecture.recalibration_batches=1",
)  # fmt: skip


def png(grey: int = 100, size: int = 8, mode: str = "L") -> bytes:
    encoded = io.BytesIO()
    Image.new(mode, (size, size), grey).save(encoded, "PNG")
    return encoded.getvalue()


def samples(count: int = 16, **changes: bytes | None) -> dict[str, bytes]:
    """Members of a shard: images and classes of samples 00, 01, ...; `changes` replaces members (_05_cls is 05.cls) or leaves
    them out (None)."""
    members = {}
    for i in range(count):
        members |= {f"{i:02}.png": png(10 * (i % 20)), f"{i:02}.cls": str(i % 10).encode()}
    members |= {key[1:].replace("_", "."): value for key, value in changes.items()}
    # Members of one sample are neighbours.
    members = dict(sorted(members.items(), key=lambda member: member[0].partition(".")[0]))
    return {name: content for name, content in members.items() if content is not None}


def write_tar(path: Path, members: dict[str, bytes], *others: tarfile.TarInfo) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in others:
            tar.addfile(member)


def write_index(folder: Path, *names: str, count: int | None = None) -> None:
    """The index of the shards `names` as they are now; with `count`, one that tells this number of samples and no offsets."""
    entries = []
    for name in names:
        with (folder / name).open("rb") as file:
            offsets, _ = boundaries(file)
        known = {"samples": len(offsets) - 1, "offsets": offsets} if count is None else {"samples": count}
        entries.append({"file": name, "bytes": (folder / name).stat().st_size} | known)
    (folder / "index.json").write_text(json.dumps({"shards": entries, "classes": []}))


def refused(ended, message: str) -> None:
    """Exit code 2, and one line that matches `message`."""
    assert ended.code == 2, ended
    lines = ended.err.splitlines()
    assert len(lines) == 1 and re.match(rf"error: .*{message}", lines[0]), f"{message!r} expected, found:\n{ended.err}"


def records(folder: Path, kind: str) -> list[dict]:
    return [r for r in map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def truncate(path: Path, member: str, into: int) -> None:
    """Cut the tar at `path` short, `into` bytes behind the beginning of `member`'s header."""
    with tarfile.open(path) as tar:
        size = tar.getmember(member).offset + into
    os.truncate(path, size)


def corrupt(path: Path, member: str) -> None:
    with tarfile.open(path) as tar:
        offset = tar.getmember(member).offset
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 512)
