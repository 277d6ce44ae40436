"""A run's page, report.html, and its report.md, from the run's folder alone. No torch."""

import shlex

from dnal_dist.common import text
from dnal_dist.report import evaluated, explorer, figures, published, records, tables, templates, words
from dnal_dist.report.records import Run
from dnal_dist.report.tables import Table
from dnal_dist.report.words import when

CONFIGS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16"}


def html(run: Run, result: dict, embedded: dict[str, dict]) -> str:
    """The page: one file that needs no network. embedded: the run's figures as `style.embed` gives them."""
    numbers, shared = explorer.numbers(run), _shared(run, result)
    return templates.render(
        "report.html",
        **shared,
        tiles=_tiles(run, result),
        explored=explorer.section(run, numbers) if numbers else None,
        spans=", ".join(f"{phase} {first + 1:,} to {last:,}" for phase, first, last in records.spans(run)),
        figures=embedded,
        cost=tables.cost(result, shared["place"] is not None),
        latency=tables.latency(result),
        starts=tables.starts(run),
        receipts=tables.receipts(run),
        amount=text.amount,
        numbers={"explorer": numbers, "figures": {name: figure["panels"] for name, figure in embedded.items()}},
    )


def markdown(run: Run, result: dict, drawn: list[str]) -> str:
    """The report as Markdown that GitHub renders. drawn: the figures that are in RUN/plots."""
    sites, kept = records.channels(run)
    shared = _shared(run, result)
    fate = "kept" if run.last("prune") else "have gates above the threshold so far"
    return templates.render(
        "report.md",
        **shared,
        results=Table("", "", ["", "value"], [list(row) for row in words.rows(result, shared["place"] is not None)]),
        titles={name: figures.TITLES[name] for name in drawn},
        channels=tables.channels(run),
        kept=f"{sum((kept or {}).values()):,} of {sum(sites.values()):,} channels in {len(sites):,} layers {fate}",
        commands=_commands(run),
    )


def _shared(run: Run, result: dict) -> dict:
    return {
        "run": run,
        "result": result,
        "about": words.about(run),
        "headline": words.headline(run, result),
        "collapse": words.collapse(run),
        "signal": words.signal(run),
        "warnings": text.counted(result["warnings"]),
        "accuracy": tables.accuracy(run, result),
        "classes": tables.classes(run),
        "place": published.place(run, result),
        "evaluation": evaluated.read(run.folder),
        "usage": tables.usage(run, result),
        "breakdown": tables.breakdown(run),
        "environment": tables.environment(run),
        "derived": f"Derived from metrics.jsonl and recipe.yaml: {len(run.records):,} records, up to {words.date(run)}.",
    }


def _tiles(run: Run, result: dict) -> list[tuple[str, str, str]]:
    """The numbers at the top of the page: label, value, detail."""
    tiles = []
    if result["accuracy"]:
        phase, accuracy = next(reversed(result["accuracy"].items()))
        before = result["accuracy"].get("pretrain")
        compared = before is not None and phase != "pretrain"
        detail = f"full network: {text.percent(before, 2)}" if compared else when(result, phase)
        tiles.append(("Top-1 accuracy", text.percent(accuracy, 2), detail))
    for key, label in (("macs", "MACs"), ("params", "Parameters")):
        if f"{key}_ratio" in result:
            full, compact, ratio = result["full"]["exact"][key], result["compact"]["exact"][key], result[f"{key}_ratio"]
            detail = f"{text.amount(compact, full)} of {text.amount(full)}, {text.fewer(ratio)}"
            tiles.append((label, text.percent(ratio), detail))
        elif "full" in result:
            tiles.append((label, text.amount(result["full"]["exact"][key]), "full network"))
    for row in words.latencies(result)[:1]:
        full, compact = (text.milliseconds(row["median"][name]) for name in ("full", "compact"))
        tiles.append(("Latency", words.faster(row), f"{compact} of {full} at batch {row['batch']}"))
    if channels := result.get("channels"):
        total, kept = channels["total"], channels.get("kept")
        known = (text.percent(kept / max(total, 1)), f"{kept:,} of {total:,} kept") if kept is not None else None
        tiles.append(("Channels", *(known or (f"{total:,}", "with a gate"))))
    images = run.last("end").get("images")
    tiles.append(("Time", text.duration(result["seconds"]), f"{images:,} training images" if images else "so far"))
    return tiles


def _commands(run: Run) -> str:
    """The commands that train the same again."""
    start, output = run.last("start"), str(run.recipe.get("output") or run.folder)
    recipe, again = (shlex.quote(text.printable(path)) for path in (f"{output}/recipe.yaml", f"{output}-again"))
    lines, commit = [], str(start.get("code") or "").rstrip("+")
    if commit.isalnum():
        changed = "   # and the uncommitted changes, which no commit has" if str(start["code"]).endswith("+") else ""
        lines.append(f"git checkout {commit}{changed}")
    return "\n".join([*lines, f"{_launch(start)} -m dnal_dist.train {recipe} output={again}"])


def _launch(start: dict) -> str:
    processes, precision = start.get("world_size", 1), PRECISIONS.get(start.get("precision", ""))
    if processes == 1 and precision is None:
        return "python"
    backend = start.get("backend")
    config = f" --config_file recipes/accelerate/{backend}.yaml" if backend in CONFIGS else ""
    mixed = f" --mixed_precision {precision}" if precision else ""
    return f"accelerate launch{config} --num_processes {int(processes)}{mixed}"
