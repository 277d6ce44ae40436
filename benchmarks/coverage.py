"""Which networks of torchvision and timm can be gated, how much of them can be removed, and whether what is left is exact.

python benchmarks/coverage.py                             all of the list, a line each; the table of docs/networks.md
python benchmarks/coverage.py torchvision:resnet18        some of them

Of each site half of the channels close, at random. `removed` is the share of the convolutions' outputs that are gone then,
`MACs` what is left of them. `difference` is between the logits of the network with gates closed at random and of the compact
one, in float64, relative to their size. `seconds` are those of one core to read and to check it, once the libraries are imported.
Images have 224 pixels (299 for Inception and NASNet, 256 for bat_resnext26ts, which need them).
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import sys
import time
import warnings

import torch
from torch import nn

from dnal_dist import nets
from dnal_dist.common.errors import InputError
from dnal_dist.nets import cost, masks
from dnal_dist.nets.checking import check_exact

TORCHVISION = (
    *("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg11_bn", "vgg16", "densenet121", "mobilenet_v2"),
    *("mobilenet_v3_small", "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf", "shufflenet_v2_x1_0", "googlenet"),
    *("inception_v3", "mnasnet1_0", "squeezenet1_1", "convnext_tiny", "alexnet"),
)
TIMM = (
    *("efficientnet_lite0", "mobilenetv3_large_100", "resnet26d", "hrnet_w18_small", "repvgg_a0", "ghostnet_100", "rexnet_100"),
    *("nf_resnet50", "eca_nfnet_l0", "dm_nfnet_f0", "regnetx_002", "tf_efficientnetv2_b0", "convnextv2_nano", "fbnetc_100"),
    *("spnasnet_100", "dla34", "ese_vovnet19b_dw", "cspresnet50", "cspdarknet53", "mixnet_s", "res2net50_26w_4s", "resnest14d"),
    *("skresnet18", "dpn68", "seresnet50", "ecaresnet26t", "xception41", "inception_v4", "mobileone_s0", "mobilenetv4_conv_small"),
    *("gernet_s", "selecsls42b", "hardcorenas_a", "lcnet_050", "tinynet_a", "starnet_s1", "fasternet_t0", "efficientvit_b0"),
    *("nasnetalarge", "pnasnet5large", "resnetv2_50", "bat_resnext26ts", "gcresnet50t", "repghostnet_100"),
)
SIZES = {"inception": 299, "nasnet": 299, "bat_": 256}
LIMIT = 600


def half_closed(network: nets.GatedNetwork, seed: int = 0) -> torch.Tensor:
    """The keep mask, bool (N,), of half of each site's gates, at least one."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.zeros(network.num_gates, dtype=torch.bool)
    for part in network.by_site(keep).values():
        part[torch.randperm(len(part), generator=generator)[: max(1, len(part) // 2)]] = True
    return masks.rescue(network, keep)[0]


def row(name: str) -> dict:
    """What came of one network."""
    torch.set_num_threads(1)
    size = next((size for word, size in SIZES.items() if word in name and "mnasnet" not in name), 224)
    importlib.import_module(name.partition(":")[0])
    importlib.import_module("torch._dynamo")
    torch.manual_seed(0)
    start = time.process_time()
    try:
        network = nets.build(name, image_size=size)
        difference = check_exact(network)
    except InputError as error:
        return {"network": name, "refused": str(error)}
    seconds, keep = time.process_time() - start, half_closed(network)
    stays = torch.cat([keep, torch.ones(1, dtype=torch.bool)])[network.gating.of_label]
    outputs = torch.cat(
        [layer.outputs for layer in network.graph.layers.values() if issubclass(network.graph.kinds[layer.path], nn.Conv2d)]
    )
    macs = cost.count(network, size, keep).macs / cost.count(network, size).macs
    removed = 1 - float(stays[outputs].float().mean())
    facts = {"difference": difference, "removed": removed, "macs": macs, "gates": network.num_gates}
    return {"network": name, **facts, "sites": len(network.gate_sites), "seconds": round(seconds, 1)}


def work(name: str, results) -> None:
    warnings.simplefilter("ignore")
    results.put(row(name))


def alone(name: str) -> dict:
    """`row` in a process of its own, so that a crash or a hang costs one row."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=work, args=(name, results), daemon=True)
    process.start()
    process.join(LIMIT)
    with contextlib.suppress(Exception):
        return results.get(timeout=5)
    process.kill()
    return {"network": name, "refused": f"no result within {LIMIT} seconds"}


def line(found: dict) -> str:
    if "refused" in found:
        return f"| {found['network']} | refused: {found['refused']} | | | | |"
    return (
        f"| {found['network']} | {found['difference']:.0e} | {found['removed']:.0%} | {found['macs']:.0%} | "
        f"{found['gates']:,} at {found['sites']} | {found['seconds']:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="library:name; all of the list by default")
    parser.add_argument("--json", help="file for one JSON line a network")
    args = parser.parse_args()
    names = args.networks or [f"torchvision:{name}" for name in TORCHVISION] + [f"timm:{name}" for name in TIMM]
    print("| network | difference | removed | MACs | gates | seconds |\n|---|---|---|---|---|---|", flush=True)
    rows = []
    for name in names:
        rows.append(alone(name))
        print(line(rows[-1]), flush=True)
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    for library in ("torchvision", "timm"):
        own = [found for found in rows if found["network"].startswith(library)]
        exact = [found for found in own if "refused" not in found]
        if exact:
            removed = sum(found["removed"] for found in exact) / len(exact)
            print(f"{library}: {len(exact)} of {len(own)} exact, {removed:.0%} of the channels removed on average", file=sys.stderr)


if __name__ == "__main__":
    main()
