"""The optimizers that every backend can hold, and what each keeps of a parameter."""

import inspect

import torch
from torch.optim import Adam, AdamW, Optimizer, RAdam, RMSprop


class SGD(torch.optim.SGD):
    """torch.optim.SGD, bit for bit. Torch's decorators of these methods import torch._dynamo at the first call, which takes as long
    as importing torch, only to exclude the methods from compilation."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


# Class of each kind, and the buffers that it keeps, each in its parameter's shape. A further kind goes here, and in the recipe: the
# backends hold any buffers of that shape, whose elements do not depend on one another, and a number of steps.
KINDS: dict[str, tuple[type[Optimizer], tuple[str, ...]]] = {
    "sgd": (SGD, ("momentum_buffer",)),
    "adam": (Adam, ("exp_avg", "exp_avg_sq")),
    "adamw": (AdamW, ("exp_avg", "exp_avg_sq")),
    "radam": (RAdam, ("exp_avg", "exp_avg_sq")),
    "rmsprop": (RMSprop, ("momentum_buffer", "square_avg")),
}
# Among saved buffers, the key of the number of steps; a buffer's key is its parameter's name, with a colon and its own behind it if
# that is not SGD's.
STEP = ":step"


def key(name: str, buffer: str) -> str:
    return name if buffer == "momentum_buffer" else f"{name}:{buffer}"


def kept(momentum) -> set[str]:
    """Names of the buffers whose keys are among these."""
    return {name.partition(":")[2] or "momentum_buffer" for name in momentum if name != STEP}


def settings(given) -> dict:
    """Arguments of the optimizer that a recipe's part `given` describes."""
    common = {"lr": given.lr, "weight_decay": given.weight_decay}
    if given.kind == "sgd":
        return common | {"momentum": given.momentum, "nesterov": given.nesterov}
    if given.kind == "rmsprop":
        return common | {"momentum": given.momentum, "alpha": given.betas[1], "eps": given.eps}
    return common | {"betas": given.betas, "eps": given.eps}


def buffers(given) -> tuple[str, ...]:
    """Names of the buffers that it keeps."""
    return tuple(name for name in KINDS[given.kind][1] if name != "momentum_buffer" or given.momentum)
