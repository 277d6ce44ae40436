"""What of a run goes into a checkpoint, and back."""

import time

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist.checkpoint.format import Checkpoint, Gathered, State, name
from dnal_dist.common.errors import InputError
from dnal_dist.common.span import spanned
from dnal_dist.data.receipts import Receipt
from dnal_dist.nets import compact
from dnal_dist.training.metrics import Meter
from dnal_dist.training.run import Run

# State that the run and its checkpoint call the same.
SAME = ("phase", "step", "global_step", "evaluated", "accuracy", "penalty_rests", "penalty_weight", "penalty_lag", "mask")


@spanned("checkpoint")
def save(run: Run, momentum: dict[str, Tensor], meter: Meter | None = None, begun: float | None = None) -> None:
    """Have a checkpoint written of where `run` stands. All processes must come here, with the network and `momentum` as
    backends.Trained.gathered gives them; nothing of what they train with is changed. begun: when training
    began to wait for it, by time.monotonic. Raises InputError: see writer.Writer."""
    begun = time.monotonic() if begun is None else begun
    taken = take(run, momentum, meter)
    if not run.context.main:
        return
    run.writer.settle()
    run.writer.pauses.append(time.monotonic() - begun)
    run.log.global_step = run.global_step
    facts = {"name": name(taken.state), "pause_seconds": round(run.writer.pauses[-1], 4), **run.writer.last}
    run.log.record("checkpoint", phase=run.phase, step=run.step, **facts)
    taken.state.records = run.log.records
    run.writer.save(taken)


def take(run: Run, momentum: dict[str, Tensor], meter: Meter | None = None) -> Checkpoint | None:
    """Copies of all that a run needs to go on, on the CPU of the main process; None on the others."""
    settle(run)
    context, own = run.context, _own(run, meter)
    ranks = {kind: context.gather_tensor(tensor) for kind, tensor in own.items()}
    gathered = None if meter is None else meter.gathered()
    if not context.main:
        return None
    tensors = {f"network.{key}": _copy(tensor) for key, tensor in run.network.state_dict().items()}
    tensors |= {f"momentum.{key}": _copy(tensor) for key, tensor in momentum.items()}
    tensors["alpha"] = _copy(run.architecture.alpha)
    state = run.architecture_optimizer.state.get(run.architecture.alpha, {})
    if state.get("momentum_buffer") is not None:
        tensors["alpha_momentum"] = _copy(state["momentum_buffer"])
    statistics = ranks["statistics"].cpu()
    if all(torch.equal(one, statistics[0]) for one in statistics):
        del ranks["statistics"]
    else:
        _combine(statistics, [(f"network.{name}", norm) for name, norm in _norms(run)], tensors)
    tensors |= {f"ranks.{kind}": _copy(tensor) for kind, tensor in ranks.items()}
    return Checkpoint(tensors, _state(run, gathered))


def settle(run: Run) -> None:
    """Hand what all processes have taken of the epoch over to the main one."""
    run.receipt.settle(run.context.gather, run.context.main, run.global_step, run.train.steps_per_epoch)


def _state(run: Run, meter: Gathered | None) -> State:
    return State(
        **{key: getattr(run, key) for key in SAME},
        seconds=dict(run.seconds),
        spent=dict(run.spent),
        compact=None if run.small is None else compact.describe(run.small),
        receipt=run.receipt.packed(),
        skipped=sorted(run.skipped),
        meter=meter,
        scaler=run.context.scaler.state_dict(),
        world_size=run.context.world_size,
        backend=run.context.backend,
        shards=run.shards,
        tracker_run=run.log.tracker_run,
        recipe=run.recipe.model_dump(mode="json"),
    )


def _own(run: Run, meter: Meter | None) -> dict[str, Tensor]:
    """What each process has of its own, one flat tensor a kind."""
    device = run.context.device
    own = {"random": torch.get_rng_state().to(device), "statistics": torch.cat([torch.zeros(0, device=device), *_statistics(run)])}
    if device.type == "cuda":
        own["random_cuda"] = torch.cuda.get_rng_state(device).to(device)
    if meter is not None:
        own["sums"] = meter.sums.clone()
    return own


def _norms(run: Run) -> list[tuple[str, _BatchNorm]]:
    found = [(key, module) for key, module in run.network.named_modules() if isinstance(module, _BatchNorm)]
    return [(key, norm) for key, norm in found if norm.running_mean is not None]


def _statistics(run: Run) -> list[Tensor]:
    """The running statistics, float32: all means, all variances."""
    norms = [norm for _, norm in _norms(run)]
    return [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]


def _combine(statistics: Tensor, norms: list[tuple[str, _BatchNorm]], tensors: dict[str, Tensor]) -> None:
    """Write into `tensors` the running statistics of all processes together (see context.average_statistics), from (world size,
    2 * features) numbers."""
    mean, variance = statistics.double().chunk(2, dim=1)
    variance = (variance + mean**2).mean(0) - mean.mean(0) ** 2
    sizes = [norm.num_features for _, norm in norms]
    for (key, _), m, v in zip(norms, mean.mean(0).split(sizes), variance.split(sizes), strict=True):
        tensors[f"{key}.running_mean"].copy_(m)
        tensors[f"{key}.running_var"].copy_(v.clamp_min(0))


def _copy(tensor: Tensor) -> Tensor:
    """On the CPU, and never the tensor itself: training goes on with that."""
    return tensor.detach().to("cpu", copy=True)


def restore(run: Run, saved: Checkpoint) -> None:
    """Put `run` where `saved` was taken: bit for bit on as many processes of the same backend, else with running statistics that
    are those of all processes together. Raises InputError if the checkpoint does not fit the recipe or the shards."""
    tensors, state = saved
    try:
        _restore(run, tensors, state)
    except (LookupError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        why = " ".join(str(error).split())[:300]
        raise InputError(
            f"{run.folder}: the checkpoint of step {state.global_step} does not fit the recipe or itself ({why}); undo what "
            "changed, or remove the folder to begin anew (outside of SLURM: --overwrite)"
        ) from None


def _restore(run: Run, tensors: dict[str, Tensor], state: State) -> None:
    if wrong := [k for k, t in tensors.items() if not k.startswith("ranks.") and not t.is_floating_point() and t.numel() > 1]:
        raise ValueError(f"{wrong[0]} is of {tensors[wrong[0]].dtype}")
    if (state.compact is None) != (state.phase in ("pretrain", "search", "prune")):
        raise ValueError(f"phase {state.phase} {'without' if state.compact is None else 'with'} a compact network")
    part = {kind: {k.removeprefix(kind): t for k, t in tensors.items() if k.startswith(kind)} for kind in ("network.", "momentum.")}
    if state.compact is not None:
        run.small = compact.restored(state.compact, part["network."]).to(run.context.device)
        run.supernet.cpu()
    else:
        run.network.load_state_dict(part["network."])
    weights = dict(run.network.named_parameters())
    if wrong := [key for key, buffer in part["momentum."].items() if key not in weights or buffer.shape != weights[key].shape]:
        raise ValueError(f"momentum of {wrong[0]}")
    run.momentum = part["momentum."]
    with torch.no_grad():
        if tensors["alpha"].shape != run.architecture.alpha.shape:
            raise ValueError(f"alpha of {tuple(tensors['alpha'].shape)} for {run.architecture.alpha.numel()} gates")
        run.architecture.alpha.copy_(tensors["alpha"])
    if "alpha_momentum" in tensors:
        buffer = tensors["alpha_momentum"].to(run.context.device).reshape_as(run.architecture.alpha)
        run.architecture_optimizer.state[run.architecture.alpha]["momentum_buffer"] = buffer
    for key in SAME:
        setattr(run, key, getattr(state, key))
    run.seconds, run.spent, run.skipped = dict(state.seconds), dict(state.spent), set(state.skipped)
    if run.context.main and state.receipt:
        # The other processes begin with nothing taken, however many there are now.
        run.receipt = Receipt.unpacked(state.receipt)
    if state.scaler and run.context.scaler.is_enabled():
        run.context.scaler.load_state_dict(state.scaler)
    _give_back(run, tensors, state)


def _give_back(run: Run, tensors: dict[str, Tensor], state: State) -> None:
    """What each process had of its own; where there are others now, what they had together, to the main one."""
    rank, same = run.context.rank, run.context.world_size == state.world_size
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
    if state.meter is not None:
        sums = tensors["ranks.sums"]
        own = sums[rank] if same else sums.sum(0) if run.context.main else torch.zeros_like(sums[0])
        if own.shape != (6,):
            raise ValueError(f"sums of {tuple(sums.shape)}")
        run.meter = state.meter, own, same and state.backend == run.context.backend
