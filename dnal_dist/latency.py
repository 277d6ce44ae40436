"""How much faster the compact network of a run is than the full one, and than an evenly thinned one of the same MACs.

python -m dnal_dist.latency runs/digits
python -m dnal_dist.latency runs/digits --batch 1,32 --threads 1,2 --runtime eager,compile,onnx,openvino
python -m dnal_dist.latency some/export --runtime onnx,pt2  its own files, without the run
python -m dnal_dist.latency resnet56_cifar                 a recipe: the full network alone
python -m dnal_dist.latency resnet56_cifar architecture.round_to=8 --profile resnet56.json --runtime onnx --check 20
                                                           the times of its layers, for architecture.target.latency
python -m dnal_dist.latency resnet56_cifar --profile phone.json --command './on_the_phone.sh {file}'
                                                           likewise, as a program of your own finds them

The networks take turns, so that what else the machine does meets all of them.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

from dnal_dist.common.door import among, argument, door, parser_of, several, whole
from dnal_dist.common.errors import InputError
from dnal_dist.common.text import amount, fewer

RUNTIMES = ("eager", "compile", "onnx", "openvino", "executorch", "pt2")


@door
def main() -> None:
    parser = parser_of("dnal_dist.latency", __doc__)
    parser.add_argument("path", type=argument, metavar="RUN|EXPORT|RECIPE", help="a finished run, an export, or a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of a recipe, as `dnal_dist.train` takes them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for name, text in (("--batch", "images at a time (1)"), ("--threads", "of the CPU (1)")):
        parser.add_argument(name, type=several(whole(1, 4096)), default=[1], metavar="N,N", help=text)
    runtimes = f"{', '.join(RUNTIMES)} (eager; of an export onnx, or openvino: the others run programs of whoever wrote it)"
    parser.add_argument("--runtime", type=several(among(RUNTIMES)), metavar="NAMES", help=runtimes)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each line (5)")
    profile = "write the table that architecture.target.table names; one there is kept"
    parser.add_argument("--profile", type=argument, metavar="FILE", help=profile)
    check = "with --profile: so many random compact networks, predicted and measured"
    parser.add_argument("--check", type=int, default=0, metavar="N", help=check)
    command = "with --profile: a program that is given {file}, an ONNX file, and prints milliseconds"
    parser.add_argument("--command", metavar="WORDS", help=command)
    parser.add_argument("--json", action="store_true", help="print an object")
    args = parser.parse_intermixed_args()
    if args.device == "cuda" and (other := set(args.runtime or ()) - {"eager", "compile"}):
        raise InputError(f"--runtime {other.pop()}: it is measured on the CPU only; give eager or compile with --device cuda")
    import torch
    from rich.console import Console

    from dnal_dist.export import latency

    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU; leave it out")
    device = torch.device(args.device)
    if args.command is not None and args.profile is None:
        raise InputError("--command: it fills a table; give --profile FILE too")
    if args.profile is not None:
        return _profile(args, device)
    made, network, image_size, runtimes = _networks(Path(args.path), args.overrides, args.runtime, args.device)
    lines, rows = list(itertools.product(args.batch, args.threads, runtimes)), []
    with Console(stderr=True).status("") as status:
        measured = latency.measure(made, image_size, device, lines, args.seconds)
        for number in range(len(lines)):
            status.update(f"{number + 1} of {len(lines)}: batch {lines[number][0]}, {lines[number][2]}")
            rows.append(next(measured))
    macs = {name: one.macs for name, one in made.items()}
    where = latency.device_name(device)
    if args.json:
        print(json.dumps({"device": where, "macs": macs, "rows": rows}, indent=1))
    else:
        _print(network, where, macs, rows)
    if "full" not in made:
        print(f"warning: {network} is not rebuilt from an export, so only its compact network is measured", file=sys.stderr)
    for warning in filter(None, map(latency.warning, rows)):
        print(f"warning: {warning}", file=sys.stderr)


def _profile(args: argparse.Namespace, device) -> None:
    """Write the table of a recipe's network, unless it is there, and compare predictions with measurements."""
    import torch
    from rich.console import Console

    from dnal_dist import recipe
    from dnal_dist.export import profile
    from dnal_dist.export.bench import Bench, CommandBench

    path = Path(args.path)
    settings = recipe.load(path / "recipe.yaml" if path.is_dir() else path, args.overrides)
    if max(len(args.batch), len(args.threads), len(args.runtime or [])) > 1:
        raise InputError("--profile: a table is of one batch, one number of threads and one runtime; give one of each")
    (batch,), (threads,), (runtime,) = args.batch, args.threads, args.runtime or ["eager"]
    torch.set_num_threads(threads)
    with Console(stderr=True).status("") as status:
        own = None if args.command is None else CommandBench(args.command, batch, threads)
        subject = profile.subject(settings, own or Bench(runtime, batch, threads, device), status.update)
        table, made = profile.kept(args.profile, subject)
        print(f"{args.profile}: {'written' if made else 'there already'}; {table.runtime} on {table.device}, batch {table.batch}")
        print(f"whole networks take {table.factor:.2f} times their layers and {1e6 * table.glue:.1f} us beside each")
        errors = []
        for _, predicted, measured in profile.checked(table, subject, args.check, 1):
            errors.append(predicted / measured - 1)
            print(f"predicted {1000 * predicted:>9.3f} ms  measured {1000 * measured:>9.3f} ms  {errors[-1]:+.1%}")
    if errors:
        sizes = sorted(map(abs, errors))
        within = sum(size <= 0.05 for size in sizes)
        print(f"off by {statistics.median(sizes):.1%} in the median, {sizes[-1]:.1%} at most; {within} of {len(sizes)} within 5 %")


def _networks(path: Path, overrides: list[str], runtimes: list[str] | None, device: str):
    """The networks to compare, the name of the full one, the image size, and the runtimes."""
    from dnal_dist import recipe
    from dnal_dist.export import compared

    if path.is_dir() and overrides:
        raise InputError(f"{overrides[0]}: {path} is measured as it is; give overrides to a recipe")
    if path.is_dir() and not (path / "recipe.yaml").exists():
        if not (path / "preprocessing.json").exists():
            raise InputError(f"{path}: is neither a run folder nor an export; give a recipe, a run's `output` or its export")
        usual = [name for name, file in (("onnx", "model.onnx"), ("openvino", "model.xml")) if (path / file).exists()]
        runtimes = runtimes or (["eager"] if device == "cuda" else usual[:1])
        if not runtimes:
            raise InputError(f"{path}: there is no model.onnx or model.xml; name --runtime eager or pt2, if the export is your own")
        return *compared.of_export(path, bool({"eager", "compile"} & set(runtimes))), runtimes
    run = path if path.is_dir() else None
    settings = recipe.load(path if run is None else path / "recipe.yaml", overrides)
    return compared.of_recipe(settings, run), settings.model.name, settings.data.image_size, runtimes or ["eager"]


def _print(network: str, where: str, macs: dict[str, int], rows: list) -> None:
    shares = [f"{name} {amount(count)}" if count else name for name, count in macs.items() if name != "even"]
    if macs.get("full") and macs.get("compact"):
        shares.append(fewer(macs["compact"] / macs["full"]))
    print(f"{network} on {where}\nMACs: {', '.join(shares)}\n")
    print(f"{'batch':>5} {'threads':>7} {'runtime':<9}" + "".join(f"{name + ', ms':>18}{'':>9}" for name in macs))
    for row in rows:
        cells = ""
        for name in macs:
            ratio = f"{row['faster'][name]:.2f}x" if name in row["faster"] else ""
            cells += f"{1000 * row['median'][name]:>10.2f} ± {1000 * row['spread'][name]:<5.2f}{ratio:>9}"
        print(f"{row['batch']:>5} {row['threads']:>7} {row['runtime']:<9}{cells}")


if __name__ == "__main__":
    main()
