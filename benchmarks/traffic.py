"""The table of docs/distributed.md: what the steps of the full ProxylessNAS supernet send on each backend.

python benchmarks/traffic.py docs/distributed.md         writes it between the page's two marks
"""

import sys
from pathlib import Path

from dnal_dist import nets, recipe
from dnal_dist.common.text import spaced
from dnal_dist.distributed.estimate import BACKENDS, totals, traffic

RECIPE, RANKS = "recipes/proxyless.yaml", (2, 8, 64, 1024)
MARKS = ("<!-- traffic -->", "<!-- end of traffic -->")


def table() -> str:
    """Collectives and bytes of each step as Markdown, a column for each number of ranks."""
    settings = recipe.load(RECIPE)
    net = nets.on_meta(**settings.network)
    lines = ["| backend | step | " + " | ".join(f"{n} ranks" for n in RANKS) + " |", "|---|---|" + "---:|" * len(RANKS)]
    for backend in BACKENDS:
        steps = zip(*(traffic(net, backend, ranks, settings.data.image_size) for ranks in RANKS), strict=True)
        for step, operations in zip(("weight", "architecture"), steps, strict=True):
            counts = [totals(sent) for sent in operations]
            cells = [f"{count['collectives']}: {spaced(count['bytes'])}" for count in counts]
            lines.append(f"| {backend} | {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(page: Path) -> None:
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
