"""What a recipe needs on every backend before a GPU is spent on it: memory for each process, bytes for each step, and the gradient
accumulation that fits. Nothing of the network is allocated.

python -m dnal_dist.plan recipes/proxyless.yaml --ranks 64 --device-memory 80GB
"""

import argparse
import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from math import ceil, prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dnal_dist import nets, recipe
from dnal_dist.backends import segments
from dnal_dist.nets import GatedNetwork
from dnal_dist.recipe import InputError

BACKENDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
MARKS = ("<!-- traffic -->", "<!-- end of traffic -->")
# The rest is for the allocator's fragments, the libraries' workspaces and the batches that wait.
USABLE = 0.9
# Blocks that FSDP2 gathers by themselves, and parameters that ZeRO-3 shares out, have at least as many numbers.
FSDP_MIN_PARAMS = ZERO_MIN_PARAMS = 100_000
# DDP sends a bucket as soon as it holds so many bytes.
DDP_BUCKETS = (2**20, 25 * 2**20)

Operations = list[tuple[str, int]]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one process, those of the process that has the most."""

    parameters: int
    gradients: int
    """After the backward pass."""
    optimizer: int
    """Momentum, and under ZeRO the float32 weights that it moves."""
    working: int
    """Weights that are gathered for a while, and buckets of gradients."""
    beside: int
    """Alpha with its gradient and momentum, and BatchNorm's statistics."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.working + self.beside


class Activations(NamedTuple):
    """Bytes that the forward pass of a weight step in the search keeps for the backward pass."""

    picture: int
    """For each picture of a part."""
    constant: int


def _fsdp_groups(net: nn.Module, min_params: int) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
    """Parameters of the blocks that are gathered by themselves, in forward order, and those of the root."""
    blocks = [[p for module in segment for p in module.parameters()] for segment in segments(net)]
    blocks = [block for block in blocks if sum(p.numel() for p in block) >= min_params]
    taken = {id(p) for block in blocks for p in block}
    return blocks, [p for p in net.parameters() if id(p) not in taken]


def _rows(p: nn.Parameter, ranks: int) -> int:
    """Numbers of the largest share of a parameter that is divided along its first dimension."""
    return ceil(p.shape[0] / ranks) * prod(p.shape[1:])


def _whole(numbers: int, ranks: int) -> int:
    """Numbers, padded to equal shares."""
    return ceil(numbers / ranks) * ranks


def traffic(
    net: GatedNetwork, backend: str, ranks: int, item: int = 4, min_params: int = FSDP_MIN_PARAMS, reshard: bool = True
) -> tuple[Operations, Operations]:
    """What a weight step and an architecture step communicate: (operation, bytes of the tensor that it is about), in order.

    item: bytes of a number in computing, 2 with bf16. min_params, reshard: FSDP2's settings. Where there is one process, the same
    operations take place and nothing leaves it, but for DDP, which is left out then.
    """
    sizes = [p.numel() for p in net.parameters()]
    alpha = [("all-reduce", 4 * net.num_gates)] if ranks > 1 else []
    if backend == "ddp":
        return ([("all-reduce", 4 * bucket) for bucket in _buckets(sizes)] if ranks > 1 else []), alpha
    if backend == "fsdp2":
        blocks, root = _fsdp_groups(net, min_params)
        groups = [block for block in (root, *blocks) if block]
        padded = [sum(_rows(p, ranks) * ranks for p in group) for group in groups]
        again = padded[1 if root else 0 :] if reshard else []
        gathers = [("all-gather", item * numbers) for numbers in padded + again[::-1]]
        # Gradients are reduced in float32.
        return gathers + [("reduce-scatter", 4 * numbers) for numbers in padded[::-1]], gathers + alpha
    if backend in ("zero1", "zero2"):
        # Shares begin where collectives are fast: at an even number.
        padded = _whole(sum(sizes), 2 * ranks)
        return [("all-reduce", item * sum(sizes)), ("all-reduce", 4), ("all-gather", item * padded)], alpha
    if backend != "zero3":
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    padded = [_whole(size, ranks) for size in sizes]
    gathers = [("all-gather", item * numbers) for size, numbers in zip(sizes, padded, strict=True) if size >= ZERO_MIN_PARAMS]
    kept = [("all-gather", item * numbers) for size, numbers in zip(sizes, padded, strict=True) if size < ZERO_MIN_PARAMS]
    return [*gathers, ("reduce-scatter", item * sum(padded)), ("all-reduce", 8), *kept], gathers + alpha


def _buckets(sizes: list[int]) -> Iterator[int]:
    """Numbers in each of DDP's buckets; gradients come last layer first."""
    held, limits = 0, list(DDP_BUCKETS)
    for size in reversed(sizes):
        held += size
        if 4 * held >= limits[0]:
            yield held
            held, limits = 0, limits[1:] or limits
    if held:
        yield held


def memory(
    net: GatedNetwork, backend: str, ranks: int, item: int = 4, min_params: int = FSDP_MIN_PARAMS, reshard: bool = True
) -> Memory:
    """Of the gated network without its activations; see `traffic` for the arguments."""
    sizes = [p.numel() for p in net.parameters()]
    numbers = sum(sizes)
    # Alpha, its gradient and its momentum, and BatchNorm's statistics are whole everywhere.
    beside = 3 * 4 * net.num_gates + sum(b.numel() * b.element_size() for b in net.buffers())
    if backend == "ddp":
        # Autocast keeps a copy of the weights for a step.
        return Memory(4 * numbers, 4 * numbers, 4 * numbers, numbers * item if item < 4 else 0, beside)
    if backend == "fsdp2":
        blocks, root = _fsdp_groups(net, min_params)
        shares = 4 * sum(_rows(p, ranks) for p in net.parameters())
        gathered = sorted((sum(_rows(p, ranks) * ranks for p in block) for block in blocks), reverse=True)
        held = sum(_rows(p, ranks) * ranks for p in root) + sum(gathered[:2] if reshard else gathered)
        # A block's gradient is there in full until it is reduced.
        working = item * held + 4 * max([*gathered, sum(p.numel() for p in root)])
        return Memory(shares, shares, shares, working, beside)
    share = _whole(numbers, 2 * ranks) // ranks
    if backend in ("zero1", "zero2"):
        return Memory(item * numbers, item * _touched(sizes, share), 8 * share, item * numbers, beside)
    shares = sum(_whole(size, ranks) // ranks for size in sizes)
    kept = sum(size for size in sizes if size < ZERO_MIN_PARAMS)
    return Memory(item * (shares + kept), item * shares, 8 * shares, item * (2 * numbers - kept), beside)


def _touched(sizes: list[int], share: int) -> int:
    """Numbers of all parameters that a process has any of, where each has `share` in a row: ZeRO keeps their gradients whole."""
    ends = list(accumulate(sizes))
    return max(
        sum(size for size, end in zip(sizes, ends, strict=True) if end > first and end - size < first + share)
        for first in range(0, ends[-1], share)
    )


def activations(
    model: recipe.Network, image_size: int, dtype: torch.dtype = torch.float32, checkpointing: bool = False
) -> Activations:
    """Measured on tensors without memory, with two batch sizes."""
    two, four = (_saved(model, image_size, batch, dtype, checkpointing) for batch in (2, 4))
    picture = (four - two) // 2
    return Activations(picture, max(0, two - 2 * picture))


def _saved(model: recipe.Network, image_size: int, batch: int, dtype: torch.dtype, checkpointing: bool) -> int:
    with FakeTensorMode():
        net = nets.build(model.name, model.num_classes, model.width).train()
        own = {p.untyped_storage()._cdata for p in (*net.parameters(), *net.buffers())}
        at: list[nn.Module | None] = [None]
        # By storage: bytes, and the unit in which it was saved first.
        kept: dict[int, tuple[int, nn.Module | None]] = {}
        inputs: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept.setdefault(storage._cdata, (storage.nbytes(), at[0]))
            return tensor

        def enter(unit, arguments):
            at[0] = unit
            storage = arguments[0].untyped_storage()
            inputs[storage._cdata] = storage.nbytes()

        def leave(*_):
            at[0] = None

        for unit in net.units():
            unit.register_forward_pre_hook(enter)
            unit.register_forward_hook(leave)
        images, gates = torch.empty(batch, 3, image_size, image_size), torch.empty(net.num_gates)
        mixed = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mixed:
            logits = net(images, gates)
            nn.functional.cross_entropy(logits.float(), torch.zeros(batch, dtype=torch.long), reduction="sum")
    if not checkpointing:
        return sum(size for size, _ in kept.values())
    # What lies between the units, their inputs, and one unit's inside at a time.
    inside = Counter()
    for size, unit in kept.values():
        inside[unit] += size
    outside = {key: size for key, (size, unit) in kept.items() if unit is None} | inputs
    return sum(outside.values()) + max((size for unit, size in inside.items() if unit is not None), default=0)


class Fit(NamedTuple):
    """Smallest number of parts in which a process can take its share of the global batch; None: not even picture by picture."""

    parts: int | None
    total: int
    """Bytes with that many parts, or with one picture a part."""


def fit(needed: Memory, kept: Activations, share: int, limit: int | None, available: int) -> Fit:
    for parts in range(1, share + 1):
        if share % parts or share // parts > (limit or share):
            continue
        total = needed.total + kept.constant + kept.picture * (share // parts)
        if total <= USABLE * available:
            return Fit(parts, total)
    return Fit(None, needed.total + kept.constant + kept.picture)


def size_of(text: str) -> int:
    """Bytes of 80GB, 24GiB, 500MB. Raises InputError."""
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise InputError(f"--device-memory: expected an amount such as 80GB, 24GiB or 500MB, found {text!r}")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))


def plan(settings: recipe.Recipe, ranks: int, available: int, dtype: torch.dtype = torch.float32) -> dict:
    """Everything that the command tells, for JSON. Raises InputError."""
    data, model = settings.data, settings.model
    if data.global_batch % ranks:
        raise InputError(f"key 'data.global_batch': {data.global_batch} is no multiple of {ranks} processes; change it or --ranks")
    item = 4 if dtype == torch.float32 else 2
    try:
        with torch.device("meta"):
            net = nets.build(model.name, model.num_classes, model.width)
        kept = activations(model, data.image_size, dtype, settings.training.activation_checkpointing)
    except ValueError as error:
        raise InputError(str(error)) from None
    except RuntimeError as error:
        raise InputError(
            f"key 'data.image_size': the network cannot take {data.image_size} ({str(error).splitlines()[0]})"
        ) from None
    share, found = data.global_batch // ranks, {}
    for backend in BACKENDS:
        needed = memory(net, backend, ranks, item)
        weight, architecture = traffic(net, backend, ranks, item)
        fits = fit(needed, kept, share, data.per_device_batch_limit, available)
        found[backend] = {
            "memory": dataclasses.asdict(needed),
            "total": fits.total,
            "parts": fits.parts,
            "weight_step": {"collectives": len(weight), "bytes": sum(size for _, size in weight)},
            "architecture_step": {"collectives": len(architecture), "bytes": sum(size for _, size in architecture)},
        }
    facts = {"network": model.name, "image_size": data.image_size, "ranks": ranks, "precision": str(dtype).removeprefix("torch.")}
    return {**facts, "share": share, "device_memory": available, "activations": kept._asdict(), "backends": found}


def table(net: GatedNetwork, name: str, all_ranks: tuple[int, ...] = (2, 8, 64, 1024)) -> str:
    """Collectives and bytes of each backend and step in Markdown, in float32."""
    lines = [f"| {name}: backend | step | " + " | ".join(f"{ranks} processes" for ranks in all_ranks) + " |"]
    lines.append("|---" * (2 + len(all_ranks)) + "|")
    for backend in BACKENDS:
        for number, step in enumerate(("weight", "architecture")):
            cells = []
            for ranks in all_ranks:
                operations = traffic(net, backend, ranks)[number]
                kinds = Counter(kind for kind, _ in operations)
                total = sum(size for _, size in operations)
                cells.append(f"{_short(total)}: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
            lines.append(f"| {backend} | {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
        size /= 1000


def _write(page: Path, text: str) -> None:
    before, marked, rest = page.read_text().partition(MARKS[0])
    if not marked or MARKS[1] not in rest:
        raise InputError(f"{page}: holds no place for the table, between {MARKS[0]} and {MARKS[1]}")
    page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def _tell(found: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = Table(box=None, pad_edge=False, header_style="bold")
    for name in (
        "backend",
        "weights",
        "gradients",
        "optimizer",
        "working",
        "parts",
        "with activations",
        "weight step",
        "architecture step",
    ):
        rows.add_column(name, justify="left" if name == "backend" else "right", no_wrap=True)
    for backend, one in found["backends"].items():
        sizes = [_short(one["memory"][key]) for key in ("parameters", "gradients", "optimizer", "working")]
        steps = [f"{_short(one[key]['bytes'])} in {one[key]['collectives']}" for key in ("weight_step", "architecture_step")]
        parts = "does not fit" if one["parts"] is None else str(one["parts"])
        rows.add_row(backend, *sizes, parts, _short(one["total"]), *steps)
    console = Console()
    console.width = max(console.width, 120)
    picture = _short(found["activations"]["picture"])
    size, picture = found["image_size"], _short(found["activations"]["picture"])
    console.print(
        f"{found['network']}, pictures of {size}x{size}, {found['precision']}; {found['ranks']} processes with {found['share']} "
        f"pictures a step each; activations of a picture in the search: {picture}",
        highlight=False,
    )
    console.print(rows)
    console.print(
        f"Parts: the fewest in which a process takes its pictures within {USABLE:.0%} of {_short(found['device_memory'])}. "
        "Bytes are those of the tensors that are sent, in so many collectives.",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dnal_dist.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a YAML file such as recipes/proxyless.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--ranks", type=int, default=1, help="processes, one for each GPU (1)")
    parser.add_argument("--device-memory", default="80GB", help="of each of them, such as 80GB or 24GiB (80GB)")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="mixed_precision of the Accelerate config (no)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--docs", type=Path, help="only write what each step sends into this page, in Markdown")
    args = parser.parse_intermixed_args()
    try:
        settings = recipe.load(args.recipe, args.overrides)
        if args.ranks < 1:
            raise InputError(f"--ranks: expected at least 1, found {args.ranks}")
        if args.docs:
            with torch.device("meta"):
                net = nets.build(settings.model.name, settings.model.num_classes, settings.model.width)
            _write(args.docs, table(net, settings.model.name))
            return
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        found = plan(settings, args.ranks, size_of(args.device_memory), dtype)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        _tell(found)


if __name__ == "__main__":
    main()
