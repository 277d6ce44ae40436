"""Activations computed again in the backward pass."""

import contextlib
import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dnal_dist.nets import GatedNetwork, computing_again
from dnal_dist.nets.gate import segments
from dnal_dist.nets.narrow import Narrow


def checkpoint_activations(network: nn.Module) -> None:
    """Compute the activations within each segment again in the backward pass. No statistic moves the second time."""

    def within(forward: Callable, modules: Sequence[nn.Module]) -> Callable:
        contexts = functools.partial(_first_and_again, modules)

        def run(*args, **kwargs):
            # Without a gradient to come there is nothing to compute again.
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

        return run

    if isinstance(network, GatedNetwork):
        for unit in network.units():
            unit.forward = within(unit.forward, [unit])
        return
    if isinstance(network, Narrow):
        network.divide(max(1, round(len(network.steps) ** 0.5)))
        network.within = within(network.within, [network])
        return
    parts = segments(network)
    firsts = {id(part[0]): part for part in parts}

    def forward(x):
        rest: list[nn.Module] = []
        for child in network.children():
            if id(child) in firsts:
                x, rest = _run(rest, x), []
            rest.append(child)
        return _run(rest, x)

    def _run(modules, x):
        return within(lambda x: functools.reduce(lambda x, module: module(x), modules, x), modules)(x) if modules else x

    network.forward = forward


def _first_and_again(modules: Sequence[nn.Module]):
    return contextlib.nullcontext(), computing_again(*modules)
