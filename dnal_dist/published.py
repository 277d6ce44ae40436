"""The paper's tables, arXiv 2103.02126, as data, and a run's place among their rows. No torch."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml


@dataclass(frozen=True)
class Row:
    """One row of a table; each figure is the text that the paper prints, empty where it prints none."""

    method: str
    cite: str = ""
    penalty_weight: str = ""
    flops: str = ""
    flops_ratio: str = ""
    params: str = ""
    params_ratio: str = ""
    top1: str = ""
    top5: str = ""
    search: str = ""
    epochs: str = ""
    note: str = ""

    @property
    def total_epochs(self) -> int | None:
        """Epochs of all phases together, None where the paper tells none."""
        return sum(map(int, self.epochs.split("+"))) if self.epochs else None


@dataclass(frozen=True)
class Table:
    """One table: its network in dnal_dist.nets, the set-up of its experiment, {column: unit} and its rows as printed."""

    network: str
    title: str
    dataset: str
    num_classes: int
    image_size: int
    pictures: dict[str, int]
    columns: dict[str, str]
    rows: list[Row]

    @property
    def baseline(self) -> Row:
        """The full network's row."""
        return next(row for row in self.rows if row.method == "Baseline")


@cache
def tables() -> dict[str, Table]:
    """Every table of the paper by the name of its network."""
    text = files("dnal_dist").joinpath("published.yaml").read_text("utf-8")
    # Digits are what is published: a loader that makes numbers of them would lose the last of 0.060.
    return {network: _table(network, told) for network, told in yaml.load(text, yaml.BaseLoader)["tables"].items()}


def _table(network: str, told: dict) -> Table:
    numbers = {key: int(told[key]) for key in ("num_classes", "image_size")}
    pictures = {key: int(count) for key, count in told["pictures"].items()}
    return Table(network, **told | numbers | {"pictures": pictures, "rows": [_row(row) for row in told["rows"]]})


def _row(told: dict) -> Row:
    figures = {}
    for key in ("flops", "params"):
        if isinstance(told.get(key), list):
            figures[key], figures[f"{key}_ratio"] = told[key]
    return Row(**told | figures)
