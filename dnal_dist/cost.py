"""What a network costs for one image, layer by layer: MACs and parameters, for any choice of channels kept, by the exact rule
(those of the compact network) and by the rule of the paper's tables.

python -m dnal_dist.cost recipes/proxyless.yaml          the full network of a recipe
python -m dnal_dist.cost runs/digits                     what a run kept of it
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnal_dist import recipe
from dnal_dist.common import console
from dnal_dist.common.door import argument, door, parser_of
from dnal_dist.common.errors import InputError
from dnal_dist.common.paths import expanded
from dnal_dist.common.text import spaced
from dnal_dist.report import records

if TYPE_CHECKING:
    from torch import Tensor

    from dnal_dist.nets import GatedNetwork
    from dnal_dist.nets.cost import Cost, Expected, both_rules, by_layer, count, expected

__all__ = ["Cost", "Expected", "both_rules", "by_layer", "count", "expected"]


def __getattr__(name: str) -> Any:
    """The functions of nets.cost, imported with torch when they are used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dnal_dist.nets import cost

    return getattr(cost, name)


def _load(path: Path, overrides: list[str]) -> "tuple[recipe.Recipe, GatedNetwork, Tensor | None]":
    """Recipe, network on the meta device, and keep mask, if there is one yet, of a recipe or a run folder."""
    if path.is_dir() and not (path / "recipe.yaml").exists():
        raise InputError(f"{path}: holds no recipe.yaml, so it is not a run folder; give a recipe or a run's `output`")
    settings = recipe.load(path / "recipe.yaml" if path.is_dir() else path, overrides)
    from dnal_dist import nets

    net = nets.on_meta(**settings.network)
    return settings, net, _kept(path, net) if path.is_dir() else None


def _warn_of_classes(settings: recipe.Recipe, net: "GatedNetwork") -> None:
    """Warn if the index of local shards, where they are there, does not name as many classes as the network has."""
    from dnal_dist.data.classes import class_names, unlike
    from dnal_dist.data.shardlist import expand

    named = {}
    for key in ("data.train", "data.val"):
        with contextlib.suppress(InputError):
            words = expanded(getattr(settings.data, key.removeprefix("data.")))
            # Nothing is asked of a server for a count of costs.
            folders = {path.parent for path in expand(words, key)[1]} if "://" not in words else ()
            named[key] = max((len(class_names(folder)) for folder in folders), default=0)
    if named and (found := unlike(named, net.num_classes)):
        print(f"warning: {found}", file=sys.stderr)


def _kept(folder: Path, net: "GatedNetwork") -> "Tensor | None":
    """The channels that a run kept; None, with a warning, if they are not known."""
    from dnal_dist.nets.masks import unpack

    pruned = records.load(folder).last("prune")
    if "mask" not in pruned:
        why = "its records do not hold the channels that it kept" if pruned else "it is not pruned yet"
        print(f"warning: {folder}: {why}; this is the full network", file=sys.stderr)
        return None
    try:
        return unpack(pruned["mask"], net.num_gates)
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder}: the mask in metrics.jsonl is not one of this network ({error})") from None


def _print(settings: recipe.Recipe, net: "GatedNetwork", keep: "Tensor | None") -> None:
    from dnal_dist.nets.cost import by_layer, count
    from dnal_dist.nets.masks import present

    size, say, lines = settings.data.image_size, console.printer(), []
    rows = by_layer(net, size, keep)
    total = max(1, sum(row["macs"] for row in rows))
    for row in rows:
        channels = [str(now) if now == full else f"{now} of {full}" for now, full in (row["inputs"], row["outputs"])]
        name = row["layer"].removesuffix(".conv") + (" *" if row["site"] else "")
        lines.append([name, *channels, spaced(row["macs"]), f"{row['macs'] / total:.1%}", spaced(row["params"])])
    console.table(("layer (* gated)", "inputs", "outputs", "MACs", "share", "parameters"), lines)
    kept = "" if keep is None else f", {int(present(net, keep).sum())} of {len(keep)} channels kept"
    say(f"\n{settings.model.name}, images of {size}x{size}, {net.num_gates} gates{kept}")
    for rule in ("exact", "paper"):
        full, now = count(net, size, None, rule), count(net, size, keep, rule)
        for what, one, other in zip(("MACs", "parameters"), now, full, strict=True):
            share = "" if keep is None else f", {one / other:.2%} of {spaced(other)}"
            say(f"{what} ({rule} rule): ", (spaced(one), "bold"), share)


@door
def main() -> None:
    parser = parser_of("dnal_dist.cost", __doc__)
    path = "a recipe's file or name, such as proxyless, or a run folder"
    parser.add_argument("path", type=argument, metavar="RECIPE|RUN", help=path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, for example model.width=0.5")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_intermixed_args()
    settings, net, keep = _load(args.path, args.overrides)
    _warn_of_classes(settings, net)
    if not args.json:
        _print(settings, net, keep)
        return
    from dnal_dist.nets.cost import both_rules, by_layer

    size = settings.data.image_size
    facts = {"network": settings.model.name, "image_size": size, "gates": net.num_gates, "full": both_rules(net, size)}
    if keep is not None:
        facts["kept"] = both_rules(net, size, keep)
    print(json.dumps({**facts, "layers": by_layer(net, size, keep)}, indent=1))


if __name__ == "__main__":
    main()
