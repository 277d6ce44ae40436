"""Shards made elsewhere, and the commands that index and verify them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from in_process import Ended, called
from PIL import Image

from data_tools import index, verify
from data_tools.images import png


def ended(module, capsys, *arguments) -> Ended:
    """`python -m data_tools.index` or `.verify` with these arguments, by one worker unless they say otherwise: processes start more
    slowly than these shards are read."""
    return called(module.main, capsys, *arguments, *(() if "--workers" in arguments else ("--workers", 1)))


def image(number: int, extension: str = "png") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6 + number % 3, 8, 3), np.uint8)
    if extension == "png":
        return png(pixels)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, number: int, label: object) -> list[tuple[str, bytes]]:
    return [(f"{key}.cls", str(label).encode()), (f"{key}.jpg", image(number, "jpg"))]


def encoded(number: int, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 9, 3), np.uint8)).save(out, kind)
    return out.getvalue()


def findings(capsys, *arguments) -> list[tuple[str, str, str]]:
    """Kind, shard (and sample) and text of each finding; the exit code must agree."""
    code, out, err = ended(verify, capsys, *arguments, "--json")
    found = json.loads(out)["findings"]
    assert code == bool(found) and not err
    return [(one["kind"], one["where"].rpartition("/")[2], one["what"]) for one in found]


def made(folder: Path, classes: int = 3, **shards: list[tuple[str, bytes]]) -> Path:
    folder.mkdir()
    for name, members in shards.items():
        tar(folder / f"{name}-000000.tar", *members)
    index.make(sorted(folder.glob("*.tar")), None, None, 1)
    name_classes(folder, [f"name {i}" for i in range(classes)])
    return folder


def name_classes(folder: Path, names: list[str]) -> None:
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(content | {"classes": names}))


def kinds(capsys, *arguments) -> list[tuple[str, str]]:
    return [(kind, where) for kind, where, _ in findings(capsys, *arguments)]
