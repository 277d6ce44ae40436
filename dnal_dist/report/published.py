"""The paper's tables, arXiv 2103.02126, as data, and a run's place among their rows. No torch."""

import re
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

import yaml

from dnal_dist.common.text import printable
from dnal_dist.report import words
from dnal_dist.report.records import Run
from dnal_dist.report.tables import Table

HEADS = {"flops": "FLOPs", "params": "parameters", "top1": "top-1", "top5": "top-5", "search": "search", "epochs": "epochs"}
UNITS = {"G": 1e9, "M": 1e6}
OWN = "this run"
OWNS = "ours"


@dataclass(frozen=True)
class Row:
    """One row of a table; each figure is the text that the paper prints, empty where it prints none.

    stds {column: figure} are the standard deviations of a row that is the mean of several runs."""

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
    stds: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.method} {self.penalty_weight}".rstrip()

    def cell(self, column: str) -> str:
        """A figure with its standard deviation, if any, and its ratio, as the paper prints the two; a dash where it prints none."""
        ratio = getattr(self, f"{column}_ratio", "")
        spread = f" ± {self.stds[column]}" if column in self.stds else ""
        return (getattr(self, column) or "-") + spread + (f" ({ratio}x)" if ratio else "")


@dataclass(frozen=True)
class Published:
    """One table: its network in dnal_dist.nets, the set-up of its experiment, {column: unit} and its rows as printed."""

    network: str
    title: str
    dataset: str
    num_classes: int
    image_size: int
    images: dict[str, int]
    columns: dict[str, str]
    rows: list[Row]

    @property
    def baseline(self) -> Row:
        """The full network's row."""
        return next(row for row in self.rows if row.method == "Baseline")

    @property
    def axis(self) -> str:
        """The column of a row's size."""
        return "flops" if "flops" in self.columns else "params"

    def head(self, column: str) -> str:
        unit = self.columns.get(column)
        return f"{HEADS[column]} ({unit})" if unit in ("G", "M", "%") else HEADS[column]

    def size(self, row: Row) -> float:
        """A row's FLOPs, or its parameters where the table has no FLOPs, in the table's unit; 0 if it has none."""
        return float(getattr(row, self.axis) or 0)

    def lines(self, rows: list[Row], own: list[int]) -> Table:
        """Rows of it in words; own: the numbers of those of runs."""
        columns = [column for column in HEADS if column in self.columns or column == "epochs"]
        body = [[row.label, *(row.cell(column) for column in columns)] for row in rows]
        head = ["method, penalty weight", *map(self.head, columns)]
        return Table("published", f"Among the published rows of {self.title}", head, body, own, stacks=True)


@dataclass(frozen=True)
class Place:
    """A run among the rows of its table, largest first; its own row is there as soon as it has a compact network."""

    table: Published
    rows: list[Row]
    own: Row | None
    differences: list[str]
    remarks: list[str]

    def lines(self) -> Table:
        """The table in words, the run's own row to stand out."""
        return self.table.lines(self.rows, [self.rows.index(self.own)] if self.own else [])

    @property
    def note(self) -> str:
        return " ".join([f"{self.table.title}, as published in arXiv 2103.02126.", *self.remarks])


@cache
def tables() -> dict[str, Published]:
    """Every table of the paper by the name of its network."""
    from pydantic import TypeAdapter

    text = files("dnal_dist.report").joinpath("published.yaml").read_text("utf-8")
    # Digits are what is published: a loader that makes numbers of them would lose the last of 0.060.
    found = yaml.load(text, yaml.BaseLoader)["tables"]
    for network, table in found.items():
        table["network"] = network
        for row in table["rows"]:
            for key in ("flops", "params"):
                if isinstance(row.get(key), list):
                    row[key], row[f"{key}_ratio"] = row[key]
    return TypeAdapter(dict[str, Published]).validate_python(found)


def place(run: Run, result: dict) -> Place | None:
    """The run, whose `results.result_of` is `result`, among the published rows of its network; None if there are none."""
    name = run.setting("model", "name")
    table = tables().get(name) if isinstance(name, str) else None
    if table is None:
        return None
    own = own_row(run, table, measures(run, result), {}) if _priced(result) else None
    # Among equals the run comes last.
    rows = sorted([*table.rows, *([own] if own else [])], key=lambda row: -table.size(row))
    found = differences(run, table)
    return Place(table, rows, own, found, _remarks(run, result, table, found))


def _priced(result: dict) -> bool:
    """Whether the compact network is there, and its cost known by both rules."""
    return all("paper" in result.get(which, {}) for which in ("full", "compact"))


def measures(run: Run, result: dict) -> dict[str, float]:
    """A run's numbers, a key absent that is not known: accuracy, top5, seconds; macs, params and their ratio to the full network's
    by the exact rule; paper_ and full_ macs and params of the compact and the full network by the paper's."""
    found, compact, full = accuracy(run), result.get("compact", {}), result.get("full", {})
    known = {"accuracy": found.get("accuracy"), "top5": found.get("top5"), "seconds": result["seconds"]}
    for key in ("macs", "params"):
        known |= {
            key: compact.get("exact", {}).get(key),
            f"{key}_ratio": result.get(f"{key}_ratio"),
            f"paper_{key}": compact.get("paper", {}).get(key),
            f"full_{key}": full.get("paper", {}).get(key),
        }
    return {name: value for name, value in known.items() if value is not None}


def own_row(run: Run, table: Published, means: dict[str, float], stds: dict[str, float], label: str | None = None) -> Row:
    """A run as a row, or several that are set up as `run`, by the means and standard deviations of their `measures`. label: what
    distinguishes these runs from others; None for a run that is alone."""
    costs, spreads = {}, {}
    for column, key in (("flops", "macs"), ("params", "params")):
        if column in table.columns:
            compact, unit, like = means[f"paper_{key}"], UNITS[table.columns[column]], getattr(table.baseline, column)
            costs[column] = _figure(compact / unit, like)
            if compact and getattr(table.baseline, f"{column}_ratio"):
                costs[f"{column}_ratio"] = f"{means[f'full_{key}'] / compact:.2f}"
            if f"paper_{key}" in stds:
                spreads[column] = f"{stds[f'paper_{key}'] / unit:.{len(costs[column].partition('.')[2])}f}"
    for column, key in (("top1", "accuracy"), ("top5", "top5")):
        costs |= {column: f"{100 * means[key]:.2f}"} if key in means else {}
        spreads |= {column: f"{100 * stds[key]:.2f}"} if key in stds else {}
    weight = run.setting("architecture", "penalty_weight")
    return Row(
        method=OWN if label is None else OWNS,
        penalty_weight=label if label is not None else weight_text(weight) if isinstance(weight, int | float) else "",
        search="gradient" if "search" in table.columns else "",
        epochs=_epochs(run),
        stds=spreads,
        **costs,
    )


def _figure(value: float, like: str) -> str:
    """With as many decimals as the baseline's figure, and two digits at least."""
    return f"{value:.{len(like.partition('.')[2])}f}" if value >= 0.1 else f"{value:#.2g}"


def weight_text(weight: float) -> str:
    """Small ones as the paper writes them, 1e-4."""
    return re.sub(r"\.?0*e-0*", "e-", f"{weight:e}") if 0 < weight < 0.001 else f"{weight:g}"


def accuracy(run: Run) -> dict:
    """The last evaluation of the compact network, empty if there is none yet."""
    return run.last("eval", "finetune") or run.last("eval", "prune")


def _epochs(run: Run) -> str:
    epochs = [run.last("train", phase).get("epoch") for phase in ("pretrain", "search", "finetune")]
    if epochs[0] is None and epochs[1] is not None:
        epochs[0] = 0
    return "+".join(f"{round(number, 2):g}" for number in epochs if number is not None)


def differences(run: Run, table: Published) -> list[str]:
    """How the run's set-up differs from the published one, as far as its folder shows."""
    start, found = run.last("start"), []
    for key, expected in table.images.items():
        count = start.get({"train": "train_samples", "held_out": "val_samples"}[key])
        # A few images that a copy of the data set lacks change no accuracy that is printed.
        if count is not None and abs(count - expected) > 0.01 * expected:
            kind = "training" if key == "train" else "held-out"
            found.append(f"{count:,} {kind} images, not the {expected:,} of {table.dataset}")
    for part, key, expected, form in (
        ("model", "num_classes", table.num_classes, "{} classes, not {}"),
        ("data", "image_size", table.image_size, "images of {0} x {0} pixels, not {1} x {1}"),
        ("model", "width", 1, "width {}, not {}"),
    ):
        value = run.setting(part, key)
        if value is not None and value != expected:
            found.append(form.format(printable(str(value)), expected))
    if given := run.setting("model", "init_from"):
        found.append(f"weights of {printable(str(given))} to begin with")
    return found


def _remarks(run: Run, result: dict, table: Published, differences: list[str]) -> list[str]:
    """What to know before comparing, a sentence each."""
    remarks = []
    if differences:
        remarks.append(f"Not comparable with the published rows, since the run has its own set-up: {'; '.join(differences)}.")
    if not _priced(result):
        return [*remarks, "The run has no row yet: it is placed once its network is pruned."]
    paper, exact = (result["compact"][rule] for rule in ("paper", "exact"))
    remarks.append(
        f"The run is placed by the paper's rule, {paper['macs']:,} FLOPs and {paper['params']:,} parameters; "
        f"by the exact rule it has {exact['macs']:,} MACs and {exact['params']:,} parameters."
    )
    found = accuracy(run)
    if not found:
        remarks.append("Its accuracy is not known yet.")
    elif not result["finished"]:
        remarks.append(f"Its accuracy is the one {words.when(result, found['phase'])}.")
    return remarks
