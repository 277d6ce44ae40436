"""Free against tied residual streams: accuracy at equal measured latency, both with counts that are multiples of 8.

    python -m data_tools.make_shards digits data/digits
    python benchmarks/streams.py --networks digits                            resnet_digits, the embedded digits
    python benchmarks/streams.py --networks cifar --data data/cifar10         ResNet20, CIFAR-10 at 16x16 pixels

Each is learned (pretrain, search with criterion taylor, finetune) at several budgets. A network is timed as it is deployed (free
streams as nets.whole writes them) in ONNX Runtime, one image, one thread, by turns with the full one of the same seed. The last
table reads each one's accuracy off at the same latencies, by straight lines between its budgets, for each seed by itself.
"""

import argparse
import contextlib
import io
import itertools
import json
import statistics
import tempfile
from pathlib import Path

import pareto_methods
import torch
from pareto_methods import Bench
from torch import nn

from dnal_dist.export import latency
from dnal_dist.nets import compact, cost, masks
from dnal_dist.nets.whole import deployed
from dnal_dist.report import records

RATE = tuple(f"phases.{phase}.optimizer.lr=0.05" for phase in ("pretrain", "search", "finetune"))
BOTH = ("architecture.criterion=taylor", "architecture.round_to=8", "data.augmentation.kind=none")
# Recipe and changes to it; side of the images, training images, each phase's passes over them.
NETWORKS = {
    "digits": (("digits", *RATE, *BOTH, "model.name=resnet_digits"), 8, 1442, (10, 6, 24)),
    "cifar": (pareto_methods.RECIPES["cifar-resnet"] + BOTH, 16, 4000, (8, 3, 9)),
}
FRACTIONS = (0.2, 0.4, 0.6, 0.8)


def cell(name: str, seed: int, streams: str, bench: Bench, budget: float) -> dict:
    """What one search came to: accuracy and latency, and how much faster than the full network it is."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run, keep = bench.searched("taylor", budget)
        run.log.close()
        run.close()
    side = bench.form.side
    full = compact.compact(run.supernet.eval(), masks.all_open(run.supernet))
    own, all_of_it = timed({"own": deployed(run.compact.eval()), "full": full}, side)
    macs = cost.count(run.supernet, side, keep).macs / cost.count(run.supernet, side).macs
    accuracy = records.summary(records.load(run.folder))["accuracy"]
    return {
        **{"network": name, "seed": seed, "streams": streams, "budget": budget, "macs": macs},
        **{"accuracy": accuracy["finetune"], "seconds": own, "latency": own / all_of_it},
    }


@torch.no_grad()
def timed(made: dict[str, nn.Module], side: int) -> list[float]:
    """Median seconds of one image in ONNX Runtime on one thread, by turns."""
    images = torch.randn(1, 3, side, side)
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name, module in made.items():
            runs[name] = latency.runner(module, images, "onnx", 1, Path(folder))
            latency.require_equal(runs[name](), module(images), name)
        return [statistics.median(row) for row in latency.rounds(runs, 4.0, images.device).values()]


def at(rows: list[dict], wanted: float) -> float | None:
    """Accuracy at a relative latency, between the nearest of one seed's networks."""
    points = sorted((row["latency"], row["accuracy"]) for row in rows)
    for (x, y), (x2, y2) in itertools.pairwise(points):
        if x <= wanted <= x2:
            return y + (y2 - y) * (wanted - x) / (x2 - x)
    return None


def spread(found: list[float]) -> str:
    return f"{100 * statistics.mean(found):.2f} ± {100 * statistics.stdev(found) if len(found) > 1 else 0:.2f}"


def tables(rows: list[dict]) -> str:
    lines = ["| network | streams | budget | top-1, % | latency, % of full | MACs |", "|---|---|--:|--:|--:|--:|"]
    for name, streams, budget in dict.fromkeys((r["network"], r["streams"], r["budget"]) for r in rows):
        own = [r for r in rows if (r["network"], r["streams"], r["budget"]) == (name, streams, budget)]
        times, macs = spread([r["latency"] for r in own]), statistics.mean(r["macs"] for r in own)
        lines.append(f"| {name} | {streams} | {budget:.0%} | {spread([r['accuracy'] for r in own])} | {times} | {macs:.1%} |")
    lines += ["", "| network | latency, % of full | free, % | tied, % | tied ahead | seeds |", "|---|--:|--:|--:|--:|--:|"]
    for name in dict.fromkeys(r["network"] for r in rows):
        mine = [r for r in rows if r["network"] == name]
        low, high = min(r["latency"] for r in mine), max(r["latency"] for r in mine)
        for wanted in (low + part * (high - low) for part in FRACTIONS):
            by_seed = []
            for seed in {r["seed"] for r in mine}:
                ways = [[r for r in mine if (r["seed"], r["streams"]) == (seed, streams)] for streams in ("free", "tied")]
                by_seed.append([at(own, wanted) for own in ways])
            pairs = [(free, tied) for free, tied in by_seed if free is not None and tied is not None]
            if pairs:
                free, tied, ahead = (spread(list(c)) for c in (*zip(*pairs, strict=True), [t - f for f, t in pairs]))
                lines.append(f"| {name} | {wanted:.0%} | {free} | {tied} | {ahead} | {len(pairs)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--data", type=Path, help="folder of shards, train-*.tar and val-*.tar, in place of the recipe's")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.3, 0.15])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, help="training images, in place of all of them (digits) or 4000")
    parser.add_argument("--epochs", nargs=3, type=float, help="passes over them of pretrain, search and finetune")
    parser.add_argument("--output", type=Path, default=Path("runs/streams"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "results.jsonl"
    for name in args.networks:
        own, args.side, images, epochs = NETWORKS[name]
        args.images, args.epochs = args.images or images, args.epochs or epochs
        for seed in args.seeds:
            for streams in ("free", "tied"):
                args.overrides, args.given, args.full = [f"architecture.streams={streams}"], False, False
                pareto_methods.RECIPES[name] = own
                bench = Bench(name, seed, args)
                for budget in args.budgets:
                    row = cell(name, seed, streams, bench, budget)
                    print(json.dumps(row), flush=True)
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print(tables([json.loads(line) for line in path.read_text().splitlines()]))


if __name__ == "__main__":
    main()
