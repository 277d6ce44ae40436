"""Our ReLU6 equals torch's bit for bit, keeps its result alone, and is torch's own to whatever reads a network."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from dnal_dist import nets
from dnal_dist.nets import compact
from dnal_dist.nets.activation import OPERATIONS, ReLU6, relu6


def values(dtype: torch.dtype) -> Tensor:
    edges = torch.tensor([0.0, -0.0, 6.0, 5.9999, 6.0001, 1e-30, -1e-30, math.inf, -math.inf])
    return torch.cat([edges, 4 * torch.randn(501)]).to(dtype).view(2, 5, 3, 17)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_torch(dtype, inplace, layout):
    found = []
    for function in (relu6, F.relu6):
        torch.manual_seed(0)
        x = values(dtype).to(memory_format=layout).requires_grad_()
        out = function(x * 1, inplace)
        (out * torch.randn_like(out)).sum().backward()
        found.append((out.detach(), x.grad, out.stride()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1]) and found[0][2] == found[1][2]


@pytest.mark.parametrize("inplace", [False, True])
def test_only_the_result_is_kept_for_the_backward_pass(inplace):
    kept, x = [], values(torch.float32).requires_grad_() * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = relu6(x, inplace)
    assert [tensor.data_ptr() for tensor in kept] == [out.data_ptr()]
    assert (out.data_ptr() == x.data_ptr()) is inplace


class Small(nn.Module):
    """A convolution, a ReLU6 as a module and another as a function."""

    def __init__(self, activation: nn.Module, function):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.activation, self.function, self.last = activation, function, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(self.first(x)))
        return self.last(self.function(self.second(x), inplace=True).mean((2, 3)))


def gradients(network: nn.Module, call=lambda network, images: network(images)) -> dict[str, Tensor]:
    """Gradients of every parameter, and the output."""
    torch.manual_seed(1)
    out = call(network.train(), 3 * torch.randn(4, 3, 9, 9))
    network.zero_grad()
    out.square().sum().backward()
    return {"output": out.detach()} | {name: parameter.grad for name, parameter in network.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def small(activation, function) -> Small:
    torch.manual_seed(0)
    return Small(activation, function)


def test_exports_and_traces_see_the_plain_operation():
    ours = small(ReLU6(inplace=True), relu6)
    exported = torch.export.export(ours, (torch.randn(2, 3, 9, 9),), strict=False)
    operations = [str(node.target) for node in exported.graph.nodes if "relu6" in str(node.target)]
    assert operations == ["aten.relu6_.default"] * 2
    assert "autograd" not in exported.graph_module.code.lower()
    assert F.relu6 in {node.target for node in fx.symbolic_trace(ours).graph.nodes}
    assert "PythonOp" not in str(torch.jit.trace(ours, torch.randn(2, 3, 9, 9)).inlined_graph)


def test_a_network_trains_as_with_the_plain_operation_checkpointed_or_not():
    expected = gradients(small(nn.ReLU6(inplace=True), F.relu6))
    assert_same(gradients(small(ReLU6(inplace=True), relu6)), expected)
    again = gradients(small(ReLU6(inplace=True), relu6), lambda network, images: checkpoint(network, images, use_reentrant=False))
    assert_same(again, expected)


def test_gated_networks_and_their_compact_ones_take_it():
    network = nets.gate(small(nn.ReLU6(inplace=True), F.relu6), torch.randn(2, 3, 9, 9))
    assert type(network.activation) is ReLU6
    keep = torch.ones(network.num_gates, dtype=torch.bool)
    keep[::3] = False
    made, plain = (compact.compact(network, keep) for _ in range(2))
    changed = [call for call in plain.operations if call in OPERATIONS.values()]
    plain.operations[:] = [next((own for own, ours in OPERATIONS.items() if ours is call), call) for call in plain.operations]
    assert len(changed) == 2
    assert_same(gradients(made), gradients(plain))


@pytest.mark.parametrize("name", ["mobilenetv2_cifar", "supernet_digits"])
def test_built_in_networks_keep_no_copy_of_an_activation(name):
    network = nets.build(name, width=0.25 if name == "mobilenetv2_cifar" else 1.0)
    known, nodes = set(), [network(torch.randn(2, 3, 16, 16)).grad_fn]
    while nodes:
        if (node := nodes.pop()) is not None and node not in known:
            known.add(node)
            nodes += [before for before, _ in node.next_functions]
    assert "_HardtanhBackward" in {type(node).__name__ for node in known}
    assert not {type(node).__name__ for node in known} & {"HardtanhBackward0", "HardtanhBackward1"}
