"""The demo's recipe over several seeds, against baselines with the same MACs and the same number of steps.

    python benchmarks/digits_seeds.py                 five seeds, about a quarter of an hour on two cores

For each seed, in one process: `learned` is the recipe as it stands. `even` is the network thinned evenly, the same share of every
layer's channels, trained from scratch. `random` is the pretrained network with channels removed at random, trained on. `full` is
the whole network. Both baselines may cost at most what the learned network of that seed costs, and all of them take as many
iterations as the recipe's three phases together; where the learned network spends half of its search on the
architecture, they train weights.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from dnal_dist import recipe
from dnal_dist.common import errors
from dnal_dist.distributed.context import Context
from dnal_dist.nets import GatedNetwork, compact, cost, masks
from dnal_dist.report import records
from dnal_dist.training import phases, setup

METHODS = ("learned", "even", "random", "full")


def thinned_evenly(net: GatedNetwork, image_size: int, most: int) -> torch.Tensor:
    """The mask that keeps the same share of each site's channels, as many as cost at most `most` MACs.

    Whole channels leave a little of the budget over; it goes to one more channel for each site, from the last on, that fits.
    """

    def mask(per_mille: int) -> torch.Tensor:
        keep = torch.zeros(net.num_gates, dtype=torch.bool)
        for part in net.by_site(keep).values():
            part[: max(1, len(part) * per_mille // 1000)] = True
        return keep

    keep = mask(_largest(1000, lambda share: cost.count(net, image_size, mask(share)).macs <= most))
    for part in reversed(net.by_site(keep).values()):
        closed = (~part).nonzero()
        if len(closed):
            part[closed[0]] = True
            if cost.count(net, image_size, keep).macs > most:
                part[closed[0]] = False
    return keep


def removed_at_random(net: GatedNetwork, image_size: int, most: int, seed: int) -> torch.Tensor:
    """The mask of the first channels of a random order, as many as cost at most `most` MACs; no site is empty."""
    shuffled = torch.randperm(net.num_gates, generator=torch.Generator().manual_seed(seed))

    def mask(number: int) -> torch.Tensor:
        keep = torch.zeros(net.num_gates, dtype=torch.bool)
        keep[shuffled[:number]] = True
        return masks.rescue(net, keep, -shuffled.argsort())[0]

    return mask(_largest(net.num_gates, lambda number: cost.count(net, image_size, mask(number)).macs <= most))


def _largest(high: int, fits) -> int:
    """The largest number up to `high` that `fits`, given that smaller ones fit when a larger one does."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def learned(settings: recipe.Recipe) -> dict:
    run = setup.prepare(settings, Context(), overwrite=True)
    phases.train(run)
    found = records.summary(run.folder)
    return {"accuracy": found["accuracy"]["finetune"], "macs": found["compact"]["exact"]["macs"], "phases": found["accuracy"]}


def baseline(settings: recipe.Recipe, method: str, most: int) -> dict:
    """Train the baseline `method` for as many iterations as the recipe's phases have together."""
    run = setup.prepare(settings, Context(), overwrite=True)
    net, image_size, per_epoch = run.supernet, settings.data.image_size, run.train.steps_per_epoch
    total = sum(getattr(settings.phases, name).iterations(per_epoch) for name in ("pretrain", "search", "finetune"))
    batches = phases.training_batches(run)
    if method == "random":
        phases.pretrain(run, batches)
        keep = removed_at_random(net, image_size, most, settings.seed)
    else:
        keep = masks.all_open(net) if method == "full" else thinned_evenly(net, image_size, most)
    run.compact, run.momentum = compact.compact(net, keep), {}
    run.state.phase, run.state.step = "finetune", 0
    longer = settings.phases.finetune.model_copy(update={"epochs": None, "steps": total - run.state.global_step})
    run.recipe = settings.model_copy(update={"phases": settings.phases.model_copy(update={"finetune": longer})})
    phases.finetune(run, batches)
    assert run.state.global_step == total
    return {"accuracy": records.summary(run.folder)["accuracy"]["finetune"], "macs": cost.count(net, image_size, keep).macs}


def table(found: list[dict], full_macs: int) -> Table:
    """Mean, standard deviation and worst of each method, as a table."""
    columns = ("method", "accuracy, mean ± std", "lowest", "MACs, mean ± std", "most")
    # As README holds it.
    shown = Table(*columns, box=box.MARKDOWN)
    for method in METHODS:
        accuracy = [100 * seed[method]["accuracy"] for seed in found]
        macs = [100 * seed[method]["macs"] / full_macs for seed in found]
        deviation = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in (accuracy, macs)]
        shown.add_row(
            method,
            f"{statistics.mean(accuracy):.2f} ± {deviation[0]:.2f} %",
            f"{min(accuracy):.2f} %",
            f"{statistics.mean(macs):.1f} ± {deviation[1]:.1f} %",
            f"{max(macs):.1f} %",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--recipe", default="recipes/digits.yaml")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0 on (default 5)")
    parser.add_argument("--output", type=Path, default=Path("runs/digits_seeds"), help="folder for the runs and results.json")
    args = parser.parse_intermixed_args()
    found = []
    for seed in range(args.seeds):
        results = {}
        for method in METHODS:
            own = [f"seed={seed}", f"output={args.output}/{method}-{seed}", "tracking.tracker=none"]
            try:
                settings = recipe.load(args.recipe, [*args.overrides, *own])
                with contextlib.redirect_stdout(io.StringIO()):
                    results[method] = (
                        learned(settings) if method == "learned" else baseline(settings, method, results["learned"]["macs"])
                    )
            except errors.InputError as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(2)
            print(f"seed {seed}: {method:8} {results[method]['accuracy']:.2%}, {results[method]['macs']:,} MACs", flush=True)
        found.append(results)
        (args.output / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    Console(width=100).print(table(found, found[0]["full"]["macs"]))


if __name__ == "__main__":
    main()
