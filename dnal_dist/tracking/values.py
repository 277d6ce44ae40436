"""Values of a run's records under the names by which trackers show them, and what trackers have in common."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

from dnal_dist.common.errors import InputError
from dnal_dist.distributed.context import Context
from dnal_dist.report import records

NAMES = {"wandb": "W&B", "tensorboard": "TensorBoard", "mlflow": "MLflow"}


def require(tracker: str) -> None:
    """Raise InputError if the package of a tracker that somebody asked for is missing. W&B is the default: without it a run warns,
    and goes on."""
    if tracker in ("tensorboard", "mlflow") and importlib.util.find_spec(tracker) is None:
        raise InputError(
            f"key 'tracking.tracker': {tracker} needs the package {tracker}: pip install 'dnal-dist[{tracker}]'; or choose wandb "
            "or none"
        )


class Sent(NamedTuple):
    """A record as trackers show it, by name."""

    scalars: dict[str, float]
    histograms: dict[str, list[int]]
    """Counts in bins of equal width between 0 and 1."""
    tables: dict[str, tuple[list[str], list[list]]]
    """Columns and rows."""


def sent(kind: str, values: dict, sites: dict[str, int]) -> Sent:
    """sites: channels of each gate site."""
    if kind == "gates":
        shares = {f"gates/open_share/{site}": number / sites[site] for site, number in values["open"].items()}
        return Sent(_scalars(kind, values) | shares, {"gates/histogram": values["histogram"]}, {})
    if kind == "prune":
        scalars = {f"prune/{key}": v for key, v in costs(values["full"], values["compact"]).items()}
        kept = values["kept"]
        rows = [[site, channels, kept[site], round(kept[site] / channels, 4)] for site, channels in sites.items()]
        table = ["site", "channels", "kept", "share"], rows
        return Sent(scalars | {"prune/collapsed": int(values["collapsed"])}, {}, {"prune/sites": table})
    return Sent(_scalars(kind, values), {}, {})


class Tracker:
    """What trackers have in common: a subclass says how it starts, and how it shows what is sent."""

    def __init__(self, folder: Path, recipe, context: Context):
        self.folder, self.recipe, self.context, self.sites = folder, recipe, context, {}

    def send(self, kind: str, values: dict, global_step: int, age: int) -> None:
        if kind == "start":
            self.sites = values["sites"]
        else:
            self.show(sent(kind, values, self.sites), global_step, age)

    def finish(self, global_step: int):
        """Send the numbers of the final table."""
        self.context.log(outcome(self.folder), global_step)

    def stop(self) -> None:
        self.context.stop_tracker()

    def give_up(self) -> None:
        """Nothing to do for one that waits for a disk only, or whose requests have time limits of their own."""


def _scalars(kind: str, values: dict) -> dict[str, float]:
    numbers = {key: v for key, v in values.items() if type(v) in (int, float)}
    if kind == "phase":
        return {f"ledger/{values['phase']}/{key}": v for key, v in numbers.items()}
    # Pruning takes no iteration: its evaluation would replace the search's last, at the same step.
    group = "prune" if kind == "eval" and values["phase"] == "prune" else kind
    return {f"{group}/{key}": v for key, v in numbers.items()}


def costs(full: dict, compact: dict) -> dict[str, float]:
    """macs_full, macs_compact, macs_ratio, the same of params, and all of them by the paper's rule."""
    found = {}
    for rule, tail in (("exact", ""), ("paper", "_paper_rule")):
        for unit in ("macs", "params"):
            before, after = full[rule][unit], compact[rule][unit]
            found |= {f"{unit}_full{tail}": before, f"{unit}_compact{tail}": after, f"{unit}_ratio{tail}": after / max(before, 1)}
    return found


def outcome(folder: Path) -> dict[str, float]:
    """Numbers of a finished run's final table, as result/NAME."""
    run = records.load(folder)
    summary = records.summary(run)
    found = {f"accuracy_{phase}": accuracy for phase, accuracy in summary["accuracy"].items()}
    if "full" in summary and "compact" in summary:
        found |= costs(summary["full"], summary["compact"])
    found |= {f"channels_{key}": number for key, number in summary.get("channels", {}).items()}
    spent = run.last("end").get("ledger", {}).values()
    for key in ("images", "device_seconds", "bytes_sent", "energy_kwh"):
        if known := [part[key] for part in spent if key in part]:
            found[key] = sum(known)
    found |= {"seconds": summary["seconds"], "collapsed": int(summary["collapsed"])}
    return {f"result/{key}": value for key, value in found.items()}


def shown_name(folder: Path, name: str) -> str:
    """A run's name at the tracker: the recipe's and, if it adds to that, the run folder's, which differs within a sweep."""
    own = folder.resolve().name
    # W&B refuses longer names with a suffix; the end of a folder's name differs more than its beginning.
    return (own if name in own else f"{name} {own}")[-100:]
