"""That exported files are the network of the run: every file in a process of its own, on images of the validation set."""

import contextlib
import copy
import itertools
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dnal_dist import nets, recipe
from dnal_dist.common.errors import reason
from dnal_dist.export import readers
from dnal_dist.export.images import Images
from dnal_dist.nets import compact
from dnal_dist.nets.masks import unpack
from dnal_dist.nets.whole import deployed

# Largest differences of logits, relative to the largest logit.
LIMITS = {"float64": 1e-10, "float32": 1e-5}
# That a process may take for a batch, or to end, on a machine that is busy.
PATIENCE_SECONDS = 600
# Images that the masked network gets, which is as slow as the full one.
MASKED = 16


class Check(NamedTuple):
    """One comparison with the compact network in float64."""

    file: str
    """Or the network that is compared."""
    precision: str
    images: int
    difference: float
    """Of the logits, relative to the largest one."""
    top1_differs: int
    """Images of which another class comes first than in the compact network of the same precision."""
    weights: str = "the run's"

    @property
    def limit(self) -> float:
        return LIMITS[self.precision]

    @property
    def holds(self) -> bool:
        return self.images > 0 and self.difference <= self.limit


class ProofError(Exception):
    """A file is not the network of the run; the message says which, and by how much it differs."""


class _Process:
    """A file in a process of its own, in which it runs in each of `precisions`."""

    def __init__(self, folder: Path, file: str, precisions: tuple[str, ...]):
        self.file, self.checks = file, {precision: Check(file, precision, 0, 0.0, 0) for precision in precisions}
        # -P: nothing is imported from the folder that this process was started in.
        command = [sys.executable, "-P", str(Path(readers.__file__)), str(folder.resolve()), file, *precisions]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, cwd=folder, **pipes)
        self.scale, self.late = dict.fromkeys(precisions, 0.0), False

    def send(self, images: Tensor) -> None:
        with self._explained():
            readers.send(self.process.stdin, images.numpy())

    def compare(self, truths: dict[str, Tensor], classes: dict[str, Tensor]) -> None:
        for precision in self.checks:
            self._compare(precision, truths[precision], classes[precision])

    def _compare(self, precision: str, truth: Tensor, classes: Tensor) -> None:
        with self._explained():
            logits = readers.receive(self.process.stdout)
            if logits is None:
                raise EOFError
        found, check = torch.from_numpy(logits).double(), self.checks[precision]
        if found.shape != truth.shape or not bool((found - truth).isfinite().all()):
            raise ProofError(
                f"{self.file}: it gives {tuple(found.shape)} numbers for {tuple(truth.shape)} logits, or infinite ones"
            )
        self.scale[precision] = max(self.scale[precision], float(truth.abs().max()))
        self.checks[precision] = check._replace(
            images=check.images + len(truth),
            difference=max(check.difference, float((found - truth).abs().max())),
            top1_differs=check.top1_differs + int((found.argmax(1) != classes).sum()),
        )

    def end(self) -> list[Check]:
        with self._explained():
            self.process.stdin.close()
            if self.process.wait(timeout=PATIENCE_SECONDS):
                raise ValueError
        return [check._replace(difference=check.difference / max(self.scale[p], 1e-30)) for p, check in self.checks.items()]

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        def end() -> None:
            self.late = True
            self.process.kill()

        # Neither reading from a pipe nor writing to one has a time limit of its own.
        timer = threading.Timer(PATIENCE_SECONDS, end)
        timer.start()
        try:
            yield
        except (OSError, ValueError, EOFError, subprocess.TimeoutExpired):
            self.close()
            self.errors.seek(0)
            lines = [line for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
            why = reason(ValueError(lines[-1] if lines else "it ended"))
            why = f"no answer in {PATIENCE_SECONDS:g} s" if self.late else why
            raise ProofError(f"{self.file}: it cannot be run in a process of its own ({why})") from None
        finally:
            timer.cancel()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


def prove(network: nn.Module, folder: Path, files: list[str], images: Images, any_size: bool = False) -> list[Check]:
    """Each of `files` in `folder` against `network`, compact and in eval mode, on all `images`; any_size: and on drawn ones
    of another height and width. Raises ProofError for a file that cannot be run; whether a check holds is the caller's to ask.

    In float64 model.py has what its weights were rounded to when layers were joined, in float32, and is compared with that.
    """
    truth, stored = copy.deepcopy(network).double(), deployed(network).double()
    # In both precisions in one process, since importing torch takes seconds of a core.
    processes = [_Process(folder, file, ("float32", "float64") if file == "model.py" else ("float32",)) for file in files]
    try:
        size, generator = images.data.image_size, torch.Generator().manual_seed(0)
        others = [torch.randn(2, 3, 2 * size, 3 * size, generator=generator)] if any_size else []
        for batch in itertools.chain(images.batches(), others):
            for process in processes:
                process.send(batch)
            with torch.no_grad():
                exact = {"float32": truth(batch.double()), "float64": stored(batch.double())}
                classes = {"float32": network(batch).argmax(1), "float64": exact["float64"].argmax(1)}
            for process in processes:
                process.compare(exact, classes)
        checks = [check for process in processes for check in process.end()]
        return sorted(checks, key=lambda check: check.precision)
    finally:
        for process in processes:
            process.close()
            process.errors.close()


@torch.no_grad()
def joined(network: nn.Module, images: Images) -> Check:
    """The deployment form of `network` against itself, both in float64. Raises ProofError if there is no image."""
    truth, batch = copy.deepcopy(network).double(), _some(images)
    return _check("deployment form", truth(batch), deployed(truth)(batch))


def _some(images: Images) -> Tensor:
    batch = next(iter(images.batches()), torch.zeros(0))[:MASKED].double()
    if not len(batch):
        raise ProofError("no image of the validation set can be used")
    return batch


def _check(what: str, expected: Tensor, logits: Tensor, weights: str = "the run's") -> Check:
    difference = float((logits - expected).abs().max() / expected.abs().max())
    differs = int((logits.argmax(1) != expected.argmax(1)).sum())
    return Check(what, "float64", len(expected), difference, differs, weights)


@torch.no_grad()
def masked(settings: recipe.Recipe, mask: str, network: nn.Module, images: Images) -> Check:
    """The full network of the recipe, with the gates closed that the run closed and the run's weights at the places that stayed,
    against the compact one, in float64.

    Where closed channels have left a constant, or a weight is computed, the run's weights have no such places; then both networks
    have drawn ones. Raises ProofError if the compact network is none of this recipe and mask.
    """
    full = nets.build(**settings.network).double().eval()
    keep = unpack(mask, full.num_gates)
    drawn = {name: tensor.clone() for name, tensor in full.state_dict().items()}
    flat = torch.cat([tensor.flatten() for tensor in drawn.values() if tensor.is_floating_point()])
    full.load_state_dict(_divided(torch.arange(len(flat), dtype=flat.dtype), drawn))
    small = compact.compact(full, keep)
    if compact.describe(small) != compact.describe(network):
        raise ProofError("compact: it is not what pruning makes of the recipe's network and the mask in metrics.jsonl")
    batch = _some(images)
    own, places = network.state_dict(), small.state_dict()
    everywhere = True
    for name, at in places.items():
        if at.is_floating_point():
            inside = (at == at.round()) & (at >= 0) & (at < len(flat))
            everywhere = everywhere and bool(inside.all())
            flat[at[inside].long()] = own[name].double()[inside]
    found, filled = None, _divided(flat, drawn)
    for weights, tensors, other in (("the run's", filled, copy.deepcopy(network).double()), ("drawn", drawn, None)):
        full.load_state_dict(tensors)
        other = other or compact.compact(full, keep).eval()
        found = _check("masked network", other(batch), full(batch, keep.double()), weights)
        if found.holds or everywhere:
            break
    return found


def _divided(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the forms of `like`, the floating ones filled with the numbers of `flat` (N,) one after the other."""
    parts = iter(flat.split([tensor.numel() for tensor in like.values() if tensor.is_floating_point()]))
    return {name: next(parts).view(tensor.shape) if tensor.is_floating_point() else tensor for name, tensor in like.items()}
