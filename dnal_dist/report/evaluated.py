"""The evaluation in a run's folder, as `python -m dnal_dist.evaluate RUN` wrote it, for the run's page and report.md. No torch."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from dnal_dist.common.errors import InputError
from dnal_dist.common.files import read_regular
from dnal_dist.common.text import percent, printable
from dnal_dist.report.record import Count, Fraction, Text
from dnal_dist.report.tables import Table

MOST_JSON, MOST_IMAGE = 64 << 20, 8 << 20
IMAGES = {
    "confusion.png": "Confusion matrix: rows are classes, columns what the network says",
    "worst.png": "The images whose class got the lowest probabilities, with their class and what the network says",
}


class _Class(BaseModel):
    name: Text = Field(alias="class")
    images: Count
    right: Count


class _Pair(BaseModel):
    name: Text = Field(alias="class")
    other: Text = Field(alias="with")
    images: Count


class _Facts(BaseModel):
    shards: Text
    runtime: Text
    images: Count
    top1: Fraction
    top5: Fraction
    classes: Annotated[list[_Class], Field(max_length=1_000_000)]
    confused: list[_Pair] = []


@dataclass(frozen=True)
class Evaluation:
    note: str
    classes: Table
    confused: Table
    images: list[tuple[str, str, str]]
    """File, title and data URL of each image."""


def read(run: Path) -> Evaluation | None:
    """None if there is none that can be read."""
    folder = run / "evaluation"
    try:
        facts = _Facts.model_validate(json.loads(read_regular(folder / "evaluation.json", MOST_JSON)))
    except (OSError, InputError, ValueError, ValidationError, RecursionError):
        return None
    seen = sorted((one for one in facts.classes if one.images), key=lambda one: (one.right / one.images, -one.images))
    classes = [[printable(one.name), percent(one.right / one.images, 2), f"{one.right:,} of {one.images:,}"] for one in seen]
    confused = [[printable(one.name), printable(one.other), f"{one.images:,}"] for one in facts.confused]
    note = (
        f"By python -m dnal_dist.evaluate, {printable(facts.runtime)}, on {facts.images:,} images of {printable(facts.shards)}: "
        f"top-1 {percent(facts.top1, 2)}, top-5 {percent(facts.top5, 2)}."
    )
    images = []
    for file, title in IMAGES.items():
        try:
            content = read_regular(folder / file, MOST_IMAGE)
        except (OSError, InputError):
            continue
        images.append((file, title, f"data:image/png;base64,{base64.b64encode(content).decode()}"))
    return Evaluation(
        note,
        Table("evaluated", "Classes of the evaluation, the weakest first", ["class", "top-1", "right"], classes, size="short"),
        Table("confused", "Classes most often taken for another", ["class", "taken for", "images"], confused, size="short"),
        images,
    )
