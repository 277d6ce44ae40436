"""What a run spent, where it ran and what it consumed, as tables of its page."""

import math
from datetime import UTC, datetime
from html import escape
from statistics import median

from dnal_dist.common.text import amount, duration, percent
from dnal_dist.report import markup
from dnal_dist.report.records import Run

_NOTE = (
    "Speed is the median over a phase's records, evaluations not counted. "
    "Waiting is time in which training stood still for want of data."
)
TOLD = {
    "device_seconds": duration,
    "images": lambda value: f"{value:,}",
    "bytes_sent": lambda value: f"{amount(value)}B" if value >= 999.5 else f"{value:,.0f} B",
    "energy_kwh": lambda value: f"{value:,.3g} kWh",
}
"""How each column that a phase's record may tell is written."""


def entries(run: Run, result: dict) -> dict[str, dict[str, float]]:
    """{phase: {seconds, images, device_seconds, bytes_sent, energy_kwh}}, a key absent where the run does not tell it."""
    found = {phase: {"seconds": seconds} for phase, seconds in result["phase_seconds"].items()}
    told = {record.get("phase"): record for record in run.of("phase")}
    for phase, record in {**told, **(run.last("end").get("ledger") or {})}.items():
        values = {key: value for key in TOLD if isinstance(value := record.get(key), int | float) and math.isfinite(value)}
        found[phase] = found.get(phase, {}) | values
    # What is on record between phases, or of one that took no time, is no row.
    return {phase: entry for phase, entry in found.items() if len(entry) > 1 or entry.get("seconds", 0) >= 0.05}


def section(run: Run, result: dict) -> str:
    """Cost by phase. A phase that does not tell a column has an empty cell there, and the column no total."""
    known, rows = entries(run, result), []
    for phase, entry in known.items():
        seconds = entry.get("seconds", 0.0)
        last = run.last("train", phase)
        steps = f"{last.get('step', 0):,} of {last.get('phase_steps', 0):,}" if last else ""
        _, speeds = run.series("train", "step", "images_per_second", phase)
        _, waits = run.series("train", "step", "data_wait_seconds", phase)
        waiting = f"{duration(sum(waits))}, {percent(sum(waits) / seconds)}" if waits and seconds else ""
        told = [write(entry[key]) if key in entry else "" for key, write in TOLD.items()]
        rows.append([str(phase), duration(seconds), *told, steps, f"{median(speeds):,.0f}" if speeds else "", waiting])
    if rows:
        totals = [write(total(known, key)) if total(known, key) is not None else "" for key, write in TOLD.items()]
        rows.append(["whole run", duration(result["seconds"]), *totals, "", "", ""])
    head = ["phase", "time", "device time", "training images", "sent by a process", "energy", "iterations", "images/s"]
    return markup.section("Cost of the run", _NOTE, markup.table("time", "Cost of each phase", [*head, "waiting for data"], rows))


def total(known: dict[str, dict[str, float]], key: str) -> float | None:
    """The sum over the phases that trained, if each of them tells it."""
    values = [entry.get(key) for phase, entry in known.items() if phase != "prune" or key in entry]
    return sum(values) if values and None not in values else None


def environment(run: Run) -> str:
    """Recipe, every start of the run, versions."""
    return markup.section("Recipe and environment", "", _recipe(run), _starts(run), _facts(run))


def _recipe(run: Run) -> str:
    if not run.recipe_text:
        return '<p class="note">recipe.yaml is not in the run folder.</p>'
    text = escape(run.recipe_text)
    text = f'<pre tabindex="0" role="region" aria-label="recipe.yaml">{text}</pre>'
    return f"<details><summary>The recipe, with all its defaults</summary>{text}</details>"


def _starts(run: Run) -> str:
    """When and where the run began and went on."""
    rows = []
    for record in run.of("start"):
        begun = datetime.fromtimestamp(record["time"], UTC) if "time" in record else None
        many = record.get("world_size", "")
        changed = record.get("changed") or {}
        rows.append(
            [
                f"{begun:%Y-%m-%d %H:%M:%S} UTC" if begun else "unknown",
                "resumed" if record.get("resumed") else "started",
                f"{record.get('global_step', 0):,}",
                str(record.get("host") or ""),
                f"{many} x {record.get('device', 'unnamed device')}" if many else "",
                ", ".join(str(record[key]) for key in ("backend", "precision") if record.get(key)),
                str(record.get("slurm_job") or ""),
                _commit(str(record.get("code") or "")),
                "; ".join(f"{key}: {_change(change)}" for key, change in changed.items()),
            ]
        )
    head = ["when", "", "at iteration", "host", "processes", "backend", "SLURM job", "code", "changed"]
    return markup.table("starts", "Starts of the run", head, rows, size="tall")


def _commit(code: str) -> str:
    """Short, with the mark of a changed checkout."""
    return code if len(code) < 40 else code[:12] + code[40:]


def _change(change: object) -> str:
    return " -> ".join(str(value) for value in change) if isinstance(change, list) else str(change)


def _facts(run: Run) -> str:
    start = run.last("start")
    words = {
        "init_from": "weights to begin with",
        "accumulation": "parts of a batch",
        "steps_per_epoch": "iterations an epoch",
        "dropped_per_epoch": "images left out of each epoch",
    }
    rows = [[label, str(start[key])] for key, label in words.items() if start.get(key) is not None]
    if bad := sum(run.series("train", "step", "bad_samples")[1]):
        rows.append(["unreadable images skipped", f"{bad:,}"])
    for told in ("versions", "environment"):
        rows += [[str(name), str(value)] for name, value in (start.get(told) or {}).items()]
    return markup.table("facts", "Environment of the run", [], rows)


def receipts(run: Run) -> str:
    """What was consumed of each pass over the training set, and which samples could not be used."""
    # A pass that a resume took up again is told again; the last word counts.
    told = list({record.get("epoch"): record for record in run.of("receipt")}.values())
    rows = [
        [
            f"{record.get('epoch', '')}",
            *(f"{record.get(key, 0):,}" for key in ("batches", "samples")),
            f"{len(record.get('skipped') or []):,}",
            *(str(record.get(key) or "") for key in ("digest", "ordered")),
        ]
        for record in told
    ]
    head = ["epoch", "batches", "samples", "skipped", "digest of samples", "digest of their order"]
    skipped = [one for record in told for one in record.get("skipped") or [] if isinstance(one, list)]
    samples, passes = sum(record.get("samples", 0) for record in told), "1 pass" if len(told) == 1 else f"{len(told):,} passes"
    note = f"{samples:,} samples in {passes}, skipped: {len(skipped):,}. Prove them: python -m dnal_dist.stream --audit RUN"
    lost = [[*map(str, one), *[""] * 5][:5] for one in skipped[:500]]
    lost_head = ["number", "shard", "byte", "key", "reason"]
    return markup.section(
        "Receipts",
        note if rows else "",
        markup.table("receipts", "Receipts of each epoch", head, rows, size="short"),
        markup.table("skipped", "Samples that were skipped", lost_head, lost, size="short"),
    )
