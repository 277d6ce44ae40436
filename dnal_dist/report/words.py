"""A run's summary in words."""

from datetime import UTC, datetime

from dnal_dist.common.phases import PHASES
from dnal_dist.common.text import amount, duration, fewer, milliseconds, percent
from dnal_dist.report.records import Run


def when(result: dict, phase: str) -> str:
    """When an accuracy was measured: after a phase, in one that still goes on, or before the first iteration."""
    if phase == "pretrain" and result["untrained"]:
        return "at the start"
    goes_on = phase == result.get("phase") != "prune" and not result["finished"] and phase not in result["ended"]
    return f"so far in {phase}" if goes_on else f"after {'pruning' if phase == 'prune' else phase}"


def where(run: Run) -> str:
    """Where an unfinished run stands."""
    train = run.last("train")
    if not train:
        return "Not finished: no iteration is on record yet."
    steps = f"iteration {train.get('step', 0):,} of {train.get('phase_steps', 0):,}"
    return f"Not finished: at {steps} of {train.get('phase', 'a phase without a name')}."


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
    """The result in a sentence, or the progress of an unfinished run; `result` is its `records.result_of`."""
    phase, accuracy = next(reversed(result["accuracy"].items()), ("", None))
    if result["finished"] and accuracy is not None and "macs_ratio" in result:
        macs, params = percent(result["macs_ratio"]), percent(result["params_ratio"])
        kept = f"{macs} of the full network's MACs and {params} of its parameters"
        speed = "".join(f", {faster(row)} at batch {row['batch']}" for row in latencies(result)[:1])
        return f"{percent(accuracy, 2)} top-1 accuracy with {kept}{speed}."
    reached = "" if accuracy is None else f" Top-1 accuracy {percent(accuracy, 2)} {when(result, phase)}."
    return ("Finished." if result["finished"] else where(run)) + reached


def collapse(run: Run) -> str:
    weight = run.setting("architecture", "penalty_weight")
    here = "" if weight is None else f" ({weight} in this run)"
    return (
        "The search would have closed nearly every channel, so the network that was kept is not one it chose. "
        f"Lower architecture.penalty_weight{here} and run again."
    )


def signal(run: Run) -> str:
    """What the t-test of the gates' gradients found; nothing without its record."""
    found = run.last("signal")
    if not {"significant", "batches"} <= found.keys():
        return ""
    return (
        f"At the start of the search the gradients of {percent(found['significant'])} of the gates stood out of noise, by a t-test "
        f"over {found['batches']:,} batches; 5 % would by chance."
    )


def latencies(result: dict) -> list[dict]:
    return result.get("latency", {}).get("rows", [])


def faster(row: dict) -> str:
    """How the compact network's latency in a row compares with the full one's."""
    ratio = row["faster"]["compact"]
    return f"{ratio:.1f}x faster" if ratio >= 1.05 else f"{1 / ratio:.1f}x slower" if ratio <= 0.95 else "no faster"


def latency(row: dict, device: str) -> str:
    full, compact = (milliseconds(row["median"][name]) for name in ("full", "compact"))
    return f"{full} -> {compact}, {faster(row)} on {device}"


def rows(result: dict, published: bool) -> list[tuple[str, str]]:
    """What a run came to, label and value. published: costs by the paper's rule too, for its rows to be compared."""
    order = [*PHASES, *(phase for phase in result["accuracy"] if phase not in PHASES)]
    accuracies = [(phase, result["accuracy"][phase]) for phase in order if phase in result["accuracy"]]
    rows = [(f"accuracy {when(result, phase)}", percent(value, 2)) for phase, value in accuracies]
    for key, words in (("macs", "MACs"), ("params", "parameters")):
        for rule in ("exact", "paper")[: 1 + published]:
            full, compact = (result.get(which, {}).get(rule, {}).get(key) for which in ("full", "compact"))
            label = words if rule == "exact" else f"{words} (paper's rule)"
            if full and compact is not None:
                ratio = compact / full
                rows.append((label, f"{amount(full)} -> {amount(compact, full)}, {percent(ratio)}, {fewer(ratio)}"))
            elif full:
                rows.append((label, f"{amount(full)} in the full network"))
    rows += [(f"latency at batch {row['batch']}", latency(row, result["latency"]["device"])) for row in latencies(result)]
    for asked in [result["budget"], *result["budget"].get("further", ())] if "budget" in result else ():
        share = percent(asked["used"] / max(asked["most"], 1), 2)
        if asked["unit"] == "latency":
            used, most = (milliseconds(asked[key] / 1e9) for key in ("used", "most"))
            how = "measured when pruned" if asked.get("measured") else "as predicted"
            rows.append(("budget", f"{used} of {most}, {how}, {share}"))
        else:
            words = {"macs": "MACs", "params": "parameters"}[asked["unit"]]
            rows.append(("budget", f"{asked['used']:,} of {asked['most']:,} {words}, {share}"))
    channels = result.get("channels", {})
    if "kept" in channels:
        share = percent(channels["kept"] / max(channels["total"], 1))
        rows.append(("channels kept", f"{channels['kept']:,} of {channels['total']:,}, {share}"))
    return [*rows, ("time", duration(result["seconds"]))]
