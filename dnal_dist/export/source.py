"""A torch.export program as a Python file that needs torch only: layers under the network's own names, and a forward pass."""

import copy
import keyword
import re
from itertools import count

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from dnal_dist.export.expressions import Expression, expression

HEAD = '''"""{title}

Written by dnal_dist; needs torch only. The weights are in model.safetensors, which `load` reads by the package safetensors.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class Layers(nn.Module):
    """Layers by their names; those whose names are numbers are items."""

    def __getitem__(self, name):
        for those in (self._modules, self._parameters, self._buffers):
            if str(name) in those:
                return those[str(name)]
        raise KeyError(name)

    def __setitem__(self, name, layer):
        those = self._parameters if isinstance(layer, nn.Parameter) else self._modules
        (those if isinstance(layer, nn.Module | nn.Parameter) else self._buffers)[str(name)] = layer


def load(path=Path(__file__).with_name("model.safetensors")):
    """The network with its weights, in eval mode."""
    from safetensors.torch import load_file

    network = Network()
    network.load_state_dict(load_file(path))
    return network.eval()


class Network(Layers):
    def __init__(self):
        super().__init__()
'''
# Characters, and calls, beyond which an expression gets a line of its own.
WIDTH, CALLS = 80, 4
_LAYERS = {"conv2d": nn.Conv2d, "linear": nn.Linear, "batch_norm": nn.BatchNorm2d}


def source(program: ExportedProgram, module: nn.Module, title: str) -> tuple[str, dict[str, Tensor]]:
    """The text of the file, and the tensors of its network by name. module: what was exported; the momentum of its BatchNorms,
    which a program does not keep, is taken from it. title: a line about the network."""
    writer, graph = _Writer(program, module), _without_changes(program.graph)
    for node in graph.nodes:
        writer.add(node)
    head = HEAD.format(title=re.sub(r"[^\w .,:;()/<>+-]", "_", title))
    return head + "\n".join([*writer.layers, "", "    def forward(self, images):", *writer.lines]) + "\n", writer.state


def _without_changes(graph: Graph) -> Graph:
    """A copy in which no operation is read for its effect on its argument: what reads the argument later reads the result."""
    graph = copy.deepcopy(graph)
    for node in graph.nodes:
        name = str(node.target).removeprefix("aten.").partition(".")[0]
        if node.op == "call_function" and name.endswith("_") and not name.startswith("_"):
            order = {one: i for i, one in enumerate(graph.nodes)}
            for user in [user for user in node.args[0].users if order[user] > order[node]]:
                user.replace_input_with(node.args[0], node)
    for node in reversed(graph.nodes):
        # Checks of sizes among them.
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    return graph


class _Writer:
    def __init__(self, program: ExportedProgram, module: nn.Module):
        self.module, self.state, signature = module, {}, program.graph_signature
        self.names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.names |= signature.inputs_to_lifted_tensor_constants
        self.tensors = {**program.constants, **program.state_dict}
        self.is_parameter = set(signature.inputs_to_parameters.values())
        self.layers: list[str] = []
        self.lines: list[str] = []
        self.held: set[str] = set()
        """Paths of what the file has made so far."""
        self.values: dict[Node, Expression] = {}
        self.waiting: dict[str, int] = {}
        """Variables in use, with the number of reads that are still to come."""

    def add(self, node: Node) -> None:
        if node.op == "placeholder" and node.name not in self.names:
            self._keep(node, "images")
        elif node.op == "output":
            (result,) = node.args[0]
            self.lines.append(f"        return {self._read(result).text}")
        elif node.op == "call_function":
            self._assign(node, self._layer(node) or expression(node, self._read))

    def _assign(self, node: Node, found: Expression) -> None:
        """Keep an expression for the one line that reads it, or write it to a variable."""
        if _reads(node) == 1 and len(found.text) < WIDTH and found.text.count("(") < CALLS:
            self.values[node] = found
            return
        for name, times in found.variables.items():
            self.waiting[name] -= times
            if not self.waiting[name]:
                del self.waiting[name]
        name = self._free()
        self.lines.append(f"        {name} = {found.text}")
        self._keep(node, name)

    def _keep(self, node: Node, name: str) -> None:
        self.values[node] = Expression(name, True, {name: 1})
        self.waiting[name] = _reads(node)

    def _free(self) -> str:
        return next(name for i in count() if (name := "xyz"[i] if i < 3 else f"x{i}") not in self.waiting)

    def _read(self, node: Node) -> Expression:
        if node.op == "placeholder" and node.name in self.names:
            return Expression(f"self{_path(self._hold(self.names[node.name]))}", True, {})
        return self.values[node]

    def _hold(self, name: str) -> str:
        """Have the network hold a tensor of its own."""
        if name not in self.held:
            self._holders(name)
            tensor = self.tensors[name].detach()
            self.state[name] = tensor
            made = f"torch.zeros({list(tensor.shape)}, dtype={tensor.dtype})"
            made = f"nn.Parameter({made})" if name in self.is_parameter else made
            holder, _, last = name.rpartition(".")
            is_plain = name in self.is_parameter and _is_identifier(last)
            self.layers.append(f"        self{_path(holder)}{_path(last) if is_plain else f'[{last!r}]'} = {made}")
        return name

    def _holders(self, path: str) -> None:
        """Have the network hold all that a path leads through."""
        parts = path.split(".")
        for end in range(1, len(parts)):
            holder = ".".join(parts[:end])
            if holder not in self.held:
                self.held.add(holder)
                self.layers.append(f"        self{_path(holder)} = Layers()")
        self.held.add(path)

    def _layer(self, node: Node) -> Expression | None:
        """The call of a layer, if its weights are plain ones of this one layer."""
        kind = str(node.target).removeprefix("aten.").partition(".")[0]
        if kind not in _LAYERS:
            return None
        tensors = node.args[1:5] if kind == "batch_norm" else [*node.args[1:3], None][:2]
        names = [None if one is None else self.names.get(one.name) for one in tensors]
        suffixes = ("weight", "bias", "running_mean", "running_var")
        paths = {name.rpartition(".")[0] for name in names if name is not None}
        own = [
            None if one is None else f"{path}.{suffix}" for path in paths for one, suffix in zip(tensors, suffixes, strict=False)
        ]
        if len(paths) != 1 or own != names:
            return None
        (path,) = paths
        made = self._made(kind, node, path)
        line = f"        self{_path(path)} = {made}"
        if path in self.held and line not in self.layers:
            return None
        if path not in self.held:
            self._holders(path)
            self.layers.append(line)
            self.state |= {name: self.tensors[name].detach() for name in names if name is not None}
            if kind == "batch_norm" and names[2] is not None:
                batches = self.tensors.get(f"{path}.num_batches_tracked")
                self.state[f"{path}.num_batches_tracked"] = torch.tensor(0) if batches is None else batches
        inner = self._read(node.args[0])
        return Expression(f"self{_path(path)}({inner.text})", True, inner.variables)

    def _made(self, kind: str, node: Node, path: str) -> str:
        if kind == "batch_norm":
            channels, rank = node.args[0].meta["val"].shape[1], node.args[0].meta["val"].dim()
            settings = {"eps": (node.args[7], 1e-5), "momentum": (self._momentum(path, node.args[6]), 0.1)}
            settings |= {"affine": (node.args[1] is not None, True), "track_running_stats": (node.args[3] is not None, True)}
            return _call(f"nn.BatchNorm{2 if rank == 4 else 1}d", [int(channels)], settings)
        weight = node.args[1].meta["val"]
        bias = len(node.args) > 2 and node.args[2] is not None
        if kind == "linear":
            return _call("nn.Linear", [weight.shape[1], weight.shape[0]], {"bias": (bias, True)})
        defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        given = dict(zip(defaults, node.args[3:], strict=False)) | {k: v for k, v in node.kwargs.items() if k in defaults}
        settings = {key: (_short(given.get(key, default)), default) for key, default in defaults.items()}
        settings["bias"] = (bias, True)
        sizes = [weight.shape[1] * settings["groups"][0], weight.shape[0], _short(weight.shape[2:])]
        return _call("nn.Conv2d", sizes, settings)

    def _momentum(self, path: str, default: float) -> float | None:
        try:
            return self.module.get_submodule(path).momentum
        except AttributeError:
            return default


def _reads(node: Node) -> int:
    """How often a node is read, by whoever reads it."""
    found: list[Node] = []
    for user in node.users:
        torch.fx.map_arg((user.args, user.kwargs), found.append)
    return found.count(node)


def _call(name: str, arguments: list, settings: dict) -> str:
    """A call as text; settings: values with the defaults, which are left out."""
    words = [repr(value) for value in arguments]
    words += [f"{key}={value!r}" for key, (value, default) in settings.items() if value != default]
    return f"{name}({', '.join(words)})"


def _short(sizes):
    """A size for both dimensions as one number."""
    if isinstance(sizes, str | int):
        return sizes
    sizes = tuple(int(size) for size in sizes)
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _is_identifier(name: str) -> bool:
    plain = re.fullmatch(r"[a-zA-Z]\w*", name, re.ASCII) and not keyword.iskeyword(name)
    return bool(plain) and not hasattr(nn.Module, name) and name not in ("training", "T_destination")


def _path(path: str) -> str:
    """How a file names what is at `path` of the network."""
    found = ""
    for name in path.split(".") if path else ():
        number = name if name.isascii() and name.isdecimal() and str(int(name)) == name else repr(name)
        found += f".{name}" if _is_identifier(name) else f"[{number}]"
    return found
