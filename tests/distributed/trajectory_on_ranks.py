"""A job of test_backends: pretrain, alternating search, prune and finetune, 8 steps on this process's part of fixed
batches, for each case in turn.

A case is network:weight_steps:architecture_steps:statistics, statistics being batch (BatchNorm as usual) or fixed (as in
evaluation, so that an image's output does not depend on the rest of its batch); after further colons any of clip, parts, sync,
checkpointing, compile, double, eager (no CUDA graphs), last (channels_last memory), shared: the smallest parameter and block are
shared out and gathered too, where a backend does so, taylor: that criterion in place of alpha, and apart: other batches, for which
no activation of resnet_digits is so near the kink of a ReLU (4e-6) that rounding decides on which side it is; adamw, rmsprop.
"""

import functools
import gc
import traceback
import warnings
import weakref

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from user_networks import Mixed

from dnal_dist import nets
from dnal_dist.distributed.context import Context
from dnal_dist.nets import compact, masks
from dnal_dist.nets.supernet import Supernet
from dnal_dist.recipe import SGD, ArchitectureSettings, Training
from dnal_dist.search import budgets, schedule, taylor
from dnal_dist.search.architecture import Architecture
from dnal_dist.training.steps import Outcome, architecture_step, weight_step

# DDP says so of gradients that it has to copy into its buckets.
warnings.filterwarnings("error", message="Grad strides do not match")
BATCH, SIDE, DELTA = 12, 8, 3.0
STEPS = {"pretrain": 2, "search": 4, "finetune": 2}
TAYLOR = ArchitectureSettings(criterion="taylor", target={"macs": "0.3x"}, tolerance=0.05)


# supernet_digits with two of its four cells: one that halves the side, and one that adds its input.
nets.NETWORKS["supernet_of_two_cells"] = lambda num_classes=10, width=1.0: Supernet([16, 8, 12], [2], [2], 64, num_classes, 1)


def fix_statistics(fixed: bool) -> None:
    """BatchNorms of all networks to come normalise with their running statistics, in training too."""
    _BatchNorm.train = (lambda norm, mode=True: nn.Module.train(norm, False)) if fixed else nn.Module.train


def local(trained) -> list[torch.Tensor]:
    """All that this process keeps of the weights and of their optimiser's state."""
    optimizer = getattr(trained.optimizer, "optimizer", trained.optimizer)
    found = [getattr(p, "ds_tensor", p) for p in trained.module.parameters()]
    found += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    found += [p for group in optimizer.param_groups for p in group["params"]]
    return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in found]


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return len(before) == len(after) and all(map(torch.equal, before, after))


def _network(name: str, dtype: torch.dtype) -> nets.GatedNetwork:
    """With running statistics that are not those of a new one."""
    torch.manual_seed(0)
    net = nets.gate(Mixed(), torch.zeros(2, 3, 8, 8), check=False) if name == "any_network" else nets.build(name)
    for norm in net.modules():
        if isinstance(norm, _BatchNorm):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return net.to(dtype)


def _training(extras: list[str]) -> Training:
    return Training(
        sync_batchnorm="sync" in extras,
        activation_checkpointing="checkpointing" in extras,
        compile="compile" in extras,
        cuda_graphs="eager" not in extras,
        memory_format="channels_last" if "last" in extras else "contiguous",
        tf32=False,
    )


def _batch(context: Context, number: int, mine: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's part of a batch."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)[mine]
    labels = torch.randint(0, 10, (BATCH,), generator=generator)[mine]
    return images.to(context.device, dtype, memory_format=context.memory_format), labels.to(context.device)


def _keep(context: Context, net: nets.GatedNetwork, architecture: Architecture) -> torch.Tensor:
    """A keep mask: by criterion taylor that of the budget, else cut between two alphas that are well apart, so that the last bit of
    neither decides."""
    alpha = architecture.alpha.detach()
    if architecture.hard:
        keep = taylor.select(net, SIDE, taylor.strength(net, SIDE, architecture, _budget(net)), _budget(net), taylor.ROUNDS, TAYLOR)
        context.agree("the keep mask", net.by_site(keep))
        return keep
    ordered = alpha.sort().values
    gaps = ordered.diff()[len(ordered) // 3 : len(ordered) // 2]
    cut = len(ordered) // 3 + int(gaps.argmax())
    keep, _ = masks.rescue(net, alpha > (ordered[cut] + ordered[cut + 1]) / 2, alpha)
    context.agree("the keep mask", net.by_site(keep))
    return keep


def _budget(net: nets.GatedNetwork) -> budgets.Budget:
    return budgets.read(TAYLOR, net, SIDE)


def _configure(context: Context, extras: list[str]) -> None:
    """The backend's own settings: with "shared" every parameter is shared out, else none of these small networks is."""
    if context.backend == "fsdp2":
        context.config.settings["min_params"] = 1 if "shared" in extras else 100_000
    if context.backend == "zero3":
        zero = context.config.settings["deepspeed"]["zero_optimization"]
        zero.pop("stage3_max_reuse_distance", None)
        zero["stage3_param_persistence_threshold"] = 0 if "shared" in extras else 100_000
        # By default a parameter stays gathered until its backward pass, and DeepSpeed looks, at the end of each module, through all
        # that come: of a supernet half of the job's time. Recomputed modules gather what was let go.
        if "checkpointing" in extras or "shared" not in extras:
            zero["stage3_max_reuse_distance"] = 0


class Alpha:
    """The architecture with its optimiser, and all that a weight step must leave alone."""

    def __init__(self, gates: int, hard: bool, context: Context, dtype: torch.dtype):
        self.architecture = Architecture(gates, hard).to(context.device, dtype)
        learning = functools.partial(torch.optim.SGD, self.architecture.parameters(), 0.05, 0.9, weight_decay=1e-3)
        self.optimizer = taylor.Squares(self.architecture) if hard else learning()

    def state(self) -> list[torch.Tensor]:
        buffers = (state["momentum_buffer"] for state in self.optimizer.state.values())
        return [tensor.detach().clone() for tensor in (self.architecture.alpha, *buffers)]


def _weight_step(context: Context, case: str, trained, alpha: Alpha, batch: tuple, gates, parts: int) -> Outcome:
    """A weight step, which moves the weights and leaves alpha."""
    weights, others = local(trained), alpha.state()
    outcome = weight_step(trained, *batch, len(batch[1]), gates, parts)
    assert same(others, alpha.state()), f"{case}: frozen alpha moved"
    # A step that overflows in float16 is left out.
    assert context.precision == "float16" or not same(weights, local(trained))
    return outcome


def _architecture_step(context: Context, case: str, trained, alpha: Alpha, batch: tuple, **more) -> Outcome:
    """An architecture step, which leaves the weights and computes no gradient of them."""
    weights, penalty = local(trained), (DELTA, "sigmoid", 0.01, context.average_)
    outcome = architecture_step(trained, alpha.architecture, alpha.optimizer, *batch, len(batch[1]), *penalty, **more)
    assert same(weights, local(trained)), f"{case}: frozen weights moved"
    assert all(p.grad is None for p in trained.module.parameters())
    return outcome


def _gathered(trained, network: torch.nn.Module, phase: str, statistics: bool) -> tuple[dict, dict[str, torch.Tensor]]:
    """The momentum, and all that `phase` left in the plain network: its momentum, weights and, if asked for, statistics."""
    with trained.gathered() as momentum:
        # As evaluation leaves it.
        network.eval()
        momentum = {name: buffer.clone() for name, buffer in momentum.items()}
        found = {f"{phase}.momentum.{name}": buffer for name, buffer in momentum.items()}
        found |= {f"{phase}.weights.{name}": p.detach().clone() for name, p in network.named_parameters()}
        if statistics:
            found |= {f"{phase}.statistics.{name}": b.clone() for name, b in network.named_buffers() if "running" in name}
    return momentum, found


def _left_in_memory(trained) -> int:
    """Tensors of the wrap that are still in memory when it is closed."""
    held = [weakref.ref(tensor) for tensor in (*trained.module.parameters(), *trained.module.buffers())]
    held += [weakref.ref(tensor) for state in trained.optimizer.state.values() for tensor in state.values()]
    trained.close()
    gc.collect()
    return sum(ref() is not None for ref in held)


def trajectory(context: Context, case: str) -> dict[str, torch.Tensor]:
    name, weight_steps, architecture_steps, statistics, *extras = case.split(":")
    known = {"clip", "parts", "sync", "checkpointing", "compile", "double", "eager", "last", "shared", "taylor", "apart"}
    known |= {"adamw", "rmsprop"}
    assert not set(extras) - known
    fix_statistics(statistics == "fixed")
    _configure(context, extras)
    dtype = torch.float64 if "double" in extras else torch.float32
    net, training = _network(name, dtype), _training(extras)
    context.tune(training)
    clip = 0.5 if "clip" in extras else None
    sgd = SGD(lr=0.02, momentum=0.9, weight_decay=1e-3, clip_norm=clip, nesterov=clip is not None, decay_norms=clip is None)
    if "rmsprop" in extras:
        sgd = SGD(kind="rmsprop", lr=0.002, weight_decay=1e-2, eps=1e-2)
    if "adamw" in extras:
        # Without so large an eps a gradient that is nothing but rounding would be a whole step.
        sgd = SGD(kind="adamw", lr=0.002, weight_decay=1e-2, decay_norms=False, eps=1e-2)
    parts = 3 if "parts" in extras and context.world_size == 1 else 2 if "parts" in extras else 1
    alpha, share = Alpha(net.num_gates, "taylor" in extras, context, dtype), BATCH // context.world_size
    mine = slice(context.rank * share, (context.rank + 1) * share)
    found, count, momentum, network = {}, 0, {}, net
    for phase, steps in STEPS.items():
        trained = context.wrap(network, sgd, momentum, training)
        for step in range(steps):
            batch = _batch(context, count + (192 if "apart" in extras else 0), mine, dtype)
            trained.set_rate(sgd.lr / (1 + count))
            if alpha.architecture.hard and phase == "search" and (number := taylor.due(step, steps, 2)) is not None:
                taylor.close(net, SIDE, alpha.architecture, _budget(net), number, TAYLOR)
                # One process on the CPU is what others are compared with.
                if context.backend != "single" or context.device.type == "cuda":
                    keep = alpha.architecture.alpha.detach() >= 0
                    why = trained.why_not_slim(keep)
                    assert (why is None) == (context.backend not in ("fsdp2", "zero3") and "checkpointing" not in extras), why
                    if why is None:
                        trained.slim(keep)
            if phase == "search" and schedule.is_architecture_step(step, int(weight_steps), int(architecture_steps)):
                outcome = _architecture_step(context, case, trained, alpha, batch, accumulation=parts, clip_norm=clip)
            else:
                gates = alpha.architecture.gates(DELTA) if phase == "search" else None
                outcome = _weight_step(context, case, trained, alpha, batch, gates, parts)
            found[f"{count:02d}.cross_entropy"] = context.sum_(outcome.cross_entropy.clone())
            count += 1
        # What is computed no more has other statistics.
        statistics = ("sync" in extras or context.world_size == 1) and "taylor" not in extras
        momentum, of_phase = _gathered(trained, network, phase, statistics)
        found |= of_phase
        assert None not in getattr(trained, "graphs", {}).values(), f"{case}: a step of {phase} cannot be captured in a CUDA graph"
        left = _left_in_memory(trained)
        if context.device.type == "cuda":
            found[f"{phase}.left in memory"] = torch.tensor(float(left))
        else:
            assert not left, f"{case}: the wrap of {phase} is still in memory"
        if phase == "search":
            found["alpha"] = alpha.architecture.alpha.detach().clone()
            keep = _keep(context, net, alpha.architecture)
            network, momentum = compact.compact(net, keep), {}
            if alpha.architecture.hard:
                # What closed channels have is a rank, too large beside sums of squares.
                found["alpha"] *= found["alpha"] >= 0
                found["keep"] = keep.float()
    return found


def trajectories(context: Context, out: str, cases: list[str], backend: str | None = None) -> dict[str, str]:
    """Write the trajectories of all cases to `out`, a tensor case/name each. backend: in place of the context's; DDP then wraps one
    process, too. A case that fails ends the others where there are several processes; else its traceback is returned."""
    found, failed = {}, {}
    context.backend = backend or context.backend
    if context.backend == "ddp" and not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for case in cases:
            # What the modules hold is by far the most that a collection looks through, and there are six of them in each case.
            gc.freeze()
            try:
                found |= {f"{case}/{name}": tensor.cpu() for name, tensor in trajectory(context, case).items()}
            except Exception:
                if context.world_size > 1 or context.device.type == "cpu":
                    raise
                failed[case] = traceback.format_exc()
    finally:
        fix_statistics(False)
        # Or modules that keep count complain, at the end of the process, of what was left of them.
        gc.unfreeze()
    if context.main:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, out, {"backend": context.backend})
    return failed
