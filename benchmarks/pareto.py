"""Accuracy against MACs: learned architectures and their baselines, at the same cost and number of steps.

    python -m data_tools.make_shards cifar10 cifar-10-binary.tar.gz data/cifar10      or `folder IMAGES`, for other images
    python benchmarks/pareto.py --data data/cifar10 --networks cifar-vgg cifar-mobilenet
    python benchmarks/pareto.py --data data/cifar10 --minutes 60 --jobs 2    stops after the cell that is under way then
    python benchmarks/pareto.py --data data/cifar10 --full                   32x32, all images, for longer; for a GPU
    python benchmarks/pareto.py --docs docs         only the table and the plot, from the results that there are

The networks of Fashion-MNIST (vgg, resnet, supernet) are those of recipes/fashion_*.yaml, with the shards that these name; those of
CIFAR-10 are VGG16, ResNet20, MobileNetV2 and a supernet in small, and torchvision's ResNet18, all by CIFAR in pareto_methods.py.

For each network, budget and seed, all of them at most the budget and at most 1 % less, for the same number of steps in all:

    learned       the recipe (pretrain, search, finetune), criterion alpha
    slow          likewise, with a tenth of the learning rate in the search
    taylor        likewise, criterion taylor
    one           likewise, and of the candidates in each cell of a supernet one stays, candidates: one
    even          the same share of every layer's channels, from new weights
    long          even, for as many steps as take the MACs of training that learned took
    l1            pretrained, then in every layer the channels with the smallest L1 norm of their weights go, then trained on
    l1-long       l1, trained on for as many steps as take the MACs of training that learned took
    gamma         like l1, those of the whole network with the smallest weight of BatchNorm (network slimming, without its L1
                  penalty in pretrain)
    random        likewise, any
    k3e6, ...     one candidate in every cell of a supernet, thinned evenly, from new weights
    retrained     the architecture of learned from new weights; no baseline
    full          the whole network

With --given the weights of pretrain are given to all that begin with them, and only the steps after it count. Test images are
looked at when a run has ended, never to choose. All methods have the recipe's optimiser and augmentation, and nothing is tuned for
any of them.

Every result is appended to OUTPUT/results.jsonl as it comes; what is there already, in the same setting, is not run again.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from pareto_methods import Bench, exported, form, milliseconds
from pareto_page import METHODS, NETWORKS, SEARCHED, write

from dnal_dist import nets
from dnal_dist.common import errors
from dnal_dist.nets import cost, masks
from dnal_dist.report import records
from dnal_dist.search import budgets

BUDGETS = {"cifar": (0.15, 0.05), "fashion": (0.5, 0.25, 0.1, 0.05)}


def measure(args, network: str, seed: int) -> None:
    """Every result of one network and seed that is not there yet, each appended to the results."""
    done = {(r["method"], r["budget"]): r for r in results(args, network) if r["seed"] == seed}
    bench = Bench(network, seed, args)
    shares = args.budgets or BUDGETS["cifar" if network.startswith("cifar") else "fashion"]
    cells = [(share, method) for share in shares for method in args.methods if method != "full"]
    for share, method in [(1.0, "full")] * ("full" in args.methods) + cells:
        if ((method.startswith("k") or method == "one") and "supernet" not in network) or (method, share) in done:
            continue
        if args.end is not None and time.time() > args.end:
            return
        learned = done.get(("learned", share))
        if learned is None and method in ("long", "l1-long", "retrained"):
            raise errors.InputError(f"--methods {method} needs learned before it")
        result = cell(bench, share, method, learned)
        done[method, share] = result
        with (args.output / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{network} seed {seed}: {share:4.0%} {method:9} {result['accuracy']:.2%} {result['seconds']:6.1f} s", flush=True)


def cell(bench: Bench, share: float, method: str, learned: dict | None) -> dict:
    """The result of a method."""
    begun, side, args = time.monotonic(), bench.form.side, bench.args
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        # The full network has no budget, but a recipe must name one.
        made = bench.searched(method, share) if method in SEARCHED else bench.baseline(method, min(share, 0.5), learned)
        run, keep = made
        run.log.close()
        # The next run takes its folder.
        run.close()
    found, full = (cost.count(run.supernet, side, mask) for mask in (keep, None))
    target = budgets.read(run.recipe.architecture, run.supernet, side)
    if method != "full" and found.macs not in target:
        raise errors.InputError(f"{bench.network} seed {bench.seed}, {method}: {target.missed(run.supernet, side, keep)}")
    log = records.load(run.folder)
    accuracy = records.summary(log)["accuracy"]
    return {
        **{
            "setting": setting(args, bench.network),
            "network": bench.network,
            "seed": bench.seed,
            "budget": share,
            "method": method,
        },
        **{"accuracy": accuracy["finetune"], "macs": found.macs, "params": found.params, "full_macs": full.macs},
        "training_macs": bench.training_macs(method, run, found.macs, full.macs),
        "milliseconds": milliseconds({method: exported(run.supernet, keep)}, side, run.context.device, 0.2)[method],
        "sites": {site: int(part.sum()) for site, part in run.supernet.by_site(keep).items()},
        **{"seconds": round(time.monotonic() - begun, 1), "steps": run.state.global_step, "phases": accuracy},
        **({"significant": log.last("signal").get("significant")} if method in SEARCHED else {}),
        "mask": masks.pack(keep),
    }


def setting(args, network: str) -> dict:
    """What the results of a network depend on, beside budget, method and seed."""
    return {**form(network, args)._asdict(), "given": args.given, "overrides": args.overrides}


def results(args, network: str) -> list[dict]:
    """Of one network in this setting: others in the same file are other experiments."""
    path = args.output / "results.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [r for r in found if r["network"] == network and r.get("setting") == setting(args, network)]


def measure_again(args) -> None:
    """The latency of all networks whose masks the results hold, those of one kind and budget by turns."""
    path = args.output / "results.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for network in args.networks:
        net, side = nets.build(**Bench(network, 0, args, data=False).settings(0.5).network), form(network, args).side
        own = [r for r in found if r["network"] == network and r.get("setting") == setting(args, network) and "mask" in r]
        for share in sorted({r["budget"] for r in own} - {1.0}):
            rows = {str(i): r for i, r in enumerate(own) if r["budget"] in (share, 1.0)}
            made = {key: exported(net, masks.unpack(r["mask"], net.num_gates)) for key, r in rows.items()}
            for key, times in milliseconds(made, side, torch.device("cpu"), args.time).items():
                rows[key]["milliseconds"] = times
    path.write_text("".join(json.dumps(r) + "\n" for r in found))


def spread(args) -> None:
    """Networks and seeds, each in a process of its own, `jobs` of them at a time."""
    waiting = [(network, seed) for seed in args.seeds for network in args.networks]
    # Several runs side by side leave each a share of the cores.
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    running: list[subprocess.Popen] = []
    while waiting or running:
        if args.end is not None and time.time() > args.end:
            waiting = []
        while waiting and len(running) < args.jobs:
            network, seed = waiting.pop(0)
            command = [sys.executable, __file__, *sys.argv[1:], "--only", network, str(seed), "--end", str(args.end or "inf")]
            running.append(subprocess.Popen(command, env={"OMP_NUM_THREADS": threads, **os.environ}))
        time.sleep(0.2)
        failed = next((process for process in running if process.poll()), None)
        running = [process for process in running if process.poll() is None]
        if failed:
            for process in running:
                process.terminate()
            sys.exit(failed.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to all recipes")
    parser.add_argument("--data", type=Path, help="folder of shards, train-*.tar and val-*.tar, in place of the recipe's")
    parser.add_argument("--networks", nargs="+", default=["cifar-vgg", "cifar-mobilenet"], choices=NETWORKS)
    parser.add_argument("--budgets", nargs="+", type=float, help="shares of the full network's MACs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--side", type=int, help="sides of the images in pixels")
    parser.add_argument("--images", type=int, help="training images")
    parser.add_argument("--epochs", nargs=3, type=float, help="passes over them of pretrain, search and finetune")
    parser.add_argument("--given", action="store_true", help="pretrained weights are given: only search and finetune count")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--minutes", type=float, help="begin no cell after so long")
    parser.add_argument("--full", action="store_true", help="all images in full size, for longer")
    parser.add_argument("--output", type=Path, default=Path("runs/pareto"))
    parser.add_argument("--time", type=float, help="run nothing; measure all latencies again by turns, each for so many seconds")
    parser.add_argument("--docs", type=Path, help="only write the table and the plot into this folder")
    parser.add_argument("--table", help="name of the table in the page, and of its plot (given with --given)")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.minutes is not None and args.end is None:
        args.end = time.time() + 60 * args.minutes
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        if args.only:
            measure(args, args.only[0], int(args.only[1]))
            return
        if args.time is not None:
            measure_again(args)
        elif args.docs is None:
            spread(args)
    except errors.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    found = [result for network in args.networks for result in results(args, network)]
    write(found, args.docs or args.output, args.table if args.table is not None else "given" * args.given)


if __name__ == "__main__":
    main()
