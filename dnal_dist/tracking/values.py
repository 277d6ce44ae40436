"""What W&B and TensorBoard get of a run's records."""

import importlib.util
from pathlib import Path

from dnal_dist.common.errors import InputError
from dnal_dist.report import records

NAMES = {"wandb": "W&B", "tensorboard": "TensorBoard"}


def require(tracker: str) -> None:
    """Raise InputError if the package of a tracker is missing."""
    if tracker == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "key 'tracking.tracker': tensorboard needs the package tensorboard: pip install 'dnal-dist[tensorboard]'; or "
            "choose wandb or none"
        )


def figures(kind: str, values: dict) -> dict[str, float]:
    """The numbers of a record under the names by which trackers show them."""
    if kind == "prune":
        return {f"prune/{key}": v for key, v in costs(values["full"], values["compact"]).items()} | {
            "prune/collapsed": int(values["collapsed"])
        }
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
    """The figures of a finished run's table, as result/NAME."""
    run = records.load(folder)
    told = records.summary(run)
    found = {f"accuracy_{phase}": accuracy for phase, accuracy in told["accuracy"].items()}
    if "full" in told and "compact" in told:
        found |= costs(told["full"], told["compact"])
    found |= {f"channels_{key}": number for key, number in told.get("channels", {}).items()}
    spent = run.last("end").get("ledger", {}).values()
    for key in ("images", "device_seconds", "bytes_sent", "energy_kwh"):
        if known := [part[key] for part in spent if key in part]:
            found[key] = sum(known)
    found |= {"seconds": told["seconds"], "collapsed": int(told["collapsed"])}
    return {f"result/{key}": value for key, value in found.items()}


def shown_name(folder: Path, name: str) -> str:
    """A run's name among others: the recipe's and, where it tells more, the run folder's, which the runs of a sweep differ in."""
    own = folder.resolve().name
    # W&B takes no longer ones with what is put behind; the end of a folder's name tells more than its beginning.
    return (own if name in own else f"{name} {own}")[-100:]


def sites_table(full: dict[str, int], kept: dict[str, int]) -> tuple[list[str], list[list]]:
    """Columns and rows of the channels of each site before and after pruning."""
    rows = [[site, channels, kept[site], round(kept[site] / channels, 4)] for site, channels in full.items()]
    return ["site", "channels", "kept", "share"], rows
