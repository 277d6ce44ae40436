"""A run folder's records, their summary, and the summary in words. No torch."""

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import mean

import yaml

from dnal_dist.common.phases import PHASES
from dnal_dist.common.text import amount, duration, fewer, percent, printable


class NoRecord(ValueError):
    """A run folder without any record yet."""


@dataclass(frozen=True)
class Run:
    """A run folder in memory: the recipe as a dictionary and as text, the records of metrics.jsonl in their order."""

    folder: Path
    recipe: dict
    recipe_text: str
    records: list[dict]

    def of(self, kind: str, phase: str | None = None) -> list[dict]:
        """Records of one kind, of one phase if given."""
        return [r for r in self.records if r.get("kind") == kind and phase in (None, r.get("phase"))]

    def last(self, kind: str, phase: str | None = None) -> dict:
        """The latest record of one kind; empty if there is none yet."""
        return next(reversed(self.of(kind, phase)), {})

    def series(self, kind: str, x: str, y: str, phase: str | None = None) -> tuple[list[float], list[float]]:
        """Two keys of the records in which both are finite numbers; a loss that became NaN leaves a gap."""
        pairs = [(r.get(x), r.get(y)) for r in self.of(kind, phase)]
        finite = [pair for pair in pairs if all(isinstance(v, int | float) and math.isfinite(v) for v in pair)]
        return [a for a, _ in finite], [b for _, b in finite]

    def setting(self, part: str, key: str) -> object:
        """One key of one part of the recipe, None where there is none."""
        settings = self.recipe.get(part)
        return settings.get(key) if isinstance(settings, dict) else None

    @property
    def name(self) -> str:
        """The run's name by its own record, else by its recipe, else its folder's."""
        return str(self.last("start").get("name") or self.recipe.get("name") or self.folder.resolve().name)


def load(run: str | Path) -> Run:
    """Read a run folder.

    A last line of metrics.jsonl that was cut short is left out, and recipe.yaml may be absent. Raises ValueError naming
    the path and the remedy if the folder or metrics.jsonl is missing, holds no record, or has a broken line before its
    last.
    """
    folder = Path(run)
    path, recipe_path = folder / "metrics.jsonl", folder / "recipe.yaml"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder; give the folder that a recipe names as its 'output'")
    try:
        lines = path.read_bytes().split(b"\n")
        recipe_text = recipe_path.read_text("utf-8") if recipe_path.exists() else ""
        recipe = yaml.safe_load(recipe_text)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file, so {folder} is not a run folder; start the run first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder}: cannot be read ({error}); mend the file or its permissions") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{recipe_path}: not valid YAML ({reason}); mend it or move it away") from None
    return Run(folder, recipe if isinstance(recipe, dict) else {}, recipe_text, _records(path, lines))


def _records(path: Path, lines: list[bytes]) -> list[dict]:
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    records = []
    for number, line in numbered:
        try:
            record = json.loads(line)
        except ValueError:
            # The last line of a run that was killed while it wrote.
            if number == numbered[-1][0]:
                break
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object; remove this line and try again")
        records.append(record)
    if not records:
        raise NoRecord(f"{path}: holds no record yet; wait for the run's first iterations, or start it again")
    return records


def summary(run: str | Path | Run) -> dict:
    """Results of a run, finished or not; a key whose value is not known yet is absent.

    accuracy {phase: top-1 of its last evaluation}, full and compact (costs as in metrics.jsonl), macs_ratio and
    params_ratio (compact / full, exact rule), budget {unit, least, most, used, missed}, channels {total, kept}, collapsed,
    warnings, seconds, phase_seconds {phase: seconds}, phase (the last one seen), finished. Raises ValueError as `load` does.
    """
    run = run if isinstance(run, Run) else load(run)
    start, prune, end = run.last("start"), run.last("prune"), run.last("end")
    elapsed = _elapsed(run)
    known = {
        "accuracy": {r["phase"]: r["accuracy"] for r in run.of("eval") if "phase" in r and "accuracy" in r},
        "full": prune.get("full") or start.get("full"),
        "compact": prune.get("compact"),
        "budget": _budget(prune),
        "collapsed": bool(prune.get("collapsed")),
        "warnings": [str(r.get("message", "")) for r in run.of("warning")],
        "seconds": end.get("seconds", sum(elapsed.values())),
        "phase_seconds": {phase: seconds for phase, seconds in elapsed.items() if phase},
        "phase": next((r["phase"] for r in reversed(run.records) if "phase" in r), None),
        "finished": bool(end),
    }
    if known["full"] and known["compact"]:
        for key in ("macs", "params"):
            known[f"{key}_ratio"] = known["compact"]["exact"][key] / max(known["full"]["exact"][key], 1)
    if start.get("sites"):
        known["channels"] = {"total": sum(start["sites"].values())}
        if "kept" in prune:
            known["channels"]["kept"] = sum(prune["kept"].values())
    return {key: value for key, value in known.items() if value is not None}


def _budget(prune: dict) -> dict | None:
    """{unit, least, most, used, missed} of a run that was given a budget."""
    target = prune.get("budget")
    used = prune.get("compact", {}).get("exact", {}).get(target.get("unit")) if isinstance(target, dict) else None
    if used is None:
        return None
    least, most = target.get("least", 0), target.get("most", 0)
    return {"unit": target["unit"], "least": least, "most": most, "used": used, "missed": not least <= used <= most}


def _elapsed(run: Run) -> dict[str, float]:
    """Seconds of each phase ("" outside of any), as the run recorded them, else from the times of its records."""
    recorded = {r["phase"]: r["seconds"] for r in run.of("phase")} | run.last("end").get("phase_seconds", {})
    seconds: dict[str, float] = {}
    phase = ""
    for before, record in pairwise(run.records):
        # A receipt has no phase: the time before it belongs to the present one.
        phase = record.get("phase", phase)
        # The last checkpoint's, which belongs to no phase.
        phase = "" if phase == "done" else phase
        # The time between a stop and its resume is nobody's.
        if record.get("kind") != "start" and "time" in before and "time" in record:
            seconds[phase] = seconds.get(phase, 0.0) + record["time"] - before["time"]
    return seconds | recorded


def channels(run: Run) -> tuple[dict[str, int], dict[str, int] | None]:
    """Channels of each site, and how many are kept or, before pruning, open; None before any record of that."""
    sites, kept = run.last("start").get("sites") or {}, run.last("prune").get("kept") or run.last("gates").get("open")
    return sites, kept if sites and isinstance(kept, dict) else None


def when(result: dict, phase: str) -> str:
    """When an accuracy was measured: after a phase, in one that still goes on, or before the first iteration."""
    if phase == "pretrain" and result["untrained"]:
        return "at the start"
    goes_on = phase == result.get("phase") != "prune" and not result["finished"] and phase not in result["ended"]
    return f"so far in {phase}" if goes_on else f"after {'pruning' if phase == 'prune' else phase}"


def result_of(run: Run) -> dict:
    """The summary, and what `when` asks for beside it."""
    untrained = run.last("eval", "pretrain").get("step") == 0
    return summary(run) | {"ended": {r.get("phase") for r in run.of("phase")}, "untrained": untrained}


def where(run: Run) -> str:
    """Where an unfinished run stands."""
    train = run.last("train")
    if not train:
        return "Not finished: no iteration is on record yet."
    steps = f"iteration {train.get('step', 0):,} of {train.get('phase_steps', 0):,}"
    return f"Not finished: at {steps} of {train.get('phase')}."


def commit(code: str) -> str:
    """A commit in short, with the mark of a checkout that had changes."""
    return code if len(code) < 40 else code[:12] + code[40:]


def date(run: Run) -> str:
    """When the run's last record was written."""
    times = [r["time"] for r in run.records if "time" in r]
    return f"{datetime.fromtimestamp(times[-1], UTC):%Y-%m-%d %H:%M} UTC" if times else "an unknown time"


def about(run: Run) -> str:
    """Network, images, processes and date in a line."""
    start, model = run.last("start"), run.setting("model", "name")
    parts = [str(model)] if model else []
    if "train_samples" in start:
        parts.append(f"{start['train_samples']:,} training and {start.get('val_samples', 0):,} held-out images")
    if "world_size" in start:
        many = "1 process" if start["world_size"] == 1 else f"{start['world_size']} processes"
        parts.append(f"{many} on {start.get('device', 'an unnamed device')}")
    return ", ".join([*parts, date(run)])


def headline(run: Run, result: dict) -> str:
    """The result in a sentence, or the progress of an unfinished run; `result` is its `result_of`."""
    phase, accuracy = next(reversed(result["accuracy"].items()), ("", None))
    if result["finished"] and accuracy is not None and "macs_ratio" in result:
        macs, params = percent(result["macs_ratio"]), percent(result["params_ratio"])
        kept = f"{macs} of the full network's MACs and {params} of its parameters"
        return f"{percent(accuracy, 2)} top-1 accuracy with {kept}."
    reached = "" if accuracy is None else f" Top-1 accuracy {percent(accuracy, 2)} {when(result, phase)}."
    return ("Finished." if result["finished"] else where(run)) + reached


def spans(run: Run) -> list[tuple[str, int, int]]:
    """Each phase that trained, with the iterations of the run at which it began (exclusive) and at which it stands."""
    steps: dict[str, list[dict]] = {}
    for record in run.of("train"):
        steps.setdefault(str(record.get("phase")), []).append(record)
    return [
        (phase, records[0]["global_step"] - records[0].get("step", 1), records[-1]["global_step"])
        for phase, records in steps.items()
    ]


def thinned(series: tuple[list[float], list[float]], most: int = 700) -> tuple[list[float], list[float]]:
    """At most `most` points, means of equal blocks: what shows a long run stays light and no trend is hidden."""
    xs, ys = series
    block = math.ceil(len(xs) / most) or 1
    starts = range(0, len(xs), block)
    return [mean(xs[i : i + block]) for i in starts], [mean(ys[i : i + block]) for i in starts]


def collapse(run: Run) -> str:
    weight = run.setting("architecture", "penalty_weight")
    here = "" if weight is None else f" ({weight} in this run)"
    return (
        "The search would have closed nearly every channel, so the network that was kept is not one it chose. "
        f"Lower architecture.penalty_weight{here} and run again."
    )


def rows(result: dict) -> list[tuple[str, str]]:
    order = [*PHASES, *(phase for phase in result["accuracy"] if phase not in PHASES)]
    accuracies = [(phase, result["accuracy"][phase]) for phase in order if phase in result["accuracy"]]
    rows = [(f"accuracy {printable(when(result, phase))}", percent(value, 2)) for phase, value in accuracies]
    for key, words in (("macs", "MACs"), ("params", "parameters")):
        for rule in ("exact", "paper"):
            full, compact = (result.get(which, {}).get(rule, {}).get(key) for which in ("full", "compact"))
            label = words if rule == "exact" else f"{words} (paper's rule)"
            if full and compact is not None:
                ratio = compact / full
                rows.append((label, f"{amount(full)} -> {amount(compact, full)}, {percent(ratio)}, {fewer(ratio)}"))
            elif full:
                rows.append((label, f"{amount(full)} in the full network"))
    if asked := result.get("budget"):
        words = {"macs": "MACs", "params": "parameters"}.get(asked["unit"], asked["unit"])
        used = asked["used"] / max(asked["most"], 1)
        rows.append(("budget", f"{asked['used']:,} of {asked['most']:,} {words}, {percent(used, 2)}"))
    channels = result.get("channels", {})
    if "kept" in channels:
        share = percent(channels["kept"] / max(channels["total"], 1))
        rows.append(("channels kept", f"{channels['kept']:,} of {channels['total']:,}, {share}"))
    return [*rows, ("time", duration(result["seconds"]))]
