"""How much faster compact networks of 25 % of the MACs run than full ones, in several runtimes, taking turns in one process.

    python benchmarks/latency.py                                      four networks, about 20 minutes on one core
    python benchmarks/latency.py --networks resnet56 --batch 1        one of them, one image at a time
    python benchmarks/latency.py --runtimes compile                   torch.compile, which takes minutes a network

Columns: pruned, with free streams, as pruning leaves it; free, the same function as nets.whole writes it for deployment, as the
others are; tied, with architecture.streams tied; free/8 and tied/8, with architecture.round_to 8. Runtimes other than PyTorch's own
get the form for deployment of the full network too. Channels are drawn at random. Each network is compared with the full one before
it is timed. ONNX Runtime and OpenVINO are used where they are installed (pip install 'dnal-dist[openvino]').
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from parts import describe
from torch import nn

from dnal_dist import nets
from dnal_dist.export import latency
from dnal_dist.nets import compact, cost
from dnal_dist.nets.whole import deployed
from dnal_dist.search import budgets, selection

NETWORKS = {
    "resnet50": ("resnet50_imagenet", 160),
    "mobilenetv2": ("mobilenetv2_imagenet", 160),
    "supernet": ("proxyless_supernet", 160),
    "resnet56": ("resnet56_cifar", 32),
}
WAYS = {
    "pruned": ("free", 1, False),
    "free": ("free", 1, True),
    "free/8": ("free", 8, True),
    "tied": ("tied", 1, True),
    "tied/8": ("tied", 8, True),
}
FRACTION = 0.25


def networks(name: str, image_size: int, ways: list[str]) -> dict[str, tuple[nn.Module, float]]:
    """The full network and its compact ones, in eval mode, each with its part of the MACs."""
    made: dict[str, tuple[nn.Module, float]] = {}
    for streams in dict.fromkeys(WAYS[way][0] for way in ways):
        torch.manual_seed(0)
        network = nets.build(name, image_size=image_size, streams=streams).eval()
        full = cost.count(network, image_size).macs
        made.setdefault("full", (compact.compact(network, torch.ones(network.num_gates, dtype=torch.bool)), 1.0))
        for way in (way for way in ways if WAYS[way][0] == streams):
            _, round_to, is_deployed = WAYS[way]
            target = budgets.Budget("macs", int(0.96 * FRACTION * full), int(FRACTION * full), full)
            strength = torch.rand(network.num_gates, generator=torch.Generator().manual_seed(1))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of rescued channels
                keep = selection.select(network, image_size, strength, target, round_to)
                small = compact.compact(network, keep)
                module = deployed(small) if is_deployed else small
            images = torch.randn(2, 3, image_size, image_size)
            with torch.no_grad():
                latency.require_equal(module(images), network(images, small.keep.float()), f"{name} {way}")
            made[way] = (module, cost.count(network, image_size, keep).macs / full)
    return made


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--runtimes", nargs="+", choices=["eager", "compile", "onnx", "openvino"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16], help="images a run (default 1 16)")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each line of the table (default 20)")
    parser.add_argument("--own-time", action="store_true", help="time that the process computed, for machines that others use too")
    parser.add_argument("--output", type=Path, help="write the rows to this file as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if args.own_time else time.perf_counter
    installed = [name for name, module in (("onnx", "onnxruntime"), ("openvino", "openvino")) if _is_installed(module)]
    runtimes = args.runtimes or ["eager", *installed]
    print(
        f"| network | batch | runtime | full, ms | {' | '.join(args.ways)} |\n|---|--:|---|--:|{'--:|' * len(args.ways)}",
        flush=True,
    )
    rows = []
    for name in args.networks:
        model, image_size = NETWORKS[name]
        made = networks(model, image_size, args.ways)
        for batch in args.batch:
            images = torch.randn(batch, 3, image_size, image_size)
            for runtime in runtimes:
                with tempfile.TemporaryDirectory() as folder:
                    runs = {}
                    for way, (module, _) in made.items():
                        # A runtime may hold the file that it opened.
                        (own := Path(folder, way.replace("/", "-"))).mkdir()
                        runs[way] = latency.runner(module, images, runtime, 1, own)
                        latency.require_equal(runs[way](), module(images), f"{name} {way} in {runtime}")
                    times = latency.rounds(runs, args.seconds, images.device, clock)
                found = {way: statistics.median(row) for way, row in times.items()}
                ratios = {way: found["full"] / found[way] for way in args.ways}
                rows.append({"network": model, "batch": batch, "runtime": runtime, "image_size": image_size, "seconds": found})
                cells = " | ".join(f"{ratio:.2f}x" for ratio in ratios.values())
                print(f"| {name} | {batch} | {runtime} | {1000 * found['full']:.1f} | {cells} |", flush=True)
        print(f"  {name}: MACs {', '.join(f'{way} {part:.1%}' for way, (_, part) in made.items())}", flush=True)
    if args.output:
        args.output.write_text(json.dumps({"machine": describe("cpu"), "rows": rows}, indent=1) + "\n")


def _is_installed(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    main()
