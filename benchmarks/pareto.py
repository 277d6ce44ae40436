"""Accuracy against MACs: learned architectures and their baselines, at the same cost and number of steps.

    python -m data_tools.make_shards cifar10 cifar-10-binary.tar.gz data/cifar10      or `folder IMAGES`, for other images
    python benchmarks/pareto.py --data data/cifar10 --networks cifar-vgg cifar-mobilenet
    python benchmarks/pareto.py --data data/cifar10 --minutes 60 --jobs 2    stops after the cell that is under way then
    python benchmarks/pareto.py --data data/cifar10 --full                   32x32, all images, for longer; for a GPU
    python benchmarks/pareto.py --docs docs         only the table and the plot, from the results that there are

The networks of Fashion-MNIST (vgg, resnet, supernet) are those of recipes/fashion_*.yaml, with the shards that these name; those of
CIFAR-10 are VGG16, ResNet20, MobileNetV2 and a supernet in small, and torchvision's ResNet18, all by CIFAR below.

For each network, budget and seed, all of them at most the budget and at most 1 % less, for the same number of steps in all:

    learned       the recipe (pretrain, search, finetune), criterion alpha
    slow          likewise, with a tenth of the learning rate in the search
    taylor        likewise, criterion taylor
    even          the same share of every layer's channels, from new weights
    long          even, for as many steps as take the MACs of training that learned took
    l1            pretrained, then in every layer the channels with the smallest L1 norm of their weights go, then trained on
    gamma         likewise, those of the whole network with the smallest weight of BatchNorm (network slimming, without its L1
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
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from pareto_page import METHODS, NETWORKS, SEARCHED, write
from torch import Tensor

from dnal_dist import recipe
from dnal_dist.common import errors
from dnal_dist.data.order import order
from dnal_dist.data.pipeline import Batch, Stream
from dnal_dist.data.shards import Shards
from dnal_dist.distributed.context import Context
from dnal_dist.export import latency
from dnal_dist.nets import GatedNetwork, compact, cost, masks
from dnal_dist.report import records
from dnal_dist.search import schedule, selection
from dnal_dist.training import phases, setup

BUDGETS = {"cifar": (0.15, 0.05), "fashion": (0.5, 0.25, 0.1, 0.05)}
# Rates of pretrain, search and finetune alike.
CIFAR = (
    *(f"phases.{phase}.optimizer.lr=0.05" for phase in ("pretrain", "search", "finetune")),
    *("architecture.optimizer.lr=0.05", "architecture.delta_start=3", "architecture.delta_final=30", "data.global_batch=64"),
    *("architecture.penalty=expected_macs", "training.memory_format=channels_last", "data.augmentation.kind=none"),
)
SMALL = ("architecture.streams=free",)
# Recipe, and changes to it.
RECIPES = {
    "vgg": ("fashion_vgg",),
    "resnet": ("fashion_resnet",),
    "supernet": ("fashion_supernet", "training.memory_format=channels_last"),
    "cifar-vgg": ("vgg16_cifar", *CIFAR, *SMALL, "model.name=pareto_networks:vgg16", "model.arguments.width=0.25"),
    "cifar-resnet": ("resnet56_cifar", *CIFAR, *SMALL, "model.name=pareto_networks:resnet20", "architecture.penalty=root_macs"),
    "cifar-mobilenet": (
        "mobilenetv2_cifar",
        *CIFAR,
        *SMALL,
        "model.name=pareto_networks:mobilenetv2",
        "model.arguments.width=0.25",
    ),
    "cifar-supernet": ("vgg16_cifar", *CIFAR, "model.name=supernet_digits"),
    "cifar-torchvision": ("resnet56_cifar", *CIFAR, "model.name=torchvision:resnet18"),
}


class Form(NamedTuple):
    """Sides of the images in pixels, training images, each phase's passes over them."""

    side: int
    images: int
    epochs: dict[str, float]


def form(network: str, args) -> Form:
    """Reduced, unless --full; what the command line says of it comes first."""
    if network.startswith("cifar"):
        found = Form(32, 50_000, dict(zip(PHASES, (30, 10, 60), strict=True))) if args.full else Form(16, 5_000, {})
        usual = found.epochs or dict(zip(PHASES, (8, 3, 9), strict=True))
    else:
        found = Form(28, 60_000, {}) if args.full else Form(14, 6_000 if network == "supernet" else 15_000, {})
        usual = dict(zip(PHASES, (4, 12, 32) if args.full else (1, 3, 8), strict=True))
    epochs = dict(zip(PHASES, args.epochs, strict=True)) if args.epochs else usual
    return Form(args.side or found.side, args.images or found.images, epochs)


PHASES = ("pretrain", "search", "finetune")


class Memory:
    """Decoded images, in place of a Stream of shards: the same order of samples, flipped at random where the recipe asks for
    it. Nothing is padded and cropped."""

    def __init__(self, key: str, data, classes: int, seed: int, training: bool, most: int | None = None):
        self.shards = Shards(getattr(data, key), f"data.{key}", classes)
        # As for validation, so that no random change is decoded into them.
        batches = Stream(self.shards, data, seed, train=False).batches()
        batches = list(islice(batches, -(-(most or self.shards.samples) // data.global_batch)))
        self.images, self.labels = (torch.cat([batch[i] for batch in batches])[:most] for i in (0, 1))
        self.data, self.seed, self.training = data, seed, training
        self.samples, self.per_epoch = len(self.labels), len(self.labels) // data.global_batch
        self.steps_per_epoch = sys.maxsize
        """For phases.py, which evaluates and saves after each epoch: all durations are in steps here, and no phase is that long."""
        self.dropped, self.with_alpha, self.warned_of_alpha = 0, 0, False

    def batches(self, start: int = 0) -> Iterator[Batch]:
        size = self.data.global_batch
        if not self.training:
            for first in range(0, self.samples, size):
                labels = self.labels[first : first + size]
                yield Batch(self.images[first : first + size], labels, torch.zeros(len(labels), dtype=torch.bool), [], [], (0, 0))
            return
        epoch, batch = divmod(start, self.per_epoch)
        while True:
            shuffled = torch.from_numpy(order(self.samples, self.seed, epoch))
            for first in range(batch * size, self.per_epoch * size, size):
                yield self._changed(shuffled[first : first + size], epoch, first)
            epoch, batch = epoch + 1, 0

    def _changed(self, chosen: Tensor, epoch: int, first: int) -> Batch:
        flips = torch.zeros(len(chosen), dtype=torch.bool)
        if self.data.augmentation.flip:
            generator = torch.Generator().manual_seed((self.seed * 1000 + epoch) * self.samples + first)
            flips = torch.rand(len(chosen), generator=generator) < 0.5
        return Batch(self.images[chosen], self.labels[chosen], flips, [], [], (0, 0))


class Pretrained(NamedTuple):
    """What all methods but `even` and `full` of one seed begin with."""

    weights: dict[str, Tensor]
    momentum: dict[str, Tensor]
    steps: int


class Bench:
    """One network with one seed: the data in memory, and the methods."""

    def __init__(self, network: str, seed: int, args):
        self.network, self.seed, self.form, self.args = network, seed, form(network, args), args
        settings = self.settings(0.5)
        classes = settings.model.num_classes
        self.train = Memory("train", settings.data, classes, seed, True, self.form.images)
        self.val = Memory("val", settings.data, classes, seed, False)
        self._pretrained: Pretrained | None = None

    def settings(self, share: float, *more: str) -> recipe.Recipe:
        """The recipe of one budget. Durations are in steps from the first look at the data on."""
        steps = []
        if hasattr(self, "train"):
            steps = [f"phases.{name}.steps={round(n * self.train.per_epoch)}" for name, n in self.form.epochs.items()]
        name, *changes = RECIPES[self.network]
        if self.args.data is not None:
            changes += [f"data.{split}={self.args.data}/{split}-*.tar" for split in ("train", "val")]
        own = [f"data.image_size={self.form.side}", f"seed={self.seed}", "tracking.tracker=none", "tracking.log_every=100000"]
        own += [f"output={self.args.output}/runs/{self.network}-{self.seed}", "tracking.latency_seconds=1000000"]
        own += ["tracking.plots=false", f"architecture.target.macs={share}x"]
        return recipe.load(f"recipes/{name}.yaml", [*changes, *own, *steps, *more, *self.args.overrides])

    def assemble(self, share: float, *more: str) -> phases.Run:
        run = setup.prepare(self.settings(share, *more), Context(), overwrite=True)
        run.train, run.val = self.train, self.val
        return run

    def from_pretrained(self, share: float, *more: str) -> phases.Run:
        """A run whose pretraining lies behind it."""
        run = self.assemble(share, *more)
        if self._pretrained is None:
            batches = phases.training_batches(run)
            phases.pretrain(run, batches)
            clones = [{name: t.detach().clone() for name, t in d.items()} for d in (run.supernet.state_dict(), run.momentum)]
            self._pretrained = Pretrained(*clones, run.state.global_step)
        else:
            run.supernet.load_state_dict(self._pretrained.weights)
            run.momentum, run.state.global_step = self._pretrained.momentum, self._pretrained.steps
        run.state.phase, run.state.step = "search", 0
        return run

    def searched(self, method: str, share: float) -> tuple[phases.Run, Tensor]:
        more = []
        if method == "slow":
            more = [f"phases.search.optimizer.lr={self.settings(share).phases.search.optimizer.lr / 10}"]
        elif method == "taylor":
            more = ["architecture.criterion=taylor"]
        run = self.from_pretrained(share, *more)
        phases.train(run)
        return run, run.compact.keep

    def trained(self, run: phases.Run, keep: Tensor, steps: int | None = None) -> phases.Run:
        """`run` with the channels of `keep`, trained by the finetune's schedule for the steps that are left of all phases; or
        `steps`."""
        settings = run.recipe
        total = sum(getattr(settings.phases, name).steps for name in PHASES)
        if self.args.given and not run.state.global_step:
            total -= settings.phases.pretrain.steps
        total = steps or total
        longer = settings.phases.finetune.model_copy(update={"steps": total - run.state.global_step})
        run.recipe = settings.model_copy(update={"phases": settings.phases.model_copy(update={"finetune": longer})})
        run.compact, run.momentum, run.state.phase, run.state.step = compact.compact(run.supernet, keep), {}, "finetune", 0
        phases.finetune(run, phases.training_batches(run))
        assert run.state.global_step == total
        return run

    def baseline(self, method: str, share: float, learned: dict) -> tuple[phases.Run, Tensor]:
        run = self.from_pretrained(share) if method in ("l1", "random", "gamma") else self.assemble(share)
        net, side = run.supernet, self.form.side
        if method == "full":
            keep = masks.all_open(net)
        elif method == "retrained":
            keep = masks.unpack(learned["mask"], net.num_gates)
        else:
            target = selection.budget(run.recipe.architecture, net, side)
            keep = selection.select(net, side, strength(net, method, self.seed), target)
        steps = None
        if method == "long":
            a_step = 3 * run.recipe.data.global_batch * cost.count(net, side, keep).macs
            steps = max(1, round(learned["training_macs"] / a_step))
        return self.trained(run, keep, steps), keep

    def training_macs(self, method: str, run: phases.Run, macs: int, full: int) -> int:
        """MACs of the whole training: a weight step three times the forward pass's, an architecture step twice."""
        settings, batch = run.recipe.phases, run.recipe.data.global_batch
        first = settings.pretrain.steps * (not self.args.given)
        if method in SEARCHED:
            search = settings.search
            gates = schedule.architecture_steps(search.steps, search.weight_steps, search.architecture_steps)
            return batch * (full * (3 * (first + search.steps - gates) + 2 * gates) + 3 * macs * settings.finetune.steps)
        first *= method in ("l1", "random", "gamma")
        return 3 * batch * (full * first + macs * settings.finetune.steps)


def strength(net: GatedNetwork, method: str, seed: int) -> Tensor:
    """What ranks the channels (N,): within every site by place (`even`) or weight (`l1`), as evenly among sites as can be; in the
    whole network by BatchNorm's weight (`gamma`); or not at all (`random`)."""
    if method == "random":
        return torch.rand(net.num_gates, generator=torch.Generator().manual_seed(seed))
    if method == "gamma":
        return net.strength().detach().cpu()
    ranked = []
    for site, channels in net.gate_sites.items():
        # From the middle outwards: shortcuts that widen put the narrow stream into the middle of the wide one.
        place = (torch.arange(channels) - (channels - 1) / 2 + 0.1).abs().argsort().argsort()
        if method == "l1":
            layers = [layer.path for layer in net.graph.layers.values() if net.site_of(layer.path) == site]
            size = sum(net.get_parameter(f"{path}.weight").detach().abs().flatten(1).sum(1).cpu() for path in layers)
            place = size.argsort(descending=True).argsort()
        rank = -(place + 0.5) / channels
        # Other candidates of a cell come behind all of this one.
        others = "cells" in site.split(".") and method.startswith("k") and method not in site.split(".")
        ranked.append(rank - 2 * others)
    return torch.cat(ranked)


def milliseconds(net: torch.nn.Module, side: int, device: torch.device) -> dict[str, float]:
    """Median time of the network for a batch of 1 and of 64, on one thread; on a CPU the thread's own, whatever else runs."""
    usual, found, clock = torch.get_num_threads(), {}, time.thread_time if device.type == "cpu" else time.perf_counter
    torch.set_num_threads(1)
    net.eval()
    for batch in (1, 64):
        images, times, end = torch.randn(batch, 3, side, side, device=device), [], time.perf_counter() + 0.2
        while len(times) < 10 or time.perf_counter() < end:
            begun = clock()
            with torch.no_grad():
                net(images)
            latency.wait(device)
            times.append(clock() - begun)
        found[str(batch)] = round(1e3 * statistics.median(times[2:]), 3)
    torch.set_num_threads(usual)
    return found


def measure(args, network: str, seed: int) -> None:
    """Every result of one network and seed that is not there yet, each appended to the results."""
    done = {(r["method"], r["budget"]): r for r in results(args, network) if r["seed"] == seed}
    bench = Bench(network, seed, args)
    shares = args.budgets or BUDGETS["cifar" if network.startswith("cifar") else "fashion"]
    cells = [(share, method) for share in shares for method in args.methods if method != "full"]
    for share, method in [(1.0, "full")] * ("full" in args.methods) + cells:
        if (method.startswith("k") and "supernet" not in network) or (method, share) in done:
            continue
        if args.end is not None and time.time() > args.end:
            return
        learned = done.get(("learned", share))
        if learned is None and method in ("long", "retrained"):
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
    target = selection.budget(run.recipe.architecture, run.supernet, side)
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
        "milliseconds": milliseconds(run.compact, side, run.context.device),
        "sites": {site: int(part.sum()) for site, part in run.supernet.by_site(keep).items()},
        **{"seconds": round(time.monotonic() - begun, 1), "steps": run.state.global_step, "phases": accuracy},
        **({"significant": log.last("signal").get("significant")} if method in SEARCHED else {}),
        **({"mask": masks.pack(keep)} if method == "learned" else {}),
    }


def setting(args, network: str) -> dict:
    """What the results of a network depend on, beside budget, method and seed."""
    return {**form(network, args)._asdict(), "given": args.given, "overrides": args.overrides}


def results(args, network: str) -> list[dict]:
    """Of one network in this setting: others in the same file are other experiments."""
    path = args.output / "results.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [r for r in found if r["network"] == network and r.get("setting") == setting(args, network)]


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
    parser.add_argument("--docs", type=Path, help="only write the table and the plot into this folder")
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
        if args.docs is None:
            spread(args)
    except errors.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    found = [result for network in args.networks for result in results(args, network)]
    write(found, args.docs or args.output)


if __name__ == "__main__":
    main()
