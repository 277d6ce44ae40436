"""How a network is wrapped for training: by DistributedDataParallel (or nothing), by FSDP2, or by DeepSpeed's ZeRO.

Whatever the backend, a Trained network is a copy on the device. The plain network that it was made from is what everybody else sees
(cost, evaluation, checkpoints, compaction); it waits on the CPU and takes the copy's weights when `gathered` is entered. Gates
enter as an input tensor, so no backend knows of alpha.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dnal_dist.common.span import span
from dnal_dist.distributed import optimizers
from dnal_dist.distributed.activation_checkpoint import checkpoint_activations
from dnal_dist.distributed.average import Average
from dnal_dist.distributed.batchnorm import replace_norms
from dnal_dist.nets import cost
from dnal_dist.nets.gate import segments
from dnal_dist.nets.slim import why_not

# Blocks with fewer parameters are gathered together by FSDP2 where nothing is said: each collective costs more time than they do.
MIN_PARAMS = 100_000
# Share of the MACs above which taking parts of all layers costs as much as is saved.
SLIM = 0.55


class Options(NamedTuple):
    """What all phases of a run are wrapped with."""

    backend: str
    """single, ddp, fsdp2, zero1, zero2 or zero3."""
    device: torch.device
    world_size: int
    dtype: torch.dtype
    """Of convolutions and activations; float32 is no mixed precision."""
    scaler: torch.amp.GradScaler
    """Of the loss, for float16; disabled otherwise."""
    settings: dict
    """The backend's own: of FSDP2 reshard_after_forward and min_params, of ZeRO DeepSpeed's configuration."""
    sync_batchnorm: bool = False
    activation_checkpointing: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    """For the passes of steps; a single process's on a GPU only."""
    memory_format: torch.memory_format = torch.contiguous_format
    """Of activations, and of the weights of backends that keep each parameter whole."""


class Trained:
    """`network` wrapped for training; momentum, what its optimizer kept of each parameter, starts it where there is any, by
    the keys of optimizers.key.

    network: the wrapped copy, as a weight step calls it. module: the copy as an architecture step calls it, so that nothing of its
    weights is synchronised.
    """

    def __init__(self, network: nn.Module, sgd, momentum: dict[str, Tensor], options: Options):
        self.plain, self.options, self.clip_norm = network, options, sgd.clip_norm
        self.module = _prepared(copy.deepcopy(network).to(options.device).train(), options)
        self.kind, self.settings, self.buffers = sgd.kind, optimizers.settings(sgd), optimizers.buffers(sgd)
        self.decay_norms = sgd.decay_norms or not sgd.weight_decay
        kept = {optimizers.key(name, buffer) for name, _ in network.named_parameters() for buffer in self.buffers}
        # A phase of another kind leaves nothing that this one could go on with.
        goes_on = optimizers.kept(momentum) == set(self.buffers)
        self.network = self.wrap({k: v for k, v in momentum.items() if goes_on and (k in kept or k == optimizers.STEP)})
        self.plain.cpu()

    def wrap(self, momentum: dict[str, Tensor]) -> nn.Module:
        """Wrap self.module and make self.optimizer; returns the wrapped network."""
        raise NotImplementedError

    objective: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    """The loss of a step as a function of logits (n, classes), images, labels and their cross-entropy, which it is where this is
    None; all summed over the images."""

    def made_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer over the copy's parameters as they are now."""
        kind = optimizers.KINDS[self.kind][0]
        if self.decay_norms:
            return kind(self.module.parameters(), **self.settings)
        # In the order of the network within each, as checkpoints of ZeRO want it.
        decayed = [parameter for parameter in self.module.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in self.module.parameters() if parameter.dim() <= 1]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        return kind([group for group in groups if group["params"]], **self.settings)

    def start_with(self, momentum: dict[str, Tensor], shared: Callable[[Tensor, nn.Parameter], Tensor]) -> None:
        """Put saved buffers into self.optimizer. shared: what of a whole buffer this process keeps; each call may be a collective,
        and a checkpoint's names come in another order on each process."""
        for name, parameter in self.parameters.items():
            for buffer in self.buffers:
                if (whole := momentum.get(optimizers.key(name, buffer))) is not None:
                    self.optimizer.state[parameter][buffer] = shared(whole, parameter)
                    if optimizers.STEP in momentum:
                        self.optimizer.state[parameter]["step"] = momentum[optimizers.STEP].cpu().clone()

    def forward(self, network: nn.Module, images: Tensor, gates: Tensor | None = None) -> Tensor:
        """Logits (n, classes), in float32 or wider, of `network`: self.network or self.module."""
        logits = network(images) if gates is None else network(images, gates)
        return logits.float() if logits.dtype != torch.float64 else logits

    def step(self, forward: Callable[..., NamedTuple], micro_batches: Sequence[tuple], batch: int) -> list:
        """One step down the gradient of the micro-batches' summed `loss` / batch, the mean over processes.

        forward(network, images, labels, gates) gives an outcome, a named tuple of tensors or None; returns the outcomes. The
        micro-batches are computed one after the other, so that only one of them needs memory for its activations.
        """
        raise NotImplementedError

    def why_not_slim(self, keep: Tensor) -> str | None:
        """Why the channels of `keep`, bool (N,), cannot be computed alone; "" if little would be saved, None if they can."""
        if self.options.backend in ("fsdp2", "zero3"):
            return f"{self.options.backend} shares out the parameters"
        if self.options.compile or self.options.activation_checkpointing:
            return "of training.compile or activation_checkpointing"
        macs, full = (cost.count(self.plain, self.plain.image_size, mask).macs for mask in (keep.cpu(), None))
        return "" if macs > SLIM * full else why_not(self.plain, keep) or None

    def slim(self, keep: Tensor) -> None:
        """From here on compute only the channels of `keep`, bool (N,), where there are gates: those of the others are 0."""
        self.module.slim_to(keep)

    def passes(self, compute: Callable[..., NamedTuple], batch: int, inputs: tuple[Tensor, ...]) -> NamedTuple:
        """compute(*inputs): the passes of an architecture step, of a local batch of `batch` images, through self.module. What they
        give may be valid until the next call only."""
        return compute(*inputs)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[dict[str, Tensor]]:
        """Inside, the plain network is on the device and has the weights and statistics of the copy on this process. Gives the
        momentum by parameter name; empty before the first step. All processes must enter together."""
        self.plain.to(self.options.device)
        buffers = dict(self.module.named_buffers())
        with span("gather"), torch.no_grad():
            for name, buffer in self.plain.named_buffers():
                buffer.copy_(buffers[name])
            for name, parameter in self.plain.named_parameters():
                parameter.copy_(self.weight(name))
        yield self.momentum()
        with torch.no_grad():
            # What came of them outside, where the statistics of all processes are combined.
            for name, buffer in self.plain.named_buffers():
                buffers[name].copy_(buffer)
        self.plain.cpu()

    average: Average | None = None
    """The moving average of the weights, where one is kept."""

    def keep_average(self, decay: float, start: dict[str, Tensor], statistics: Tensor | None) -> None:
        """Keep a moving average from here on; see Average. All processes must call this."""
        self.average = Average(self, decay, start, statistics)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[dict[str, Tensor]]:
        """Like `gathered`, but with the moving average in place of the weights where one is kept."""
        with self.average.in_place() if self.average is not None else contextlib.nullcontext(), self.gathered() as momentum:
            yield momentum

    def held(self) -> list[Tensor]:
        """What this process holds of the weights in float32, always in the same order."""
        return [parameter.detach() for parameter in self.parameters.values()]

    def statistics(self) -> list[Tensor]:
        """The running statistics of the copy."""
        return [buffer for buffer in self.module.buffers() if buffer.is_floating_point()]

    def put(self, name: str, value: Tensor) -> None:
        """Give a parameter a whole value, in float32. All processes must call this."""
        self.parameters[name].detach().copy_(value)

    def weight(self, name: str) -> Tensor:
        return self.parameters[name]

    def momentum(self) -> dict[str, Tensor]:
        states = [(name, self.optimizer.state.get(parameter, {})) for name, parameter in self.parameters.items()]
        found = {optimizers.key(n, buffer): state[buffer] for n, state in states for buffer in self.buffers if buffer in state}
        steps = [state["step"] for _, state in states if "step" in state]
        return found | ({optimizers.STEP: steps[0]} if steps else {})

    def shares(self) -> tuple[list[Tensor], list[Tensor]]:
        """What this process's optimiser holds of the weights and of their momentum, as it is stored."""
        # DeepSpeed's optimisers have the one that they were given inside.
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        weights = {id(p): p for group in inner.param_groups for p in group["params"]} | {id(p): p for p in inner.state}
        found = [state.get(buffer) for state in inner.state.values() for buffer in self.buffers]
        return list(weights.values()), [buffer for buffer in found if buffer is not None]

    @functools.cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def close(self) -> None:
        """Let go of the copy, its optimiser and what wraps them."""
        self.__dict__ = {"plain": self.plain.to(self.options.device)}


def _prepared(network: nn.Module, options: Options) -> nn.Module:
    """The copy, with what the recipe switches on."""
    replace_norms(network, options.sync_batchnorm and options.world_size > 1)
    if options.activation_checkpointing:
        checkpoint_activations(network)
    if options.compile:
        parts = segments(network)
        import torch._dynamo

        # Segments share their code, and each is compiled with and without gates, with moving and with resting statistics.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 8 * len(parts))
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 8 * len(parts))
        for segment in parts:
            for module in segment:
                module.compile()
    return network
