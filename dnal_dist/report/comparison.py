"""Runs side by side: those that differ in nothing but seed are one row. From their folders alone, no torch."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from dnal_dist.common import text
from dnal_dist.common.errors import InputError
from dnal_dist.report import pareto, published, records, seeds
from dnal_dist.report.pareto import Point
from dnal_dist.report.records import NoRecord, Run
from dnal_dist.report.run_list import found_in
from dnal_dist.report.seeds import value_text

# Of the keys in which rows differ, those of these parts are named first.
PARTS = ("model", "architecture", "phases", "training", "data")
MOST_KEYS = 5
# Folders between one that is given and its runs, and the run folder itself.
DEEP = 2
# The numbers of a run that a row has means of; shares, counts, seconds.
MEASURES = ("accuracy", "top5", "macs", "macs_ratio", "params", "params_ratio", "seconds")


@dataclass(frozen=True, eq=False)
class Row:
    """Seeds of one setting. Only runs that finished have a say in its numbers.

    settings: as seeds.settings has them; measures: one {name: number} for each finished run.
    """

    settings: dict[str, object]
    finished: list[Run]
    unfinished: list[Run]
    measures: list[dict[str, float]]

    @property
    def runs(self) -> list[Run]:
        return [*self.finished, *self.unfinished]

    def mean(self, name: str) -> float | None:
        """Over the finished runs; None if one of them lacks it."""
        values = [measures.get(name) for measures in self.measures]
        return mean(values) if values and None not in values else None

    def std(self, name: str) -> float | None:
        """Standard deviation (n - 1) over the finished runs; None for a single one."""
        return (
            stdev([measures[name] for measures in self.measures])
            if len(self.finished) > 1 and self.mean(name) is not None
            else None
        )

    @property
    def priced(self) -> bool:
        """Whether its costs are known by the paper's rule."""
        return self.mean("paper_macs") is not None and self.mean("full_macs") is not None

    @property
    def collapsed(self) -> list[Run]:
        """The finished runs whose network is not the search's choice."""
        return [run for run in self.finished if run.last("prune").get("collapsed")]

    def label(self, keys: list[str]) -> str:
        """What distinguishes it from rows that differ in `keys`, in few words; its first run's name if there are no keys."""
        shown = [(key, value_text(self.settings[key])) for key in keys if self.settings.get(key) is not None]
        bare = ("model.name", "architecture.penalty_weight") if len(keys) < 3 else ("model.name",)
        words = [value if key in bare else f"{key.rpartition('.')[2]}={value}" for key, value in shown]
        return text.printable(", ".join(words) or self.runs[0].name)


class Diagram(NamedTuple):
    """Marks, with their rows if they are no published ones; costs are in the unit that `size` names: by the paper's rule among
    published rows, which are there if all runs have one network, else by the exact rule."""

    marks: list[tuple[Point, Row | None]]
    size: str
    title: str


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs that were given: rows (by the values of what they differ in), the keys of their settings in which they differ, and
    folders of runs that have not begun."""

    parent: Path
    rows: list[Row]
    keys: list[str]
    waiting: list[Path]

    @cached_property
    def tables(self) -> dict[str, published.Published]:
        """The published tables that have a row of these runs, by network."""
        names = dict.fromkeys(row.settings.get("model.name") for row in self.rows if row.priced)
        return {name: published.tables()[name] for name in names if name in published.tables()}

    def among(self, name: str) -> list[tuple[published.Row, Row | None]]:
        """The rows of a published table with those of its network's runs among them, largest first."""
        table = self.tables[name]
        keys = [key for key in self.keys if key != "model.name"]
        mine = []
        for row in self._of(name):
            means, stds = ({key: value for key in row.measures[0] if (value := of(key)) is not None} for of in (row.mean, row.std))
            mine.append((published.own_row(row.finished[0], table, means, stds, _named(row, keys, bool(self.keys))), row))
        return sorted([*((row, None) for row in table.rows), *mine], key=lambda pair: -table.size(pair[0]))

    def _of(self, name: str) -> list[Row]:
        return [row for row in self.rows if row.settings.get("model.name") == name and row.priced]

    def differences(self, name: str) -> list[str]:
        """How the set-up of a network's runs differs from the published one."""
        found = [words for row in self._of(name) for run in row.finished for words in published.differences(run, self.tables[name])]
        return list(dict.fromkeys(found))

    @cached_property
    def diagrams(self) -> list[Diagram]:
        """One for each validation set that a row with accuracy and cost has."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.mean("accuracy") is not None and row.mean("macs") is not None:
                groups.setdefault(validation(row.finished[0]), []).append(row)
        many = len(groups) > 1
        return [self._diagram(rows, f"held-out images: {name}" if many else "") for name, rows in groups.items()]

    def _diagram(self, rows: list[Row], title: str) -> Diagram:
        networks = {row.settings.get("model.name") for row in rows}
        name = networks.pop()
        if networks or name not in self.tables:
            return Diagram([(self._point(row), row) for row in rows], "MACs for one image", title)
        table, comparable = self.tables[name], not self.differences(name)
        marks = [(pareto.of_row(mark, table, comparable), row) for mark, row in self.among(name) if row is None or row in rows]
        return Diagram([(point, row) for point, row in marks if point], pareto.unit(table), title)

    def _point(self, row: Row) -> Point:
        series, keys = self.series, [key for key in self.keys if key != self.series]
        stds = {"cost_std": row.std("macs") or 0.0, "accuracy_std": 100 * (row.std("accuracy") or 0.0)}
        named = value_text(row.settings.get(series)) if series else ""
        return Point("own", _named(row, keys, bool(series)), row.mean("macs"), 100 * row.mean("accuracy"), **stds, series=named)

    @cached_property
    def series(self) -> str:
        """The key by which marks of runs look different: the network's, if there are a few; else none."""
        networks = {json.dumps(row.settings.get("model.name")) for row in self.rows}
        return "model.name" if 1 < len(networks) <= pareto.MOST_SERIES else ""

    @cached_property
    def front(self) -> list[Row]:
        """The rows that no other one of their diagram dominates."""
        best = [(pareto.front([point for point, _ in diagram.marks]), diagram) for diagram in self.diagrams]
        return [row for points, diagram in best for point, row in diagram.marks if row is not None and point in points]


def _named(row: Row, keys: list[str], told: bool) -> str:
    """A row's label; without one where no keys are left to differ in, and what it differs in is `told` beside."""
    words = "" if told and not keys else row.label(keys)
    return f"{words} (collapsed)".lstrip() if row.collapsed else words


def compare(given: list[str | Path]) -> Comparison:
    """Compare runs, each given by its own folder or by one of a sweep, whose runs lie within (at most two folders down).

    Raises InputError naming a folder that holds no run, or what of a run cannot be read.
    """
    folders = gather([Path(path) for path in given])
    runs, waiting = [], []
    for folder in folders:
        try:
            runs.append(records.load(folder))
        except NoRecord:
            waiting.append(folder)
        except InputError:
            if (folder / "metrics.jsonl").exists():
                raise
            waiting.append(folder)
    if not runs:
        many, where = len(folders), given[0] if len(given) == 1 else _parent(folders)
        raise InputError(f"{where}: none of its {many} runs has begun; see python -m dnal_dist.runs {where}")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(seeds.setting_of(run), []).append(run)
    rows = [_row(group) for group in groups.values()]
    keys = differing(rows)
    rows.sort(key=lambda row: ([seeds.in_order(row.settings.get(key)) for key in keys], -(row.mean("macs") or 0), row.label([])))
    return Comparison(_parent(folders), rows, keys, waiting)


def gather(given: list[Path]) -> list[Path]:
    """The folders of runs that were given, each once. Raises InputError naming what is, and holds, none."""
    found: dict[Path, Path] = {}
    for path in given:
        if path.is_file() and path.parent.is_dir() and path.name in OUTPUTS:
            # A shell's * meets what an earlier comparison left.
            continue
        within = list(found_in(path, DEEP))
        if not within and path.name == "submit" and path.is_dir():
            # So does it what slurm/submit.py keeps of a sweep.
            continue
        if not within:
            raise InputError(f"{path}: no run folder, nor one that holds some; give folders that recipes name as 'output'")
        for folder in within:
            found.setdefault(folder.resolve(), folder)
    if not found:
        raise InputError(f"{given[0]}: no run folder; give folders that recipes name as 'output'")
    return list(found.values())


OUTPUTS = ("comparison.html", "comparison.md", "comparison.csv", "pareto.svg", "pareto.png")


def is_sweep(path: Path) -> bool:
    """Whether it is a folder that holds runs and is none itself."""
    return path not in (found := list(found_in(path, DEEP))) and bool(found)


def _parent(folders: list[Path]) -> Path:
    """The closest folder that all of them lie in."""
    lines = [folder.resolve().parents for folder in folders]
    return next(parent for parent in lines[0] if all(parent in line for line in lines))


def differing(rows: list[Row]) -> list[str]:
    """The keys of the settings whose values are not the same in all rows that have a recipe."""
    told = [row.settings for row in rows if row.settings]
    keys = dict.fromkeys(key for settings in told for key in settings)
    found = [key for key in keys if len({json.dumps(settings.get(key), sort_keys=True) for settings in told}) > 1]
    return sorted(found, key=lambda key: next((i for i, part in enumerate(PARTS) if key.startswith(f"{part}.")), len(PARTS)))


def _row(runs: list[Run]) -> Row:
    summaries = [(run, records.summary(run)) for run in runs]
    finished = [run for run, result in summaries if result["finished"]]
    measures = [published.measures(run, result) for run, result in summaries if result["finished"]]
    return Row(seeds.settings(runs[0]), finished, [run for run, result in summaries if not result["finished"]], measures)


def validation(run: Run) -> str:
    """What names a run's validation set: its shards and how many images they hold."""
    samples = run.last("start").get("val_samples")
    return str(run.setting("data", "val") or "unnamed") + ("" if samples is None else f" ({samples:,})")
