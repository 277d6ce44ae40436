"""The networks whose latency is compared: the full one, the compact one, and an evenly thinned one of the same MACs."""

import json
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dnal_dist import nets, recipe
from dnal_dist.common.errors import InputError, reason
from dnal_dist.common.files import read_regular
from dnal_dist.export import readers
from dnal_dist.export.prediction import MOST_JSON, preprocessing_of
from dnal_dist.export.subject import recipe_of
from dnal_dist.nets import compact, cost
from dnal_dist.nets.masks import rescue
from dnal_dist.nets.whole import deployed


class Compared(NamedTuple):
    """A network as it is deployed."""

    module: nn.Module | None
    """In eval mode; None if only `files` are to run."""
    macs: int
    files: Path | None = None
    """The folder of an export, whose files run in place of files that are written from the module."""


def full(network: nets.GatedNetwork, image_size: int) -> Compared:
    """The network with all its channels."""
    everything = torch.ones(network.num_gates, dtype=torch.bool)
    return Compared(deployed(compact.compact(network, everything)).eval(), cost.count(network, image_size).macs)


def small(folder: Path, image_size: int) -> Compared:
    """The compact network in `folder`. Raises InputError."""
    network = compact.load(folder)
    return Compared(deployed(network), _macs(network, image_size))


def of_recipe(settings: recipe.Recipe, run: Path | None = None) -> dict[str, Compared]:
    """The full network of a recipe; of a run folder also its compact one, and one that keeps the same part of every site at no more
    MACs. Raises InputError."""
    size = settings.data.image_size
    torch.manual_seed(0)
    network = nets.build(**settings.network).eval()
    found = {"full": full(network, size)}
    if run is not None:
        found["compact"] = small(run / "compact", size)
        even = evenly(network, size, found["compact"].macs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rescued channels
            thinned = compact.compact(network, even).eval()
        found["even"] = Compared(deployed(thinned), cost.count(network, size, even).macs)
    return found


def of_export(folder: Path, as_module: bool) -> tuple[dict[str, Compared], str, int]:
    """The network of an export and, if its recipe names one that is known here or a library's, the full one; the network's name
    and the image size. as_module: run the program model.py, for runtimes that need the module. Raises InputError."""
    size = (how := preprocessing_of(folder / "preprocessing.json"))["image_size"]
    settings = recipe_of(folder / "manifest.json", how)
    own = None
    if as_module:
        try:
            own = readers.network(folder / "model.py").eval()
        except Exception as error:  # it is a program
            raise InputError(f"{folder}/model.py: cannot be loaded ({reason(error)}); export it again") from None
    found = {"compact": Compared(own, _counted(folder / "architecture.json"), folder)}
    library, colon, _ = settings.model.name.partition(":")
    # A function of the user's own, or a run's network, need not be what it was, or be here at all.
    if not colon or library in ("torchvision", "timm"):
        found = of_recipe(settings) | found
    return found, settings.model.name, size


def _counted(path: Path) -> int:
    """MACs of the compact network by an export's architecture.json; 0 where they are not known."""
    try:
        return int(json.loads(read_regular(path, MOST_JSON))["cost"]["compact"]["exact"]["macs"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0


@torch.no_grad()
def _macs(network: nn.Module, size: int) -> int:
    """Multiply-adds of the convolutions and Linear layers for one image."""
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2


def evenly(network: nets.GatedNetwork, size: int, macs: int) -> Tensor:
    """The mask, bool (N,), that keeps the same fraction of every site, as large as `macs` allow."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if cost.count(network, size, _part(network, middle)).macs <= macs else (low, middle)
    return _part(network, low)


def _part(network: nets.GatedNetwork, fraction: float) -> Tensor:
    kept = [torch.arange(channels) < max(1, round(fraction * channels)) for channels in network.gate_sites.values()]
    return rescue(network, torch.cat(kept))[0]
