"""Make webdataset shards (a picture and its class number for each sample) and their index.

python -m data_tools.make_shards digits data/digits
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image


def write_shards(folder: Path, split: str, samples: list[tuple[str, bytes, str, int]], shards: int) -> list[dict]:
    """Write `samples` (key, encoded picture, its extension, label) as `shards` files whose counts differ by one at most.

    The same samples give the same bytes. A shard gets its name only when it is complete. Returns their index entries.
    """
    entries = []
    for number, part in enumerate(np.array_split(np.arange(len(samples)), shards)):
        path = folder / f"{split}-{number:06d}.tar"
        unfinished = path.with_suffix(".tar.unfinished")
        with webdataset.TarWriter(str(unfinished), mtime=0) as tar:
            for i in part:
                key, picture, extension, label = samples[i]
                tar.write({"__key__": key, extension: picture, "cls": str(label).encode()})
        os.replace(unfinished, path)
        entries.append({"file": path.name, "samples": len(part), "bytes": path.stat().st_size})
    return entries


def write_index(folder: Path, entries: list[dict], classes: Iterable[str]) -> None:
    unfinished = folder / "index.json.unfinished"
    unfinished.write_text(json.dumps({"shards": entries, "classes": list(classes)}, indent=1) + "\n")
    os.replace(unfinished, folder / "index.json")


def digits(folder: Path) -> dict[str, int]:
    """scikit-learn's 1 797 scanned digits, 8x8 grey, as PNG. Of each class every fifth picture, in the data's own order, is for
    validation. Returns the number of samples of each split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digits come with scikit-learn: pip install 'dnal-dist[demo]'") from None
    source = load_digits()
    splits, seen = {"train": [], "val": []}, [0] * 10
    for number, (picture, label) in enumerate(zip(source.images, source.target.tolist(), strict=True)):
        encoded = io.BytesIO()
        # The scans have 17 grey levels, 0 to 16.
        Image.fromarray(np.round(picture * 255 / 16).astype(np.uint8)).save(encoded, "PNG")
        split = "val" if seen[label] % 5 == 4 else "train"
        splits[split].append((f"{number:06d}", encoded.getvalue(), "png", label))
        seen[label] += 1
    entries = write_shards(folder, "train", splits["train"], 4) + write_shards(folder, "val", splits["val"], 2)
    write_index(folder, entries, map(str, range(10)))
    return {split: len(samples) for split, samples in splits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_tools.make_shards", description=__doc__.splitlines()[0])
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    one = sources.add_parser("digits", help="scikit-learn's 1 797 scanned digits", description=digits.__doc__)
    one.add_argument("folder", type=Path, help="where the shards go, for example data/digits")
    args = parser.parse_args()
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        counts = digits(args.folder)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.folder}: " + ", ".join(f"{count} samples for {split}" for split, count in counts.items()))


if __name__ == "__main__":
    main()
