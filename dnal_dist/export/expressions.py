"""Operations of a torch.export program as the text of plain torch."""

import math
import operator
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.fx import Node

END = 9223372036854775807
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", operator.add: "+", operator.sub: "-", operator.mul: "*"}
_INFIX |= {operator.floordiv: "//", operator.truediv: "/"}
# Written with the operation's own arguments in their order.
_FUNCTIONAL = {"relu", "relu6", "silu", "hardswish", "hardsigmoid", "gelu", "elu", "leaky_relu", "softplus", "mish", "selu"}
_FUNCTIONAL |= {"adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d", "pad"}
_FUNCTIONS = {"sigmoid", "tanh", "matmul", "exp", "sqrt"}
_METHODS = {"mean", "flatten", "transpose", "unsqueeze", "squeeze", "contiguous", "clone", "softmax", "sum", "unflatten"}


class Expression(NamedTuple):
    text: str
    whole: bool
    """Whether it needs no parentheses within another."""
    variables: dict[str, int]
    """How often it reads each variable."""

    def __str__(self) -> str:
        return self.text


def expression(node: Node, read: Callable[[Node], Expression]) -> Expression:
    """The text of one operation. read: that of a node it reads."""
    seen: Counter[str] = Counter()

    def text(argument, closed: bool = False) -> str:
        if isinstance(argument, Node):
            found = read(argument)
            seen.update(found.variables)
            return found.text if found.whole or not closed else f"({found.text})"
        if isinstance(argument, list | tuple):
            return f"[{', '.join(map(text, argument))}]"
        return _value(argument)

    written, whole = _written(node, text)
    return Expression(written, whole, dict(seen))


def _value(argument) -> str:
    if isinstance(argument, float) and not math.isfinite(argument):
        return f"float({str(argument)!r})"
    if argument is None or isinstance(argument, bool | int | float | str):
        return repr(argument)
    if isinstance(argument, torch.dtype | torch.memory_format | torch.layout):
        return str(argument)
    if isinstance(argument, torch.device):
        return repr(argument.type)
    raise ValueError(f"{argument!r:.80} cannot be written to a file")


def _written(node: Node, text: Callable) -> tuple[str, bool]:
    args, target = list(node.args), node.target
    if target is operator.getitem:
        return f"{text(args[0], True)}[{text(args[1])}]", True
    if target in _INFIX:
        return f"{text(args[0], True)} {_INFIX[target]} {text(args[1], True)}", False
    name, _, overload = str(target).removeprefix("aten.").partition(".")
    plain = name.rstrip("_") if not name.startswith("_") else name
    if plain in _INFIX and not node.kwargs and len(args) == 2:
        return f"{text(args[0], True)} {_INFIX[plain]} {text(args[1], True)}", False
    if special := _special(plain, overload, args, node, text):
        return special, True
    keywords = [f"{key}={text(value)}" for key, value in node.kwargs.items()]
    if plain in _FUNCTIONAL:
        return f"F.{plain}({', '.join([*map(text, args), *keywords])})", True
    if plain in _FUNCTIONS and not keywords:
        return f"torch.{plain}({', '.join(map(text, args))})", True
    if plain in _METHODS and not any(key in ("dtype", "memory_format") for key in node.kwargs):
        return f"{text(args[0], True)}.{plain}({', '.join([*map(text, args[1:]), *keywords])})", True
    if not str(target).startswith("aten."):
        raise ValueError(f"the operation {target} cannot be written to a file")
    # Out of place, as the graph reads it.
    own = plain if hasattr(torch.ops.aten, plain) else name
    return f"torch.ops.aten.{own}.{overload or 'default'}({', '.join([*map(text, args), *keywords])})", True


def _special(plain: str, overload: str, args: list, node: Node, text: Callable) -> str:
    """Operations that read better in a form of their own; "" for others."""
    if plain == "sym_size":
        return f"{text(args[0], True)}.shape[{args[1]}]"
    if plain == "hardtanh":
        limits = args[1:] or [-1.0, 1.0]
        return f"F.relu6({text(args[0])})" if limits == [0.0, 6.0] else f"F.hardtanh({', '.join(map(text, [args[0], *limits]))})"
    if plain == "dropout":
        return f"F.dropout({text(args[0])}, {text(args[1])}, self.training)"
    if plain == "slice":
        dim, start, end, step = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
        if not isinstance(dim, int) or dim < 0:
            return ""
        part = f"{'' if start in (0, None) else text(start)}:{'' if end is None or end == END else text(end)}"
        part += "" if step == 1 else f":{text(step)}"
        return text(args[0], True) if part == ":" else f"{text(args[0], True)}[{':, ' * dim}{part}]"
    if plain in ("view", "reshape", "_unsafe_view", "permute", "expand") and not node.kwargs:
        method = plain if plain in ("permute", "expand") else "reshape"
        return f"{text(args[0], True)}.{method}({', '.join(map(text, args[1]))})"
    if plain in ("split_with_sizes", "split", "chunk"):
        return f"torch.{'chunk' if plain == 'chunk' else 'split'}({', '.join(map(text, args))})"
    if plain in ("cat", "stack"):
        return f"torch.{plain}({', '.join(map(text, args))})"
    return ""
