"""Between a run and its checkpoints: what is saved, and how a run is restored."""

import time

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist.checkpoint.format import Checkpoint, RunState, name
from dnal_dist.common.errors import InputError, reason
from dnal_dist.common.span import spanned
from dnal_dist.data.receipts import Receipt
from dnal_dist.distributed import average, optimizers
from dnal_dist.nets import compact
from dnal_dist.training.metrics import SUMS, Metrics
from dnal_dist.training.run import Run


@spanned("checkpoint")
def save(run: Run, momentum: dict[str, Tensor], metrics: Metrics | None = None, begun: float | None = None) -> None:
    """Have a checkpoint of the run's present state written. All processes must call this, inside Trained.gathered; training goes on
    as if nothing had been saved. begun: when training began to wait, by time.monotonic. Raises InputError as writer.Writer does."""
    begun = time.monotonic() if begun is None else begun
    taken = take(run, momentum, metrics)
    if taken is None:
        return
    run.writer.settle()
    run.writer.pauses.append(time.monotonic() - begun)
    facts = {"name": name(taken.state), "pause_seconds": round(run.writer.pauses[-1], 4), **run.writer.last}
    run.log.record("checkpoint", phase=run.state.phase, step=run.state.step, **facts)
    taken.state.records = run.log.records
    run.writer.save(taken)


def take(run: Run, momentum: dict[str, Tensor], metrics: Metrics | None = None) -> Checkpoint | None:
    """Copies of everything a resume needs, on the CPU of the main process; None on the others."""
    merge_receipts(run)
    context, state = run.context, run.state
    ranks = {kind: context.gather_tensor(tensor) for kind, tensor in _per_process(run, metrics).items()}
    state.metrics = None if metrics is None else metrics.pending()
    state.receipt, state.scaler = run.receipt.packed(), context.scaler.state_dict()
    state.compact = None if run.compact is None else compact.describe(run.compact)
    if not context.main:
        return None
    tensors = {f"network.{key}": _copy(tensor) for key, tensor in run.network.state_dict().items()}
    tensors |= {f"momentum.{key}": _copy(tensor) for key, tensor in momentum.items()}
    tensors |= {f"average.{key}": _copy(tensor) for key, tensor in run.average.items()}
    tensors["alpha"] = _copy(run.architecture.alpha)
    optimizer_state = run.architecture_optimizer.state.get(run.architecture.alpha, {})
    if optimizer_state.get("momentum_buffer") is not None:
        tensors["alpha_momentum"] = _copy(optimizer_state["momentum_buffer"])
    if run.signal is not None:
        tensors["signal"] = _copy(run.signal)
    statistics = ranks["statistics"].cpu()
    if all(torch.equal(one, statistics[0]) for one in statistics):
        del ranks["statistics"]
    else:
        _combine(statistics, [(f"network.{name}", norm) for name, norm in _norms(run)], tensors)
    tensors |= {f"ranks.{kind}": _copy(tensor) for kind, tensor in ranks.items()}
    # Written by a thread, while the run moves on.
    return Checkpoint(tensors, state.model_copy(deep=True))


def merge_receipts(run: Run) -> None:
    """Move the samples consumed by all processes into the main process's receipt."""
    run.receipt.settle(run.context.gather, run.context.main, run.state.global_step, run.train.steps_per_epoch)


def _per_process(run: Run, metrics: Metrics | None) -> dict[str, Tensor]:
    """State that differs between processes, one flat tensor a kind."""
    device = run.context.device
    own = {"random": torch.get_rng_state().to(device), "statistics": torch.cat([torch.zeros(0, device=device), *_statistics(run)])}
    if device.type == "cuda":
        own["random_cuda"] = torch.cuda.get_rng_state(device).to(device)
    if run.average_statistics is not None:
        own["average_statistics"] = run.average_statistics
    if metrics is not None:
        own["sums"] = metrics.sums.clone()
    return own


def _norms(run: Run) -> list[tuple[str, _BatchNorm]]:
    found = [(key, module) for key, module in run.network.named_modules() if isinstance(module, _BatchNorm)]
    return [(key, norm) for key, norm in found if norm.running_mean is not None]


def _statistics(run: Run) -> list[Tensor]:
    """The running statistics, float32: all means, all variances."""
    norms = [norm for _, norm in _norms(run)]
    return [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]


def _combine(statistics: Tensor, norms: list[tuple[str, _BatchNorm]], tensors: dict[str, Tensor]) -> None:
    """Write the combined running statistics of all processes (see Context.average_statistics) into `tensors`, from (world size,
    2 * features) numbers."""
    mean, variance = average.pooled(*statistics.double().chunk(2, dim=1))
    sizes = [norm.num_features for _, norm in norms]
    for (key, _), m, v in zip(norms, mean.split(sizes), variance.split(sizes), strict=True):
        tensors[f"{key}.running_mean"].copy_(m)
        tensors[f"{key}.running_var"].copy_(v)


def _copy(tensor: Tensor) -> Tensor:
    """On the CPU, and never the tensor itself, which training goes on to change."""
    return tensor.detach().to("cpu", copy=True)


def restore(run: Run, saved: Checkpoint) -> None:
    """Put the tensors of `saved` into `run`, whose state is that of the checkpoint already: bit for bit on as many processes of the
    same backend, else with the combined running statistics of all processes. Raises InputError if they do not fit."""
    try:
        _restore(run, *saved)
    except (LookupError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{run.folder}: the checkpoint of step {saved.state.global_step} does not fit the recipe or itself ({reason(error)}); "
            "undo what changed, or remove the folder to start again (outside of SLURM: --overwrite)"
        ) from None


def _restore(run: Run, tensors: dict[str, Tensor], saved: RunState) -> None:
    if wrong := [k for k, t in tensors.items() if not k.startswith("ranks.") and not t.is_floating_point() and t.numel() > 1]:
        raise ValueError(f"{wrong[0]} is of {tensors[wrong[0]].dtype}")
    if (saved.compact is None) != (saved.phase in ("pretrain", "search", "prune")):
        raise ValueError(f"phase {saved.phase} {'without' if saved.compact is None else 'with'} a compact network")
    kinds = ("network.", "momentum.", "average.")
    part = {kind: {k.removeprefix(kind): t for k, t in tensors.items() if k.startswith(kind)} for kind in kinds}
    if saved.compact is not None:
        run.compact = compact.restored(saved.compact, part["network."]).to(run.context.device)
        run.supernet.cpu()
    else:
        run.network.load_state_dict(part["network."])
    weights = dict(run.network.named_parameters())
    for kind in kinds[1:]:
        # Of AdamW's the names of its buffers stand behind a colon, and its number of steps is no parameter's.
        owners = {key: weights.get(key.partition(":")[0]) for key in part[kind] if key != optimizers.STEP}
        if wrong := [key for key, owner in owners.items() if owner is None or part[kind][key].shape != owner.shape]:
            raise ValueError(f"{kind[:-1]} of {wrong[0]}")
    if part["average."] and part["average."].keys() != weights.keys():
        raise ValueError("an average of some weights only")
    run.momentum, run.average = part["momentum."], part["average."]
    with torch.no_grad():
        if tensors["alpha"].shape != run.architecture.alpha.shape:
            raise ValueError(f"alpha of {tuple(tensors['alpha'].shape)} for {run.architecture.alpha.numel()} gates")
        run.architecture.alpha.copy_(tensors["alpha"])
    if "alpha_momentum" in tensors:
        buffer = tensors["alpha_momentum"].to(run.context.device).reshape_as(run.architecture.alpha)
        run.architecture_optimizer.state[run.architecture.alpha]["momentum_buffer"] = buffer
    if "signal" in tensors:
        run.signal = tensors["signal"].to(run.context.device).reshape(3, -1)
    if run.context.main and saved.receipt:
        # The other processes begin with an empty receipt, however many there are now.
        run.receipt = Receipt.unpacked(saved.receipt)
    if saved.scaler and run.context.scaler.is_enabled():
        run.context.scaler.load_state_dict(saved.scaler)
    _restore_per_process(run, tensors, saved)


def _restore_per_process(run: Run, tensors: dict[str, Tensor], saved: RunState) -> None:
    """Each process's own state; with another number of processes, the main one takes the sums of all."""
    rank, same = run.context.rank, run.context.world_size == saved.world_size
    if same and "ranks.statistics" in tensors:
        own = tensors["ranks.statistics"][rank]
        targets = _statistics(run)
        for target, values in zip(targets, own.split([len(target) for target in targets]), strict=True):
            target.copy_(values)
    if same:
        # A copy: torch reads a view from the start of its storage and beyond, which ends the process.
        torch.set_rng_state(tensors["ranks.random"][rank].clone())
        if run.context.device.type == "cuda" and "ranks.random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["ranks.random_cuda"][rank].clone(), run.context.device)
    if "ranks.average_statistics" in tensors:
        every = tensors["ranks.average_statistics"]
        run.average_statistics = every[rank] if same else average.combined(every, run.network)
    if saved.metrics is not None:
        sums = tensors["ranks.sums"]
        own = sums[rank] if same else sums.sum(0) if run.context.main else torch.zeros_like(sums[0])
        if own.shape == (SUMS - 1,):  # of a release whose loss was the cross-entropy
            own = torch.cat([own, own[:1]])
        if own.shape != (SUMS,):
            raise ValueError(f"sums of {tuple(sums.shape)}")
        run.pending = saved.metrics, own, same and saved.backend == run.context.backend
