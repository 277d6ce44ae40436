"""Runs whose pages are opened in a browser."""

from made_up import HOSTILE, changed, made_up_run

COSTS = {
    "conv0.conv": {"full": {"macs": 900, "params": 90}, "compact": {"macs": 300, "params": 30}},
    "conv1.conv": {"full": {"macs": 5000, "params": 500}, "compact": {"macs": 1000, "params": 100}},
    "conv2.conv": {"full": {"macs": 7000, "params": 700}, "compact": {"macs": 0, "params": 0}},
    "classifier": {"full": {"macs": 80, "params": 88}, "compact": {"macs": 20, "params": 28}},
}
COUNTS = [
    {"conv0": [0] * 5 + [8] + [0] * 4, "conv1": [0] * 5 + [16] + [0] * 4, "conv2": [0] * 5 + [16] + [0] * 4},
    {"conv0": [3, 2, *[0] * 6, 1, 2], "conv1": [4] * 2 + [0] * 6 + [4] * 2, "conv2": [8, 7, *[0] * 7, 1]},
    {"conv0": [7, *[0] * 8, 1], "conv1": [12, *[0] * 8, 4], "conv2": [16, *[0] * 9]},
]
OPEN = [{"conv0": 0, "conv1": 0, "conv2": 0}, {"conv0": 3, "conv1": 8, "conv2": 1}, {"conv0": 1, "conv1": 4, "conv2": 0}]


def told_in_full() -> list[dict]:
    """The finished run, with all that today's records tell beside what those of older runs did."""
    looks = iter(zip(COUNTS, OPEN, strict=True))
    records = []
    for record in made_up_run():
        if record["kind"] == "gates":
            counts, opened = next(looks)
            record = record | {"by_site": counts, "open": opened}
        elif record["kind"] == "phase":
            record = record | {"images": 640, "device_seconds": 40.0, "bytes_sent": 3_200_000, "energy_kwh": 0.25}
        records.append(record)
    where = {"host": "node7", "code": "0123abc+", "slurm_job": "812", "environment": {"nccl": "2.27.3"}, "shortcuts": ["conv1"]}
    records = changed(changed(records, "prune", layers=COSTS), "start", **where)
    skipped = [[7, "train-000000.tar", 512, "00007", "not an image"]]
    receipt = {"kind": "receipt", "global_step": 90, "epoch": 0, "batches": 90, "samples": 5759, "digest": "ab" * 16}
    return [*records, receipt | {"ordered": "cd" * 16, "skipped": skipped}]


def supernet() -> list[dict]:
    """A search of 255 sites in cells, not over yet."""
    names = [f"k{kernel}e{expansion}.{which}" for kernel in (3, 5, 7) for expansion in (3, 6) for which in ("depthwise", "project")]
    sites = {"first.depthwise": 32, "first.project": 16}
    sites |= {
        f"stages.{cell // 4}.cells.{cell % 4}.{name}": 24 + 24 * ("depthwise" in name) for cell in range(21) for name in names
    }
    sites["last"] = 64
    start = made_up_run()[0] | {
        "name": "supernet",
        "sites": sites,
        "shortcuts": [f"stages.{s}.cells.{c}" for s in range(5) for c in (1, 2, 3)],
    }
    looks = [
        {
            "kind": "gates", "time": 1_790_000_000 + step, "global_step": step, "phase": "search", "step": step,
            "epoch": step / 10, "delta": 2.0**step, "histogram": [sum(sites.values()), *[0] * 19],
            "open": {site: channels // (step + 1) for site, channels in sites.items()},
            "by_site": {site: [channels, *[0] * 9] for site, channels in sites.items()},
        }
        for step in range(10)
    ]  # fmt: skip
    return [start, *looks]


def hostile() -> list[dict]:
    name = f"stages.0.{HOSTILE}"
    records = changed(told_in_full(), "start", sites={name: 8, "conv1": 16, "conv2": 16}, host=HOSTILE, code=HOSTILE)
    records = changed(
        records, "prune", kept={name: 1, "conv1": 4, "conv2": 0}, layers={f"{name}.conv": COSTS["conv0.conv"], **COSTS}
    )
    records = changed(records, "receipt", skipped=[[HOSTILE] * 5], digest=HOSTILE)
    return changed(records, "gates", open={name: 1}, by_site={name: [1] * 10, "conv1": [1] * 10, "conv2": [1] * 10})


def unfinished() -> list[dict]:
    records = told_in_full()
    return records[: [record["kind"] for record in records].index("prune") - 2]


RUNS = {
    "finished": told_in_full,
    "older": made_up_run,
    "unfinished": unfinished,
    "pretraining": lambda: made_up_run()[:3],
    "supernet": supernet,
    "hostile": hostile,
}
