"""What a recipe needs on each backend, before anything is started: the memory of a rank, what a weight step and an architecture
step of the search send, and the smallest gradient accumulation that fits.

python -m dnal_dist.plan recipes/proxyless.yaml data.global_batch=4096 --ranks 64 --device-memory 80GB

Everything is computed on meta tensors, which have a shape and no memory. Backends are configured as in recipes/accelerate. Bytes
are those of the tensor that a collective is about.
"""

import json

from dnal_dist import recipe
from dnal_dist.common import console
from dnal_dist.common.door import argument, door, parser_of
from dnal_dist.common.text import bytes_of, short, spaced


def _print(found: dict) -> None:
    columns = ("parameters", "gradients", "optimizer", "other", "working", "images", "activations", "total")
    kept, sent = [], []
    for backend, one in found["backends"].items():
        fitting = f"{one['parts']} x {one['images_at_a_time']}" if one["fits"] else "does not fit"
        kept.append([backend, *(short(one["memory"][name]) for name in columns), fitting])
        steps = [one["weight_step"], one["architecture_step"]]
        sent.append([backend, *(spaced(step[what]) for step in steps for what in ("collectives", "bytes"))])
    device = f" in devices of {short(found['device_memory'])}" if found["device_memory"] else ""
    ranks = f"{found['ranks']} rank" + "s" * (found["ranks"] > 1)
    print(f"{found['network']}, images of {found['image_size']}x{found['image_size']}, {ranks}{device}")
    print(f"local batch: {found['share']} images, mixed precision: {found['precision']}\n")
    console.table(("memory of a rank", *columns, "accumulation"), kept)
    print()
    console.table(("sent in a step", "weight: collectives", "bytes", "architecture: collectives", "bytes"), sent)
    tail = "\naccumulation: steps x images of a micro-batch"
    if not found["device_memory"]:
        tail += "; --device-memory finds the fewest steps that fit"
    else:
        tail += f", the fewest steps that take at most {found['usable']:.0%} of the device memory"
        if not all(one["fits"] for one in found["backends"].values()):
            tail += ";\nbackends that do not fit are shown with the smallest micro-batch"
    print(tail)
    if found["ranks"] == 1:
        print("a single process sends nothing; ZeRO calls its reductions all the same")


@door
def main() -> None:
    parser = parser_of("dnal_dist.plan", __doc__)
    parser.add_argument("recipe", type=argument, metavar="RECIPE", help="a YAML file such as recipes/proxyless.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe: dotted keys, YAML values")
    parser.add_argument("--ranks", type=int, default=1, help="processes, one a device (default 1)")
    parser.add_argument("--device-memory", metavar="AMOUNT", help="of one device: 80GB, 24GiB, 500MB; a part of it is left free")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="mixed precision (default no: float32)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_intermixed_args()
    settings = recipe.load(args.recipe, args.overrides)
    from dnal_dist.distributed.estimate import plan

    device_memory = None if args.device_memory is None else bytes_of(args.device_memory)
    found = plan(settings, args.ranks, device_memory, args.precision)
    print(json.dumps(found, indent=1)) if args.json else _print(found)


if __name__ == "__main__":
    main()
