"""SGD without the compiler, AdamW, and what each keeps of a parameter."""

import inspect

import torch
from torch.optim import AdamW, Optimizer


class SGD(torch.optim.SGD):
    """torch.optim.SGD, bit for bit. Torch's decorators of these methods import torch._dynamo at the first call, which takes as long
    as importing torch, only to exclude the methods from compilation."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


# Class of each kind, and the buffers that it keeps, each in its parameter's shape. A further kind goes here: the backends hold any
# buffers of that shape, and a number of steps.
KINDS: dict[str, tuple[type[Optimizer], tuple[str, ...]]] = {
    "sgd": (SGD, ("momentum_buffer",)),
    "adamw": (AdamW, ("exp_avg", "exp_avg_sq")),
}
# Among saved buffers, the key of the number of steps; a buffer's key is its parameter's name, with a colon and its own behind it if
# that is not SGD's.
STEP = ":step"


def key(name: str, buffer: str) -> str:
    return name if buffer == "momentum_buffer" else f"{name}:{buffer}"


def settings(given) -> dict:
    """Arguments of the optimizer that a recipe's part `given` describes."""
    if given.kind == "adamw":
        return {"lr": given.lr, "betas": given.betas, "eps": given.eps, "weight_decay": given.weight_decay}
    return {"lr": given.lr, "momentum": given.momentum, "weight_decay": given.weight_decay, "nesterov": given.nesterov}


def buffers(given) -> tuple[str, ...]:
    """Names of the buffers that it keeps."""
    return KINDS[given.kind][1] if given.kind != "sgd" or given.momentum else ()
