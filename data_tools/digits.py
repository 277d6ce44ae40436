"""scikit-learn's scanned digits."""

from pathlib import Path

import numpy as np

from data_tools.images import png
from data_tools.record import Record
from data_tools.writing import Sample, Split, write

SHARDS = {"train": 4, "val": 2}


def digits(folder: Path, overwrite: bool = False) -> dict[str, int]:
    """scikit-learn's 1 797 scanned digits, 8x8 grey, as PNG. Of each class every fifth image, in the data's own order, is for
    validation. Returns the number of samples of each split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digits come with scikit-learn: pip install 'dnal-dist[demo]'") from None
    record, source = Record(folder, {"kind": "digits"}, overwrite), load_digits()
    splits, seen = {"train": [], "val": []}, [0] * 10
    for number, (image, label) in enumerate(zip(source.images, source.target.tolist(), strict=True)):
        split = "val" if seen[label] % 5 == 4 else "train"
        # The scans have 17 grey levels, 0 to 16.
        splits[split].append((number, np.round(image * 255 / 16).astype(np.uint8), label))
        seen[label] += 1
    return write(record, {name: Split(found, _sample, SHARDS[name]) for name, found in splits.items()}, [*"0123456789"])


def _sample(_: int, reference: tuple[int, np.ndarray, int]) -> Sample:
    number, pixels, label = reference
    return f"{number:06d}", png(pixels), "png", label
