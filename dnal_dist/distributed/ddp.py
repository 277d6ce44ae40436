"""The replicated backend: a single process, or DDP."""

import contextlib
import warnings

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dnal_dist.common.span import span
from dnal_dist.distributed.sgd import SGD
from dnal_dist.distributed.wrapper import Trained


class Replicated(Trained):
    """Every process has all of the network: DistributedDataParallel, or a single process."""

    def wrap(self, momentum):
        self.module.to(memory_format=self.options.memory_format)
        self.optimizer = SGD(self.module.parameters(), **self.settings)
        for name, buffer in momentum.items():
            # In the parameter's own layout: the optimiser's fast path is for tensors of one layout.
            own = torch.empty_like(self.parameters[name])
            self.optimizer.state[self.parameters[name]]["momentum_buffer"] = own.copy_(buffer)
        if self.options.world_size == 1:
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
        self.module.forward = lambda: sum((p * 0).sum() for p in self.module.parameters())
        for _ in range(2):
            network().backward()
        self.optimizer.zero_grad()
        del self.module.forward
        if own is not None:
            self.module.forward = own

    def forward(self, network, images, gates=None):
        mixed = self.options.dtype != torch.float32
        with torch.autocast(self.options.device.type, self.options.dtype, enabled=mixed):
            return super().forward(network, images, gates)

    def step(self, losses):
        scaler, alone = self.options.scaler, self.options.world_size == 1
        for number, loss in enumerate(losses):
            last = number + 1 == len(losses)
            with contextlib.nullcontext() if last or alone else self.network.no_sync():
                scaled = scaler.scale(loss(self.network))
                with span("backward"):
                    scaled.backward()
        with span("optimizer"):
            scaler.unscale_(self.optimizer)
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_norm)
            scaler.step(self.optimizer)
            scaler.update()
            self.optimizer.zero_grad()
