"""Weight gradients of depthwise convolutions on one thread of a CPU: those of torch, and as products of matrices.

    python benchmarks/depthwise.py

Both are equal, or nothing is timed. Times are the thread's own, whatever else runs; medians, by turns.
"""

import functools
import time

import torch

from dnal_dist.export import latency
from dnal_dist.nets.convolution import MOST, MOST_STRIDED, weight_gradient

# Images, channels, side, kernel, stride.
SHAPES = [
    *((4, 1152, 2, 7, 1), (8, 1152, 3, 7, 1), (8, 480, 6, 7, 1), (8, 480, 6, 5, 1), (8, 240, 12, 7, 2), (8, 240, 12, 5, 2)),
    *((8, 240, 12, 7, 1), (32, 1152, 7, 7, 1), (32, 576, 7, 5, 1), (8, 480, 14, 7, 1), (8, 240, 20, 7, 1), (32, 480, 14, 7, 1)),
]


def of_torch(x: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
    sizes = None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], len(weight)
    return torch.ops.aten.convolution_backward(gradient, x, weight, *sizes, [False, True, False])[1]


def main() -> None:
    torch.set_num_threads(1)
    print("| images | channels | side | kernel | stride | layout | torch, ms | products, ms | used |")
    print("|--:|--:|--:|--:|--:|---|--:|--:|---|")
    for images, channels, side, kernel, stride in SHAPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(images, channels, side, side).contiguous(memory_format=layout)
            weight, out = torch.randn(channels, 1, kernel, kernel), -(-side // stride)
            gradient = torch.randn(images, channels, out, out).contiguous(memory_format=layout)
            runs = {
                "torch": functools.partial(of_torch, x, gradient, weight, stride, kernel // 2),
                "products": functools.partial(weight_gradient, x, gradient, weight, (stride,) * 2, (kernel // 2,) * 2),
            }
            own, ours = (run() for run in runs.values())
            assert (own - ours).abs().max() < 1e-4 * own.abs().max()
            times = latency.rounds(runs, 1.0, x.device, time.thread_time)
            cells = [f"{1e3 * sorted(times[name])[len(times[name]) // 2]:.2f}" for name in runs]
            used = images * out * out <= (MOST if stride == 1 else MOST_STRIDED)
            name = "contiguous" if layout is torch.contiguous_format else "channels_last"
            print(
                f"| {images} | {channels} | {side} | {kernel} | {stride} | {name} | {' | '.join(cells)} | {'yes' if used else ''} |"
            )


if __name__ == "__main__":
    main()
