"""Memory and traffic of a recipe on each backend, estimated without a GPU."""

import contextlib
import copy
import math
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist import nets, recipe
from dnal_dist.common import errors
from dnal_dist.distributed import optimizers
from dnal_dist.distributed.wrapper import MIN_PARAMS
from dnal_dist.nets import GatedNetwork
from dnal_dist.nets.gate import segments

BACKENDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16}
# The rest is for what is not counted: workspaces of kernels, gradients of activations, fragmentation.
USABLE = 0.9
# DistributedDataParallel closes its first bucket at the first of these many bytes, so that sending begins early.
BUCKETS = (2**20, 25 * 2**20)
# Parameters up to this many elements stay on every rank under ZeRO-3 (DeepSpeed's stage3_param_persistence_threshold).
PERSISTENT = 100_000


Operations = list[tuple[str, int]]


class Memory(NamedTuple):
    """Bytes that one rank keeps whatever its batch, the most of any rank."""

    parameters: int
    gradients: int
    """Between the backward pass and the optimiser's step."""
    optimizer: int
    """What the optimizer keeps, a moving average, and ZeRO's copy of the weights in float32."""
    other: int
    """Alpha with its gradient and momentum, and BatchNorm's running statistics."""
    working: int
    """Gathered parameters, buckets of gradients, what is summed up where a share is taken in parts. Estimated."""


class Activations(NamedTuple):
    """Bytes that the forward pass of a weight step keeps for its backward pass: `fixed`, and `each` for each image."""

    fixed: int
    each: int


def _ceil(number: int, ranks: int) -> int:
    return -(-number // ranks)


def _sizes(net: nn.Module) -> list[int]:
    return [p.numel() for p in net.parameters()]


def _groups(net: nn.Module, ranks: int) -> list[int]:
    """Elements that a rank keeps of each of FSDP2's groups, the root's first: whole rows, as many as the first rank has."""
    inner = [{p for module in segment for p in module.parameters()} for segment in segments(net)]
    inner = [group for group in inner if sum(p.numel() for p in group) >= MIN_PARAMS]
    root = set(net.parameters()).difference(*inner)
    return [sum(_ceil(p.shape[0], ranks) * (p.numel() // p.shape[0]) for p in group) for group in (root, *inner)]


def _on_meta(net: GatedNetwork, dtype: torch.dtype = torch.float32) -> GatedNetwork:
    """A copy without memory. In bfloat16 its statistics stay as they are, like on every backend."""
    known = {id(t): t for t in (*net.parameters(), *net.buffers())}
    empty = {key: torch.empty_like(t, device="meta") for key, t in known.items()}
    copied = copy.deepcopy(net, {key: nn.Parameter(t) if isinstance(known[key], nn.Parameter) else t for key, t in empty.items()})
    copied.to(dtype)
    for norm in copied.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            norm.running_mean, norm.running_var = norm.running_mean.float(), norm.running_var.float()
    return copied.train()


def _images(net: GatedNetwork, image_size: int, images: int) -> Tensor:
    return torch.empty(images, 3, image_size, image_size, device="meta", dtype=next(net.parameters()).dtype)


def _loss(net: GatedNetwork, images: Tensor) -> Tensor:
    """Of a weight step in the search, on the meta device."""
    labels = torch.empty(len(images), device="meta", dtype=torch.long)
    return F.cross_entropy(net(images, torch.empty(net.num_gates, device="meta")).float(), labels, reduction="sum")


def _buckets(net: GatedNetwork) -> list[int]:
    """Bytes of DDP's buckets, which are arranged from the last parameter to the first (see ddp.Replicated)."""
    arrived, buckets = [4 * p.numel() for p in reversed(list(net.parameters()))], [0]
    for number, size in enumerate(arrived, 1):
        buckets[-1] += size
        if buckets[-1] >= BUCKETS[min(len(buckets), len(BUCKETS)) - 1] and number < len(arrived):
            buckets.append(0)
    return buckets


def traffic(
    net: GatedNetwork, backend: str, ranks: int, image_size: int, precision: str = "no", parts: int = 1
) -> tuple[Operations, Operations]:
    """What a weight step and an architecture step of the search communicate on images of image_size x image_size: (operation,
    bytes) as traffic.Traffic records them, in no particular order.

    precision: no or bf16. parts: the share of a rank is taken in so many. Without sync_batchnorm and clip_norm, which add to it. A
    single process sends nothing to another; ZeRO calls its reductions all the same.
    """
    low, together = PRECISIONS[precision].itemsize, ranks > 1
    alpha = [("all-reduce", 4 * net.num_gates)] * together
    if backend == "ddp":
        return [("all-reduce", size) for size in _buckets(net)] if together else [], alpha
    if backend == "fsdp2":
        root, *inner = (ranks * rows for rows in _groups(net, ranks))
        # The root stays gathered until its backward pass; the others are gathered for it a second time.
        gathers = [("all-gather", low * size) for size in (root, *inner, *inner) if size] * parts * together
        return [*gathers, *(("reduce-scatter", 4 * size) for size in (root, *inner) if size and together)], [*gathers, *alpha]
    if backend == "zero3":
        small, large = _persistent(net, ranks)
        gathers = [("all-gather", low * sum(large))] * parts * (together and bool(large))
        reduced = [("reduce-scatter", low * sum(small + large)), ("all-reduce", 8)]
        return [*gathers, *reduced, *(("all-gather", low * size) for size in small if together)], [*gathers, *alpha]
    total = sum(_sizes(net))
    # In bfloat16 it also asks whether a gradient is infinite: one byte.
    reduced = [("all-reduce", low * total), ("all-reduce", 4), *[("all-reduce", 1)] * (precision == "bf16")]
    return [*reduced, *[("all-gather", low * _in_zero(total, ranks) * ranks)] * together], alpha


def _persistent(net: nn.Module, ranks: int) -> tuple[list[int], list[int]]:
    """Elements of the parameters that stay gathered under ZeRO-3 and of the others, as gathers have them."""
    sizes = _sizes(net)
    padded = [_ceil(size, ranks) * ranks for size in sizes]
    both = list(zip(sizes, padded, strict=True))
    return [more for size, more in both if size <= PERSISTENT], [more for size, more in both if size > PERSISTENT]


def _in_zero(total: int, ranks: int) -> int:
    """Elements of a rank's share under ZeRO-1 and 2, which is even (nccl_start_alignment_factor)."""
    return 2 * _ceil(total, 2 * ranks)


def _touched(net: nn.Module, ranks: int) -> int:
    """Elements of all parameters that a rank's share under ZeRO-1 and 2 has a part of, the most of any rank: their gradients are
    kept whole."""
    share, start, touched = _in_zero(sum(_sizes(net)), ranks), 0, Counter()
    for size in _sizes(net):
        for rank in range(start // share, _ceil(start + size, share)):
            touched[rank] += size
        start += size
    return max(touched.values())


def states_of(settings: recipe.Recipe) -> int:
    """What is kept of each parameter beside it and its gradient, in its size: what its optimizer keeps, a moving average."""
    phases = (settings.phases.pretrain, settings.phases.search)
    return max(len(optimizers.buffers(phase.optimizer)) + (phase.ema is not None) for phase in phases)


def memory(net: GatedNetwork, backend: str, ranks: int, precision: str = "no", parts: int = 1, states: int = 1) -> Memory:
    """What one of so many ranks keeps beside images and activations. states: see states_of."""
    low, total = PRECISIONS[precision].itemsize, sum(_sizes(net))
    other = 12 * net.num_gates + sum(b.numel() * b.element_size() for b in net.buffers())
    if backend == "ddp":
        # Autocast keeps its copies of what convolutions and Linear layers take.
        cast = sum(p.numel() for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear) for p in m.parameters())
        return Memory(4 * total, 4 * total, 4 * total * states, other, low * cast * (precision != "no"))
    if backend == "fsdp2":
        share = 4 * sum(_groups(net, ranks))
        root, *inner = (ranks * rows for rows in _groups(net, ranks))
        largest = max(inner, default=0)
        # The group at work and the next one, gradients in the same precision, and those that are being sent.
        working = low * (2 * root + 3 * largest) + 4 * max(root, largest)
        return Memory(share, share, share * states, other, working + 4 * total * (parts > 1))
    # The bucket that gradients are reduced in is as large as the network.
    working = low * total + 2 * low * total * (parts > 1)
    if backend == "zero3":
        small, large = _persistent(net, ranks)
        share, together = (sum(small) + sum(large)) // ranks, ranks > 1
        whole = low * (share + together * sum(small))
        return Memory(whole, low * share, 4 * (1 + states) * share, other, working + low * together * sum(large))
    share = _in_zero(total, ranks)
    return Memory(low * share * ranks, low * _touched(net, ranks), 4 * (1 + states) * share, other, working)


def activations(net: GatedNetwork, image_size: int, precision: str = "no", checkpointing: bool = False) -> Activations:
    """What a weight step of the search keeps for its backward pass, without the number themselves.

    With activation checkpointing that is what lies between the units of the network, and the unit that keeps the most.
    """
    net = _on_meta(net, PRECISIONS[precision])
    two, four = (_saved(net, image_size, number, checkpointing) for number in (2, 4))
    return Activations(two - (four - two), (four - two) // 2)


def _saved(net: GatedNetwork, image_size: int, number: int, checkpointing: bool) -> int:
    images = _images(net, image_size, number)
    # Only a cast of the number comes on top of them.
    others = [images] if images.dtype == torch.float32 else []
    own = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers(), *others)}
    # Storages by unit; outside of units under None. They are held, so that none takes another's place.
    found: dict[nn.Module | None, dict[int, torch.UntypedStorage]] = {None: {}}
    within: list[nn.Module | None] = [None]

    def note(tensor: Tensor, unit: nn.Module | None) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found.setdefault(unit, {})[storage._cdata] = storage
        return tensor

    def enter(unit: nn.Module, inputs: tuple) -> None:
        if checkpointing:
            note(inputs[0], None)
            within.append(unit)

    def leave(*_) -> None:
        if checkpointing:
            within.pop()

    with contextlib.ExitStack() as stack:
        for unit in net.units():
            stack.callback(unit.register_forward_pre_hook(enter).remove)
            stack.callback(unit.register_forward_hook(leave).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: note(t, within[-1]), lambda t: t))
        loss = _loss(net, images)
    outside = found.pop(None)
    size = {unit: sum(s.nbytes() for key, s in inside.items() if key not in outside) for unit, inside in found.items()}
    del loss
    return sum(s.nbytes() for s in outside.values()) + max(size.values(), default=0)


def plan(settings: recipe.Recipe, ranks: int, device_memory: int | None = None, precision: str = "no") -> dict:
    """By backend, what a rank keeps and what steps send if the share of a rank is taken in the fewest equal parts that fit.

    device_memory: bytes of a device, of which USABLE are counted on; None: only data.per_device_batch_limit asks for parts. Raises
    InputError if the global batch cannot be divided or the images are too small, ValueError for an unknown network.
    """
    data, checkpointing = settings.data, settings.training.activation_checkpointing
    if ranks < 1:
        raise errors.InputError(f"--ranks {ranks}: expected at least 1")
    if data.global_batch % ranks:
        raise errors.InputError(
            f"key 'data.global_batch': {data.global_batch} images cannot be divided evenly among {ranks} ranks; the nearest that "
            f"can is {max(1, round(data.global_batch / ranks)) * ranks}"
        )
    net = nets.on_meta(**settings.network)
    share, size = data.global_batch // ranks, data.image_size
    states = states_of(settings)
    usable, limit = math.inf if device_memory is None else USABLE * device_memory, data.per_device_batch_limit or share
    kept, images = activations(net, size, precision, checkpointing), 12 * size**2 * share

    def needed(backend: str, parts: int) -> dict[str, int]:
        found = memory(net, backend, ranks, precision, parts, states)._asdict() | {"images": images}
        found["activations"] = kept.fixed + kept.each * (share // parts)
        return found | {"total": sum(found.values())}

    def of(backend: str) -> dict:
        # With one image at a time last, which is told of if nothing fits.
        parts = [p for p in range(1, share + 1) if share % p == 0 and share // p <= limit]
        best = next((p for p in parts if needed(backend, p)["total"] <= usable), None)
        shown = best or parts[-1]
        steps = zip(("weight", "architecture"), traffic(net, backend, ranks, size, precision, shown), strict=True)
        found = {"fits": best is not None, "parts": shown, "images_at_a_time": share // shown, "memory": needed(backend, shown)}
        return found | {f"{step}_step": totals(operations) for step, operations in steps}

    facts = {"network": settings.model.name, "image_size": size, "parameters": sum(_sizes(net)), "gates": net.num_gates}
    facts |= {"precision": precision, "activation_checkpointing": checkpointing, "ranks": ranks, "share": share}
    return facts | {"device_memory": device_memory, "usable": USABLE, "backends": {backend: of(backend) for backend in BACKENDS}}


def totals(operations: Operations) -> dict:
    """Number and bytes of collectives, together and by operation."""
    kinds = {kind: [size for name, size in operations if name == kind] for kind in sorted({name for name, _ in operations})}
    by_kind = {kind: {"collectives": len(sizes), "bytes": sum(sizes)} for kind, sizes in kinds.items()}
    return {"collectives": len(operations), "bytes": sum(size for _, size in operations), "by_operation": by_kind}
