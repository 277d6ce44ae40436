"""The DeepSpeed ZeRO backends, stages 1 to 3."""

import logging

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dnal_dist.common.errors import InputError
from dnal_dist.common.span import span
from dnal_dist.distributed import optimizers
from dnal_dist.distributed.accelerate_config import without_deepspeed
from dnal_dist.distributed.wrapper import Trained

LINEAR = nn.functional.linear


class Zero(Trained):
    """DeepSpeed's ZeRO: stage 1 shares out the momentum, stage 2 also the gradients, stage 3 also the parameters."""

    def wrap(self, momentum):
        try:
            import deepspeed
        except Exception as error:  # whatever its libraries fail with
            raise without_deepspeed(error) from None

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if self.options.device.type == "cpu":
            # An operation for inference that it would compile with g++ for a minute, and that training does not use.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if frozen := [name for name, p in self.module.named_parameters() if not p.requires_grad]:
            raise InputError(f"ZeRO cannot hold {frozen[0]}, which does not train; use DDP or FSDP2, or a network without it")
        statistics = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        weights = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        optimizer = self.made_optimizer()
        given = self.options.settings["deepspeed"]
        # Its own buckets are made for networks of billions of parameters: gradients alone would take 2 GB.
        size = sum(p.numel() for p in self.module.parameters())
        zero = {"reduce_bucket_size": size, "stage3_prefetch_bucket_size": size, **given["zero_optimization"]}
        # DeepSpeed clips to a norm of 1 where nothing is said.
        configuration = {**given, "zero_optimization": zero, "gradient_clipping": self.clip_norm or 0.0}
        configuration |= {"bf16": {"enabled": self.options.dtype == torch.bfloat16}}
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=configuration)
        self.stage, self.stepped = self.engine.zero_optimization_stage(), False
        if f"zero{self.stage}" != self.options.backend:
            raise InputError(
                f"{self.options.backend} was asked for, but DeepSpeed gives stage {self.stage}; correct its configuration"
            )
        self.parameters = dict(self.module.named_parameters())
        for name, buffer in self.module.named_buffers():
            # It rounds them with the weights.
            buffer.data = statistics[name]
        if self.options.dtype != torch.float32:
            # So are those that its optimiser moves, which it makes of the rounded ones.
            for name, p in self.parameters.items():
                self._set(p, weights[name], None)
        if self.stage == 3:
            for p in self.parameters.values():
                # The last shares are padded, with whatever the memory held.
                share, own = self._share(p, None)
                share.data[own:] = 0
        if momentum:
            self._start_with(momentum)
        return self.engine

    def _share(self, p: nn.Parameter, key: str | None) -> tuple[Tensor, int]:
        """This process's share of the optimiser's state `key` of a parameter, or of its weights in float32 (None), and how many of
        its elements are no padding. ZeRO-3 only."""
        share, _ = self.optimizer._get_fp32_opt_state_partition(p, release_swap_buffers=False, optim_state_key=key)
        return share, min(max(p.ds_numel - share.numel() * dist.get_rank(), 0), share.numel())

    def shares(self):
        if self.stage < 3:
            return super().shares()
        keys = (None, *self.buffers) if self.stepped else (None,)
        found = [[share[:own] for share, own in (self._share(p, key) for p in self.parameters.values()) if own] for key in keys]
        return found[0], [share for part in found[1:] for share in part]

    def held(self):
        if self.stage < 3:
            return list(self.optimizer.single_partition_of_fp32_groups)
        return [self._share(p, None)[0] for p in self.parameters.values()]

    def put(self, name, value):
        self._set(self.parameters[name], value, None)

    def _start_with(self, momentum: dict[str, Tensor]) -> None:
        inner = self.optimizer.optimizer
        shares = self.optimizer.fp32_partitioned_groups_flat if self.stage == 3 else self.optimizer.single_partition_of_fp32_groups
        for share in shares:
            inner.state[share] |= {buffer: torch.zeros_like(share) for buffer in self.buffers}
            if optimizers.STEP in momentum:
                inner.state[share]["step"] = momentum[optimizers.STEP].cpu().clone()
        if self.stage < 3:
            # Its public function finds nothing to write to before a step was taken.
            self.optimizer._lazy_init_hp_params_optimizer_state()
        for name, p in self.parameters.items():
            for buffer in self.buffers:
                if (whole := momentum.get(optimizers.key(name, buffer))) is not None:
                    self._set(p, whole.to(self.options.device), buffer)
        self.stepped = True

    def _set(self, p: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Give the optimiser's state `key` of a parameter, or its weights in float32 (None), a whole value."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.stage < 3:
            safe_set_full_fp32_param(p, value) if key is None else safe_set_full_optimizer_state(p, value, key)
            return
        # Its public function fails where a parameter cannot be divided evenly: the last shares are padded, a whole value is not.
        share, own = self._share(p, key)
        start = share.numel() * dist.get_rank()
        share.data[:own].copy_(value.flatten()[start : start + own])

    def forward(self, network, images, gates=None):
        if self.stage == 3:
            from deepspeed.runtime.zero import parameter_offload

            # Computing activations again ends as soon as all are there, before the hook that takes a module off this list.
            del parameter_offload.FWD_MODULE_STACK[1:]
        return super().forward(network, images.to(self.options.dtype), gates)

    def step(self, forward, micro_batches, batch):
        *first, last = micro_batches
        outcomes, gradients = [], None
        for micro_batch in first:
            outcomes.append(forward(self.module, *micro_batch))
            with span("backward"):
                found = torch.autograd.grad(outcomes[-1].loss / batch, self.parameters.values())
            gradients = found if gradients is None else [a + b for a, b in zip(gradients, found, strict=True)]
        outcomes.append(forward(self.network, *last))
        total = outcomes[-1].loss / batch
        if gradients is not None:
            total = _WithGradients.apply(total, gradients, *self.parameters.values())
        with span("backward"):
            self.engine.backward(total)
        with span("optimizer"):
            self.engine.step()
        self.stepped = True
        return outcomes

    def weight(self, name):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(self.parameters[name])

    def momentum(self):
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.stepped or not self.buffers:
            return {}
        if self.stage < 3:
            # It links them after the first group's step, when the second group has none yet.
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()
        found = {
            optimizers.key(name, buffer): safe_get_full_optimizer_state(p, buffer)
            for name, p in self.parameters.items()
            for buffer in self.buffers
        }
        steps = [state["step"] for state in self.optimizer.optimizer.state.values() if "step" in state]
        return found | ({optimizers.STEP: steps[0]} if steps else {})

    def close(self):
        self.engine.destroy()
        if self.stage == 3:
            _forget_stage_3()
        super().close()


def _forget_stage_3() -> None:
    """Empty what DeepSpeed keeps for all engines of a process, or they would stay in memory: the modules of the last forward pass,
    and a cache of a method's results."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    parameter_offload.FWD_MODULE_STACK.clear()
    cached = vars(PartitionedParameterCoordinator).get("_PartitionedParameterCoordinator__params_to_release")
    for cell in getattr(cached, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
    # It puts a function of its own in place of torch's, in which the graph of a network could not be read.
    nn.functional.linear = LINEAR


class _WithGradients(torch.autograd.Function):
    """The loss as it is; its backward pass adds `gradients` to those of the parameters, which are thus synchronised together."""

    @staticmethod
    def forward(ctx, loss, gradients, *parameters):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        # Of a loss that was not scaled, `gradient` is 1.
        return gradient, None, *(found * gradient.to(found.dtype) for found in ctx.gradients)
