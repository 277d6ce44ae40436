"""Bytes that collectives communicate."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Inside, every collective is noted: (operation, bytes) in `operations`. Bytes are those of the tensor that the operation is
    about: what an all-reduce reduces, what a gather ends with, what a reduce-scatter begins with."""

    def __init__(self):
        super().__init__()
        self.operations: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in function.name():
            name = function.name().partition("::")[2].strip("_")
            self.operations.append((NAMES.get(name, name), max(map(_bytes, args), default=0)))
        return function(*args, **(kwargs or {}))

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.operations)


NAMES = {
    **dict.fromkeys(("allreduce", "all_reduce", "allreduce_coalesced"), "all-reduce"),
    **dict.fromkeys(("allgather_base", "allgather", "all_gather_into_tensor", "allgather_into_tensor_coalesced"), "all-gather"),
    **dict.fromkeys(("reduce_scatter_base", "reduce_scatter", "reduce_scatter_tensor"), "reduce-scatter"),
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
}


def _bytes(argument) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0
