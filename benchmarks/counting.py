"""The work of a step, counted: elements that its operations read and write, and MACs.

Counted on the meta device as the operations are issued: each reads its tensors once and writes its results once, views cost
nothing. Activations are tensors whose first dimension is the batch; the rest (weights, statistics, gradients of weights, five
passes of SGD) stays in float32 whatever the precision. MACs are those of convolutions and Linear layers: three times the forward
pass's in a weight step, twice in an architecture step, which takes no gradient to weights; the published formulation takes three
times always.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from formulation import STEPS
from subject import Case, Subject
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnal_dist.nets import cost, frozen_statistics

# A size that no other dimension has; nothing is computed on the meta device.
BATCH = 1009


class Elements(TorchDispatchMode):
    """Counts elements read and written: of `activations`, and `others`."""

    def __init__(self):
        super().__init__()
        self.activations = self.others = self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function is not torch.ops.aten.detach.default:
            self.operations += 1
            for tensor in tree_leaves((args, kwargs, result)):
                if isinstance(tensor, Tensor):
                    if tensor.dim() > 1 and tensor.shape[0] == BATCH:
                        self.activations += tensor.numel()
                    else:
                        self.others += tensor.numel()
        return result


def count(case: Case, report: Callable[[dict], None]) -> None:
    """Report for each step, ours and the published formulation's: elements of activations for each image, other elements,
    operations (without those of the optimiser), MACs for each image."""
    subject = Subject(case)
    full = cost.count(subject.network, case.image_size).macs
    small = cost.count(subject.network, case.image_size, subject.keep).macs
    images = torch.empty(BATCH, 3, case.image_size, case.image_size, device="meta")
    labels = torch.empty(BATCH, dtype=torch.long, device="meta")
    networks = [part.to("meta").train() for part in (subject.network, subject.compact, subject.formulation)]
    for step in STEPS:
        for who in ("ours", "formulation"):
            with Elements() as found:
                trained = (_ours if who == "ours" else _published)(step, networks, images, labels)
            forward = small if step == "finetune" and who == "ours" else full
            work = {
                "activations_each": round(found.activations / BATCH),
                "others": found.others + (0 if step == "architecture" else 5 * sum(p.numel() for p in trained)),
                "operations": found.operations,
                "macs_each": forward * (2 if step == "architecture" and who == "ours" else 3),
            }
            report({**{key: value for key, value in case._asdict().items() if key != "batch"}, "step": step, "who": who, **work})


def _ours(step: str, networks: list[nn.Module], images: Tensor, labels: Tensor) -> list[Tensor]:
    """A step's forward and backward pass; returns the weights."""
    network, compact, _ = networks
    network = compact if step == "finetune" else network
    weights = list(network.parameters())
    if step in ("pretrain", "finetune"):
        F.cross_entropy(network(images), labels).backward()
    else:
        gates = torch.empty(network.num_gates, device="meta", requires_grad=step == "architecture")
        if step == "architecture":
            with frozen_statistics(network):
                torch.autograd.grad(F.cross_entropy(network(images, gates), labels), gates)
        else:
            F.cross_entropy(network(images, gates), labels).backward()
    for weight in weights:
        weight.grad = None
    return weights


def _published(step: str, networks: list[nn.Module], images: Tensor, labels: Tensor) -> list[Tensor]:
    network = networks[2]
    network.set_gates({"pretrain": "absent", "finetune": "mask"}.get(step, "soft"))
    F.cross_entropy(network(images), labels).backward()
    network.zero_grad()
    return network.weights()
