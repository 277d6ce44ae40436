"""A made-up run in any state, and what its report says."""

import io
import json
import re
from html.parser import HTMLParser

from rich.console import Console

from dnal_dist.report import outputs

FULL = {"exact": {"macs": 2_421_376, "params": 287_146}, "paper": {"macs": 2_430_000, "params": 287_000}}
COMPACT = {"exact": {"macs": 281_344, "params": 28_211}, "paper": {"macs": 290_000, "params": 28_000}}
SITES = {"conv0": 8, "conv1": 16, "conv2": 16}
KEPT = {"conv0": 1, "conv1": 4, "conv2": 0}
HISTOGRAMS = [[40 * (bin == 9) for bin in range(20)], [10 + i for i in range(20)], [35, *[0] * 18, 5]]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&$name${title}\x1b[31m[bold]"


def made_up_run() -> list[dict]:
    """A finished run of 20, 30 and 40 iterations, recorded as docs/run-folder.md says; one second an iteration."""
    records = [
        {
            "kind": "start", "global_step": 0, "name": "digits", "resumed": False, "world_size": 2, "backend": "ddp",
            "device": "CPU", "train_samples": 1442, "val_samples": 355, "steps_per_epoch": 10, "dropped_per_epoch": 2,
            "sites": SITES, "full": FULL, "versions": {"python": "3.11.7"},
        }
    ]  # fmt: skip
    begin = 0
    for phase, steps, accuracy in (("pretrain", 20, 0.97), ("search", 30, 0.95), ("finetune", 40, 0.9944)):
        if phase == "search":
            records.append(gates(0, begin))
        for step in range(10, steps + 1, 10):
            here = {"phase": phase, "step": step, "epoch": step / 10, "global_step": begin + step}
            train = {
                "phase_steps": steps, "loss": 0.5, "cross_entropy": 0.5, "accuracy": 0.9, "learning_rate": 0.05,
                "images_per_second": 900.0, "data_wait_seconds": 0.25, "bad_samples": 0,
            }  # fmt: skip
            if phase == "search":
                train |= {"penalty": 0.1, "delta": 10.0, "open_share": 0.4, "expected_macs": 500_000}
            records.append({"kind": "train"} | here | train)
            if phase == "search" and step < 30:
                records.append(gates(step // 10, begin))
            value = accuracy - (steps - step) / 1000
            found = {"accuracy": value, "top5": 0.999, "cross_entropy": 0.1, "samples": 355}
            records.append({"kind": "eval"} | here | found)
        records[-1] |= {"balanced_accuracy": accuracy, "per_class": [[176, 177], [177, 178]]}
        begin += steps
        records.append({"kind": "phase", "global_step": begin, "phase": phase, "seconds": float(steps)})
        if phase == "search":
            cut = {"kept": KEPT, "threshold": 0.9, "full": FULL, "compact": COMPACT}
            records.append({"kind": "prune", "global_step": begin, "rescued": ["conv0"], "collapsed": False} | cut)
            found = {"accuracy": 0.93, "top5": 0.99, "cross_entropy": 0.2, "samples": 355}
            records.append({"kind": "eval", "global_step": begin, "phase": "prune", "step": 0, "epoch": 0} | found)
    seconds = {"pretrain": 20.0, "search": 30.0, "finetune": 40.0}
    records.append({"kind": "end", "global_step": 90, "seconds": 90.0, "phase_seconds": seconds, "images": 5760})
    return [{"time": 1_790_000_000 + record["global_step"]} | record for record in records]


def gates(index: int, begin: int) -> dict:
    here = {"phase": "search", "step": 10 * index, "epoch": float(index), "global_step": begin + 10 * index}
    found = {"delta": [1, 100, 10_000][index], "histogram": HISTOGRAMS[index], "open": {site: 1 for site in SITES}}
    return {"kind": "gates"} | here | found


def save(folder, records, tail: bytes = b"", recipe: str | None = "name: digits\nmodel: {name: vgg_digits}\n"):
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_bytes(lines.encode() + tail)
    if recipe is not None:
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return folder


def changed(records: list[dict], kind: str, **values) -> list[dict]:
    return [record | values if record["kind"] == kind else record for record in records]


def page_of(folder) -> str:
    outputs.write_all(folder, draw=False)
    return (folder / "report.html").read_text("utf-8")


def numbers_in(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="numbers">(.*?)</script>', page, re.S).group(1))


def values_in(page: str, figure: str) -> list[dict[str, list[str]]]:
    """The texts that a figure of the page has for the pointer: {series: texts} of each panel."""
    return [{one["name"]: one["text"] for one in panel["series"]} for panel in numbers_in(page)["figures"].get(figure, [])]


def table_of(folder, width: int = 80) -> str:
    out = io.StringIO()
    outputs.print_table(folder, Console(file=out, width=width))
    return out.getvalue()


class Tags(HTMLParser):
    """The tags of a page, in order, and the values of its attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text.append(data)


FIGURE = r'<figure class="plot".*?</figure>'
