"""A run's report.md, for a pull request or a paper, from its folder alone. No torch."""

import shlex
from pathlib import Path

from dnal_dist.common import atomic
from dnal_dist.common.text import counted, duration, percent, printable
from dnal_dist.report import accounts, markdown, published, records
from dnal_dist.report.markdown import code, text
from dnal_dist.report.records import Run

HEADS = {
    "device_seconds": "device time",
    "images": "training images",
    "bytes_sent": "sent by each process",
    "energy_kwh": "energy",
}
CONFIGS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16"}


def write(run: Run, result: dict, figures: dict[str, str]) -> Path:
    """Write RUN/report.md, `figures` being what `plots.write` drew, and give its path. Raises OSError."""
    path = run.folder / "report.md"
    atomic.put(path, render(run, result, figures).encode())
    return path


def render(run: Run, result: dict, figures: dict[str, str]) -> str:
    """The report as Markdown that GitHub renders; `result` is the run's `results.result_of`."""
    parts = [
        f"# {text(run.name)}",
        text(records.about(run)),
        f"**{text(records.headline(run, result))}**",
        *_notices(run, result),
        "## Results",
        markdown.table([" ", "value"], [[text(label), text(value)] for label, value in records.rows(result)]),
        _accuracy(run, result),
        *_published(run, result),
        "## What each phase took",
        _ledger(run, result),
        *(["## Figures"] if figures else []),
        *(f"{title}:\n\n[![{title}](plots/{name}.png)](plots/{name}.svg)" for name, title in figures.items()),
        *_channels(run),
        "## Environment",
        _environment(run),
        "## Again",
        _again(run),
        f"Derived from `metrics.jsonl` and `recipe.yaml`: {len(run.records):,} records, up to {records.date(run)}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _notices(run: Run, result: dict) -> list[str]:
    notices = [f"> **The architecture collapsed.** {text(records.collapse(run))}"] if result["collapsed"] else []
    return notices + [f"> Warning: {text(message)}" for message in counted(result["warnings"])]


def _accuracy(run: Run, result: dict) -> str:
    rows = []
    for phase in result["accuracy"]:
        record = run.last("eval", phase)
        shares = [percent(record[key], 2) if key in record else "" for key in ("accuracy", "top5")]
        entropy = f"{record['cross_entropy']:.4f}" if "cross_entropy" in record else ""
        images = f"{record['samples']:,}" if "samples" in record else ""
        rows.append([text(records.when(result, phase)), records.NETWORKS.get(phase, ""), *shares, entropy, images])
    return markdown.table(["held-out images", "network", "top-1", "top-5", "cross-entropy", "pictures"], rows) if rows else ""


def _published(run: Run, result: dict) -> list[str]:
    place = published.place(run, result)
    if place is None:
        return []
    head, rows, own = place.lines()
    cells = [[f"**{text(cell)}**" if number in own else text(cell) for cell in row] for number, row in enumerate(rows)]
    note = f"{place.table.title}, as published in arXiv 2103.02126. {' '.join(place.remarks)}"
    return ["## Among the published results", text(note), markdown.table(head, cells)]


def _ledger(run: Run, result: dict) -> str:
    known = accounts.entries(run, result)
    whole = {key: total for key in HEADS if (total := accounts.total(known, key)) is not None}
    rows = [
        [
            text(name),
            duration(entry.get("seconds", 0.0)),
            *(accounts.TOLD[key](entry[key]) if key in entry else "" for key in HEADS),
        ]
        for name, entry in [*known.items(), ("whole run", whole | {"seconds": result["seconds"]})]
    ]
    return markdown.table(["phase", "time", *HEADS.values()], rows)


def _channels(run: Run) -> list[str]:
    sites, prune = run.last("start").get("sites") or {}, run.last("prune")
    kept = prune.get("kept") or run.last("gates").get("open")
    if not sites or kept is None:
        return []
    rescued = set(prune.get("rescued", []))
    rows = []
    for site, channels in sites.items():
        left = kept.get(site, 0)
        fate = "rescued" if site in rescued else "" if left else "closed"
        rows.append([code(site), f"{channels:,}", f"{left:,}", percent(left / max(channels, 1)), fate])
    words = f"{sum(kept.values()):,} of {sum(sites.values()):,} channels in {len(sites):,} layers"
    words += " kept" if prune else " have gates above the threshold so far"
    return ["## Channels", markdown.details(words, markdown.table(["layer", "channels", "kept", "share", " "], rows))]


def _environment(run: Run) -> str:
    start = run.last("start")
    words = {
        "device": "device", "backend": "backend", "world_size": "processes", "precision": "precision", "code": "code (commit)",
        "init_from": "weights to begin with", "host": "host", "slurm_job": "SLURM job",
    }  # fmt: skip
    rows = [[label, text(start[key])] for key, label in words.items() if key in start]
    for part in ("versions", "environment"):
        told = start.get(part)
        rows += [[text(name), text(version)] for name, version in (told.items() if isinstance(told, dict) else ())]
    resumes = sum(bool(record.get("resumed")) for record in run.of("start"))
    if resumes:
        rows.append(["resumed", "once" if resumes == 1 else f"{resumes:,} times"])
    return markdown.table([" ", "value"], rows)


def _again(run: Run) -> str:
    """The commands that train the same again, and the recipe."""
    start, output = run.last("start"), str(run.recipe.get("output") or run.folder)
    recipe, again = (shlex.quote(printable(path)) for path in (f"{output}/recipe.yaml", f"{output}-again"))
    lines = []
    commit = str(start.get("code") or "").rstrip("+")
    if commit.isalnum():
        changed = "   # and the changes that it had then, which are not in it" if str(start["code"]).endswith("+") else ""
        lines.append(f"git checkout {commit}{changed}")
    lines.append(f"{_launch(start)} -m dnal_dist.train {recipe} output={again}")
    commands = markdown.fence("\n".join(lines), "sh")
    if not run.recipe_text:
        return f"{commands}\n\n`recipe.yaml` is not in the run folder."
    return f"{commands}\n\n{markdown.details('The recipe, with all its defaults', markdown.fence(run.recipe_text, 'yaml'))}"


def _launch(start: dict) -> str:
    processes, precision = start.get("world_size", 1), PRECISIONS.get(start.get("precision", ""))
    if processes == 1 and precision is None:
        return "python"
    backend = start.get("backend")
    config = f" --config_file recipes/accelerate/{backend}.yaml" if backend in CONFIGS else ""
    mixed = f" --mixed_precision {precision}" if precision else ""
    return f"accelerate launch{config} --num_processes {int(processes)}{mixed}"
