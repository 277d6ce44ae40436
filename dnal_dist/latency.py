"""How much faster the compact network of a run is than the full one, and than an evenly thinned one of the same MACs.

python -m dnal_dist.latency runs/digits
python -m dnal_dist.latency runs/digits --batch 1,32 --threads 1,2 --runtime eager,compile,onnx,openvino
python -m dnal_dist.latency resnet56_cifar                 a recipe: the full network alone

The networks take turns, so that what else the machine does meets all of them.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

from dnal_dist.common.door import door
from dnal_dist.common.errors import InputError
from dnal_dist.common.paths import argument
from dnal_dist.common.text import amount, fewer

RUNTIMES = ("eager", "compile", "onnx", "openvino")


def _numbers(text: str) -> list[int]:
    if not all(word.isdecimal() and 0 < int(word) <= 4096 for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers, separated by commas")
    return [int(word) for word in text.split(",")]


def _runtimes(text: str) -> list[str]:
    if unknown := [word for word in text.split(",") if word not in RUNTIMES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected some of {', '.join(RUNTIMES)}, separated by commas")
    return text.split(",")


@door
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dnal_dist.latency", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=argument, metavar="RUN|RECIPE", help="the folder of a finished run, or a recipe")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=_numbers, default=[1], metavar="N,N", help="images at a time (1)")
    parser.add_argument("--threads", type=_numbers, default=[1], metavar="N,N", help="of the CPU (1)")
    parser.add_argument("--runtime", type=_runtimes, default=["eager"], metavar="NAMES", help=", ".join(RUNTIMES) + " (eager)")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each line (5)")
    parser.add_argument("--json", action="store_true", help="print an object")
    args = parser.parse_args()
    if args.device == "cuda" and (other := set(args.runtime) - {"eager", "compile"}):
        raise InputError(f"--runtime {other.pop()}: it is measured on the CPU only; give eager or compile with --device cuda")
    import torch
    from rich.console import Console

    from dnal_dist import recipe
    from dnal_dist.export import latency

    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU; leave it out")
    is_run, device = args.path.is_dir(), torch.device(args.device)
    if is_run and not (args.path / "recipe.yaml").exists():
        raise InputError(f"{args.path}: holds no recipe.yaml, so it is not a run folder; give a recipe or a run's `output`")
    settings = recipe.load(args.path / "recipe.yaml" if is_run else args.path)
    made = latency.subjects(settings, Path(args.path) if is_run else None)
    lines, rows = list(itertools.product(args.batch, args.threads, args.runtime)), []
    with Console(stderr=True).status("") as status:
        measured = latency.measure(made, settings.data.image_size, device, lines, args.seconds)
        for number in range(len(lines)):
            status.update(f"{number + 1} of {len(lines)}: batch {lines[number][0]}, {lines[number][2]}")
            rows.append(next(measured))
    macs = {name: count for name, (_, count) in made.items()}
    where = latency.device_name(device)
    if args.json:
        print(json.dumps({"device": where, "macs": macs, "rows": [row._asdict() for row in rows]}, indent=1))
    else:
        _print(settings.model.name, where, macs, rows)
    for row in rows:
        if row.faster.get("compact", 1) < 1:
            print(
                f"warning: the compact network is slower than the full one at batch {row.batch} in {row.runtime}; "
                "architecture.round_to=8 and architecture.streams=tied give shapes that runtimes are fast with",
                file=sys.stderr,
            )


def _print(network: str, where: str, macs: dict[str, int], rows: list) -> None:
    share = f", compact {amount(macs['compact'])}, {fewer(macs['compact'] / macs['full'])}" if "compact" in macs else ""
    print(f"{network} on {where}\nMACs: {amount(macs['full'])}{share}\n")
    print(f"{'batch':>5} {'threads':>7} {'runtime':<9}" + "".join(f"{name + ', ms':>18}{'':>9}" for name in macs))
    for row in rows:
        cells = ""
        for name in macs:
            ratio = f"{row.faster[name]:.2f}x" if name in row.faster else ""
            cells += f"{1000 * row.median[name]:>10.2f} ± {1000 * row.spread[name]:<5.2f}{ratio:>9}"
        print(f"{row.batch:>5} {row.threads:>7} {row.runtime:<9}{cells}")


if __name__ == "__main__":
    main()
