"""Accuracy against MACs on Fashion-MNIST: learned architectures and their baselines, at the same cost and number of steps.

    python -m data_tools.make_shards fashion_mnist data/fashion_mnist
    python benchmarks/pareto.py --jobs 2            reduced: 14x14, 15 000 images (supernet 6 000); 1 to 1.5 hours on two cores
    python benchmarks/pareto.py --full              28x28, all 60 000; for a GPU
    python benchmarks/pareto.py --docs docs         only the table and the plot, from the results that there are

For each network, budget and seed: `learned` is the recipe (pretrain, search, finetune). `even` keeps the same share of every
layer's channels and is trained from scratch. `random` and `l1` are the pretrained network with channels removed at random, or in
every layer those with the smallest L1 norm of their weights, trained on. `full` is the whole network. All of them take as many
steps in all; all but `full` cost at most the budget, and at most 1 % less. `retrained` (with --methods, behind `learned`) is no
baseline: the learned architecture from scratch for all of the steps, which tells what of the result is the architecture's. Test
images are looked at when a run has ended, never to choose.

Every result is appended to OUTPUT/results.jsonl as it comes; what is there already is not run again.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from pareto_page import BUDGETS, METHODS, NETWORKS, table, write
from torch import Tensor

from dnal_dist import recipe
from dnal_dist.common import errors
from dnal_dist.data.order import order
from dnal_dist.data.pipeline import Batch, Stream
from dnal_dist.data.shards import Shards
from dnal_dist.distributed.context import Context
from dnal_dist.nets import GatedNetwork, compact, cost, masks
from dnal_dist.report import records
from dnal_dist.search import selection
from dnal_dist.training import phases, setup


class Form(NamedTuple):
    """What is smaller in the reduced form: sides of the images in pixels, training images, each phase's passes over them."""

    side: int
    images: dict[str, int]
    epochs: dict[str, float]


REDUCED = Form(14, {"supernet": 6_000, "others": 15_000}, {"pretrain": 1, "search": 3, "finetune": 8})
FULL = Form(28, {"others": 60_000}, {"pretrain": 4, "search": 12, "finetune": 32})


class Memory:
    """Decoded images, in place of a Stream of shards: the same order of samples, flipped at random where the recipe asks for
    it. Nothing is padded and cropped: at 14x14 that would take the hems off."""

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

    def __init__(self, network: str, seed: int, form: Form, output: Path, overrides: list[str]):
        self.network, self.seed, self.form, self.output, self.overrides = network, seed, form, output, overrides
        settings = self.settings(BUDGETS[0])
        classes = settings.model.num_classes
        images = form.images.get(network, form.images["others"])
        self.train = Memory("train", settings.data, classes, seed, True, images)
        self.val = Memory("val", settings.data, classes, seed, False)
        self._pretrained: Pretrained | None = None

    def settings(self, share: float) -> recipe.Recipe:
        """The recipe of one budget. Durations are in steps from the first look at the data on."""
        steps = []
        if hasattr(self, "train"):
            steps = [f"phases.{name}.steps={round(n * self.train.per_epoch)}" for name, n in self.form.epochs.items()]
        own = [f"data.image_size={self.form.side}", f"seed={self.seed}", "tracking.tracker=none", "tracking.log_every=100000"]
        folder = f"output={self.output}/runs/{self.network}-{self.seed}"
        return recipe.load(NETWORKS[self.network], [*own, folder, f"architecture.target.macs={share}x", *steps, *self.overrides])

    def assemble(self, share: float) -> phases.Run:
        run = setup.prepare(self.settings(share), Context(), overwrite=True)
        run.train, run.val = self.train, self.val
        if self.network == "supernet" and not torch.cuda.is_available():
            # Depthwise convolutions take half the time on a CPU so, and a feed's images are contiguous there.
            run.supernet.register_forward_pre_hook(
                lambda _, given: (given[0].contiguous(memory_format=torch.channels_last), *given[1:])
            )
        return run

    def from_pretrained(self, share: float) -> phases.Run:
        """A run whose pretraining lies behind it."""
        run = self.assemble(share)
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

    def learned(self, share: float) -> tuple[phases.Run, Tensor]:
        run = self.from_pretrained(share)
        phases.train(run)
        return run, run.compact.keep

    def trained(self, run: phases.Run, keep: Tensor) -> phases.Run:
        """`run` with the channels of `keep`, trained by the finetune's schedule for the steps that are left of all phases."""
        settings = run.recipe
        total = sum(getattr(settings.phases, name).steps for name in self.form.epochs)
        longer = settings.phases.finetune.model_copy(update={"steps": total - run.state.global_step})
        run.recipe = settings.model_copy(update={"phases": settings.phases.model_copy(update={"finetune": longer})})
        run.compact, run.momentum, run.state.phase, run.state.step = compact.compact(run.supernet, keep), {}, "finetune", 0
        phases.finetune(run, phases.training_batches(run))
        assert run.state.global_step == total
        return run

    def baseline(self, method: str, share: float, learned: Tensor | None) -> tuple[phases.Run, Tensor]:
        run = self.from_pretrained(share) if method in ("l1", "random") else self.assemble(share)
        net, side = run.supernet, self.form.side
        if method == "full":
            keep = masks.all_open(net)
        elif method == "retrained":
            keep = learned
        else:
            target = selection.budget(run.recipe.architecture, net, side)
            keep = selection.select(net, side, strength(net, method, self.seed), target)
        return self.trained(run, keep), keep


def strength(net: GatedNetwork, method: str, seed: int) -> Tensor:
    """What ranks the channels (N,): within every site by place (`even`) or weight (`l1`), as evenly among sites as can be; or not
    at all (`random`)."""
    if method == "random":
        return torch.rand(net.num_gates, generator=torch.Generator().manual_seed(seed))
    ranked = []
    for site, channels in net.gate_sites.items():
        # From the middle outwards: shortcuts that widen put the narrow stream into the middle of the wide one.
        place = (torch.arange(channels) - (channels - 1) / 2 + 0.1).abs().argsort().argsort()
        if method == "l1":
            place = net.get_submodule(site).conv.weight.detach().abs().sum((1, 2, 3)).cpu().argsort(descending=True).argsort()
        ranked.append(-(place + 0.5) / channels)
    return torch.cat(ranked)


def measure(args, network: str, seed: int) -> None:
    """Every result of one network and seed that is not there yet, each appended to the results."""
    done = {(r["method"], r["budget"]): r for r in results(args) if (r["network"], r["seed"]) == (network, seed)}
    bench = Bench(network, seed, FULL if args.full else REDUCED, args.output, args.overrides)
    for share in (1.0, *args.budgets):
        learned = None
        for method in ("full",) if share == 1.0 else args.methods:
            if before := done.get((method, share)):
                learned = torch.tensor(before["keep"], dtype=torch.bool) if method == "learned" else learned
                continue
            begun = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()):
                # The full network has no budget, but a recipe must name one.
                run, keep = bench.learned(share) if method == "learned" else bench.baseline(method, min(share, 0.5), learned)
                run.log.close()
                # The next run takes its folder.
                run.close()
                accuracy = records.summary(run.folder)["accuracy"]
            learned = keep if method == "learned" else learned
            found = cost.count(run.supernet, bench.form.side, keep)
            target = selection.budget(run.recipe.architecture, run.supernet, bench.form.side)
            if method != "full" and found.macs not in target:
                raise errors.InputError(f"{network} seed {seed}, {method}: {target.missed(found.macs)}")
            result = {
                "form": form_of(args),
                "overrides": args.overrides,
                "network": network,
                "seed": seed,
                "budget": share,
                "method": method,
                "accuracy": accuracy["finetune"],
            }
            result |= {"macs": found.macs, "params": found.params, "full_macs": cost.count(run.supernet, bench.form.side).macs}
            result |= {"sites": {site: int(part.sum()) for site, part in run.supernet.by_site(keep).items()}}
            result |= {"seconds": round(time.monotonic() - begun, 1), "steps": run.state.global_step, "phases": accuracy}
            result |= {"keep": keep.int().tolist()} if method == "learned" else {}
            with (args.output / "results.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{network} seed {seed}: {share:4.0%} {method:9} {result['accuracy']:.2%} {result['seconds']:6.1f} s", flush=True)


def form_of(args) -> str:
    return "full" if args.full else "reduced"


def results(args) -> list[dict]:
    """Of this form and these overrides: others in the same file are other experiments."""
    path = args.output / "results.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [r for r in found if (r["form"], r["overrides"]) == (form_of(args), args.overrides)]


def spread(args) -> None:
    """Networks and seeds, each in a process of its own, `jobs` of them at a time; the longest first."""
    waiting = [(network, seed) for network in reversed(args.networks) for seed in args.seeds]
    # Several runs side by side leave each a share of the cores.
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    running: list[subprocess.Popen] = []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            network, seed = waiting.pop(0)
            command = [sys.executable, __file__, *sys.argv[1:], "--only", network, str(seed)]
            running.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": threads}))
        time.sleep(0.2)
        failed = next((process for process in running if process.poll()), None)
        running = [process for process in running if process.poll() is None]
        if failed:
            for process in running:
                process.terminate()
            sys.exit(failed.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to all three recipes")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS, help="shares of the full network's MACs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[m for m in METHODS[:-1] if m != "retrained"], choices=METHODS[:-1])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--full", action="store_true", help="all images in full size, for longer")
    parser.add_argument("--output", type=Path, default=Path("runs/pareto"))
    parser.add_argument("--docs", type=Path, help="only write the table and the plot into this folder")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if "retrained" in args.methods and "learned" not in args.methods:
        parser.error("--methods retrained needs learned, whose channels it trains anew")
    try:
        if args.only:
            measure(args, args.only[0], int(args.only[1]))
            return
        if args.docs is None:
            spread(args)
    except errors.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if args.docs is None:
        print(table(results(args)))
    else:
        write(results(args), args.docs)


if __name__ == "__main__":
    main()
