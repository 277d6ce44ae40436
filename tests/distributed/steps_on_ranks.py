"""Run by test_two_processes on each process: steps on its part of fixed batches, in float64, on a network without BatchNorm.

accelerate launch ... tests/distributed/steps_on_ranks.py OUT
"""

import sys

import torch
from safetensors.torch import save_file
from torch import nn

from dnal_dist import checkpoint, nets
from dnal_dist.architecture import Architecture
from dnal_dist.parallel import Parallel
from dnal_dist.steps import architecture_step, weight_step

BATCH, DELTA = 12, 3.0


class Affine(nn.Module):
    """What is left of a gated BatchNorm without statistics, so that a sample's output does not depend on its batch."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels) * 0.1)

    def forward(self, x, gate=None):
        gate = torch.ones_like(self.weight) if gate is None else gate
        return x * (self.weight * gate).view(-1, 1, 1) + (self.bias * gate).view(-1, 1, 1)


def main(out: str) -> None:
    parallel = Parallel()
    torch.manual_seed(0)
    net = nets.build("resnet_digits")
    for site, channels in net.gate_sites.items():
        net.get_submodule(site).norm = Affine(channels)
    net.double()
    architecture = Architecture(net.num_gates).double()
    wrapped, weights = parallel.wrap(net, torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=1e-3))
    alphas = torch.optim.SGD(architecture.parameters(), 0.5, 0.9)
    share = BATCH // parallel.world_size
    mine = slice(parallel.rank * share, (parallel.rank + 1) * share)
    found = {}
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(BATCH, 3, 8, 8, dtype=torch.float64, generator=generator)[mine]
        labels = torch.randint(0, 10, (BATCH,), generator=generator)[mine]
        if step % 2 == 0:
            gates = architecture.gates(DELTA) if step else None
            outcome = weight_step(wrapped, weights, images, labels, share, parallel.backward, gates)
        else:
            before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            moments = {name: tensor.clone() for name, tensor in checkpoint.momentum(net, weights).items()}
            outcome = architecture_step(net, architecture, alphas, images, labels, share, DELTA, "sigmoid", 0.01, parallel.average_)
            assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
            assert all(torch.equal(moments[name], tensor) for name, tensor in checkpoint.momentum(net, weights).items())
            assert all(p.grad is None for p in net.parameters())
        found[f"cross_entropy.{step}"] = parallel.sum_(outcome.cross_entropy.clone())
    parallel.assert_equal(architecture.alpha, "alpha")
    found |= {f"weights.{name}": tensor for name, tensor in net.state_dict().items()}
    found |= {f"momentum.{name}": tensor for name, tensor in checkpoint.momentum(net, weights).items()}
    found |= {"alpha": architecture.alpha.detach(), "world_size": torch.tensor(parallel.world_size)}
    if parallel.main:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, out)
    parallel.close()
    parallel.leave(0)


if __name__ == "__main__":
    main(sys.argv[1])
