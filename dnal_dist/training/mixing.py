"""Mixup and CutMix: each image is mixed with its neighbour in the global order, and its label with the neighbour's.

Neighbours are always in one process, so that a batch is mixed alike on any number of them.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dnal_dist import recipe
from dnal_dist.common.errors import InputError
from dnal_dist.training.run import Run

# Labels of images that only fill a batch are below 0: they count for nothing, mixed or not.


def check(run: Run) -> None:
    """Raise InputError if a process has an odd number of images, of which one would have no neighbour."""
    for name in ("pretrain", "search", "finetune"):
        phase = getattr(run.recipe.phases, name)
        if (phase.mixup or phase.cutmix) and run.local_batch % 2:
            key, count = "mixup" if phase.mixup else "cutmix", run.recipe.data.global_batch
            raise InputError(
                f"key 'phases.{name}.{key}': mixes pairs of images, but 'data.global_batch' ({count}) leaves {run.local_batch} "
                "to a process; make that even"
            )


def mixed(phase: recipe.Phase, images: Tensor, labels: Tensor, classes: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Images (n, 3, H, W), n even, and labels (n,) as mixed images and the shares of the classes (n, classes), at iteration `step`
    of the run; as they are if the phase mixes nothing."""
    if not (phase.mixup or phase.cutmix):
        return images, labels
    # On all processes alike.
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, step, 2))))
    cut = phase.cutmix and (not phase.mixup or rng.random() < 0.5)
    share = float(rng.beta(*[phase.cutmix if cut else phase.mixup] * 2))
    others = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    if cut:
        top, left, bottom, right = box(images.shape[2:], share, rng)
        images = images.clone()
        images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / images[0, 0].numel()
    else:
        images = torch.lerp(others, images, share)
    shares = F.one_hot(labels.clamp_min(0), classes).to(images.dtype) * (labels >= 0).unsqueeze(1)
    return images, torch.lerp(shares.unflatten(0, (-1, 2)).flip(1).flatten(0, 1), shares, share)


def box(shape: tuple[int, int], share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of a part with 1 - share of the area, around a point anywhere in the image, cut at its edges."""
    side = (1 - share) ** 0.5
    middles = [int(rng.integers(0, length)) for length in shape]
    halves = [int(length * side / 2) for length in shape]
    first = [max(0, middle - half) for middle, half in zip(middles, halves, strict=True)]
    last = [min(length, middle + half) for length, middle, half in zip(shape, middles, halves, strict=True)]
    return (*first, *last)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Summed over the images. labels: numbers of classes (n,), those below 0 left out, or shares of the classes (n, classes)."""
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    weights = labels * (1 - smoothing) + labels.sum(1, keepdim=True) * smoothing / labels.shape[1]
    return -(weights * logits.log_softmax(1)).sum()


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many images are said to be of their class, or of the one with the largest share."""
    if labels.dim() == 1:
        return (logits.argmax(1) == labels).sum()
    return ((logits.argmax(1) == labels.argmax(1)) & (labels.sum(1) > 0)).sum()
