"""The tables of a run's page and of its report.md: what each shows, not how it is written."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median

from dnal_dist.common.phases import PHASES
from dnal_dist.common.text import amount, duration, percent
from dnal_dist.report import records, words
from dnal_dist.report.records import Run


@dataclass(frozen=True)
class Table:
    """A table in words, the first column naming the rows. name: its class on the page; own: numbers of the rows to stand out;
    stacks: on a narrow page each row's cells stand below one another."""

    name: str
    label: str
    head: list[str]
    rows: list[list[str]]
    own: Collection[int] = ()
    size: str = ""
    stacks: bool = False

    @property
    def columns(self) -> list[int]:
        """The columns that have any content."""
        return [i for i in range(len(self.head)) if i == 0 or any(row[i] for row in self.rows)]


NETWORKS = dict(zip(PHASES, ("full, no gates", "full, gated", "compact, as cut", "compact"), strict=False))
AMOUNTS = {
    "device_seconds": duration,
    "images": "{:,}".format,
    "bytes_sent": lambda value: f"{amount(value)}B" if value >= 999.5 else f"{value:,.0f} B",
    "energy_kwh": "{:,.3g} kWh".format,
}
"""The optional values of a phase's usage, and how each is written."""


def accuracy(run: Run, result: dict) -> Table:
    rows = []
    forms = dict.fromkeys(("accuracy", "top5", "balanced_accuracy"), lambda value: percent(value, 2))
    forms |= {"cross_entropy": "{:.4f}".format, "samples": "{:,}".format}
    for phase in result["accuracy"]:
        record = run.last("eval", phase)
        cells = [write(record[key]) if key in record else "" for key, write in forms.items()]
        rows.append([words.when(result, phase), NETWORKS.get(phase, ""), *cells])
    head = ["held-out images", "network", "top-1", "top-5", "mean over classes", "cross-entropy", "images"]
    return Table("accuracy", "Accuracy after each phase", head, rows)


def classes(run: Run) -> Table:
    """The last evaluation by class, the weakest class first."""
    found = sorted(enumerate(records.by_class(run)), key=lambda one: (one[1][0] / max(one[1][1], 1), -one[1][1]))
    rows = [
        [str(number), percent(right / seen, 2) if seen else "no image", f"{right:,} of {seen:,}"] for number, (right, seen) in found
    ]
    head = ["class", "top-1", "right"]
    if trained := records.trained_on(run):
        rows, head = [[*row, f"{trained.get(int(row[0]), 0):,}"] for row in rows], [*head, "training images"]
    return Table("classes", "Accuracy of each class", head, rows, size="short")


def cost(result: dict, published: bool) -> Table:
    """Exact numbers of the full and of the compact network; published: by the paper's rule too."""
    columns = [(rule, key) for rule in ("exact", "paper")[: 1 + published] for key in ("macs", "params")]
    networks = {which: result[which] for which in ("full", "compact") if which in result}
    costs = {which: [cost.get(rule, {}).get(key) for rule, key in columns] for which, cost in networks.items()}
    rows = [[which, *("" if value is None else f"{value:,}" for value in values)] for which, values in costs.items()]
    if len(rows) == 2:
        pairs = zip(*costs.values(), strict=True)
        rows.append(["compact / full", *(percent(b / a, 2) if a and b is not None else "" for a, b in pairs)])
    head = ["network", "MACs", "parameters", *(["MACs (paper)", "parameters (paper)"] if published else [])]
    return Table("cost", "Cost of the full and of the compact network", head, rows)


def latency(result: dict) -> Table:
    """Milliseconds of the full and of the compact network as the run's end measured them."""
    head = ["images at a time", "runtime", "full, ms", "compact, ms", "", "device"]
    rows = []
    for row in words.latencies(result):
        spread = row.get("spread", {})
        cells = [f"{1000 * row['median'][name]:.3g} ± {1000 * spread.get(name, 0):.2g}" for name in ("full", "compact")]
        rows.append([f"{row['batch']:,}", row["runtime"], *cells, words.faster(row), result["latency"]["device"]])
    return Table("latency", "Latency of the full and of the compact network", head, rows)


def usage(run: Run, result: dict) -> Table:
    """What each phase used. A phase without a value has an empty cell there, and the column no total."""
    known, rows = usage_of_phases(run, result), []
    for phase, entry in known.items():
        seconds, last = entry.get("seconds", 0.0), run.last("train", phase)
        steps = f"{last.get('step', 0):,} of {last.get('phase_steps', 0):,}" if last else ""
        speeds, waits = (run.series("train", "step", key, phase)[1] for key in ("images_per_second", "data_wait_seconds"))
        waiting = f"{duration(sum(waits))}, {percent(sum(waits) / seconds)}" if waits and seconds else ""
        amounts = [write(entry[key]) if key in entry else "" for key, write in AMOUNTS.items()]
        rows.append([phase, duration(seconds), *amounts, steps, f"{median(speeds):,.0f}" if speeds else "", waiting])
    if rows:
        totals = [write(value) if (value := _total(known, key)) is not None else "" for key, write in AMOUNTS.items()]
        rows.append(["whole run", duration(result["seconds"]), *totals, "", "", ""])
    head = ["phase", "time", "device time", "training images", "sent by each process", "energy", "iterations", "images/s"]
    return Table("time", "Cost of each phase", [*head, "waiting for data"], rows)


def breakdown(run: Run) -> Table:
    """Time of each phase by part, as the main process measured it since the phase began or was last resumed."""
    found = {record["phase"]: record["breakdown"] for record in run.of("phase", has=("phase", "breakdown"))}
    parts = list(dict.fromkeys(part for values in found.values() for part in values))
    rows = []
    for phase, known in found.items():
        total = sum(known.values())
        cells = [f"{duration(known[part])}, {percent(known[part] / total)}" if known.get(part) else "" for part in parts]
        rows.append([phase, *cells])
    return Table("breakdown", "Time by part", ["phase", *(part.replace("_", " ") for part in parts)], rows)


def usage_of_phases(run: Run, result: dict) -> dict[str, dict[str, float]]:
    """{phase: {seconds, images, device_seconds, bytes_sent, energy_kwh}}, a key absent where no record has it."""
    found = {phase: {"seconds": seconds} for phase, seconds in result["phase_seconds"].items()}
    recorded = {record["phase"]: record for record in run.of("phase", has=("phase",))}
    for phase, record in (recorded | run.last("end").get("ledger", {})).items():
        found[phase] = found.get(phase, {}) | {key: record[key] for key in AMOUNTS if key in record}
    # Time between phases, and a phase that took none, is no row.
    return {phase: entry for phase, entry in found.items() if len(entry) > 1 or entry.get("seconds", 0) >= 0.05}


def _total(known: dict[str, dict[str, float]], key: str) -> float | None:
    """The sum over the phases that trained, if each of them has it."""
    values = [entry.get(key) for phase, entry in known.items() if phase != "prune" or key in entry]
    return sum(values) if values and None not in values else None


def channels(run: Run) -> Table:
    sites, kept = records.channels(run)
    rescued, rows = run.last("prune").get("rescued", ()), []
    for site, count in sites.items() if kept is not None else ():
        left = kept[site]
        fate = "rescued" if site in rescued else "" if left else "closed"
        rows.append([site, f"{count:,}", f"{left:,}", percent(left / count), fate])
    return Table("channels", "Channels of each layer", ["layer", "channels", "kept", "fraction", " "], rows)


def starts(run: Run) -> Table:
    """When and where the run began and was resumed."""
    rows = []
    for record in run.of("start"):
        many, changed = record.get("world_size", ""), record.get("changed", {})
        rows.append(
            [
                f"{datetime.fromtimestamp(record['time'], UTC):%Y-%m-%d %H:%M:%S} UTC" if "time" in record else "unknown",
                "resumed" if record.get("resumed") else "started",
                f"{record.get('global_step', 0):,}",
                record.get("host", ""),
                f"{many} x {record.get('device', 'unnamed device')}" if many else "",
                ", ".join(record[key] for key in ("backend", "precision") if key in record),
                str(record.get("slurm_job", "")),
                words.commit(record.get("code", "")),
                "; ".join(f"{key}: {' -> '.join(map(str, change))}" for key, change in changed.items()),
            ]
        )
    head = ["when", "", "at iteration", "host", "processes", "backend", "SLURM job", "code", "changed"]
    return Table("starts", "Starts of the run", head, rows, size="tall")


FACTS = {
    "device": "device", "backend": "backend", "world_size": "processes", "precision": "precision", "code": "code (commit)",
    "host": "host", "slurm_job": "SLURM job", "init_from": "initial weights", "accumulation": "micro-batches of a batch",
    "steps_per_epoch": "iterations an epoch", "dropped_per_epoch": "images left out of each epoch",
}  # fmt: skip


def environment(run: Run) -> Table:
    start = run.last("start")
    rows = [[label, str(start[key])] for key, label in FACTS.items() if key in start]
    if bad := sum(run.series("train", "step", "bad_samples")[1]):
        rows.append(["unreadable images skipped", f"{bad:,}"])
    if resumes := sum(bool(record.get("resumed")) for record in run.of("start")):
        rows.append(["resumed", "once" if resumes == 1 else f"{resumes:,} times"])
    for part in ("versions", "environment"):
        rows += [[name, str(value)] for name, value in start.get(part, {}).items()]
    return Table("facts", "Environment of the run", ["", ""], rows)


def receipts(run: Run) -> tuple[str, Table, Table]:
    """A summary of all passes over the training set, their receipts, and the samples that were skipped."""
    # A pass that a resume went on with has two records, and the last one counts.
    found = list({record.get("epoch"): record for record in run.of("receipt")}.values())
    rows = [
        [
            f"{record['epoch']:g}" if "epoch" in record else "",
            *(f"{record.get(key, 0):,}" for key in ("batches", "samples")),
            f"{len(record.get('skipped', ())):,}",
            *(record.get(key, "") for key in ("digest", "ordered")),
        ]
        for record in found
    ]
    head = ["epoch", "batches", "samples", "skipped", "digest of samples", "digest of their order"]
    skipped = [one for record in found for one in record.get("skipped", ())]
    samples, passes = sum(record.get("samples", 0) for record in found), "1 pass" if len(found) == 1 else f"{len(found):,} passes"
    summary = f"{samples:,} samples in {passes}, skipped: {len(skipped):,}. Verify them: python -m dnal_dist.stream --audit RUN"
    lost = [[*map(str, one), *[""] * 5][:5] for one in skipped[:500]]
    lost_head = ["number", "shard", "byte", "key", "reason"]
    return (
        summary,
        Table("receipts", "Receipts of each epoch", head, rows, size="short"),
        Table("skipped", "Samples that were skipped", lost_head, lost, size="short"),
    )
