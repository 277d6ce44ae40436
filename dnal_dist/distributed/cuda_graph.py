"""A forward and backward pass as one CUDA graph: a launch instead of thousands, where the GPU would wait for Python."""

import gc
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Passes before the capture: cuDNN times its algorithms in them, and lazy initialisations happen.
WARM_UP = 3


class CudaGraph:
    """`compute` of `inputs`, captured; it returns the named tuple, of tensors or None, that a replay gives. It sets the gradients
    of `network`'s parameters, which must be None before, and moves its statistics; so does each replay.

    A replay overwrites gradients instead of adding to them. What the passes keep in memory stays in `pool`, for other graphs of it
    only: one of them runs at a time, so they need the memory of the largest. While a further one is made, its passes run beside it.
    Raises RuntimeError if something in `compute` cannot be captured, torch.OutOfMemoryError, a kind of it, if memory is short.
    """

    def __init__(self, network: nn.Module, compute: Callable[..., NamedTuple], inputs: tuple[Tensor | None, ...], pool: tuple):
        self.inputs = [None if tensor is None else tensor.detach().clone() for tensor in inputs]
        device = next(network.parameters()).device
        buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
        generator, own = torch.cuda.default_generators[device.index], torch.cuda.current_stream(device)
        random = generator.clone_state()
        try:
            self._warm_up(network, compute, own)
            outputs = self._capture(compute, pool)
            generator.set_state(random.get_state())
        except BaseException:
            # A capture that failed leaves both in the midst of it.
            torch.cuda.set_stream(own)
            generator.graphsafe_set_state(random)
            raise
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
        # Detached: what was recorded for the backward pass would stay in memory.
        self.outputs = outputs._make(None if tensor is None else tensor.detach() for tensor in outputs)
        self.gradients = [(p, p.grad) for p in network.parameters()]

    def _warm_up(self, network: nn.Module, compute: Callable[..., NamedTuple], own: torch.cuda.Stream) -> None:
        side, mode = torch.cuda.Stream(own.device), torch.cuda.get_sync_debug_mode()
        side.wait_stream(own)
        try:
            with torch.cuda.stream(side):
                for number in range(WARM_UP):
                    if number + 1 == WARM_UP:
                        # What waits for the device cannot be captured. It fails here: a capture that fails cannot be cleaned up.
                        with warnings.catch_warnings():
                            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
                            torch.cuda.set_sync_debug_mode("error")
                    compute(*self.inputs)
                    for parameter in network.parameters():
                        parameter.grad = None
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            own.wait_stream(side)

    def _capture(self, compute: Callable[..., NamedTuple], pool: tuple) -> NamedTuple:
        self.graph = torch.cuda.CUDAGraph()
        # What is collected meanwhile might free device memory, which no capture allows.
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()
        try:
            # Loader threads go on pinning memory.
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                return compute(*self.inputs)
        finally:
            if collecting:
                gc.enable()

    def replay(self, *inputs: Tensor | None) -> NamedTuple:
        """Outputs for inputs of the same shapes, valid until the next replay; gradients are set."""
        for own, tensor in zip(self.inputs, inputs, strict=True):
            if own is not None:
                own.copy_(tensor)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.outputs
