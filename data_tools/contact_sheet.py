"""A contact sheet: an image of samples with their labels, to check labels by eye."""

import os
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from data_tools.images import MAX_PIXELS
from data_tools.survey import Good, Survey
from dnal_dist.common.sheet import sheet
from dnal_dist.data.decoding import ImageError, check_size, decode, read_header
from dnal_dist.data.samples import Fault

SAMPLES, TILE = 64, 160


def refuse_unwritable(path: Path) -> None:
    """Raise ValueError if `path` cannot be written."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--contact-sheet: {path} cannot be written; name a file in a folder that exists")


def contact_sheet(surveys: Sequence[Survey], classes: Sequence[str], path: Path, seed: int = 0) -> None:
    """Write a PNG of 64 samples, drawn by `seed`, with their labels below. Raises ValueError if there is no sample."""
    samples = [(one, good) for one in surveys for good in one.good]
    if not samples:
        raise ValueError("no sample to put on a contact sheet")
    chosen = random.Random(seed).sample(samples, min(SAMPLES, len(samples)))
    labels = [good.label for _, good in chosen]
    captions = [[(f"{label} {classes[label] if label < len(classes) else ''}", "black")] for label in labels]
    sheet((_image(*one) for one in chosen), captions, TILE).save(path, "PNG")


def _image(one: Survey, good: Good) -> Image.Image:
    try:
        encoded = one.image(good)
        header = read_header(encoded)
        check_size((header.height, header.width), MAX_PIXELS)
        return Image.fromarray(decode(encoded, header))
    except (ImageError, Fault):
        # With its label, so that an image that cannot be decoded is seen too.
        return Image.new("RGB", (8, 8), "red")
