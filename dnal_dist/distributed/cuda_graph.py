"""A forward and backward pass as one CUDA graph: a launch instead of thousands, where the GPU would wait for Python."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Passes before the capture: cuDNN times its algorithms in them, and lazy initialisations happen.
WARM_UP = 3


class CudaGraph:
    """`compute` of `inputs`, captured; it returns the named tuple, of tensors or None, that a replay gives. It sets the gradients
    of `network`'s parameters, which must be None before, and moves its statistics; so does each replay.

    A replay overwrites gradients instead of adding to them. What the passes keep in memory is never given back for other use.
    Raises RuntimeError if something in `compute` cannot be captured.
    """

    def __init__(self, network: nn.Module, compute: Callable[..., NamedTuple], inputs: tuple[Tensor | None, ...]):
        self.inputs = [None if tensor is None else tensor.detach().clone() for tensor in inputs]
        device = next(network.parameters()).device
        buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
        generator = torch.cuda.default_generators[device.index]
        before_capture = generator.clone_state()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                compute(*self.inputs)
                _forget_gradients(network)
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        try:
            # Loader threads go on pinning memory meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                outputs = compute(*self.inputs)
            generator.set_state(before_capture.get_state())
        except BaseException:
            # A capture that failed leaves the generator in the midst of it.
            generator.graphsafe_set_state(before_capture)
            raise
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
        # Detached: what was recorded for the backward pass would stay in memory.
        self.outputs = outputs._make(None if tensor is None else tensor.detach() for tensor in outputs)
        self.gradients = [(p, p.grad) for p in network.parameters()]

    def replay(self, *inputs: Tensor | None) -> NamedTuple:
        """Outputs for inputs of the same shapes, valid until the next replay; gradients are set."""
        for own, tensor in zip(self.inputs, inputs, strict=True):
            if own is not None:
                own.copy_(tensor)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.outputs


def _forget_gradients(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.grad = None
