"""The FSDP2 backend."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dnal_dist.common.errors import InputError
from dnal_dist.common.shipped import named
from dnal_dist.common.span import span
from dnal_dist.distributed.wrapper import Trained
from dnal_dist.nets.gate import segments


class FullySharded(Trained):
    """Every process keeps a share of each parameter, its gradient and its momentum: FSDP2, one group a segment of the network."""

    def wrap(self, momentum):
        options = self.options
        mesh = init_device_mesh(options.device.type, (options.world_size,))
        low = options.dtype if options.dtype != torch.float32 else None
        # Inputs are cast in forward: FSDP2 would round the gates too.
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low and torch.float32, cast_forward_inputs=False)
        for segment in segments(self.module):
            size = sum(p.numel() for module in segment for p in module.parameters())
            if size >= max(1, options.settings["min_params"]):
                reshard = options.settings["reshard_after_forward"]
                fully_shard(segment if len(segment) > 1 else segment[0], mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        fully_shard(self.module, mesh=mesh, mp_policy=policy)
        if not all(isinstance(p, DTensor) for p in self.module.parameters()):
            raise InputError(
                f"FSDP2 was asked for, but it left parameters whole; use another config of {named('recipes/accelerate')}"
            )
        self.optimizer = self.made_optimizer()
        self.start_with(momentum, lambda whole, p: distribute_tensor(whole.to(p.device), p.device_mesh, p.placements))
        return self.module

    def forward(self, network, images, gates=None):
        return super().forward(network, images.to(self.options.dtype), gates)

    def step(self, forward, micro_batches, batch):
        outcomes = []
        for number, micro_batch in enumerate(micro_batches, 1):
            self.module.set_requires_gradient_sync(number == len(micro_batches))
            outcomes.append(forward(self.network, *micro_batch))
            with span("backward"):
                (outcomes[-1].loss / batch).backward()
        with span("optimizer"):
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return outcomes

    def shares(self):
        return tuple([tensor.to_local() for tensor in part] for part in super().shares())

    def held(self):
        return [parameter.to_local() for parameter in super().held()]

    def put(self, name, value):
        parameter = self.parameters[name]
        super().put(name, distribute_tensor(value, parameter.device_mesh, parameter.placements))

    def weight(self, name):
        return self.parameters[name].full_tensor()

    def momentum(self):
        found = super().momentum()
        return {name: buffer.full_tensor() if isinstance(buffer, DTensor) else buffer for name, buffer in found.items()}
