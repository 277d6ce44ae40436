"""Comparison of two runs of a recipe by their folders."""

import json
from pathlib import Path

# Records about training. Those of starts, stops, warnings and checkpoints depend on how often a run was interrupted.
TRAINED = ("train", "eval", "gates", "prune", "receipt", "phase", "end")
CLOCK = ("time", "seconds", "phase_seconds", "images_per_second", "data_wait_seconds", "device_seconds", "energy_kwh")
# A resumed process has another history of allocations, and measures its own time.
CLOCK += ("device_memory_bytes", "breakdown", "eta_seconds", "run_eta_seconds")


def training_records(run: Path) -> list[dict]:
    """A run's records about training, without what depends on the clock. Raises ValueError naming a line that is no record."""
    records = []
    for number, line in enumerate((run / "metrics.jsonl").read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            raise ValueError(f"metrics.jsonl: line {number} is no record: {line[:60]}") from None
        if record["kind"] in TRAINED:
            records.append(timeless(record))
    return records


def timeless(record: dict) -> dict:
    """A record, or a mapping within one, without what depends on the clock."""
    return {k: timeless(v) if isinstance(v, dict) else v for k, v in record.items() if k not in CLOCK}


def same(run: Path, whole: Path) -> list[str]:
    """Differences, bit for bit, between the results and records of two runs; empty if there are none."""
    faults = [
        f"compact/{file} is not that of the uninterrupted run"
        for file in ("architecture.json", "weights.safetensors")
        if (run / "compact" / file).read_bytes() != (whole / "compact" / file).read_bytes()
    ]
    found, expected = training_records(run), training_records(whole)
    for number, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            return [*faults, f"record {number}: {_difference(one, other)}"]
    if len(found) != len(expected):
        faults.append(f"{len(found)} records of training, expected {len(expected)}")
    return faults


def alike(run: Path, whole: Path, tolerance: float) -> list[str]:
    """Differences that two runs on different numbers of processes may not have: in the samples of each epoch and their order, in
    the recorded steps, and in the last accuracy beyond `tolerance`."""
    found, expected = training_records(run), training_records(whole)
    faults = []
    for what, kinds, keys in (
        ("the samples and their order", ("receipt",), ("epoch", "batches", "samples", "digest", "ordered", "skipped")),
        ("the recorded steps", ("train", "eval", "phase"), ("kind", "phase", "step", "global_step")),
    ):
        one, other = ([[r.get(key) for key in keys] for r in records if r["kind"] in kinds] for records in (found, expected))
        if one != other:
            faults.append(f"{what} are not those of the uninterrupted run")
    last, reference = ([r["accuracy"] for r in records if r["kind"] == "eval"][-1] for records in (found, expected))
    if abs(last - reference) > tolerance:
        faults.append(f"accuracy {last:.2%}, of the uninterrupted run {reference:.2%}: more than {tolerance:.2%} apart")
    return faults


def _difference(one: dict, other: dict) -> str:
    keys = [key for key in one | other if one.get(key) != other.get(key)]
    place = f"{one['kind']} at step {one['global_step']}"
    return f"{place}: " + ", ".join(f"{key} {one.get(key)!r:.60} for {other.get(key)!r:.60}" for key in keys[:3])
