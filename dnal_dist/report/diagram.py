"""Geometry of the image of a run's network: an SVG for each block, a box for each layer or candidate, filled as far as its
channels stay.

A site's name is the path of its module: up to the last number it names the block, up to the first one of several the stage; of two
names behind, the first is the candidate.
"""

import math
from dataclasses import dataclass
from itertools import groupby

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


Place = tuple[float, float, float, float]
"""x, y, width and height in pixels."""


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


def stages(sites: list[Site], shortcuts: list[str]) -> list[tuple[str, list[dict]]]:
    """Names of the stages, with what draws each of their blocks. shortcuts: names of the blocks with a shortcut around them."""
    rows = blocks([site.name for site in sites])
    # As wide as the page allows, within reason.
    room = WIDTH - GAP * len({block.stage for block in rows}) - LABELS
    pitch = min(max(room / (sum(block.columns for block in rows) + 0.6 * len(rows)), 10), 72)
    # The names of the candidates stand once, beside the first block that has any.
    first = next((block for block in rows if block.stacked), None)
    return [
        (stage, [_drawn(block, sites, pitch, block.name in shortcuts, block is first) for block in members])
        for stage, members in groupby(rows, key=lambda block: block.stage)
    ]


def _drawn(block: Block, sites: list[Site], pitch: float, shortcut: bool, labelled: bool) -> dict:
    gap, middle, left = 0.3 * pitch, HEAD + TALLEST / 2, LABELS if labelled else 0
    width = left + pitch * block.columns + 2 * gap
    places = _stacked(block, sites, pitch, left) if block.stacked else _in_a_row(block, sites, pitch)
    begin, end = left + gap / 2, width - gap / 2
    wires = f"M{left} {middle}H{begin:.1f}M{end:.1f} {middle}H{width:.1f}"
    if block.stacked:
        ys = [y + height / 2 for _, y, _, height in places]
        for x in (begin, end):
            wires += f"M{x:.1f} {min([middle, *ys]):.1f}V{max([middle, *ys]):.1f}"
        wires += "".join(f"M{begin:.1f} {y:.1f}H{end:.1f}" for y in ys)
    else:
        wires += f"M{begin:.1f} {middle}H{end:.1f}"
    return {
        "width": width,
        "height": HEAD + TALLEST + (FOOT if pitch >= NUMBERED else 4),
        "wires": wires,
        "around": f"M{begin:.1f} {middle}V5H{end:.1f}V{middle}" if shortcut else "",
        "labelled": labelled,
        "numbered": pitch >= NUMBERED and not block.stacked,
        "boxes": [_box(block, box, [sites[i] for i in box.sites], place) for box, place in zip(block.boxes, places, strict=True)],
    }


def _in_a_row(block: Block, sites: list[Site], pitch: float) -> list[Place]:
    """Boxes as high as the root of their channels, so that the narrowest of a network is still seen."""
    widest = math.sqrt(max(site.channels for site in sites) or 1)
    heights = [max(TALLEST * math.sqrt(sum(sites[i].channels for i in box.sites)) / widest, 4) for box in block.boxes]
    middle = HEAD + TALLEST / 2
    return [
        (0.3 * pitch + n * pitch + 0.14 * pitch, middle - height / 2, 0.72 * pitch, height)
        for n, height in enumerate(min(height, TALLEST) for height in heights)
    ]


def _stacked(block: Block, sites: list[Site], pitch: float, left: float) -> list[Place]:
    """Candidates below one another, their heights by their hidden channels."""
    row = TALLEST / len(block.boxes)
    most = max(sites[box.sites[0]].channels for box in block.boxes) or 1
    places = []
    for n, box in enumerate(block.boxes):
        height = max((row - 3) * math.sqrt(sites[box.sites[0]].channels / most), 2)
        places.append((left + 0.55 * pitch, HEAD + row * (n + 0.5) - height / 2, 1.5 * pitch, height))
    return places


def _box(block: Block, box: Box, sites: list[Site], place: Place) -> dict:
    """The outline is all channels, the filled part those that stay: of a candidate, its output channels across and its hidden ones
    down, so that the area is the fraction of its weights. Undecided channels are pale."""
    name = f"{block.name}.{box.name}".rstrip(".")
    words = sites[0].words("channels")
    if len(sites) > 1:
        words = f"{sites[0].words('hidden channels')}; {sites[-1].words('output channels')}"
    return {
        "name": name,
        "short": box.name,
        "title": f"{name}: {words}",
        "sites": " ".join(map(str, box.sites)),
        "closed": any(site.closed for site in sites),
        "left": sites[0].left,
        "place": place,
        "rects": {
            kind: _inside(place, fractions[0], fractions[-1] if len(fractions) > 1 else 1)
            for kind, fractions in (
                ("hull", [1]),
                ("pale", [site.possible for site in sites]),
                ("fill", [site.share for site in sites]),
            )
        },
    }


def _inside(place: Place, down: float, across: float) -> Place:
    """A rectangle amid the place; the least of it is still seen, nothing is not."""
    x, y, width, height = place
    seen = down > 0 and across > 0
    inner_width, inner_height = (max(width * across, LEAST), max(height * down, LEAST)) if seen else (0, 0)
    return x + (width - inner_width) / 2, y + (height - inner_height) / 2, inner_width, inner_height
