"""The part of the run's page that one drags through the search: an image of the network and a table of its layers.

What is written here is the run's last state, which needs no script; the script moves it to another record of the search.
"""

from html import escape

from dnal_dist.common import text
from dnal_dist.report import diagram, layers, markup
from dnal_dist.report.records import Run

BINS = 10


def frames(run: Run, limit: int = 240) -> list[dict]:
    """The states that the slider goes through, at most `limit` of the search, evenly taken, and the pruned network behind them:
    {words, open [channels of each site], counts [[gates in each of 10 bins] of each site], undecided [gates of each site that are
    neither open nor below 0.1]}, the last two absent in runs that were made before the records told them."""
    sites = _sites(run)
    records = [r for r in run.of("gates") if isinstance(r.get("open"), dict)]
    # A search that was stopped looks again where it goes on.
    records = list({r.get("step"): r for r in records}.values())
    if len(records) > limit:
        records = [records[round(i * (len(records) - 1) / (limit - 1))] for i in range(limit)]
    found = [_frame(run, record, sites) for record in records]
    if kept := run.last("prune").get("kept"):
        stay = [kept.get(site, 0) for site in sites]
        words = f"after pruning: {sum(stay):,} of {sum(sites.values()):,} channels kept"
        last = {key: value for key, value in (found[-1] if found else {}).items() if key == "counts"}
        found.append({"words": words, "open": stay} | last)
    # Before the search every channel is there.
    return found or [{"words": "before the search", "open": list(sites.values())}]


def _sites(run: Run) -> dict[str, int]:
    return run.last("start").get("sites") or {}


def _frame(run: Run, record: dict, sites: dict[str, int]) -> dict:
    opened = [record["open"].get(site, 0) for site in sites]
    epochs = run.setting("phases", "search")
    total = epochs.get("epochs") if isinstance(epochs, dict) else None
    where = f"epoch {record.get('epoch', 0):.4g}" + (f" of {total:g}" if isinstance(total, int | float) else "")
    delta = f", delta {text.number(record['delta'])}" if "delta" in record else ""
    words, told = f"{where}{delta}: {sum(opened):,} of {sum(sites.values()):,} gates open", record.get("by_site")
    if not isinstance(told, dict) or any(len(told.get(site, [])) != BINS for site in sites):
        return {"words": words, "open": opened}
    counts = [told[site] for site in sites]
    undecided = [max(sum(bins[1:]) - left, 0) for bins, left in zip(counts, opened, strict=True)]
    if any(undecided):
        words += f", {sum(undecided):,} undecided"
    return {"words": words, "open": opened, "counts": counts, "undecided": undecided}


def numbers(run: Run) -> dict | None:
    """What the script needs; None before the run has said which sites there are."""
    sites = _sites(run)
    return {"channels": list(sites.values()), "frames": frames(run)} if sites else None


def section(run: Run, told: dict | None) -> str:
    """The whole part, from what `numbers` gave."""
    if told is None:
        return ""
    prune, found = run.last("prune"), told["frames"]
    undecided = found[-1].get("undecided") or [0] * len(told["channels"])
    sites = [diagram.Site(*site) for site in zip(_sites(run), told["channels"], found[-1]["open"], undecided, strict=True)]
    image = diagram.draw(sites, run.last("start").get("shortcuts") or [])
    readout = '<p class="note" id="readout" aria-live="polite"></p>'
    counts = next((frame["counts"] for frame in reversed(found) if "counts" in frame), None)
    note = _note(sites, prune, bool(prune or run.of("gates")), any("undecided" in frame for frame in found))
    return markup.section("The architecture", note, _slider(found), image, readout, layers.table(run, sites, counts))


def _note(sites: list[diagram.Site], prune: dict, searched: bool, graded: bool) -> str:
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


def _slider(found: list[dict]) -> str:
    if len(found) < 2:
        return ""
    last, words = len(found) - 1, escape(found[-1]["words"])
    return (
        '<div class="slider" hidden><button type="button" id="play" aria-label="Play the search">Play</button>'
        '<label for="position">Through the search</label>'
        f'<input type="range" id="position" min="0" max="{last}" step="1" value="{last}" aria-valuetext="{words}">'
        f'<output id="words" for="position">{markup.text(found[-1]["words"])}</output></div>'
    )
