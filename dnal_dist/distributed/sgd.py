"""SGD without the compiler."""

import inspect

import torch
from torch.optim import Optimizer


class SGD(torch.optim.SGD):
    """torch.optim.SGD, bit for bit. Torch's decorators of these methods import torch._dynamo at the first call, which takes as long
    as importing torch, only to exclude the methods from compilation."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)
