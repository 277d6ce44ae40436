"""The methods of pareto.py: what each trains, on images in memory, from its beginning to its end."""

import copy
import functools
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from pareto_page import SEARCHED
from torch import Tensor

from dnal_dist import recipe
from dnal_dist.data.order import order
from dnal_dist.data.pipeline import Batch, Stream
from dnal_dist.data.shards import Shards
from dnal_dist.distributed.context import Context
from dnal_dist.distributed.wrapper import SLIM
from dnal_dist.export import latency
from dnal_dist.nets import GatedNetwork, compact, cost, masks
from dnal_dist.nets.whole import deployed
from dnal_dist.search import budgets, schedule, selection, taylor
from dnal_dist.training import phases, setup

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
# Baselines that begin with the pretrained weights.
PRUNED = ("l1", "l1-long", "random", "gamma")


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

    def __init__(self, network: str, seed: int, args, data: bool = True):
        self.network, self.seed, self.form, self.args = network, seed, form(network, args), args
        if not data:
            return
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
        own += ["architecture.criterion=alpha", "architecture.candidates=all"]
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
        return self.taught(run)

    def taught(self, run: phases.Run) -> phases.Run:
        """With a teacher, if the recipe asks for one: for every method the network as pretrain left it."""
        if run.recipe.phases.distillation is not None:
            run.teacher = copy.deepcopy(run.supernet).eval().requires_grad_(False)
            run.teacher.load_state_dict(self._pretrained.weights)
        return run

    def searched(self, method: str, share: float) -> tuple[phases.Run, Tensor]:
        more = []
        if method == "slow":
            more = [f"phases.search.optimizer.lr={self.settings(share).phases.search.optimizer.lr / 10}"]
        elif method in ("taylor", "one"):
            more = ["architecture.criterion=taylor", f"architecture.candidates={'one' if method == 'one' else 'all'}"]
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
        if self.settings(share).phases.distillation is not None and self._pretrained is None:
            self.from_pretrained(share).close()
        run = self.from_pretrained(share) if method in PRUNED else self.taught(self.assemble(share))
        net, side = run.supernet, self.form.side
        if method == "full":
            keep = masks.all_open(net)
        elif method == "retrained":
            keep = masks.unpack(learned["mask"], net.num_gates)
        else:
            target = budgets.read(run.recipe.architecture, net, side)
            keep = selection.select(net, side, strength(net, method, self.seed), target)
        steps = None
        if method.endswith("long"):
            teacher = cost.count(net, side).macs * (run.teacher is not None)
            a_step = run.recipe.data.global_batch * (3 * cost.count(net, side, keep).macs + teacher)
            before = self.training_macs(method, run, 0, cost.count(net, side).macs, finetune=0)
            steps = run.state.global_step + max(1, round((learned["training_macs"] - before) / a_step))
        return self.trained(run, keep, steps), keep

    def training_macs(self, method: str, run: phases.Run, macs: int, full: int, finetune: int | None = None) -> int:
        """MACs of the whole training: a weight step three times the forward pass's, an architecture step twice, and a teacher's
        forward pass in each that has one. finetune: its steps, if not those of the recipe."""
        settings, batch = run.recipe.phases, run.recipe.data.global_batch
        first = settings.pretrain.steps * (not self.args.given)
        taught = full * (run.teacher is not None)
        last = (3 * macs + taught) * (settings.finetune.steps if finetune is None else finetune)
        if method in SEARCHED:
            search = settings.search
            searched, left = 0.0, 1.0
            for step in range(search.steps):
                if method in ("taylor", "one") and (number := taylor.due(step, search.steps, search.cycle)) is not None:
                    left = (macs / full) ** (number / taylor.ROUNDS)
                is_gates = schedule.is_architecture_step(step, search.weight_steps, search.architecture_steps)
                searched += (left if left <= SLIM else 1.0) * (2 if is_gates else 3)
            return round(batch * (full * (3 * first + searched) + taught * search.steps + last))
        return batch * (3 * full * first * (method in PRUNED) + last)


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
        if method in ("l1", "l1-long"):
            layers = [layer.path for layer in net.graph.layers.values() if net.site_of(layer.path) == site]
            size = sum(net.get_parameter(f"{path}.weight").detach().abs().flatten(1).sum(1).cpu() for path in layers)
            place = size.argsort(descending=True).argsort()
        rank = -(place + 0.5) / channels
        # Other candidates of a cell come behind all of this one.
        others = "cells" in site.split(".") and method.startswith("k") and method not in site.split(".")
        ranked.append(rank - 2 * others)
    return torch.cat(ranked)


def exported(net: GatedNetwork, keep: Tensor) -> torch.nn.Module:
    """The compact network as an export has it."""
    return deployed(compact.compact(net, keep)).eval()


@torch.no_grad()
def milliseconds(networks: dict[str, torch.nn.Module], side: int, device: torch.device, seconds: float) -> dict[str, dict]:
    """Median time of each network for a batch of 1 and of 64, on one thread, by turns; on a CPU the thread's own, whatever else
    runs. seconds: for each network and batch."""
    usual, clock = torch.get_num_threads(), time.thread_time if device.type == "cpu" else time.perf_counter
    torch.set_num_threads(1)
    found: dict[str, dict] = {name: {} for name in networks}
    for batch in (1, 64):
        images = torch.randn(batch, 3, side, side, device=device)
        runs = {name: functools.partial(net, images) for name, net in networks.items()}
        for name, times in latency.rounds(runs, seconds * len(runs), device, clock).items():
            found[name][str(batch)] = round(1e3 * statistics.median(times), 3)
    torch.set_num_threads(usual)
    return found
