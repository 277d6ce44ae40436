"""Time of the search's two steps by criterion taylor, with closed channels computed and skipped.

    python benchmarks/skip_closed.py     MobileNetV2 and ResNet50 with few images, VGG16 at 32x32: two minutes on one core

Masks are random, of counts rounded to 8; the two take turns. Times are the thread's own.
"""

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable

import torch

from dnal_dist import nets
from dnal_dist.recipe import ArchitectureSettings
from dnal_dist.search import budgets, selection

# Network, images, their side.
CASES = (("resnet50_imagenet", 4, 128), ("mobilenetv2_imagenet", 4, 160), ("vgg16_cifar", 32, 32))


def step(net: nets.GatedNetwork, images: torch.Tensor, gates: torch.Tensor, of_weights: bool) -> None:
    labels = torch.zeros(len(images), dtype=torch.long)
    gates = gates.clone().requires_grad_(not of_weights)
    loss = torch.nn.functional.cross_entropy(net(images, gates), labels)
    loss.backward() if of_weights else torch.autograd.grad(loss, gates)


def seconds(runs: list[Callable], rounds: int) -> list[float]:
    """Median time of each, taken in turn, after one of each that does not count."""
    times = []
    for _ in range(rounds + 1):
        times.append([])
        for run in runs:
            begun = time.thread_time()
            run()
            times[-1].append(time.thread_time() - begun)
    return [statistics.median(column) for column in zip(*times[1:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | MACs left | weight step, ms | skipped | architecture step, ms | skipped |\n|---|--:|--:|--:|--:|--:|")
    for name, number, side in CASES:
        torch.manual_seed(0)
        whole = nets.build(name, image_size=side, num_classes=10).to(memory_format=torch.channels_last).train()
        images = torch.randn(number, 3, side, side).to(memory_format=torch.channels_last)
        for share in (0.5, 0.25, 0.1):
            settings = ArchitectureSettings(criterion="taylor", target={"macs": f"{share}x"}, round_to=8, tolerance=0.1)
            keep = selection.select(whole, side, torch.rand(whole.num_gates), budgets.read(settings, whole, side), 8)
            slim, cells = copy.deepcopy(whole), []
            slim.slim_to(keep)
            for of_weights in (True, False):
                for net in (whole, slim):
                    for parameter in net.parameters():
                        parameter.requires_grad_(of_weights)
                runs = [functools.partial(step, net, images, keep.float(), of_weights) for net in (whole, slim)]
                cells += [f"{1e3 * s:.0f}" for s in seconds(runs, args.rounds)]
            print(f"| {name} | {share:.0%} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
