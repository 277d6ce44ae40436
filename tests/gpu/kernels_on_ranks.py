"""Jobs of test_kernels: BatchNorm across processes, compiled segments, layouts, and what a checkpoint copies."""

import itertools
import threading

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from trajectory_on_ranks import trajectories

from dnal_dist import recipe
from dnal_dist.checkpoint.writer import Writer
from dnal_dist.distributed.batchnorm import _normalise_across
from dnal_dist.distributed.context import Context
from dnal_dist.training import setup, state
from dnal_dist.training.steps import weight_step


def _off(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((ours.double() - exact.double()).abs().max() / exact.double().abs().max())


def batchnorm(context: Context) -> dict[str, dict[str, float]]:
    """Of BatchNorm across processes (one, or several with a batch of their own each) against F.batch_norm over all images in
    float64: differences of output, gradients and running statistics, by dtype, shape, layout, and whether statistics move."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    shapes, layouts = [(6, 8, 5, 7), (6, 8)], ["contiguous", "channels_last"]
    dtypes = [torch.float32, torch.bfloat16, *([torch.float16] if context.device.type == "cuda" else [])]
    found = {}
    for dtype, shape, layout, moving in itertools.product(dtypes, shapes, layouts, (True, False)):
        if len(shape) == 2 and layout == "channels_last":
            continue
        generator = torch.Generator().manual_seed(0)
        size = shape[0] * context.world_size, *shape[1:]
        whole, upstream = (torch.randn(size, generator=generator).to(dtype) * 2 + 0.5 for _ in range(2))
        affine = [torch.rand(8, generator=generator) + 0.5 for _ in range(2)]
        exact = _normalised(whole.double(), upstream.double(), [a.double() for a in affine], moving, F.batch_norm)
        mine = slice(context.rank * shape[0], (context.rank + 1) * shape[0])
        memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        x, g = (t[mine].to(context.device, memory_format=memory) for t in (whole, upstream))
        ours = _normalised(x, g, [a.to(context.device) for a in affine], moving, _normalise_across)
        assert ours["output"].dtype == dtype and ours["output"].is_contiguous(memory_format=memory)
        off = {}
        for name, tensor in ours.items():
            if name in ("weight", "bias"):
                context.sum_(tensor)
            of_all = exact[name][mine] if name in ("output", "input") else exact[name]
            off[name] = _off(tensor.cpu(), of_all)
        kind = f"{dtype}".removeprefix("torch."), f"{len(shape)}d", layout, "moving" if moving else "frozen"
        found[" ".join(kind)] = off
    return found


def _normalised(x, upstream, affine, moving: bool, normalise) -> dict[str, torch.Tensor]:
    """Output, gradients and, where they move, running statistics of one call of `normalise`, which is like F.batch_norm."""
    x, affine = x.clone().requires_grad_(), [a.clone().requires_grad_() for a in affine]
    statistics = [torch.zeros_like(affine[0]), torch.ones_like(affine[0])] if moving else [None, None]
    statistics = [s if s is None else s.detach() for s in statistics]
    output = normalise(x, *statistics, *affine, True, 0.1, 1e-5)
    gradients = torch.autograd.grad(output, [x, *affine], upstream)
    found = {"output": output.detach(), **dict(zip(("input", "weight", "bias"), gradients, strict=True))}
    return found | dict(zip(("mean", "variance"), statistics, strict=True)) if moving else found


def compiled(context: Context, out: str, cases: list[str]) -> dict:
    """Trajectories of compiled networks, as trajectory_on_ranks.trajectories, and how many graphs were compiled."""
    from torch._dynamo.utils import counters

    if context.device.type == "cpu":
        # Inductor's C++ takes minutes; what is captured, and how often, is the same.
        torch.nn.Module.compile = lambda module: module.__setattr__("_compiled_call_impl", aot_eager(module._call_impl))
    counters.clear()
    failed = trajectories(context, out, cases)
    return {"failed": failed, "graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}


def aot_eager(call):
    return torch.compile(call, backend="aot_eager")


class Copies(TorchDispatchMode):
    """Inside, tensors copied from `device` to the CPU are counted."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.number, self.bytes = device, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name, tensors = function.name(), [a for a in args if isinstance(a, torch.Tensor)]
        copied = name in ("aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::_local_scalar_dense")
        if copied and any(t.device.type == "cuda" for t in tensors) and getattr(result, "is_cpu", True):
            self.number, self.bytes = self.number + 1, self.bytes + tensors[-1].nbytes
        return result


def copied_by_a_checkpoint(context: Context, overrides: list[str]) -> dict:
    """Of one checkpoint in the search: tensors and bytes in it, those copied from the GPU for it, tensors that are not on the CPU
    or share their memory with the run's own, and the thread that writes."""
    run = setup.prepare(recipe.load("recipes/digits.yaml", overrides), context)
    run.state.phase = "search"
    images = torch.randn(4, 3, 8, 8, device=context.device)
    trained = context.wrap(run.network, run.recipe.phases.search.optimizer, {}, run.recipe.training)
    weight_step(trained, images, torch.arange(4, device=context.device), 4, run.architecture.gates(1.0))
    threads = []

    def write(taken):
        threads.append(threading.current_thread().name)
        return Writer._write(run.writer, taken)

    with trained.gathered() as momentum:
        with Copies(context.device) as copies:
            taken = state.take(run, momentum)
        own = {t.data_ptr() for t in (*run.network.state_dict().values(), *momentum.values(), run.architecture.alpha)}
        run.writer._write = write
        state.save(run, momentum)
    run.writer.settle()
    trained.close()
    run.close()
    return {
        "tensors": len(taken.tensors),
        "bytes": sum(t.nbytes for t in taken.tensors.values()),
        "copies": copies.number,
        "bytes copied": copies.bytes,
        "momentum": sum(name.startswith("momentum.") for name in taken.tensors),
        "elsewhere": [name for name, t in taken.tensors.items() if t.device.type != "cpu" or t.data_ptr() in own],
        "threads": threads,
        "main": threading.current_thread().name,
    }
