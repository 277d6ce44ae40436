"""A picture of a run's network, an SVG for each block: each layer or candidate a box, filled as far as its channels stay.

Where a site lies is read from its name, the path of its module: up to the last number it names the block, up to the first one of
several the stage; of two names behind, the first is the candidate.
"""

import math
from dataclasses import dataclass
from html import escape
from itertools import groupby

from dnal_dist import markup

WIDTH, GAP, LABELS = 998, 12, 34
"""Pixels: of the page's column, between stages, of the candidates' names."""
TALLEST, HEAD, FOOT = 96, 14, 16
"""Pixels: of the tallest box, of the room above the boxes for shortcuts, below for numbers."""
NUMBERED = 26
"""Pixels of a layer from which on there is room for its number of channels."""
LEAST = 1.5
"""Pixels of what is filled, so that one channel of many is still seen."""


@dataclass(frozen=True)
class Box:
    """A layer, or a candidate: its name in its block and the numbers of its sites, in forward order."""

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


def draw(sites: dict[str, int], kept: dict[str, int], shortcuts: list[str]) -> str:
    """HTML of the picture.

    sites: {site: channels}; kept: {site: channels that stay}; shortcuts: names of the blocks with a way around them.
    """
    names, channels = list(sites), list(sites.values())
    stay, rows = [kept.get(site, 0) for site in names], blocks(names)
    # As wide as the page allows, within reason.
    room = WIDTH - GAP * len({block.stage for block in rows}) - LABELS
    pitch = min(max(room / (sum(block.columns for block in rows) + 0.6 * len(rows)), 10), 52)
    stages, first = "", True
    for stage, members in groupby(rows, key=lambda block: block.stage):
        svgs = ""
        for block in members:
            labelled = first and block.stacked
            first = first and not labelled
            svgs += _block(block, channels, stay, pitch, block.name in shortcuts, labelled)
        stages += f'<div class="stage"><p>{markup.breakable(stage)}</p><div>{svgs}</div></div>'
    return f'<div class="network" role="group" aria-label="The network, layer by layer">{stages}</div>'


def _block(block: Block, channels: list[int], kept: list[int], pitch: float, shortcut: bool, labelled: bool) -> str:
    gap, middle, left = 0.3 * pitch, HEAD + TALLEST / 2, LABELS if labelled else 0
    width = left + pitch * block.columns + 2 * gap
    places = _stacked(block, channels, pitch, left) if block.stacked else _in_a_row(block, channels, pitch)
    begin, end = left + gap / 2, width - gap / 2
    wires = f"M{left} {middle}H{begin:.1f}M{end:.1f} {middle}H{width:.1f}"
    if block.stacked:
        ys = [place.y + place.height / 2 for place in places]
        for x in (begin, end):
            wires += f"M{x:.1f} {min([middle, *ys]):.1f}V{max([middle, *ys]):.1f}"
    else:
        wires += f"M{begin:.1f} {middle}H{end:.1f}"
    around = f'<path class="around" d="M{begin:.1f} {middle}V5H{end:.1f}V{middle}"/>' if shortcut else ""
    boxes = "".join(
        _box(block, box, place, channels, kept, (begin, end), pitch, labelled)
        for box, place in zip(block.boxes, places, strict=True)
    )
    height = HEAD + TALLEST + (FOOT if pitch >= NUMBERED else 4)
    size = f'width="{width:.1f}" height="{height}" viewBox="0 0 {width:.1f} {height}"'
    return f'<svg {size}><path class="wire" d="{wires}"/>{around}{boxes}</svg>'


def _in_a_row(block: Block, channels: list[int], pitch: float) -> list[Place]:
    """Boxes as high as the root of their channels, so that the narrowest of a network is still seen."""
    widest = math.sqrt(max(*channels, 1))
    heights = [max(TALLEST * math.sqrt(sum(channels[i] for i in box.sites)) / widest, 4) for box in block.boxes]
    middle = HEAD + TALLEST / 2
    return [
        Place(0.3 * pitch + n * pitch + 0.14 * pitch, middle - height / 2, 0.72 * pitch, height)
        for n, height in enumerate(min(height, TALLEST) for height in heights)
    ]


def _stacked(block: Block, channels: list[int], pitch: float, left: float) -> list[Place]:
    """Candidates below one another, their heights by their hidden channels."""
    row = TALLEST / len(block.boxes)
    most = max(*(channels[box.sites[0]] for box in block.boxes), 1)
    places = []
    for n, box in enumerate(block.boxes):
        height = max((row - 3) * math.sqrt(channels[box.sites[0]] / most), 2)
        places.append(Place(left + 0.55 * pitch, HEAD + row * (n + 0.5) - height / 2, 1.5 * pitch, height))
    return places


def _box(
    block: Block,
    box: Box,
    place: Place,
    channels: list[int],
    kept: list[int],
    wires: tuple[float, float],
    pitch: float,
    labelled: bool,
) -> str:
    """The outline is all channels, what is filled are those that stay: of a candidate, its output channels across and its hidden
    ones down, so that the area is the share of its weights."""
    shares = [kept[i] / max(channels[i], 1) for i in box.sites]
    down, across = shares[0], shares[-1] if len(shares) > 1 else 1.0
    middle, width, height = place.y + place.height / 2, max(place.width * across, LEAST), max(place.height * down, LEAST)
    corner = f'x="{place.x + (place.width - width) / 2:.2f}" y="{middle - height / 2:.2f}"'
    fill = f'{corner} width="{width:.2f}" height="{height:.2f}"'
    hull = f'x="{place.x:.2f}" y="{place.y:.2f}" width="{place.width:.2f}" height="{place.height:.2f}"'
    name = f"{block.name}.{box.name}" if box.name else block.name
    counts = [f"{kept[i]:,} of {channels[i]:,}" for i in box.sites]
    told = f"{counts[0]} channels" if len(counts) == 1 else f"{counts[0]} hidden channels, {counts[-1]} output channels"
    more = ""
    if block.stacked:
        more += f'<path class="wire" d="M{wires[0]:.1f} {middle:.1f}H{wires[1]:.1f}"/>'
        if labelled:
            more += f'<text class="row" x="0" y="{middle + 3:.1f}">{escape(box.name)}</text>'
    elif pitch >= NUMBERED:
        foot = HEAD + TALLEST + FOOT - 4
        more += f'<text class="count" x="{place.x + place.width / 2:.1f}" y="{foot}">{kept[box.sites[0]]}</text>'
    state = "box" if all(kept[i] for i in box.sites) else "box closed"
    numbers = " ".join(map(str, box.sites))
    rects = f'<rect class="hull" {hull}/><rect class="fill" {fill}/>'
    return (
        f'<g class="{state}" role="img" data-sites="{numbers}" data-name="{escape(name)}">'
        f"<title>{escape(f'{name}: {told}')}</title>{more}{rects}</g>"
    )
