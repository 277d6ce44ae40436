"""Run by launch.py in each process: the backend as it was set up, and one step of each kind on a few random images.

python -m dnal_dist.doctor.probe RECIPE.yaml RESULT.json SIZE
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from dnal_dist import nets, recipe
from dnal_dist.common import atomic
from dnal_dist.common.errors import InputError
from dnal_dist.data import nvjpeg
from dnal_dist.distributed.context import Context
from dnal_dist.distributed.optimizers import SGD
from dnal_dist.distributed.wrapper import Trained
from dnal_dist.recipe import Recipe
from dnal_dist.search.architecture import Architecture
from dnal_dist.training import preflight
from dnal_dist.training.steps import Outcome, architecture_step, weight_step

# In each process.
IMAGES = 2


def main() -> None:
    path, result, largest = sys.argv[1:]
    # Imports are done; from here on the process waits for the others.
    if os.environ.get("RANK", "0") == "0":
        atomic.put(Path(result), b'{"up": true}')
    context = None
    try:
        settings = recipe.load(path)
        context = Context()
        for facts in probe(settings, context, int(largest)):
            if context.main:
                atomic.put(Path(result), json.dumps(facts).encode())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if context is not None:
            context.leave(2)
        sys.exit(2)
    context.close()
    context.leave(0)


def probe(settings: Recipe, context: Context, largest: int) -> Iterator[dict]:
    """The same facts, growing: world size, device and precision; backend and what was reduced; of each step, by kind, the loss (the
    mean over processes) and its seconds; whether all processes have the same weights."""
    device = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else "CPU"
    facts = {"up": True, "world_size": context.world_size, "device": device, "precision": context.precision, "steps": {}}
    yield facts
    if settings.data.decode == "cuda":
        nvjpeg.require(context.device)
    torch.manual_seed(settings.seed)
    network, training = nets.build(**settings.network), settings.training
    size = _size(network, settings.data, largest)
    facts["reduced"] = [f"{IMAGES} random images of {size}x{size} in each process", *["without torch.compile"] * training.compile]
    network = network.to(context.device)
    architecture = Architecture(network.num_gates).to(context.device)
    context.tune(training, network)
    trained = context.wrap(network, settings.phases.search.optimizer, {}, training.model_copy(update={"compile": False}))
    facts["backend"] = backend_of(trained)
    yield facts
    for kind, step in _steps(settings, context, trained, network, architecture, size).items():
        begun = time.monotonic()
        loss = context.average_(step().cross_entropy.detach().double().cpu().to(context.device)) / IMAGES
        facts["steps"][kind] = float(loss), time.monotonic() - begun
        yield facts
    with trained.gathered():
        weights = {name: p.detach().cpu() for name, p in network.named_parameters()}
        try:
            context.agree("the weights", weights | {"alpha": architecture.alpha.detach().cpu()})
            facts["alike"] = True
        except InputError:
            facts["alike"] = False
    yield facts
    trained.close()


def backend_of(trained: Trained) -> str:
    """By what the network was really wrapped in."""
    engine = getattr(trained, "engine", None)
    if engine is not None:
        return f"zero{engine.zero_optimization_stage()}"
    if any(type(p).__name__ == "DTensor" for p in trained.module.parameters()):
        return "fsdp2"
    return "ddp" if isinstance(trained.network, DistributedDataParallel) else "single"


def _size(network: nets.GatedNetwork, data: recipe.Data, largest: int) -> int:
    """The smallest of a few image sizes that the network takes."""
    for size in (largest, 2 * largest):
        if size < data.image_size:
            try:
                preflight.check_images(network, data.model_copy(update={"image_size": size}), IMAGES)
                return size
            except InputError:
                continue
    return data.image_size


def _steps(
    settings: Recipe, context: Context, trained: Trained, network: nets.GatedNetwork, architecture: Architecture, size: int
) -> dict[str, Callable[[], Outcome]]:
    """One step of each kind."""
    options, device = settings.architecture, context.device
    optimizer = SGD(architecture.parameters(), options.optimizer.lr, options.optimizer.momentum)
    generator = torch.Generator().manual_seed(context.rank)
    images = torch.randn(IMAGES, 3, size, size, generator=generator).to(device)
    labels = torch.randint(settings.model.num_classes or network.num_classes, (IMAGES,), generator=generator).to(device)

    def architecture_only() -> Outcome:
        # Costs of channels take seconds for a large network, so without the penalties that need them.
        penalty = options.delta_start, "sigmoid", options.penalty_weight or 0.0, context.average_
        clip = {"clip_norm": options.optimizer.clip_norm}
        return architecture_step(trained, architecture, optimizer, images, labels, IMAGES, *penalty, **clip)

    return {
        "pretrain": lambda: weight_step(trained, images, labels, IMAGES),
        "weights": lambda: weight_step(trained, images, labels, IMAGES, architecture.gates(options.delta_start)),
        "architecture": architecture_only,
    }


if __name__ == "__main__":
    main()
