"""A contact sheet: an image of samples with their labels, to check labels by eye."""

import os
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_tools.images import MAX_PIXELS
from data_tools.survey import Good, Survey
from dnal_dist.data.decoding import ImageError, check_size, decode, read_header
from dnal_dist.data.samples import Fault

COLUMNS, ROWS = 8, 8
TILE, CAPTION = 160, 20


def refuse_unwritable(path: Path) -> None:
    """Raise ValueError if `path` cannot be written."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--contact-sheet: {path} cannot be written; name a file in a folder that exists")


def contact_sheet(surveys: Sequence[Survey], classes: Sequence[str], path: Path, seed: int = 0) -> None:
    """Write a PNG of 8 x 8 samples, drawn by `seed`, with their labels below. Raises ValueError if there is no sample."""
    samples = [(one, good) for one in surveys for good in one.good]
    if not samples:
        raise ValueError("no sample to put on a contact sheet")
    chosen = random.Random(seed).sample(samples, min(COLUMNS * ROWS, len(samples)))
    rows = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE, rows * (TILE + CAPTION)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (one, good) in enumerate(chosen):
        left, top = number % COLUMNS * TILE, number // COLUMNS * (TILE + CAPTION)
        tile = _tile(one, good)
        sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        name = classes[good.label] if good.label < len(classes) else ""
        draw.text((left + 4, top + TILE + 3), _fitting(f"{good.label} {name}", font), "black", font=font)
    sheet.save(path, "PNG")


def _tile(one: Survey, good: Good) -> Image.Image:
    inner = TILE - 8
    try:
        encoded = one.image(good)
        header = read_header(encoded)
        check_size((header.height, header.width), MAX_PIXELS)
        image = Image.fromarray(decode(encoded, header))
    except (ImageError, Fault):
        # With its label, so that an image that cannot be decoded is seen too.
        return Image.new("RGB", (inner, inner), "red")
    scale = inner / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    # An image of 8 pixels is clearer as squares.
    return image.resize(size, Image.Resampling.NEAREST if scale > 4 else Image.Resampling.LANCZOS)


def _fitting(text: str, font: ImageFont.FreeTypeFont) -> str:
    # The built-in font has Latin letters only.
    text = text.encode("latin-1", "replace").decode("latin-1")
    while len(text) > 1 and font.getlength(text) > TILE - 8:
        text = text[:-1]
    return text
