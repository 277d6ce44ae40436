"""Every network of the project and two of torchvision's, half of their gates closed at random, exported and proven on drawn images.

python benchmarks/exports.py                                    the table of docs/deploy.md, 15 minutes on two busy cores
python benchmarks/exports.py torchvision:resnet18 --image-size 224 --images 8
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import torch

from dnal_dist import nets, recipe
from dnal_dist.export import files, proof, readers
from dnal_dist.export.images import Images
from dnal_dist.export.program import program
from dnal_dist.export.source import source
from dnal_dist.nets import compact, masks

# Adaptive pooling of the VGG enlarges what is smaller than 7 x 7, for which ONNX has no plain operation.
PIXELS = {"vgg16_cifar": 32, "resnet56_cifar": 32, "mobilenetv2_cifar": 32, "vgg16_imagenet": 224}
NETWORKS = ["vgg16_cifar", "resnet56_cifar", "mobilenetv2_cifar"]
IMAGENET = ["vgg16_imagenet", "resnet50_imagenet", "mobilenetv2_imagenet", "proxyless_supernet"]
IMAGENET += ["torchvision:resnet18", "torchvision:mobilenet_v3_small"]


def row(name: str, image_size: int, count: int, kinds: list[str]) -> str:
    """The line of a network. Raises ProofError, and InputError for what cannot be exported."""
    torch.manual_seed(0)
    network = nets.build(name, image_size=image_size).eval()
    keep, _ = masks.rescue(network, torch.rand(network.num_gates) < 0.5)
    with torch.no_grad():
        # Activations of the order of 1, as in a trained network: BatchNorms know the statistics of what they get.
        norms = [module for module in network.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = 1.0
        network.train()(torch.randn(8, 3, image_size, image_size), keep.float())
    network.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = compact.compact(network, keep).eval()
    del network
    data = recipe.Data(train="none", val="none", image_size=image_size, global_batch=1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        made = program(small, image_size)
        text, state = source(made, small, name)
        files.write_torch(text, state, Path(folder))
        for kind in kinds:
            files.WRITERS[kind](made, Path(folder), None)
        names = ["model.py", *(readers.FILES[kind] for kind in kinds)]
        images = Images(count, 0, "drawn", [], data, None, [])
        *checks, of_file = proof.prove(small, Path(folder), names, images)
        exact = max(of_file, proof.joined(small, images), key=lambda one: one.difference)
    cells = [f"{one.difference:.0e}{'' if one.holds else ' (!)'}" for one in [exact, *checks]]
    differs = sum(one.top1_differs for one in checks)
    seconds = time.perf_counter() - start
    return f"| {name} | {image_size} | {' | '.join(cells)} | {differs} | {len(text.splitlines())} | {seconds:.0f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=[*NETWORKS, *IMAGENET])
    parser.add_argument("--image-size", type=int, help="by default 32 for networks of CIFAR-10, 224 for VGG16, 96 for others")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--to", nargs="*", choices=files.WRITERS, default=["pt2", "onnx"])
    args = parser.parse_args()
    head = ["network", "pixels", "model.py, float64", "model.py", *(readers.FILES[kind] for kind in args.to)]
    head += ["other classes", "lines of model.py", "time"]
    print(f"| {' | '.join(head)} |\n|---|{'--:|' * (len(head) - 1)}", flush=True)
    for name in args.networks:
        print(row(name, args.image_size or PIXELS.get(name, 96), args.images, args.to), flush=True)


if __name__ == "__main__":
    main()
