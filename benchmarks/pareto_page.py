"""The results of pareto.py as a table in Markdown and as a plot in SVG."""

import math
import statistics
from pathlib import Path

NETWORKS = {"vgg": "recipes/fashion_vgg.yaml", "resnet": "recipes/fashion_resnet.yaml", "supernet": "recipes/fashion_supernet.yaml"}
BUDGETS = (0.5, 0.25, 0.1, 0.05)
METHODS = ("learned", "retrained", "even", "l1", "random", "full")
MARKS = ("<!-- table -->", "<!-- end of table -->")


def table(found: list[dict]) -> str:
    """Mean and standard deviation of each cell in Markdown. Last, how far `learned` is ahead of the best baseline's mean, and that
    in standard deviations: the root mean square of the two methods' own."""
    shown_methods = [method for method in METHODS if any(r["method"] == method for r in found)]
    lines = [
        "| network | MACs | " + " | ".join(shown_methods) + " | ahead | in deviations |",
        "|---" * (len(shown_methods) + 4) + "|",
    ]
    for network in NETWORKS:
        for share in (1.0, *BUDGETS):
            cells = {m: accuracies(found, network, share, m) for m in METHODS}
            if any(cells.values()):
                row = [network, f"{share:.0%}", *(shown(cells[m]) for m in shown_methods), *ahead(cells)]
                lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def ahead(cells: dict[str, list[float]]) -> tuple[str, str]:
    learned, baselines = cells["learned"], [cells[m] for m in ("even", "l1", "random") if cells[m]]
    if not learned or not baselines:
        return "", ""
    best = max(baselines, key=statistics.mean)
    by = statistics.mean(learned) - statistics.mean(best)
    if min(len(learned), len(best)) < 2:
        return f"{by:+.2f}", ""
    deviation = math.sqrt((statistics.variance(learned) + statistics.variance(best)) / 2)
    return f"{by:+.2f}", f"{by / deviation:+.1f}" if deviation else ""


def accuracies(found: list[dict], network: str, share: float, method: str) -> list[float]:
    """In per cent, one for each seed."""
    key = (network, share, method)
    return [100 * r["accuracy"] for r in found if (r["network"], r["budget"], r["method"]) == key]


def shown(values: list[float]) -> str:
    """Fewer than three seeds are said, in brackets."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}" + (f" ({len(values)})" if len(values) < 3 else "")


COLOURS = {"learned": "#0072b2", "retrained": "#56b4e9", "even": "#d55e00", "l1": "#009e73", "random": "#999999", "full": "#000000"}
WIDTH, HEIGHT, LEFT, TOP = 300, 260, 50, 30


def plot(found: list[dict]) -> str:
    """The table as an SVG: for each network accuracy (mean, and a bar of one standard deviation) over the budget."""
    names = [network for network in NETWORKS if any(r["network"] == network for r in found)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(names) * WIDTH + 90}" height="{HEIGHT}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>'
    ]
    for number, network in enumerate(names):
        parts.append(f'<g transform="translate({number * WIDTH},0)">{_panel(found, network)}</g>')
    for number, method in enumerate(m for m in METHODS if any(r["method"] == m for r in found)):
        y = TOP + 10 + 18 * number
        parts.append(f'<rect x="{len(names) * WIDTH + 8}" y="{y - 8}" width="10" height="10" fill="{COLOURS[method]}"/>')
        parts.append(f'<text x="{len(names) * WIDTH + 24}" y="{y + 1}">{method}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(found: list[dict], network: str) -> str:
    cells = {(m, s): accuracies(found, network, s, m) for m in METHODS[:-1] for s in BUDGETS}
    full = accuracies(found, network, 1.0, "full")
    # Random pruning may lie far below the others, which are what the plot is for.
    seen = [v for (m, _), values in cells.items() if m != "random" for v in values] + full or [0, 100]
    low, high = min(seen) - 0.5, max(seen) + 0.5

    def x(share: float) -> float:
        return LEFT + BUDGETS[::-1].index(share) * (WIDTH - LEFT - 30) / (len(BUDGETS) - 1) + 5

    def y(value: float) -> float:
        return TOP + (high - min(high, max(value, low))) / (high - low) * (HEIGHT - TOP - 40)

    parts = [f'<text x="{LEFT}" y="18" font-weight="bold">{network}</text>']
    step = 1 if high - low < 10 else 5
    for tick in range(step * (int(low / step) + 1), int(high) + 1, step):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - 15}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick} %</text>')
    parts += [f'<text x="{x(s):.0f}" y="{HEIGHT - 20}" text-anchor="middle">{s:.0%}</text>' for s in BUDGETS]
    if full:
        parts.append(f'<path d="M{LEFT} {y(statistics.mean(full)):.1f}H{WIDTH - 15}" stroke="black" stroke-dasharray="4 3"/>')
    for number, method in enumerate(METHODS[:-1]):
        points = [(x(s) + 3 * (number - 2), cells[method, s]) for s in BUDGETS if cells[method, s]]
        line = " ".join(f"{px:.1f},{y(statistics.mean(v)):.1f}" for px, v in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[method]}" stroke-width="1.5"/>')
        for px, values in points:
            mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            parts.append(f'<circle cx="{px:.1f}" cy="{y(mean):.1f}" r="2.5" fill="{COLOURS[method]}"/>')
            parts.append(f'<path d="M{px:.1f} {y(mean - deviation):.1f}V{y(mean + deviation):.1f}" stroke="{COLOURS[method]}"/>')
    return "".join(parts)


def write(found: list[dict], docs: Path) -> None:
    """The plot, and the table between its two marks in pareto.md, which is otherwise left alone."""
    (docs / "pareto.svg").write_text(plot(found))
    page = docs / "pareto.md"
    text = page.read_text() if page.exists() else "\n".join(MARKS)
    before, rest = text.split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n{table(found)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
