"""The quick way to the graph of this project's networks finds what torch.export does."""

import pytest
import torch

from dnal_dist import nets
from dnal_dist.nets.tracing import IMAGES, exported, symbolic


def operations(traced) -> list[tuple]:
    """Each operation with its module, arguments, parameters and the shape of its result."""
    found = []
    for node in traced.nodes:
        if node.op == "call_function":
            args = [traced.names.get(a.name, a.name) if isinstance(a, torch.fx.Node) else a for a in node.args]
            defaults = [argument.default_value for argument in node.target._schema.arguments]
            args += defaults[len(args) :]
            stack = [path for path, _ in node.meta["nn_module_stack"].values() if path]
            found.append((node.target, stack[-1:], args[1:], tuple(node.meta["val"].shape), len(node.users)))
    return found


@pytest.mark.parametrize("name", ["vgg_digits", "resnet_digits", "resnet50_imagenet", "supernet_digits"])
def test_operations_are_those_of_torch_export(name):
    network = nets.NETWORKS[name](width=0.25).eval()
    images = torch.zeros(IMAGES, 3, 64, 64)
    quick, slow = operations(symbolic(network, images)), operations(exported(network, images))
    assert len(quick) == len(slow) > 20
    for one, other in zip(quick, slow, strict=True):
        assert one[0] == other[0] and one[1] == other[1] and one[3:] == other[3:]
        for a, b in zip(one[2], other[2], strict=True):
            assert a == b or isinstance(a, str), (one, other)
