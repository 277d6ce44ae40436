"""What the device can do: copies, matrix products, launches, depthwise convolutions in both layouts, optimisers."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from stepping import free, reporting
from torch import Tensor, nn

from dnal_dist import nets
from dnal_dist.distributed.optimizers import SGD

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PRECISIONS = {"bf16": (torch.bfloat16, True), "tf32": (torch.float32, True), "fp32": (torch.float32, False)}


def seconds_of(run: Callable[[], object], device: str, budget: float = 0.15) -> float:
    """Mean seconds of `run`, which is called twice before and then for about `budget` seconds, 3 to 200 times."""

    def spent(count: int) -> float:
        if device == "cuda":
            one, other = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            one.record()
            for _ in range(count):
                run()
            other.record()
            other.synchronize()
            return one.elapsed_time(other) / 1000
        begun = time.perf_counter()
        for _ in range(count):
            run()
        return time.perf_counter() - begun

    run()
    once = max(spent(1), 1e-6)
    count = max(3, min(200, int(budget / once)))
    return spent(count) / count


def set_precision(name: str) -> torch.dtype:
    dtype, tf32 = PRECISIONS[name]
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    return dtype


def machine(part) -> None:
    """Bandwidth of copies (bytes read and written), rates of matrix products, time to launch."""
    device, small = part.device, part.small
    count = 2**22 if small else 2**29
    source = torch.ones(count, dtype=torch.float16, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device, 0.5)
    part.report({"what": "copy on the device", "bytes_per_second": round(4 * count / seconds)})
    if device == "cuda":
        host = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(2**26, dtype=torch.uint8, device=device)
        seconds = seconds_of(lambda: there.copy_(host, non_blocking=True), device)
        part.report({"what": "copy from page-locked memory", "bytes_per_second": round(2**26 / seconds)})
    side = 256 if small else 8192
    for name in PRECISIONS:
        with reporting({"what": f"matrix product {side}^3, {name}"}, part.report):
            dtype = set_precision(name)
            one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
            seconds = seconds_of(lambda one=one, other=other: one @ other, device, 0.5)
            part.report(
                {"what": f"matrix product {side}^3, {name}", "precision": name, "macs_per_second": round(side**3 / seconds)}
            )
    tiny = torch.zeros(1, device=device)
    launches = 200 if small else 5000
    begun = time.perf_counter()
    for _ in range(launches):
        tiny.add_(1)
    if device == "cuda":
        torch.cuda.synchronize()
    part.report({"what": "a tiny kernel from Python", "microseconds": round((time.perf_counter() - begun) / launches * 1e6, 2)})


class Depthwise(NamedTuple):
    channels: int
    kernel: int
    stride: int
    side: int
    """Of the input."""


def depthwise_shapes(name: str, width: float, image_size: int) -> dict[Depthwise, int]:
    """The depthwise convolutions of a network and how many of each there are, those with the most to compute first."""
    with torch.device("meta"):
        network = nets.build(name, width=width)
    found: dict[Depthwise, int] = {}

    def count(conv: nn.Conv2d, inputs: tuple[Tensor], _: Tensor) -> None:
        if conv.groups > 1:
            shape = Depthwise(conv.in_channels, conv.kernel_size[0], conv.stride[0], inputs[0].shape[-1])
            found[shape] = found.get(shape, 0) + 1

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(2, 3, image_size, image_size, device="meta"))
    work = {s: number * s.channels * s.kernel**2 * (s.side / s.stride) ** 2 for s, number in found.items()}
    return {shape: found[shape] for shape in sorted(found, key=work.get, reverse=True)}


def depthwise(part) -> None:
    """Depthwise convolutions, forward and both gradients, in milliseconds, and the seconds of the first calls, by layout and
    precision. The ones with the most to compute come first, of the supernet and of MobileNetV2 in turn."""
    # By the part's name: an algorithm once chosen for a shape stays with the process, whatever the switch says later.
    benchmark = part.name.endswith("benchmark")
    width, size, batch, most = (0.25, 32, 4, 2) if part.small else (1.0, 224, 96, 14)
    shapes = [list(depthwise_shapes(name, width, size).items())[:most] for name in ("proxyless_supernet", "mobilenetv2_imagenet")]
    turns = [(shape, number) for pair in itertools.zip_longest(*shapes) for shape, number in filter(None, pair)]
    for precision in ("bf16", "tf32"):
        for shape, number in dict(turns).items():
            if part.left() < 3:
                part.report({"what": "the rest", "failed": "not run: no time was left"})
                return
            row = {**shape._asdict(), "number": number, "batch": batch, "precision": precision, "cudnn_benchmark": benchmark}
            with reporting(row, part.report):
                for layout in LAYOUTS:
                    row |= {
                        f"{layout} {k}": v
                        for k, v in _depthwise_ms(part.device, shape, batch, precision, layout, benchmark).items()
                    }
                row["ratio"] = round(row["channels_last total"] / row["contiguous total"], 3)
                part.report(row)


def _depthwise_ms(device: str, shape: Depthwise, batch: int, precision: str, layout: str, benchmark: bool) -> dict[str, float]:
    torch.backends.cudnn.benchmark = benchmark
    dtype, memory_format, padding = set_precision(precision), LAYOUTS[layout], shape.kernel // 2
    x = torch.randn(batch, shape.channels, shape.side, shape.side, device=device, dtype=dtype).contiguous(
        memory_format=memory_format
    )
    weight = torch.randn(shape.channels, 1, shape.kernel, shape.kernel, device=device, dtype=dtype)
    weight = weight.contiguous(memory_format=memory_format)
    forward = lambda: torch.nn.functional.conv2d(x, weight, None, shape.stride, padding, 1, shape.channels)  # noqa: E731
    begun = time.perf_counter()
    gradient = torch.randn_like(forward())

    def backward(inputs: bool, weights: bool) -> Callable[[], object]:
        both = ([shape.stride] * 2, [padding] * 2, [1, 1], False, [0, 0], shape.channels, [inputs, weights, False])
        return lambda: torch.ops.aten.convolution_backward(gradient, x, weight, None, *both)

    runs = {"forward": forward, "to input": backward(True, False), "to weights": backward(False, True)}
    runs["to input"](), runs["to weights"]()
    if device == "cuda":
        torch.cuda.synchronize()
    # Kernels may be compiled in them.
    first = time.perf_counter() - begun
    found = {name: 1000 * seconds_of(run, device, 0.02) for name, run in runs.items()}
    rounded = {name: round(ms, 4) for name, ms in {**found, "total": sum(found.values())}.items()}
    return {**rounded, "first call seconds": round(first, 3)}


def optimizers(part) -> None:
    """One step of SGD with momentum and weight decay over a network's weights, in milliseconds."""
    name, width = ("proxyless_supernet", 0.25) if part.small else ("proxyless_supernet", 1.0)
    for layout, memory_format in LAYOUTS.items():
        network = nets.build(name, width=width).to(part.device).to(memory_format=memory_format)
        parameters = list(network.parameters())
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        for kind, make in _optimizers(parameters):
            row = {"network": name, "tensors": len(parameters), "layout": layout, "optimizer": kind}
            with reporting(row, part.report):
                part.report({**row, "ms": round(1000 * seconds_of(make().step, part.device, 0.3), 3)})
        del network, parameters
        free()


def _optimizers(parameters: list[nn.Parameter]) -> Iterator[tuple[str, Callable[[], torch.optim.Optimizer]]]:
    usual = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 4e-5}
    yield "dnal_dist's SGD", lambda: SGD(parameters, **usual)
    for kind in ("foreach", "fused"):
        yield f"torch's SGD, {kind}", lambda kind=kind: torch.optim.SGD(parameters, **usual, **{kind: True})
    yield "torch's SGD, tensor by tensor", lambda: torch.optim.SGD(parameters, **usual, foreach=False, fused=False)
