"""The architecture on the run's page: an image of the network and a table of its layers, with a slider through the search.

The page has the run's last state without a script; the script moves it to another record of the search.
"""

import math
from dataclasses import dataclass, field

from dnal_dist.common import text
from dnal_dist.report import diagram
from dnal_dist.report.diagram import Site
from dnal_dist.report.records import Run

BINS = 10
COSTS = [(which, key, words) for key, words in (("macs", "MACs"), ("params", "parameters")) for which in ("full", "compact")]
# Most states of sites on a page, which keeps that of a large supernet below 1 MB.
MOST = 24_000


def frames(run: Run) -> list[dict]:
    """The states of the slider: at most 240 of the search, fewer of many sites, evenly taken, and the pruned network behind them.

    {words, open [channels of each site], counts [[gates in each of 10 bins] of each site], undecided [gates of each site that are
    neither open nor below 0.1]}, the last two absent in runs whose records lack them."""
    sites = run.sites
    limit = max(min(240, MOST // max(len(sites), 1)), 24)
    # A search that was stopped records its gates again where it resumes.
    records = list({r.get("step"): r for r in run.of("gates", has=("open",))}.values())
    if len(records) > limit:
        records = [records[round(i * (len(records) - 1) / (limit - 1))] for i in range(limit)]
    found = [_frame(run, record) for record in records]
    if kept := run.last("prune").get("kept"):
        stay = run.channels(kept)
        words = f"after pruning: {sum(stay):,} of {sum(sites.values()):,} channels kept"
        last = {key: value for key, value in (found[-1] if found else {}).items() if key == "counts"}
        found.append({"words": words, "open": stay} | last)
    # Before the search every channel is there.
    return found or [{"words": "before the search", "open": list(sites.values())}]


def _frame(run: Run, record: dict) -> dict:
    sites, opened = run.sites, run.channels(record["open"])
    epochs = run.setting("phases", "search")
    total = epochs.get("epochs") if isinstance(epochs, dict) else None
    where = f"epoch {record.get('epoch', 0):.4g}" + (f" of {total:g}" if isinstance(total, int | float) else "")
    delta = f", delta {text.number(record['delta'])}" if "delta" in record else ""
    words, by_site = f"{where}{delta}: {sum(opened):,} of {sum(sites.values()):,} gates open", record.get("by_site", {})
    if any(len(by_site.get(site, ())) != BINS for site in sites):
        return {"words": words, "open": opened}
    counts = [by_site[site] for site in sites]
    undecided = [
        min(max(sum(bins[1:]) - left, 0), channels - left)
        for bins, left, channels in zip(counts, opened, sites.values(), strict=True)
    ]
    if any(undecided):
        words += f", {sum(undecided):,} undecided"
    return {"words": words, "open": opened, "counts": counts, "undecided": undecided}


def numbers(run: Run) -> dict | None:
    """Channels of the sites and the states, for the script; None before the sites are recorded."""
    return {"channels": list(run.sites.values()), "frames": frames(run)} if run.sites else None


@dataclass(frozen=True)
class Layer:
    """A row of the table; site is None for a layer without gates. cost: {"full", "compact": {"macs", "params"}}, empty where no
    record has it; strip: its gates' histogram as a path."""

    name: str
    number: int = -1
    site: Site | None = None
    strip: str = ""
    rescued: bool = False
    cost: dict = field(default_factory=dict)

    @property
    def fate(self) -> str:
        """Neither one channel of many is none, nor all but one of many all."""
        if self.rescued:
            return "rescued"
        site, percent = self.site, round(100 * self.site.share)
        return "closed" if site.closed else f"{min(max(percent, min(site.left, 1)), 99 if site.left < site.channels else 100)} %"


def section(run: Run, found: dict) -> dict:
    """What the template draws of `numbers`."""
    prune, states = run.last("prune"), found["frames"]
    undecided = states[-1].get("undecided") or [0] * len(found["channels"])
    sites = [Site(*site) for site in zip(run.sites, found["channels"], states[-1]["open"], undecided, strict=True)]
    counts = next((state["counts"] for state in reversed(states) if "counts" in state), None)
    rows = layers(run, sites, counts)
    return {
        "note": _note(sites, prune, bool(prune or run.of("gates")), any("undecided" in state for state in states)),
        "last": len(states) - 1,
        "words": states[-1]["words"],
        "stages": diagram.stages(sites, run.last("start").get("shortcuts", [])),
        "layers": rows,
        "strips": counts is not None,
        "costs": COSTS if any(layer.cost for layer in rows) else [],
        "totals": [sum(layer.cost.get(which, {}).get(key, 0) for layer in rows) for which, key, _ in COSTS],
        # The column of names is as wide as the longest needs, within reason.
        "letters": min(max(len(layer.name) for layer in rows) + 2, 32),
    }


def layers(run: Run, sites: list[Site], counts: list | None) -> list[Layer]:
    """Every layer in forward order, or every site where the cost of layers is not recorded. counts: histograms of the sites."""
    rescued, costs = (run.last("prune").get(key, ()) for key in ("rescued", "layers"))
    gated = {
        site.name: {"number": i, "site": site, "strip": strip(counts[i]) if counts else "", "rescued": site.name in rescued}
        for i, site in enumerate(sites)
    }
    if not costs:
        return [Layer(name, **one) for name, one in gated.items()]
    names = {path: path.removesuffix(".conv") for path in costs}
    return [Layer(name, **gated.get(name, {}), cost=costs[path]) for path, name in names.items()]


def strip(counts: list[float]) -> str:
    """A histogram as the path of an SVG 100 wide and 20 high: a bar is as high as the root of its part of the gates, so that a few
    are still seen."""
    total, width = sum(counts) or 1, 100 / len(counts)
    bars = ""
    for i, count in enumerate(counts):
        if count > 0:
            height = max(20 * math.sqrt(count / total), 1.5)
            bars += f"M{width * i + 1:g} 20v{-height:.1f}h{width - 2:g}v{height:.1f}z"
    return bars


def _note(sites: list[Site], prune: dict, searched: bool, graded: bool) -> str:
    total = f"{sum(site.channels for site in sites):,} channels in {len(sites):,} layers"
    if not searched:
        return f"{total} with gates; the search has not begun."
    closed = sum(site.closed for site in sites)
    note = f"{sum(site.left for site in sites):,} of {total}" + ("." if prune else ": gates above the threshold so far.")
    note += f" Closed as a whole: {closed:,}." if closed else ""
    note += " Rescued: the layer would have closed, and keeps its strongest channel." if prune.get("rescued") else ""
    note += " An outline is a layer with all its channels, filled as far as they stay"
    stacked = any(block.stacked for block in diagram.blocks([site.name for site in sites]))
    note += ": of a candidate, hidden channels down and output channels across." if stacked else "."
    return note + (" Pale: not decided yet, above 0.1 and not open." if graded else "")
