"""What can be gated in a network, before it is trained: sites, what is coupled, what stays whole and why.

python -m dnal_dist.gate torchvision:resnet18
python -m dnal_dist.gate timm:mobilenetv3_large_100 --image-size 224 --classes 10
python -m dnal_dist.gate my_package.networks:small depth=3          with what the function takes
"""

import json

import yaml

from dnal_dist.common import console
from dnal_dist.common.door import door, parser_of, whole
from dnal_dist.common.errors import InputError
from dnal_dist.common.text import spaced


def _arguments(words: list[str]) -> dict:
    found = {}
    for word in words:
        key, is_given, text = word.partition("=")
        if not is_given:
            raise InputError(f"{word}: expected KEY=VALUE, an argument of the network")
        try:
            found[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"{word}: {text!r} is no value in YAML") from None
    return found


def facts(name: str, image_size: int, num_classes: int | None, arguments: dict, ignore: list[str]) -> dict:
    """The table of a network, as JSON. Raises InputError."""
    from dnal_dist import nets
    from dnal_dist.nets import cost

    network = nets.build(name, num_classes, image_size=image_size, arguments=arguments, ignore=ignore, check=":" in name)
    found = {"network": name, "image_size": image_size, "gates": network.num_gates, "sites": []}
    coupled = network.coupled()
    whole = [row._asdict() for row in network.ungated]
    for site, channels in network.gate_sites.items():
        found["sites"].append({"site": site, "gates": channels, "coupled": coupled.get(site, [])})
    return found | {"ungated": whole, "cost": cost.both_rules(network, image_size)}


def _print(found: dict) -> None:
    rows = []
    for row in found["sites"]:
        also = row["coupled"]
        more = f" and {len(also) - 3} more" if len(also) > 3 else ""
        rows.append([row["site"], str(row["gates"]), ", ".join(also[:3]) + more])
    console.table(("site", "gates", "they also close channels of"), rows, (0, 2), 100)
    if found["ungated"]:
        print()
        rows = [[row["layer"], str(row["channels"]), row["reason"]] for row in found["ungated"]]
        console.table(("stays whole", "channels", "because"), rows, (0, 2), 100)
    exact = found["cost"]["exact"]
    print(
        f"\n{found['network']}, images of {found['image_size']}x{found['image_size']}: {found['gates']} gates at "
        f"{len(found['sites'])} sites, {spaced(exact['macs'])} MACs, {spaced(exact['params'])} parameters\n"
        "The compact network of a random mask equals the network with those gates closed."
    )


@door
def main() -> None:
    parser = parser_of("dnal_dist.gate", __doc__)
    parser.add_argument("network", help="torchvision:NAME, timm:NAME, PACKAGE.MODULE:FUNCTION, or a name of dnal_dist.nets")
    parser.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help="what the network's function is called with")
    parser.add_argument("--image-size", type=whole(1, 4096), default=224, metavar="PIXELS", help="sides of its images (224)")
    parser.add_argument("--classes", type=int, metavar="N", help="classes to tell apart; by default the network's own number")
    parser.add_argument("--ignore", nargs="+", default=[], metavar="PATH", help="modules whose output channels all stay")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    args = parser.parse_intermixed_args()
    found = facts(args.network, args.image_size, args.classes, _arguments(args.arguments), args.ignore)
    print(json.dumps(found, indent=1)) if args.json else _print(found)


if __name__ == "__main__":
    main()
