"""Divergence: what of a run is no longer finite, looked at where its metrics are read anyway, so that no step waits for it."""

import math

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from dnal_dist.common.errors import InputError
from dnal_dist.distributed.wrapper import Trained
from dnal_dist.training.run import Run

WATCHED = ("the weights", "their momentum", "BatchNorm's statistics", "alpha", "alpha's momentum")
# A mean cross-entropy over training batches that no network recovers from: that of a guess is the logarithm of the classes.
HIGHEST_LOSS = 1e6
# Times the loss of a guess: networks come back from such losses, so they are only warned of.
STRANGE = 10


@torch.no_grad()
def flags(run: Run, trained: Trained) -> Tensor:
    """(len(WATCHED),), float64, on the device: 1 where this process has a value that is not finite."""
    weights, momentum = trained.shares()
    norms = [module for module in trained.module.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    statistics = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
    alpha = run.architecture.alpha
    buffer = run.architecture_optimizer.state.get(alpha, {}).get("momentum_buffer")
    watched = weights, momentum, statistics, [alpha], [] if buffer is None else [buffer]
    # Of a parameter with fewer rows than there are processes, FSDP2 leaves some of them nothing.
    watched = [[tensor for tensor in part if tensor.numel()] for part in watched]
    # The largest magnitude, which no sum of squares overflows.
    largest = [get_total_norm(part, math.inf) if part else alpha.new_zeros(()) for part in watched]
    return ~torch.stack([one.to(alpha.device, torch.float64) for one in largest]).isfinite() * 1.0


def warning(run: Run, loss: float) -> str:
    """The warning of a mean training loss that is far above a guess's; "" if it is not."""
    guess, phase = math.log(run.train.shards.num_classes), run.state.phase
    # Of few classes a single batch may cost more.
    if loss <= STRANGE * max(guess, math.log(10)):
        return ""
    return (
        f"the training loss in {phase} after {run.state.step} steps is {loss:.3g}, that of a guess is {guess:.2f}; if it stays so, "
        f"lower phases.{phase}.optimizer.lr ({getattr(run.recipe.phases, phase).optimizer.lr:g})"
    )


def check(run: Run, found: list[float] | Tensor, loss: float = 0.0, highest: float = math.inf) -> None:
    """Raise InputError if a process has a value that is not finite, by the sum of all `flags`, or if the loss is not below
    `highest`."""
    what = [name for name, count in zip(WATCHED, found, strict=False) if count]
    if loss < highest and not what:
        return
    phase, step, settings = run.state.phase, run.state.step, run.recipe
    if run.state.global_step == 0:
        raise InputError(
            f"key 'model.init_from': with the weights of {settings.model.init_from} the loss on data.val is {loss}; give others"
        )
    if not loss < highest:
        what.insert(0, f"the loss is {loss:.3g}")
    if len(what) > (not loss < highest):
        what[-1] += " not finite"
    optimizer = f"phases.{phase}.optimizer"
    given = getattr(settings.phases, phase, settings.phases.search).optimizer
    remedy = f"lower {optimizer}.lr ({given.lr:g})" + ("" if given.clip_norm else f" or set {optimizer}.clip_norm")
    if "alpha" in " ".join(what):
        remedy += f", lower architecture.optimizer.lr ({settings.architecture.optimizer.lr:g})"
    raise InputError(
        f"diverged in {phase} after {step} steps: {', '.join(what)}; {remedy}, and resume from the last checkpoint, which is from "
        f"before, by --allow-changed phases.{phase} outside of SLURM, or remove the folder to start again"
    )
