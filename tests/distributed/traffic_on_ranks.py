"""A job of test_plan: what a weight step and an architecture step of some networks send, and what is kept of them.

A case is network:parts, parts being how many the images of a step are taken in, one after the other. Of what is kept, the
result has the most that any process keeps.
"""

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from dnal_dist import nets
from dnal_dist.distributed.context import Context
from dnal_dist.distributed.traffic import Traffic
from dnal_dist.recipe import SGD, Training
from dnal_dist.search.architecture import Architecture
from dnal_dist.training.steps import architecture_step, weight_step

BATCH, DELTA, STEPS = 8, 2.0, 3


def kept(found: Iterable) -> int:
    """Bytes of the tensors in `found`, those that share memory counted once."""
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tree_leaves(list(found)) if isinstance(t, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def note_gradients(trained, found: dict[str, int]) -> None:
    """From now on, what is kept of gradients is noted between a backward pass and the optimiser's step."""
    stepper = getattr(trained, "engine", trained.optimizer)
    step = stepper.step

    def noted(*args, **kwargs):
        # ZeRO keeps them under names of its own.
        own = [getattr(trained.optimizer, name, None) for name in ("averaged_gradients", "grad_partitions_flat_buffer")]
        found["gradients"] = kept([own, [p.grad for p in trained.module.parameters()]])
        return step(*args, **kwargs)

    stepper.step = noted


def measure(context: Context, case: str) -> dict:
    name, _, parts = case.partition(":")
    torch.manual_seed(0)
    net = nets.build(name)
    architecture = Architecture(net.num_gates)
    alphas = torch.optim.SGD(architecture.parameters(), 0.1, 0.9)
    trained = context.wrap(net, SGD(lr=0.01), {}, Training())
    images, labels = torch.randn(BATCH, 3, 8, 8), torch.arange(BATCH)
    memory: dict[str, int] = {}
    note_gradients(trained, memory)
    for _ in range(STEPS):
        with Traffic() as weight:
            weight_step(trained, images, labels, BATCH, architecture.gates(DELTA), int(parts))
        with Traffic() as alpha:
            penalty, average_ = ("sigmoid", 0.01), context.average_
            architecture_step(
                trained, architecture, alphas, images, labels, BATCH, DELTA, *penalty, average_, accumulation=int(parts)
            )
    inner = getattr(trained.optimizer, "optimizer", trained.optimizer)
    parameters = [(p.data, getattr(p, "ds_tensor", None)) for p in trained.module.parameters()]
    memory["parameters"] = kept(parameters)
    # Beside them ZeRO keeps a copy in float32, which is what its optimiser moves.
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    masters = [getattr(trained.optimizer, name, None) for name in names]
    memory["optimizer"] = kept([masters, [list(state.values()) for state in inner.state.values()]])
    trained.close()
    everywhere = context.gather([memory])
    memory = {kind: max(one[kind] for one in everywhere) for kind in memory}
    return {"weight": weight.operations, "architecture": alpha.operations, "memory": memory}


def traffic(context: Context, cases: list[str]) -> dict[str, dict]:
    return {case: measure(context, case) for case in cases}
