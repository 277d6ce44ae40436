"""Exact accuracy over the validation set, on any number of processes: every sample once."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnal_dist import recipe
from dnal_dist.common.errors import InputError
from dnal_dist.common.span import spanned
from dnal_dist.data.device import feed
from dnal_dist.data.pipeline import Stream
from dnal_dist.distributed.context import Context


class Evaluation(NamedTuple):
    """Results over a validation set, accuracies as fractions."""

    accuracy: float
    balanced_accuracy: float
    """Mean of the accuracies by class, over the classes that the set has."""
    top5: float
    cross_entropy: float
    """Mean over samples."""
    samples: int
    per_class: list[list[int]]
    """[correct, seen] of each class."""
    bad: list[str]
    """The samples that were skipped."""


@spanned("evaluation")
@torch.no_grad()
def evaluate(
    network: nn.Module,
    stream: Stream,
    data: recipe.Data,
    context: Context,
    gates: Tensor | None = None,
    between: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Top-1 and top-5 of the bare `network` (with `gates` (N,), if given) over all of `stream`.

    between is called between two batches, equally often on all processes; its exceptions pass.
    """
    network.eval()
    classes, bad = stream.shards.num_classes, []
    # In the top five, summed cross-entropy, and by class the samples and the correct ones.
    sums = torch.zeros(2 + 2 * classes, dtype=torch.float64, device=context.device)
    # The last batch may be a partial one, of which some processes have no samples.
    whole = stream.samples // data.global_batch
    for number, (images, labels, batch, _) in enumerate(
        feed(stream.batches(), data, context.device, memory_format=context.memory_format)
    ):
        if number < whole:
            between()
        bad += map(str, batch.bad)
        if not len(labels):
            continue
        logits = network(images) if gates is None else network(images, gates)
        top = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        sums[:2] += torch.stack([top.sum(), F.cross_entropy(logits, labels, reduction="sum")])
        sums.index_add_(0, 2 + labels, torch.ones_like(labels, dtype=torch.float64))
        sums.index_add_(0, 2 + classes + labels, top[:, 0].double())
    top5, cross_entropy, *counts = context.sum_(sums).tolist()
    seen, correct = counts[:classes], counts[classes:]
    samples, bad = sum(seen), context.gather(bad)
    if samples + len(bad) != stream.samples:
        raise InputError(f"evaluated {samples:.0f} samples and skipped {len(bad)} of {stream.samples}: a process saw other shards")
    recalls = [right / number for right, number in zip(correct, seen, strict=True) if number]
    return Evaluation(
        accuracy=sum(correct) / max(samples, 1),
        balanced_accuracy=sum(recalls) / max(len(recalls), 1),
        top5=top5 / max(samples, 1),
        cross_entropy=cross_entropy / max(samples, 1),
        samples=int(samples),
        per_class=[[int(right), int(number)] for right, number in zip(correct, seen, strict=True)],
        bad=bad,
    )
