"""A network on a set of shards, class by class: what it confuses, and the images that it is most wrong about."""

import heapq
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dnal_dist.common import atomic
from dnal_dist.common.errors import InputError
from dnal_dist.common.sheet import sheet
from dnal_dist.data.pipeline import Batch
from dnal_dist.export.prediction import probabilities

# Images on the contact sheet, and pairs of classes that are listed.
WORST, PAIRS = 40, 20
# Pixels of an image there.
TILE = 128


class Mistake(NamedTuple):
    """An image, and the probability that the network gives its class."""

    probability: float
    key: str
    label: int
    predicted: int
    image: np.ndarray
    """uint8 (H, W, 3)."""


@dataclass
class Tally:
    """What a network made of images; the sum of two is that of both sets."""

    confusion: np.ndarray
    """int64 (classes, classes): images by their class, and by the class that comes first."""
    top5: int = 0
    skipped: list[str] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    """Those of the lowest probabilities, up to WORST."""

    def add(self, batch: Batch, logits: np.ndarray) -> None:
        """logits: (n, classes) of the batch's images."""
        labels, shares = batch.labels.numpy(), probabilities(logits)
        order = np.argsort(-shares, axis=1, kind="stable")
        np.add.at(self.confusion, (labels, order[:, 0]), 1)
        self.top5 += int((order[:, :5] == labels[:, None]).any(1).sum())
        for row in np.flatnonzero(order[:, 0] != labels):
            share = float(shares[row, labels[row]])
            if len(self.mistakes) < WORST or share < self.mistakes[-1].probability:
                image = batch.images[row].permute(1, 2, 0).numpy().copy()
                self.keep([Mistake(share, batch.keys[row], int(labels[row]), int(order[row, 0]), image)])

    def keep(self, others: Iterable[Mistake]) -> None:
        self.mistakes = heapq.nsmallest(WORST, [*self.mistakes, *others], key=lambda one: (one.probability, one.key))

    def facts(self, names: list[str]) -> dict:
        """As JSON; accuracies are fractions."""
        seen, right = self.confusion.sum(1), np.diag(self.confusion)
        total = int(seen.sum())
        classes = [
            {"class": name, "images": int(number), "right": int(correct)}
            for name, number, correct in zip(names, seen, right, strict=True)
        ]
        wrong = self.confusion - np.diag(right)
        order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
        pairs = [(int(at) // len(names), int(at) % len(names)) for at in order if wrong.flat[at]]
        return {
            "images": total,
            "top1": float(right.sum() / max(total, 1)),
            "top5": self.top5 / max(total, 1),
            "classes": classes,
            "confused": [{"class": names[a], "with": names[b], "images": int(wrong[a, b])} for a, b in pairs],
            "worst": [
                {"key": one.key, "class": names[one.label], "predicted": names[one.predicted], "probability": one.probability}
                for one in self.mistakes
            ],
            "skipped": self.skipped,
            "confusion": self.confusion.tolist(),
        }


def require_own(folder: Path) -> None:
    """Raise InputError if `folder` holds something else than an evaluation, which would replace it."""
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / "evaluation.json").exists())):
        raise InputError(f"--output {folder}: there is something already that is no evaluation; name a new folder")


def write(tally: Tally, facts: dict, folder: Path) -> None:
    """evaluation.json, confusion.png and, if any image is wrong, worst.png in `folder`. Raises OSError."""
    names = [row["class"] for row in facts["classes"]]
    with atomic.folder(folder) as unfinished:
        (unfinished / "evaluation.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        _draw(tally.confusion, names, unfinished / "confusion.png")
        if tally.mistakes:
            captions = [[(names[one.label], "black"), (f"not {names[one.predicted]}", "red")] for one in tally.mistakes]
            sheet((Image.fromarray(one.image) for one in tally.mistakes), captions, TILE).save(unfinished / "worst.png")


def _draw(confusion: np.ndarray, names: list[str], path: Path) -> None:
    """The matrix, each row as shares of its class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    few = len(names) <= 40
    side = 2.5 + (0.3 * len(names) if few else 6)
    figure = Figure((side + 0.8, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="class")
    if few:
        # Dollar signs would be mathematics.
        words = [name[:24].replace("$", r"\$") for name in names]
        axes.set_xticks(range(len(names)), words, rotation=90)
        axes.set_yticks(range(len(names)), words)
        for row, column in itertools.product(range(len(names)), repeat=2):
            if confusion[row, column]:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, int(confusion[row, column]), ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(drawn, ax=axes, label="share of the class", shrink=0.8)
    figure.savefig(path, dpi=120)
