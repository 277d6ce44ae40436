"""OUT/results.md from the files of all parts: a table each, steps with their speed-up and their share of what the device can do."""

import json
import os
from pathlib import Path

STEP_COLUMNS = ("network", "batch", "multiple", "step", "who", "precision", "layout", "mode", "cudnn_benchmark")
STEPS = ("pretrain", "search weights", "architecture", "finetune")
# Of the published recipes: pretrain, search, finetune.
EPOCHS = {"proxyless_supernet": (100, 10, 110), "mobilenetv2_imagenet": (80, 10, 90), "resnet50_imagenet": (30, 10, 70)}
HIDDEN = {"traceback", "width", "difference", "ms_least", "ms_most", "steps"}
KEY = ("network", "image_size", "width", "multiple", "batch", "step")
WORK = ("network", "image_size", "width", "multiple", "step", "who")
# What a row means that does not say it.
UNSAID = {"multiple": 1}
NAMES = {"multiple": "multiples of channels"} | {
    "cudnn_benchmark": "cudnn. benchmark",
    "images_per_second": "images/s",
    "memory_bytes": "memory, GB",
}


def write_results(out: Path, results: dict[str, dict]) -> None:
    """results: status of each part by its name, in order."""
    found = {name: load(out / f"{name}.json") for name in ("work", *results)}
    if os.path.exists(out / "machine.json"):
        found["machine"] = load(out / "machine.json")
    machine = next((part["machine"] for name, part in found.items() if part and name != "work"), None)
    lines = ["# Speed of dnal_dist on one device", ""]
    if machine:
        lines += [", ".join(f"{key} {value}" for key, value in machine.items() if value is not None), ""]
    lines += EXPLANATION
    able = rates(found.get("machine"))
    counted = {key_of(row, *WORK): row for row in (found["work"] or {}).get("rows", [])}
    steps = [row for part in found.values() if part for row in part["rows"] if row.get("who") == "formulation" and "ms" in row]
    for name, result in results.items():
        lines += [f"## {name}", "", f"{result['status']}" + (f", {result['seconds']} s" if "seconds" in result else ""), ""]
        rows = (found[name] or {}).get("rows", []) if result["status"] != "not run" else []
        is_steps = any("who" in row and "ms" in row for row in rows)
        lines += [*table([derived(row, [*rows, *steps], able, counted) for row in rows] if is_steps else rows), ""]
        lines += [*(schedules(rows, steps) if is_steps else []), *failures(rows)]
        if result.get("errors"):
            lines += ["The last lines of its errors:", "", "```", result["errors"], "```", ""]
    unfinished = out / "results.md.unfinished"
    unfinished.write_text("\n".join(lines).rstrip() + "\n")
    os.replace(unfinished, out / "results.md")


EXPLANATION = [
    "`ms`: median of a step. `x published`: how many times faster than the published formulation as its authors' code runs here",
    "(float32 with torch's defaults, contiguous, eager), in turn with it in one process where the part has it, else as an earlier",
    "part found it. `bandwidth`: the time that the device's own copies take for the bytes that the step's operations read and",
    "write, as issued in eager mode, as a share of `ms`. `products`: likewise the time of its MACs at the rate of the device's own",
    "matrix product of that precision. `loss`: of the first step; ours and the formulation take it from the same weights and",
    "images. A whole schedule has the epochs of the published recipe, and half of the search's steps train weights.",
    "",
]


def load(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def key_of(row: dict, *names: str) -> tuple:
    return tuple(row.get(name, UNSAID.get(name)) for name in names)


def rates(machine: dict | None) -> dict[str, float]:
    """Bytes/s of copies on the device under "copy", MACs/s of products under their precision."""
    found = {}
    for row in (machine or {}).get("rows", []):
        if row.get("what") == "copy on the device":
            found["copy"] = row["bytes_per_second"]
        elif "macs_per_second" in row:
            found[row["precision"]] = row["macs_per_second"]
    return found


def derived(row: dict, rows: list[dict], able: dict[str, float], counted: dict[tuple, dict]) -> dict:
    """The row as the table shows it. rows: where the published formulation's is looked for, the nearest first."""
    shown = {key: row[key] for key in STEP_COLUMNS if key in row} | {key: value for key, value in row.items() if key not in KEY}
    if "ms" not in row:
        return shown
    base = published(row, rows)
    if base is not None:
        shown["x published"] = round(base["ms"] / row["ms"], 2)
    work, seconds = counted.get(key_of(row, *WORK)), row["ms"] / 1000
    if work and able:
        size = 2 if row["precision"] == "bf16" else 4
        moved = size * work["activations_each"] * row["batch"] + 4 * work["others"]
        shown["bandwidth"] = f"{moved / able['copy'] / seconds:.0%}" if "copy" in able else None
        if row["precision"] in able:
            shown["products"] = f"{work['macs_each'] * row['batch'] / able[row['precision']] / seconds:.0%}"
    return shown


def published(row: dict, rows: list[dict]) -> dict | None:
    """The published formulation's row of the same step, as its authors' code runs."""
    found = [r for r in rows if r.get("who") == "formulation" and r.get("layout") == "contiguous" and "ms" in r]
    same = [r for r in found if key_of(r, *KEY) == key_of(row, *KEY)]
    return next((r for precision in ("tf32", "fp32") for r in same if r["precision"] == precision), None)


def schedules(rows: list[dict], others: list[dict]) -> list[str]:
    """For each way of which all steps were timed, how many times faster than the published formulation its whole schedule is."""
    ways: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if "ms" in row:
            way = ("network", "image_size", "width", "batch", "who", "precision", "layout", "mode", "cudnn_benchmark")
            ways.setdefault(key_of(row, *way), {})[row["step"]] = row
    lines = []
    for (network, _, _, batch, *way), by_step in ways.items():
        bases = {step: published(row, [*rows, *others]) for step, row in by_step.items()}
        if len(by_step) < 4 or None in bases.values():
            continue
        epochs = EPOCHS.get(network, (160, 20, 160))
        share = dict(zip(STEPS, (epochs[0], epochs[1] / 2, epochs[1] / 2, epochs[2]), strict=True))
        ours, theirs = (sum(share[step] * found[step]["ms"] for step in STEPS) for found in (by_step, bases))
        named = ", ".join(str(part) for part in way[:-1])
        lines.append(f"- {network}, {batch} images, {'+'.join(map(str, epochs))} epochs, {named}: {theirs / ours:.2f} x published")
    return ["Whole schedules:", "", *lines, ""] if lines else []


def table(rows: list[dict]) -> list[str]:
    columns = list({key: None for row in rows for key, value in row.items() if key not in HIDDEN and value is not None})
    # Why there is nothing else in a row.
    columns.sort(key=lambda column: column == "failed")
    if not columns:
        return []
    lines = ["| " + " | ".join(NAMES.get(column, column.replace("_", " ")) for column in columns) + " |"]
    lines.append("|" + " --- |" * len(columns))
    for row in rows:
        lines.append("| " + " | ".join(text(column, row.get(column)) for column in columns) + " |")
    return lines


def text(column: str, value) -> str:
    if value is None:
        return ""
    if column.endswith("_bytes"):
        return f"{value / 1e9:.2f}"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str):
        return value.replace("|", "/")
    if column.endswith("per_second") and value > 1e6:
        return f"{value / 1e12:.3g} T"
    return str(value)


def failures(rows: list[dict]) -> list[str]:
    lines = []
    for row in rows:
        if "traceback" in row:
            what = " ".join(str(value) for key, value in row.items() if key not in {*HIDDEN, "failed"})
            lines += [f"Failed: {what}", "", "```", *row["traceback"].strip().splitlines()[-25:], "```", ""]
    return lines
