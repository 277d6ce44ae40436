"""The results of pareto.py as a table in Markdown and as a plot in SVG."""

import statistics
from pathlib import Path

NETWORKS = ("vgg", "resnet", "supernet", "cifar-vgg", "cifar-resnet", "cifar-mobilenet", "cifar-supernet", "cifar-torchvision")
SEARCHED = ("learned", "slow", "taylor", "one")
BASELINES = ("even", "long", "l1", "l1-long", "gamma", "random", "k3e6", "k3e3", "k5e3")
METHODS = (*SEARCHED, *BASELINES, "retrained", "full")
MARKS = ("<!-- table -->", "<!-- end of table -->")


def table(found: list[dict]) -> str:
    """A row for each network, budget and method: means over the seeds, with the standard deviation of the accuracy."""
    lines = [
        "| network | MACs | method | top-1, % | seeds | parameters | ms, batch 1 | ms, batch 64 | training MACs, T |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for network, share, method in _cells(found):
        rows = _rows(found, network, share, method)
        mean = {key: statistics.mean(row[key] for row in rows) for key in ("params", "training_macs")}
        times = [statistics.mean(row["milliseconds"][batch] for row in rows) for batch in ("1", "64")]
        cells = [network, f"{share:.0%}", method, shown(accuracies(found, network, share, method)), f"{len(rows)}"]
        cells += [f"{mean['params']:,.0f}", *(f"{value:.2f}" for value in times), f"{mean['training_macs'] / 1e12:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(found: list[dict]) -> list[tuple[str, float, str]]:
    """The best method of each network and budget first."""
    keys = {(r["network"], r["budget"], r["method"]) for r in found}
    return sorted(keys, key=lambda key: (NETWORKS.index(key[0]), -key[1], -statistics.mean(accuracies(found, *key))))


def _rows(found: list[dict], network: str, share: float, method: str) -> list[dict]:
    return [r for r in found if (r["network"], r["budget"], r["method"]) == (network, share, method)]


def accuracies(found: list[dict], network: str, share: float, method: str) -> list[float]:
    """In per cent, one for each seed."""
    return [100 * r["accuracy"] for r in _rows(found, network, share, method)]


def shown(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


COLOURS = {"learned": "#0072b2", "slow": "#56b4e9", "taylor": "#cc79a7", "even": "#d55e00", "long": "#e69f00", "l1": "#009e73"}
OTHERS = ("#005f45", "#999999", "#8b4513", "#5f5f5f", "#b0a000", "#607d8b", "#7b1fa2", "#3f51b5", "#000000")
COLOURS |= dict(zip((method for method in METHODS if method not in COLOURS), OTHERS, strict=True))
WIDTH, HEIGHT, LEFT, TOP = 300, 260, 50, 30


def plot(found: list[dict]) -> str:
    """The table as an SVG: for each network accuracy (mean, and a bar of one standard deviation) over the budget."""
    names = [network for network in NETWORKS if any(r["network"] == network for r in found)]
    methods = [method for method in METHODS if any(r["method"] == method for r in found)]
    height = max(HEIGHT, TOP + 10 + 18 * len(methods))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(names) * WIDTH + 90}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>'
    ]
    for number, network in enumerate(names):
        parts.append(f'<g transform="translate({number * WIDTH},0)">{_panel(found, network, methods)}</g>')
    for number, method in enumerate(methods):
        y = TOP + 10 + 18 * number
        parts.append(f'<rect x="{len(names) * WIDTH + 8}" y="{y - 8}" width="10" height="10" fill="{COLOURS[method]}"/>')
        parts.append(f'<text x="{len(names) * WIDTH + 24}" y="{y + 1}">{method}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(found: list[dict], network: str, methods: list[str]) -> str:
    budgets = sorted({r["budget"] for r in found if r["network"] == network and r["budget"] < 1}) or [1.0]
    methods = [method for method in methods if method != "full"]
    cells = {(m, s): accuracies(found, network, s, m) for m in methods for s in budgets}
    full = accuracies(found, network, 1.0, "full")
    # Random pruning may lie far below the others, which are what the plot is for.
    seen = [v for (m, _), values in cells.items() if m != "random" for v in values] + full or [0, 100]
    low, high = min(seen) - 0.5, max(seen) + 0.5

    def x(share: float) -> float:
        return LEFT + budgets.index(share) * (WIDTH - LEFT - 60) / max(len(budgets) - 1, 1) + 20

    def y(value: float) -> float:
        return TOP + (high - min(high, max(value, low))) / (high - low) * (HEIGHT - TOP - 40)

    parts = [f'<text x="{LEFT}" y="18" font-weight="bold">{network}</text>']
    step = 1 if high - low < 10 else 5
    for tick in range(step * (int(low / step) + 1), int(high) + 1, step):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - 15}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick} %</text>')
    parts += [f'<text x="{x(s):.0f}" y="{HEIGHT - 20}" text-anchor="middle">{s:.0%}</text>' for s in budgets]
    if full:
        parts.append(f'<path d="M{LEFT} {y(statistics.mean(full)):.1f}H{WIDTH - 15}" stroke="black" stroke-dasharray="4 3"/>')
    for number, method in enumerate(methods):
        points = [(x(s) + 3 * (number - len(methods) / 2), cells[method, s]) for s in budgets if cells[method, s]]
        line = " ".join(f"{px:.1f},{y(statistics.mean(v)):.1f}" for px, v in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[method]}" stroke-width="1.5"/>')
        for px, values in points:
            mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            parts.append(f'<circle cx="{px:.1f}" cy="{y(mean):.1f}" r="2.5" fill="{COLOURS[method]}"/>')
            parts.append(f'<path d="M{px:.1f} {y(mean - deviation):.1f}V{y(mean + deviation):.1f}" stroke="{COLOURS[method]}"/>')
    return "".join(parts)


def write(found: list[dict], docs: Path, name: str) -> None:
    """The plot, and the table between its two marks in pareto.md, which is otherwise left alone. name: of one of several tables."""
    begin, end = (mark.replace("table", f"table, {name}") if name else mark for mark in MARKS)
    (docs / f"{'-'.join(filter(None, ('pareto', name)))}.svg").write_text(plot(found))
    page = docs / "pareto.md"
    text = page.read_text() if page.exists() else ""
    before, found_it, rest = text.partition(begin)
    after = rest.partition(end)[2] if found_it else "\n"
    page.write_text(f"{before}{begin}\n{table(found)}\n{end}{after}")
