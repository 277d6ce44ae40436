"""Run by launch.py in each process: the backend that there is, and one step of each kind on a few random images.

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
from dnal_dist.common.errors import InputError
from dnal_dist.distributed.context import Context
from dnal_dist.distributed.wrapper import Trained
from dnal_dist.nets import cost
from dnal_dist.recipe import Recipe
from dnal_dist.search.architecture import Architecture
from dnal_dist.training import preflight
from dnal_dist.training.steps import architecture_step, weight_step

# Of one process.
IMAGES = 2


def main() -> None:
    path, result, largest = sys.argv[1:]
    # All is imported; what follows waits for the others.
    Path(f"{result}.{os.environ.get('RANK', '0')}.up").touch()
    context = None
    try:
        settings = recipe.load(path)
        context = Context()

        def tell(found: dict) -> None:
            if context.main:
                Path(f"{result}.new").write_text(json.dumps(found))
                os.replace(f"{result}.new", result)

        probe(settings, context, int(largest), tell)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if context is not None:
            context.leave(2)
        sys.exit(2)
    context.close()
    context.leave(0)


def probe(settings: Recipe, context: Context, largest: int, tell: Callable[[dict], None]) -> None:
    """Tells what the processes are, as they turned out, and what was made smaller; after each step {its kind: (loss, seconds)}; at
    last whether all processes have the same weights."""
    device = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else "CPU"
    facts = {"world_size": context.world_size, "device": device, "precision": context.precision, "steps": {}}
    tell(facts)
    torch.manual_seed(settings.seed)
    network = nets.build(settings.model.name, settings.model.num_classes, settings.model.width)
    size = _size(network, settings.data, largest)
    reduced = [f"{IMAGES} random images of {size}x{size} for a process"]
    training = settings.training
    if training.compile:
        training = training.model_copy(update={"compile": False})
        reduced.append("without torch.compile")
    network = network.to(context.device)
    architecture = Architecture(network.num_gates).to(context.device)
    trained = context.wrap(network, settings.phases.search.optimizer, {}, training)
    facts |= {"backend": obtained(trained), "reduced": reduced}
    tell(facts)
    for kind, loss, seconds in _steps(settings, context, trained, network, architecture, size):
        facts["steps"][kind] = loss, seconds
        tell(facts)
    with trained.gathered():
        weights = {name: p.detach().cpu() for name, p in network.named_parameters()}
        facts["alike"] = _alike(context, weights | {"alpha": architecture.alpha.detach().cpu()})
    tell(facts)
    trained.close()


def obtained(trained: Trained) -> str:
    """The backend, by what the network was really wrapped in."""
    engine = getattr(trained, "engine", None)
    if engine is not None:
        return f"zero{engine.zero_optimization_stage()}"
    if any(type(p).__name__ == "DTensor" for p in trained.module.parameters()):
        return "fsdp2"
    return "ddp" if isinstance(trained.network, DistributedDataParallel) else "single"


def _size(network: nets.GatedNetwork, data: recipe.Data, largest: int) -> int:
    """The smallest of a few sizes of images that the network takes."""
    for size in (largest, 2 * largest):
        if size < data.image_size:
            try:
                preflight.unfit_images(network, data.model_copy(update={"image_size": size}), IMAGES)
                return size
            except InputError:
                continue
    return data.image_size


def _steps(
    settings: Recipe, context: Context, trained: Trained, network: nets.GatedNetwork, architecture: Architecture, size: int
) -> Iterator[tuple[str, float, float]]:
    """Kind, loss (the mean over processes) and seconds of each step."""
    asked, device = settings.architecture, context.device
    optimizer = torch.optim.SGD(architecture.parameters(), asked.optimizer.lr, asked.optimizer.momentum)
    generator = torch.Generator().manual_seed(context.rank)
    images = torch.randn(IMAGES, 3, size, size, generator=generator).to(device)
    labels = torch.randint(settings.model.num_classes or network.num_classes, (IMAGES,), generator=generator).to(device)
    # Looking up what each channel costs takes seconds for a large network, so only where it is asked for.
    share = None
    if asked.penalty in ("expected_macs", "root_macs"):
        full = cost.count(network, size).macs

        def share(gates):
            return cost.expected(network, size, gates).macs / full

    def pretrain():
        return weight_step(trained, images, labels, IMAGES)

    def weights():
        return weight_step(trained, images, labels, IMAGES, architecture.gates(asked.delta_start))

    def gates():
        weight = asked.penalty_weight or 0.0
        clip = asked.optimizer.clip_norm
        delta, kind, average = asked.delta_start, asked.penalty, context.average_
        return architecture_step(
            trained, architecture, optimizer, images, labels, IMAGES, delta, kind, weight, average, share, clip_norm=clip
        )

    for name, step in {"pretrain": pretrain, "weights": weights, "architecture": gates}.items():
        begun = time.monotonic()
        loss = context.average_(step().cross_entropy.detach().double().cpu().to(device)) / IMAGES
        yield name, float(loss), time.monotonic() - begun


def _alike(context: Context, tensors: dict[str, torch.Tensor]) -> bool:
    try:
        context.agree("the weights", tensors)
    except InputError:
        return False
    return True


if __name__ == "__main__":
    main()
