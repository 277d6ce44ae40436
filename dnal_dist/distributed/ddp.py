"""The replicated backend: a single process, or DDP."""

import contextlib
import functools
import warnings

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dnal_dist.common.span import span
from dnal_dist.distributed.cuda_graph import CudaGraph
from dnal_dist.distributed.wrapper import Trained


class Replicated(Trained):
    """Every process has all of the network: DistributedDataParallel, or a single process."""

    def wrap(self, momentum):
        self.module.to(memory_format=self.options.memory_format)
        self.graphs: dict[tuple, CudaGraph | None] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.options.cuda_graphs else None
        self.optimizer = self.made_optimizer()
        # In the parameter's own layout: the optimiser's fast path is for tensors of one layout.
        self.start_with(momentum, lambda whole, parameter: torch.empty_like(parameter).copy_(whole).detach())
        if self.options.backend == "single":
            return self.module
        with warnings.catch_warnings():
            # torch is renaming broadcast_buffers; the new name is not in every release that this project runs on.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            # Running statistics are combined at the end of each epoch (see context.average_statistics), not sent at every step.
            network = DistributedDataParallel(
                self.module,
                device_ids=[self.options.device.index] if self.options.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        self._fix_buckets(network)
        return network

    def _fix_buckets(self, network: DistributedDataParallel) -> None:
        """Let DDP arrange its buckets again now, as it does once after the first backward pass. Three processes or more sum in an
        order that depends on the buckets, and a resumed run would sum its first step otherwise than the one that went on."""
        own = self.module.__dict__.get("forward")
        # Gradients in the parameters' own layout, or DDP warns of each.
        self.module.forward = lambda _: sum((p * torch.zeros_like(p)).sum() for p in self.module.parameters())
        for _ in range(2):
            # On a GPU, DDP fails without an argument.
            network(torch.zeros((), device=self.options.device)).backward()
        self.optimizer.zero_grad()
        del self.module.forward
        if own is not None:
            self.module.forward = own

    def slim(self, keep):
        before = self.module.slim
        super().slim(keep)
        if self.options.cuda_graphs and self.module.slim is not before:  # they are those of the channels before
            self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()

    def forward(self, network, images, gates=None):
        mixed = self.options.dtype != torch.float32
        with torch.autocast(self.options.device.type, self.options.dtype, enabled=mixed):
            return super().forward(network, images, gates)

    def step(self, forward, micro_batches, batch):
        scaler = self.options.scaler
        if len(micro_batches) == 1:
            outcomes = [self._passes("weights", functools.partial(self._backward, forward, batch), batch, micro_batches[0])]
        else:
            outcomes = []
            for number, micro_batch in enumerate(micro_batches, 1):
                alone = number == len(micro_batches) or self.options.backend == "single"
                with contextlib.nullcontext() if alone else self.network.no_sync():
                    outcomes.append(self._backward(forward, batch, *micro_batch))
        with span("optimizer"):
            scaler.unscale_(self.optimizer)
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_norm)
            scaler.step(self.optimizer)
            scaler.update()
            self.optimizer.zero_grad()
        return outcomes

    def _backward(self, forward, batch: int, *micro_batch):
        """The outcome of a micro-batch, whose gradients are added."""
        outcome = forward(self.network, *micro_batch)
        with span("backward"):
            self.options.scaler.scale(outcome.loss / batch).backward()
        return outcome

    def passes(self, compute, batch, inputs):
        return self._passes("architecture", compute, batch, inputs)

    def _passes(self, step: str, compute, batch: int, inputs: tuple):
        """compute(*inputs), by a CUDA graph where there are any."""
        if (graph := self._graph(step, compute, batch, inputs)) is None:
            return compute(*inputs)
        with span("backward"):
            return graph.replay(*inputs)

    def _graph(self, step: str, compute, batch: int, inputs: tuple) -> CudaGraph | None:
        """The graph of such passes, captured when they first come; None where there are none."""
        if not self.options.cuda_graphs:
            return None
        key = step, batch, *(None if tensor is None else tensor.shape for tensor in inputs)
        if key not in self.graphs:
            try:
                self.graphs[key] = CudaGraph(self.module, compute, inputs, self.pool)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # A network may do what no graph can hold, such as looking at a value.
                why = (str(error).splitlines() or ["no reason given"])[0]
                warnings.warn(f"key 'training.cuda_graphs': this network's steps cannot be captured ({why})", stacklevel=1)
                self.graphs[key] = None
                self.optimizer.zero_grad()
        return self.graphs[key]
