"""The table of the layers of a run's network on its page: channels, gates and cost of each."""

import math
from dataclasses import dataclass, field
from html import escape

from dnal_dist.common import text
from dnal_dist.report import markup
from dnal_dist.report.diagram import Site
from dnal_dist.report.records import Run

_COSTS = [(which, key, words) for key, words in (("macs", "MACs"), ("params", "parameters")) for which in ("full", "compact")]
_FILTER = (
    '<div class="filter" hidden><label>Layers <input type="search" id="filter" placeholder="part of a name" autocomplete="off" '
    'spellcheck="false"></label><label>State <select id="state"><option value="">all</option><option value="closed">closed</option>'
    '<option value="thinned">thinned</option><option value="whole">whole</option></select></label>'
    '<span id="shown" role="status"></span></div>'
)


@dataclass(frozen=True)
class Gated:
    """A layer's gates: its site and that one's number, the histogram where it is told."""

    number: int
    site: Site
    counts: list[float] | None
    rescued: bool


@dataclass(frozen=True)
class Layer:
    """A row: gated is None of one without gates; cost {"full", "compact": {"macs", "params"}}, empty where no record tells it."""

    name: str
    gated: Gated | None = None
    cost: dict = field(default_factory=dict)


def rows(run: Run, sites: list[Site], counts: list | None) -> list[Layer]:
    """Every layer in forward order, or every site where the run did not tell what each layer costs.

    counts: a histogram of the gates of each site, if known.
    """
    rescued = set(run.last("prune").get("rescued") or [])
    gated = {site.name: Gated(i, site, counts[i] if counts else None, site.name in rescued) for i, site in enumerate(sites)}
    costs = run.last("prune").get("layers")
    if not isinstance(costs, dict):
        return [Layer(site, one) for site, one in gated.items()]
    names = {path: path.removesuffix(".conv") for path in costs}
    return [Layer(name, gated.get(name), costs[path]) for path, name in names.items()]


def table(run: Run, sites: list[Site], counts: list | None) -> str:
    """The table, and what filters it by script; arguments as those of `rows`."""
    told = rows(run, sites, counts)
    priced = any(layer.cost for layer in told)
    heads = [("layer", "layer", "text"), *([("gates", "gates", "")] if counts else []), ("channels", "channels", "number")]
    heads += [("bar", "", ""), ("share", "share", "number")]
    heads += [("cost", f"{words}, {which}", "number") for which, _, words in _COSTS if priced]
    columns = "".join(
        f'<th scope="col" class="{name}" data-sort="{sort}">{words}</th>' if words else f'<td class="{name}"></td>'
        for name, words, sort in heads
    )
    body = "".join(_row(layer, counts is not None, priced) for layer in told)
    foot = _total(told, counts is not None) if priced else ""
    # As wide as the longest name needs, within reason.
    letters = min(max(len(layer.name) for layer in told) + 2, 32)
    content = f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody>{foot}"
    content = f'<table class="layers" style="--name:{letters}ch">{content}</table>'
    return (_FILTER if len(told) > 1 else "") + markup.scroll("Channels and cost of each layer", content, "tall")


def _row(layer: Layer, strips: bool, priced: bool) -> str:
    cells = _strip(layer.gated) if strips else ""
    cells += '<td class="channels" data-value="-1">no gates</td><td class="bar"></td><td class="share" data-value="2"></td>'
    data = ""
    if gated := layer.gated:
        cells = (_strip(gated) if strips else "") + _channels(gated)
        data = f' data-site="{gated.number}"' + (" data-rescued" if gated.rescued else "")
    costs = _costs(layer.cost) if priced else ""
    name = f'<th scope="row" data-value="{escape(layer.name)}">{markup.breakable(layer.name)}</th>'
    return f"<tr{data}>{name}{cells}{costs}</tr>"


def _strip(gated: Gated | None) -> str:
    path = strip(gated.counts) if gated and gated.counts else ""
    drawn = f'<svg viewBox="0 0 100 20" preserveAspectRatio="none"><path d="{path}"/></svg>' if gated else ""
    return f'<td class="gates" aria-hidden="true">{drawn}</td>'


def strip(counts: list[float]) -> str:
    """A histogram as the path of an SVG 100 wide and 20 high: a bar is as high as the root of its share of the gates, so that a few
    are still seen."""
    total, width = sum(counts) or 1, 100 / len(counts)
    bars = ""
    for i, count in enumerate(counts):
        if count > 0:
            height = max(20 * math.sqrt(count / total), 1.5)
            bars += f"M{width * i + 1:g} 20v{-height:.1f}h{width - 2:g}v{height:.1f}z"
    return bars


def _channels(gated: Gated) -> str:
    site = gated.site
    bar = (
        f'<span><i style="width:{100 * site.share:.2f}%"></i><b style="width:{100 * (site.possible - site.share):.2f}%"></b></span>'
    )
    flag, fate = (" flag", "rescued") if gated.rescued else ("", "closed" if site.closed else _percent(site))
    return (
        f'<td class="channels" data-value="{site.left}">{site.left:,} of {site.channels:,}</td>'
        f'<td class="bar" aria-hidden="true">{bar}</td>'
        f'<td class="share{flag}" data-value="{site.share:.6f}">{fate}</td>'
    )


def _percent(site: Site) -> str:
    """Neither one channel of many is none, nor all but one of many all."""
    whole = min(max(round(100 * site.share), min(site.left, 1)), 99 if site.left < site.channels else 100)
    return f"{whole}&nbsp;%"


def _costs(cost: dict) -> str:
    cells = ""
    for which, key, words in _COSTS:
        value = cost.get(which, {}).get(key)
        told = "" if value is None else markup.text(text.amount(value))
        label, sorts = words if which == "full" else which, -1 if value is None else value
        cells += f'<td class="cost" data-label="{label}" data-value="{sorts}">{told}</td>'
    return cells


def _total(told: list[Layer], strips: bool) -> str:
    sums: dict[str, dict[str, int]] = {"full": {}, "compact": {}}
    for which, key, _ in _COSTS:
        sums[which][key] = sum(layer.cost.get(which, {}).get(key, 0) for layer in told)
    empty = '<td class="gates"></td>' if strips else ""
    empty += '<td class="channels"></td><td class="bar"></td><td class="share"></td>'
    return f'<tfoot><tr><th scope="row">all layers</th>{empty}{_costs(sums)}</tr></tfoot>'
