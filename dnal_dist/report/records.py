"""A run folder's records, their summary, and the summary in words. No torch."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from dnal_dist.common.errors import InputError
from dnal_dist.common.files import read_regular
from dnal_dist.common.text import percent, printable

# Bytes; a search of a large supernet records about 50 MB.
MOST_RECORDS, MOST_RECIPE = 1 << 29, 1 << 20


class NoRecord(InputError):
    """A run folder without any record yet."""


@dataclass(frozen=True)
class Run:
    """A run folder in memory: the recipe as a dictionary and as text, and the records of metrics.jsonl in their order.

    Every key that a record has is of its type and within its bounds (record.py); any may be absent. faults: how much of
    metrics.jsonl was left out for that, in words; empty for nothing.
    """

    folder: Path
    recipe: dict
    recipe_text: str
    records: list[dict]
    faults: str = ""

    def of(self, kind: str, phase: str | None = None, has: tuple[str, ...] = ()) -> list[dict]:
        """Records of one kind, of one phase if given, with all keys of `has`."""
        return [r for r in self.records if r["kind"] == kind and phase in (None, r.get("phase")) and all(key in r for key in has)]

    def last(self, kind: str, phase: str | None = None) -> dict:
        """The latest record of one kind; empty if there is none yet."""
        return next(reversed(self.of(kind, phase)), {})

    def series(self, kind: str, x: str, y: str, phase: str | None = None) -> tuple[list[float], list[float]]:
        """Two keys of the records that have both; a loss that became NaN leaves a gap."""
        found = self.of(kind, phase, (x, y))
        return [r[x] for r in found], [r[y] for r in found]

    def setting(self, part: str, key: str) -> Any:
        """One key of one part of the recipe, None where there is none."""
        settings = self.recipe.get(part)
        return settings.get(key) if isinstance(settings, dict) else None

    def channels(self, counts: dict[str, int]) -> list[int]:
        """Of a record's counts those of each gate site, in order, none above the site's channels."""
        return [min(counts.get(site, 0), channels) for site, channels in self.sites.items()]

    @cached_property
    def sites(self) -> dict[str, int]:
        """Channels of each gate site."""
        return self.last("start").get("sites") or {}

    @property
    def name(self) -> str:
        """The run's name by its own record, else by its recipe, else its folder's."""
        return printable(str(self.last("start").get("name") or self.recipe.get("name") or self.folder.resolve().name))


def load(run: str | Path) -> Run:
    """Read a run folder. Damaged lines and wrong values of metrics.jsonl are left out and counted; recipe.yaml may be absent.

    Raises InputError naming the path and the remedy if the folder or metrics.jsonl is missing, holds no record, or cannot be
    read, or if recipe.yaml cannot.
    """
    folder = Path(run)
    path, recipe_path = folder / "metrics.jsonl", folder / "recipe.yaml"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder; give the folder that a recipe names as its 'output'")
    try:
        content = read_regular(path, MOST_RECORDS)
        recipe_text = read_regular(recipe_path, MOST_RECIPE).decode() if recipe_path.exists() else ""
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, so {folder} is not a run folder; start the run first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder}: cannot be read ({error}); mend the file or its permissions") from None
    recipe = _recipe(recipe_path, recipe_text)
    return Run(folder, recipe, recipe_text, *_records(path, content.split(b"\n")))


def _recipe(path: Path, text: str) -> dict:
    # Not at the top: the list of runs has to begin at once.
    from dnal_dist.recipe.loading import parsed

    try:
        tree = _plain(parsed(text, f"{path}: not valid YAML"))
    except InputError as error:
        raise InputError(f"{error}; mend it or move it away") from None
    return tree if isinstance(tree, dict) else {}


def _plain(value: Any) -> Any:
    """A recipe's value with nothing in it that JSON has not, and no control characters."""
    if isinstance(value, dict):
        return {printable(str(key)): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, bool) or (isinstance(value, int | float) and abs(value) < 1e30):
        return value
    return printable(str(value))


def _records(path: Path, lines: list[bytes]) -> tuple[list[dict], str]:
    """The records, and in words what was left out."""
    from dnal_dist.report.record import typed

    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    records, damaged, wrong, first = [], 0, 0, ""
    for number, line in numbered:
        try:
            tree = json.loads(line)
        except (ValueError, RecursionError):
            # The last line of a run that was killed while it wrote.
            if number == numbered[-1][0]:
                break
            tree = None
        record, keys = typed(tree)
        if record is not None:
            records.append(record)
        if keys or record is None:
            damaged, wrong = damaged + (record is None), wrong + len(keys)
            first = first or f"line {number}" + (f", key {printable(keys[0])[:40]}" if keys else "")
    if not records and damaged:
        raise InputError(f"{path}: none of its {damaged:,} lines is a record; name a run folder")
    if not records:
        raise NoRecord(f"{path}: holds no record yet; wait for the run's first iterations, or start it again")
    left_out = f"{damaged:,} damaged lines and {wrong:,} wrong values of {path.name} were left out, the first in {first}"
    return records, left_out if first else ""


def summary(run: str | Path | Run) -> dict:
    """Results of a run, finished or not; a key whose value is not known yet is absent.

    accuracy {phase: top-1 of its last evaluation}, full and compact (costs as in metrics.jsonl), macs_ratio and
    params_ratio (compact / full, exact rule), budget {unit, least, most, used, missed, further}, latency {device, rows}
    (as in metrics.jsonl, of rows that have both networks), channels {total, kept}, collapsed,
    warnings, seconds, phase_seconds {phase: seconds}, phase (the last one seen), finished. Raises ValueError as `load` does.
    """
    run = run if isinstance(run, Run) else load(run)
    start, prune, end = run.last("start"), run.last("prune"), run.last("end")
    elapsed = _elapsed(run)
    known = {
        "accuracy": {r["phase"]: r["accuracy"] for r in run.of("eval", has=("phase", "accuracy"))},
        "full": prune.get("full") or start.get("full"),
        "compact": prune.get("compact"),
        "budget": _budget(prune),
        "latency": _latency(run.last("latency")),
        "collapsed": bool(prune.get("collapsed")),
        "warnings": [r["message"] for r in run.of("warning", has=("message",))] + [*filter(None, [imbalance(run), run.faults])],
        "seconds": end.get("seconds", sum(elapsed.values())),
        "phase_seconds": {phase: seconds for phase, seconds in elapsed.items() if phase},
        "phase": next((r["phase"] for r in reversed(run.records) if "phase" in r), None),
        "finished": bool(end),
    }
    if known["full"] and known["compact"]:
        for key in ("macs", "params"):
            known[f"{key}_ratio"] = known["compact"]["exact"][key] / max(known["full"]["exact"][key], 1)
    if run.sites:
        known["channels"] = {"total": sum(run.sites.values())}
        if "kept" in prune:
            known["channels"]["kept"] = sum(run.channels(prune["kept"]))
    return {key: value for key, value in known.items() if value is not None}


def _budget(prune: dict) -> dict | None:
    """{unit, least, most, used, missed, further} of a run that was given a budget; further: others, as {unit, least, most, used}.
    Missed: one is exceeded, or less is used of each than was asked for."""
    if "budget" not in prune or "compact" not in prune:
        return None
    rows = []
    for one in (prune["budget"], *prune.get("further_budgets", ())):
        used = one.get("used", prune["compact"]["exact"].get(one["unit"], 0))
        rows.append({"unit": one["unit"], "least": one["least"], "most": one["most"], "used": used, "measured": "predicted" in one})
    missed = any(row["used"] > row["most"] for row in rows) or all(row["used"] < row["least"] for row in rows)
    return {**rows[0], "missed": missed, "further": rows[1:]}


def _latency(record: dict) -> dict | None:
    rows = [row for row in record.get("rows", ()) if {"full", "compact"} <= row["median"].keys() and "compact" in row["faster"]]
    return {"device": record.get("device", "an unnamed device"), "rows": rows} if rows else None


def _elapsed(run: Run) -> dict[str, float]:
    """Seconds of each phase ("" outside of any), as the run recorded them, else from the times of its records."""
    recorded = {r["phase"]: r["seconds"] for r in run.of("phase", has=("phase", "seconds"))}
    recorded |= run.last("end").get("phase_seconds", {})
    seconds: dict[str, float] = {}
    phase = ""
    for before, record in pairwise(run.records):
        # A receipt has no phase: the time before it belongs to the present one.
        phase = record.get("phase", phase)
        # The last checkpoint's, which belongs to no phase.
        phase = "" if phase == "done" else phase
        # The time between a stop and its resume is nobody's.
        if record["kind"] != "start" and "time" in before and "time" in record:
            seconds[phase] = seconds.get(phase, 0.0) + max(record["time"] - before["time"], 0.0)
    return seconds | recorded


def channels(run: Run) -> tuple[dict[str, int], dict[str, int] | None]:
    """Channels of each site, and how many are kept or, before pruning, open; None before any record of that."""
    kept = run.last("prune").get("kept") or run.last("gates").get("open")
    return run.sites, dict(zip(run.sites, run.channels(kept), strict=True)) if run.sites and kept else None


def by_class(run: Run) -> list[list[int]]:
    """[right, seen] of each class in the newest evaluation that counted them; empty if there is none."""
    found = run.of("eval", has=("per_class",))
    return [[min(right, seen), seen] for right, seen in found[-1]["per_class"]] if found else []


def trained_on(run: Run) -> dict[int, int]:
    """Training images of each class, as the run's first epoch had them; empty if they were not counted."""
    found = run.of("receipt", has=("class_counts",))
    return dict(enumerate(found[-1]["class_counts"])) if found else {}


def imbalance(run: Run) -> str:
    """What top-1 accuracy hides, in a sentence; empty where the mean over classes is as high and no class is lost."""
    found = [(right / seen, number, seen) for number, (right, seen) in enumerate(by_class(run)) if seen]
    if not found:
        return ""
    (lowest, number, seen), balanced = min(found), mean(accuracy for accuracy, _, _ in found)
    total = sum(accuracy * seen for accuracy, _, seen in found) / sum(seen for _, _, seen in found)
    # A network that knows little yet has none right of some class by chance.
    lost = lowest == 0 and seen >= 5 and total >= 0.5
    if total - balanced <= 0.05 and not lost:
        return ""
    weakest = f"the weakest, class {number}, has {percent(lowest, 2)} of {seen:,} images"
    if number in (trained := trained_on(run)):
        weakest += f", and {trained[number]:,} of {sum(trained.values()):,} training images"
    return f"top-1 accuracy {percent(total, 2)} is {percent(balanced, 2)} as a mean over classes: {weakest}"


def result_of(run: Run) -> dict:
    """The summary, and what `when` asks for beside it."""
    untrained = run.last("eval", "pretrain").get("step") == 0
    return summary(run) | {"ended": {r.get("phase") for r in run.of("phase")}, "untrained": untrained}


def spans(run: Run) -> list[tuple[str, int, int]]:
    """Each phase that trained, with the iterations of the run at which it began (exclusive) and at which it stands."""
    steps: dict[str, list[dict]] = {}
    for record in run.of("train", has=("phase", "global_step")):
        steps.setdefault(record["phase"], []).append(record)
    return [
        (phase, max(records[0]["global_step"] - records[0].get("step", 1), 0), max(r["global_step"] for r in records))
        for phase, records in steps.items()
    ]


def thinned(series: tuple[list[float], list[float]], most: int = 700) -> tuple[list[float], list[float]]:
    """At most `most` points, means of equal blocks: what shows a long run stays light and no trend is hidden."""
    xs, ys = series
    block = math.ceil(len(xs) / most) or 1
    starts = range(0, len(xs), block)
    return [mean(xs[i : i + block]) for i in starts], [mean(ys[i : i + block]) for i in starts]
