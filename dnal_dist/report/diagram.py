"""An image of a run's network, an SVG for each block: each layer or candidate a box, filled as far as its channels stay.

Where a site lies is read from its name, the path of its module: up to the last number it names the block, up to the first one of
several the stage; of two names behind, the first is the candidate.
"""

import math
from dataclasses import dataclass
from html import escape
from itertools import groupby

from dnal_dist.report import markup

WIDTH, GAP, LABELS = 998, 12, 34
"""Pixels: of the page's column, between stages, of the candidates' names."""
TALLEST, HEAD, FOOT = 96, 14, 16
"""Pixels: of the tallest box, of the room above the boxes for shortcuts, below for numbers."""
NUMBERED = 26
"""Pixels of a layer from which on there is room for its number of channels."""
LEAST = 1.5
"""Pixels of what is filled, so that one channel of many is still seen."""


@dataclass(frozen=True)
class Site:
    """A layer's gates at one moment: channels in all, those that are open (after pruning: that stay), those not decided yet."""

    name: str
    channels: int
    left: int
    undecided: int = 0

    @property
    def share(self) -> float:
        return self.left / max(self.channels, 1)

    @property
    def possible(self) -> float:
        """The share that may stay."""
        return (self.left + self.undecided) / max(self.channels, 1)

    @property
    def closed(self) -> bool:
        return not self.possible

    def words(self, what: str) -> str:
        undecided = f", {self.undecided:,} undecided" if self.undecided else ""
        return f"{self.left:,} of {self.channels:,} {what}{undecided}"


@dataclass(frozen=True)
class Box:
    """A layer, or a candidate: its name and the numbers of its sites, in forward order."""

    name: str
    sites: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """Boxes side by side, or candidates one below the other."""

    stage: str
    name: str
    boxes: tuple[Box, ...]
    stacked: bool

    @property
    def columns(self) -> int:
        return 2 if self.stacked else len(self.boxes)


@dataclass(frozen=True)
class Place:
    x: float
    y: float
    width: float
    height: float


def blocks(sites: list[str]) -> list[Block]:
    """The blocks of a network, in forward order, from the names of its gate sites."""
    places = [_place(site) for site in sites]
    found = []
    for (stage, block), members in groupby(range(len(sites)), key=lambda i: places[i][:2]):
        boxes: dict[str, list[int]] = {}
        members = list(members)
        stacked = all(len(places[i][2]) > 1 for i in members)
        for i in members:
            rest = places[i][2]
            boxes.setdefault(rest[0] if stacked else ".".join(rest), []).append(i)
        found.append(Block(stage, block, tuple(Box(name, tuple(of)) for name, of in boxes.items()), stacked))
    return found


def _place(site: str) -> tuple[str, str, tuple[str, ...]]:
    """Stage, block, and the names within the block."""
    parts = site.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    if not numbers:
        return parts[0], parts[0], tuple(parts[1:])
    stage = parts[: numbers[0] + 1] if len(numbers) > 1 else parts[:1]
    return ".".join(stage), ".".join(parts[: numbers[-1] + 1]), tuple(parts[numbers[-1] + 1 :])


def draw(sites: list[Site], shortcuts: list[str]) -> str:
    """HTML of the image. shortcuts: names of the blocks with a way around them."""
    rows = blocks([site.name for site in sites])
    # As wide as the page allows, within reason.
    room = WIDTH - GAP * len({block.stage for block in rows}) - LABELS
    pitch = min(max(room / (sum(block.columns for block in rows) + 0.6 * len(rows)), 10), 72)
    stages, first = "", True
    for stage, members in groupby(rows, key=lambda block: block.stage):
        svgs = ""
        for block in members:
            labelled = first and block.stacked
            first = first and not labelled
            svgs += _block(block, sites, pitch, block.name in shortcuts, labelled)
        stages += f'<div class="stage"><p>{markup.breakable(stage)}</p><div>{svgs}</div></div>'
    return f'<div class="network" role="group" aria-label="The network, layer by layer">{stages}</div>'


def _block(block: Block, sites: list[Site], pitch: float, shortcut: bool, labelled: bool) -> str:
    gap, middle, left = 0.3 * pitch, HEAD + TALLEST / 2, LABELS if labelled else 0
    width = left + pitch * block.columns + 2 * gap
    places = _stacked(block, sites, pitch, left) if block.stacked else _in_a_row(block, sites, pitch)
    begin, end = left + gap / 2, width - gap / 2
    wires = f"M{left} {middle}H{begin:.1f}M{end:.1f} {middle}H{width:.1f}"
    if block.stacked:
        ys = [place.y + place.height / 2 for place in places]
        for x in (begin, end):
            wires += f"M{x:.1f} {min([middle, *ys]):.1f}V{max([middle, *ys]):.1f}"
    else:
        wires += f"M{begin:.1f} {middle}H{end:.1f}"
    around = f'<path class="around" d="M{begin:.1f} {middle}V5H{end:.1f}V{middle}"/>' if shortcut else ""
    numbered = pitch >= NUMBERED and not block.stacked
    boxes = ""
    for box, place in zip(block.boxes, places, strict=True):
        middle_of = place.y + place.height / 2
        beside = f'<path class="wire" d="M{begin:.1f} {middle_of:.1f}H{end:.1f}"/>' if block.stacked else ""
        beside += f'<text x="0" y="{middle_of + 3:.1f}">{escape(box.name)}</text>' if labelled else ""
        if numbered:
            x, y = place.x + place.width / 2, HEAD + TALLEST + FOOT - 4
            beside += f'<text class="count" x="{x:.1f}" y="{y}">{sites[box.sites[0]].left:,}</text>'
        boxes += _box(f"{block.name}.{box.name}".rstrip("."), [sites[i] for i in box.sites], box.sites, place, beside)
    height = HEAD + TALLEST + (FOOT if pitch >= NUMBERED else 4)
    size = f'width="{width:.1f}" height="{height}" viewBox="0 0 {width:.1f} {height}"'
    return f'<svg {size}><path class="wire" d="{wires}"/>{around}{boxes}</svg>'


def _in_a_row(block: Block, sites: list[Site], pitch: float) -> list[Place]:
    """Boxes as high as the root of their channels, so that the narrowest of a network is still seen."""
    widest = math.sqrt(max(site.channels for site in sites) or 1)
    heights = [max(TALLEST * math.sqrt(sum(sites[i].channels for i in box.sites)) / widest, 4) for box in block.boxes]
    middle = HEAD + TALLEST / 2
    return [
        Place(0.3 * pitch + n * pitch + 0.14 * pitch, middle - height / 2, 0.72 * pitch, height)
        for n, height in enumerate(min(height, TALLEST) for height in heights)
    ]


def _stacked(block: Block, sites: list[Site], pitch: float, left: float) -> list[Place]:
    """Candidates below one another, their heights by their hidden channels."""
    row = TALLEST / len(block.boxes)
    most = max(sites[box.sites[0]].channels for box in block.boxes) or 1
    places = []
    for n, box in enumerate(block.boxes):
        height = max((row - 3) * math.sqrt(sites[box.sites[0]].channels / most), 2)
        places.append(Place(left + 0.55 * pitch, HEAD + row * (n + 0.5) - height / 2, 1.5 * pitch, height))
    return places


def _box(name: str, sites: list[Site], numbers: tuple[int, ...], place: Place, beside: str) -> str:
    """The outline is all channels, what is filled are those that stay: of a candidate, its output channels across and its hidden
    ones down, so that the area is the share of its weights. What may stay besides is pale."""
    told = sites[0].words("channels")
    if len(sites) > 1:
        told = f"{sites[0].words('hidden channels')}; {sites[-1].words('output channels')}"
    rects = f'<rect class="hull" {_rect(place, 1, 1)}/>'
    for kind, shares in (("pale", [site.possible for site in sites]), ("fill", [site.share for site in sites])):
        rects += f'<rect class="{kind}" {_rect(place, shares[0], shares[-1] if len(shares) > 1 else 1)}/>'
    state = "box closed" if any(site.closed for site in sites) else "box"
    return (
        f'<g class="{state}" role="img" data-sites="{" ".join(map(str, numbers))}" data-name="{escape(name)}">'
        f"<title>{escape(f'{name}: {told}')}</title>{beside}{rects}</g>"
    )


def _rect(place: Place, down: float, across: float) -> str:
    """A rectangle amid the place; the least of it is still seen, nothing is not."""
    seen = down > 0 and across > 0
    width, height = (max(place.width * across, LEAST), max(place.height * down, LEAST)) if seen else (0, 0)
    x, y = place.x + (place.width - width) / 2, place.y + (place.height - height) / 2
    return f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
