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
    """Accuracies as fractions, mean cross-entropy, number of samples, and the samples that were skipped."""

    accuracy: float
    top5: float
    cross_entropy: float
    samples: int
    bad: list[str]


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
    # correct, in the top five, summed cross-entropy, samples
    sums, bad = torch.zeros(4, dtype=torch.float64, device=context.device), []
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
        cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([top[:, 0].sum(), top.sum(), cross_entropy, top.new_tensor(len(labels), dtype=torch.long)])
    correct, top5, cross_entropy, samples = context.sum_(sums).tolist()
    bad = context.gather(bad)
    if samples + len(bad) != stream.samples:
        raise InputError(f"evaluated {samples:.0f} samples and skipped {len(bad)} of {stream.samples}: a process saw other shards")
    samples = max(samples, 1)
    return Evaluation(correct / samples, top5 / samples, cross_entropy / samples, int(samples), bad)
