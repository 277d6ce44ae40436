"""A network of fewer channels from a graph: the same operations, narrower layers, sizes that fit. It needs nothing of the module
that the graph was read from."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dnal_dist.nets.activation import OPERATIONS
from dnal_dist.nets.rules import RULES


class Step(NamedTuple):
    """One operation of a Narrow network."""

    out: str
    """Name of the result."""
    kind: str
    """"module" (its path), "op" (its name in torch.ops.aten), "item" or "tensor" (its name)."""
    target: str
    args: list
    kwargs: dict


class Ref(NamedTuple):
    """The result of another step, as an argument."""

    name: str


OF_IMAGES = "images' device"
NUMBER = "number of images"
MOST_STEPS, MOST_PIXELS = 20_000, 1 << 14


def operation(name: str) -> Callable:
    """The operation of aten called `name`, with its overload. Raises ValueError if there is none, and unless a rule names it or it
    is plain: public, without text (which may be the name of a file), without effect on its arguments, checked for bounds."""
    plain, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops.aten, plain, None), overload or "default", None)
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"no operation is called {name!r}")
    schema = found._schema
    text = plain != "einsum" and any("str" in str(argument.type) for argument in schema.arguments)
    private = plain.startswith("_") or any(word in plain for word in ("unsafe", "strided", "resize", "set_", "sparse", "quantize"))
    if plain.removesuffix("_") not in RULES and (text or private or schema.is_mutable):
        raise ValueError(f"operation {name!r} is not among those that a network may have")
    return found


class Beside(nn.Module):
    """Its modules, parameters and buffers may have any name: what else it is given under that name, it has beside them."""

    def __setattr__(self, name: str, value) -> None:
        taken = any(name in self.__dict__.get(held, {}) for held in ("_modules", "_parameters", "_buffers"))
        if taken and not isinstance(value, nn.Module | nn.Parameter | None):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)


class Narrow(Beside):
    """A network that runs `steps` one after the other on images (n, 3, H, W), and returns what the last one gives.

    layers: modules by path, which keep the names of the network that it was made from. image_size: H and W. `uses` has how often a
    result is an argument, `calls` how often steps have a module or tensor.
    """

    def __init__(self, steps: list[Step], layers: dict[str, nn.Module], tensors: dict[str, Tensor | nn.Parameter], image_size: int):
        super().__init__()
        # Beside the modules, among which there may be any name.
        own = self.__dict__
        own["steps"], own["image_size"] = steps, image_size
        of_kind = {"module": layers, "tensor": tensors, "op": None, "item": None}
        for step in steps:
            if len(steps) > MOST_STEPS or (of_kind[step.kind] is not None and step.target not in of_kind[step.kind]):
                raise ValueError(f"step {step.out} of {len(steps)}: nothing of it is called {step.target}")
        for path, layer in layers.items():
            siblings, name = _holder(self, path)._modules, path.rpartition(".")[2]
            if name in siblings:  # the holder of what is called by this path and more
                layer._modules.update(siblings[name]._modules)
            siblings[name] = layer
        for name, tensor in tensors.items():
            holder = _holder(self, name)
            (holder._parameters if isinstance(tensor, nn.Parameter) else holder._buffers)[name.rpartition(".")[2]] = tensor
        last: dict[str, int] = {}
        for i, step in enumerate(steps):
            for name in names([step.args, step.kwargs]):
                last[name] = i
        own["ends"] = [[] for _ in steps]
        for name, at in last.items():
            own["ends"][at].append(name)
        own["edges"] = [0, len(steps)]
        own["uses"] = Counter(name for step in steps for name in names([step.args, step.kwargs]))
        own["calls"] = Counter(step.target for step in steps if step.kind in ("module", "tensor"))
        operations = [operation(step.target) if step.kind == "op" else None for step in steps]
        own["operations"] = [OPERATIONS.get(one, one) for one in operations]

    def forward(self, images: Tensor) -> Tensor:
        found: dict = {"images": images}
        for first, last in itertools.pairwise(self.edges):
            found = self.within(first, last, found, (images.device, images.shape[0]))
        return found[self.steps[-1].out]

    def within(self, first: int, last: int, found: dict, images: tuple[torch.device, int]) -> dict:
        """The results of steps `first` to `last` that later ones read, from those of the steps before. images: where they are, and
        their number."""
        found = dict(found)
        for step, call, ends in list(zip(self.steps, self.operations, self.ends, strict=True))[first:last]:
            if step.kind == "tensor":
                result = _named(self, step.target)
            elif step.kind == "module":
                result = _named(self, step.target)(*(found[ref.name] for ref in step.args))
            elif step.kind == "item":
                result = found[step.args[0].name][step.args[1]]
            else:
                result = call(*_filled(step.args, found, images), **_filled(step.kwargs, found, images))
            found[step.out] = result
            for name in ends:
                del found[name]
        return found

    def divide(self, every: int) -> None:
        """Run about `every` steps at a time by `within`, which a caller may wrap."""
        self.__dict__["edges"] = [*range(0, len(self.steps), every), len(self.steps)]

    def called(self, step: Step) -> nn.Module | Tensor | None:
        """The module or tensor of a step."""
        return _named(self, step.target) if step.kind in ("module", "tensor") else None

    def replace(self, name: str, tensor: Tensor) -> None:
        """Another parameter called `name`."""
        held, own = _holder(self, name)._parameters, name.rpartition(".")[2]
        held[own] = nn.Parameter(tensor, held[own].requires_grad)

    def with_steps(self, steps: list[Step], layers: Mapping[str, nn.Module] = MappingProxyType({})) -> "Narrow":
        """A network of other steps with modules and tensors of this one, or of `layers`."""
        layers = {s.target: layers.get(s.target) or _named(self, s.target) for s in steps if s.kind == "module"}
        tensors = {s.target: _named(self, s.target) for s in steps if s.kind == "tensor"}
        return Narrow(steps, layers, tensors, self.image_size).train(self.training)

    def leaves(self) -> list[nn.Module]:
        """The modules that steps call, in their order."""
        return [_named(self, path) for path in dict.fromkeys(step.target for step in self.steps if step.kind == "module")]


def _holder(root: nn.Module, path: str) -> nn.Module:
    """The module that holds what is called `path`, made where it is not there."""
    for name in path.split(".")[:-1]:
        if name not in root._modules:
            root.register_module(name, nn.Module())
        root = root._modules[name]
    return root


def _named(module: nn.Module, path: str) -> nn.Module | Tensor:
    """The module or tensor called `path` within `module`."""
    *within, last = path.split(".")
    for name in within:
        module = module._modules[name]
    held = next(held for held in (module._modules, module._parameters, module._buffers) if last in held)
    return held[last]


def _filled(argument, found: dict, images: tuple[torch.device, int]):
    if isinstance(argument, Ref):
        return found[argument.name]
    if isinstance(argument, list):
        return [_filled(a, found, images) for a in argument]
    if isinstance(argument, dict):
        return {k: _filled(a, found, images) for k, a in argument.items()}
    if argument is OF_IMAGES or argument is NUMBER:
        return images[argument is NUMBER]
    return argument


def names(argument) -> list[str]:
    """The results that an argument names."""
    if isinstance(argument, Ref):
        return [argument.name]
    if isinstance(argument, list | dict):
        parts = argument.values() if isinstance(argument, dict) else argument
        return [name for part in parts for name in names(part)]
    return []


def described(network: Narrow, module: Callable[[nn.Module], list]) -> list:
    """[steps, modules, tensors, image size] as JSON; module: the description of one module."""
    steps = [[step.out, step.kind, step.target, _encoded(step.args), _encoded(step.kwargs)] for step in network.steps]
    layers = {step.target: _named(network, step.target) for step in network.steps if step.kind == "module"}
    of_steps = dict.fromkeys(step.target for step in network.steps if step.kind == "tensor")
    own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    tensors = {
        name: [list(own[name].shape), str(own[name].dtype).removeprefix("torch."), isinstance(own[name], nn.Parameter)]
        + [False] * (isinstance(own[name], nn.Parameter) and not own[name].requires_grad)
        for name in of_steps
    }
    return [steps, {path: module(layer) for path, layer in layers.items()}, tensors, network.image_size]


def made(description: list, module: Callable[[list], nn.Module]) -> Narrow:
    """The network that `described` described. Raises ValueError, or whatever comes of another thing in its place."""
    steps, layers, tensors, image_size = description
    if type(image_size) is not int or not 0 < image_size <= MOST_PIXELS:
        raise ValueError(f"images of {image_size} pixels")
    found = {}
    for name, (shape, dtype, parameter, *trains) in tensors.items():
        tensor = torch.zeros(shape, dtype=_dtype(dtype))
        if tensor.is_floating_point():  # as those of modules are, whatever the network was in when it was described
            tensor = tensor.to(torch.get_default_dtype())
        found[name] = nn.Parameter(tensor, trains != [False]) if parameter else tensor
    steps = [Step(out, kind, target, _decoded(args), _decoded(kwargs)) for out, kind, target, args, kwargs in steps]
    return Narrow(steps, {path: module(item) for path, item in layers.items()}, found, image_size)


def _dtype(name: str) -> torch.dtype:
    if not isinstance(found := getattr(torch, name, None), torch.dtype):
        raise ValueError(f"no type of numbers is called {name!r}")
    return found


# What is no JSON among the arguments of operations, by a key of its own.
_FORMATS = {str(f): f for f in (torch.contiguous_format, torch.channels_last, torch.preserve_format, torch.strided)}


def _encoded(argument):
    if isinstance(argument, Ref):
        return {"ref": argument.name}
    if argument is OF_IMAGES or argument is NUMBER:
        return {"number" if argument is NUMBER else "device": True}
    if isinstance(argument, torch.dtype):
        return {"dtype": str(argument).removeprefix("torch.")}
    if isinstance(argument, torch.memory_format | torch.layout):
        return {"format": str(argument)}
    if isinstance(argument, list | tuple):
        return [_encoded(a) for a in argument]
    if isinstance(argument, dict):
        return {"map": {k: _encoded(a) for k, a in argument.items()}}
    return argument


def _decoded(argument):
    if isinstance(argument, list):
        return [_decoded(a) for a in argument]
    if not isinstance(argument, dict):
        return argument
    ((kind, value),) = argument.items()
    if kind == "map":
        return {k: _decoded(a) for k, a in value.items()}
    makers = {"ref": Ref, "dtype": _dtype, "format": _FORMATS.__getitem__}
    makers |= {"device": lambda _: OF_IMAGES, "number": lambda _: NUMBER}
    return makers[kind](value)
