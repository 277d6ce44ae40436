"""Steps of training, timed: dnal_dist's own against the published formulation's, in one process, from the same weights.

A `Way` says whose step it is, and in which precision, memory layout and mode. `measure` builds
the contenders of one step, lets them take turns, and reports one row for each: median milliseconds, images/s and memory.
"""

import contextlib
import copy
import gc
import itertools
import os
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch
from formulation import ALPHA_LR, LR, MOMENTUM, PENALTY_WEIGHT, STEPS, WEIGHT_DECAY, Trainer
from subject import Subject
from torch import Tensor, nn

from dnal_dist.distributed.context import Context
from dnal_dist.distributed.optimizers import SGD
from dnal_dist.recipe import SGD as Optimizer
from dnal_dist.recipe import Training
from dnal_dist.search.architecture import Architecture
from dnal_dist.training.steps import architecture_step, weight_step


class Way(NamedTuple):
    who: str = "ours"
    """ours, formulation, or floor: nothing but the convolutions and products of ours."""
    precision: str = "bf16"
    """fp32; tf32 (float32 whose convolutions and products may use TF32); bf16 (autocast)."""
    layout: str = "channels_last"
    """Of images, activations and weights: channels_last or contiguous."""
    mode: str = "eager"
    """eager; compile and graphs (ours only): the recipe's training.compile and training.cuda_graphs."""
    cudnn_benchmark: bool = False
    """The same for all ways of a process: an algorithm once chosen for a shape stays with it, whatever the switch says later."""


# What the authors' code does on a GPU with torch's defaults, which let convolutions use TF32.
PUBLISHED = Way("formulation", "tf32", "contiguous")

Report = Callable[[dict], None]


def context_for(way: Way, device: str) -> tuple[Context, Training]:
    """A single process in `way`'s precision, and the recipe's part that asks for the rest. device: cuda or cpu."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if way.precision == "bf16" else "no"
    os.environ["ACCELERATE_USE_CPU"] = str(device == "cpu").lower()
    training = Training(
        compile=way.mode == "compile",
        cuda_graphs=way.mode == "graphs",
        memory_format=way.layout,
        tf32=way.precision != "fp32",
        cudnn_benchmark=way.cudnn_benchmark,
    )
    return Context(), training


class Contender:
    """One step of `way`, ready to run: called, it takes a step and returns its mean cross-entropy, a scalar on the device."""

    def __init__(self, subject: Subject, step: str, way: Way, device: str):
        assert step in STEPS
        self.way, self.subject, self.step = way, subject, step
        self.context, self.training = context_for(way, device)
        self.device = self.context.device
        assert self.device.type == device, f"asked for {device}, found {self.device}"
        self.on_gpu = device == "cuda"
        self.resident = _memory(self.on_gpu)
        """Bytes of weights, momentum and whatever else stays on the device between steps; for graphs, all that they use."""
        reserved = _reserved(self.on_gpu)
        self.tune()
        images, self.labels = subject.batch(self.device)
        self.images = images.contiguous(memory_format=self.context.memory_format)
        del images
        self.run = {"ours": self._ours, "formulation": self._formulation, "floor": self._floor}[way.who]()
        begun = time.perf_counter()
        with warnings.catch_warnings():
            # Training would go on without a graph.
            warnings.filterwarnings("error", message=".*cannot be captured")
            self.loss = float(self.run())
        self.first_step_seconds = time.perf_counter() - begun
        if self.in_graph():
            self.resident = _reserved(self.on_gpu) - reserved
        else:
            self.resident = _memory(self.on_gpu) - self.resident
        self.seconds: list[float] = []
        self.transient = 0

    def in_graph(self) -> bool:
        """Whether the step was captured."""
        return any(getattr(getattr(self, "trained", None), "graphs", {}).values())

    def tune(self) -> None:
        """Set the device's switches, which are the process's, as this way has them."""
        self.context.tune(self.training)

    def _ours(self) -> Callable[[], Tensor]:
        subject, batch, images, labels = self.subject, self.subject.case.batch, self.images, self.labels
        network = subject.compact if self.step == "finetune" else subject.network
        sgd = Optimizer(lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        trained = self.trained = self.context.wrap(network, sgd, {}, self.training)
        if self.step in ("pretrain", "finetune"):
            return lambda: weight_step(trained, images, labels, batch).cross_entropy / batch
        architecture = Architecture(subject.network.num_gates).to(self.device)
        if self.step == "search weights":
            return lambda: weight_step(trained, images, labels, batch, architecture.gates(1.0)).cross_entropy / batch
        optimizer, average_ = SGD(architecture.parameters(), lr=ALPHA_LR, momentum=MOMENTUM), self.context.average_
        penalty = (1.0, "sigmoid", PENALTY_WEIGHT)
        take = architecture_step
        return lambda: take(trained, architecture, optimizer, images, labels, batch, *penalty, average_).cross_entropy / batch

    def _formulation(self) -> Callable[[], Tensor]:
        network = copy.deepcopy(self.subject.formulation).to(self.device).to(memory_format=self.context.memory_format)
        take = Trainer(network, self.step, torch.bfloat16 if self.way.precision == "bf16" else None)
        images, labels = self.images, self.labels
        return lambda: take(images, labels)

    def _floor(self) -> Callable[[], Tensor]:
        """Each convolution and Linear by itself, forward and backward, on random inputs of the shapes that it has in the step; in
        an architecture step without gradients of weights."""
        network = copy.deepcopy(self.subject.compact if self.step == "finetune" else self.subject.network).to(self.device)
        network = network.to(memory_format=self.context.memory_format)
        layers: list[tuple[nn.Module, Tensor, list[Tensor], Tensor]] = []

        def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            # Of the same layout; the images need no gradient.
            x = torch.randn_like(inputs[0]).requires_grad_(bool(layers))
            wanted = [x] * bool(layers) + [module.weight] * (self.step != "architecture")
            layers.append((module, x, wanted, torch.randn_like(output)))

        hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        with torch.no_grad():
            network.eval()(self.images)
        for hook in hooks:
            hook.remove()

        def take() -> Tensor:
            for module, x, wanted, upstream in layers:
                out = module(x)
                if wanted:
                    torch.autograd.grad(out, wanted, upstream)
            return out.new_zeros(())

        return take

    def time(self, count: int) -> None:
        """Take one step that is not timed, since another contender ran before, then `count` that are."""
        self.tune()
        self.run()
        if not self.on_gpu:
            # With one thread the processor's time, which others on the machine do not lengthen.
            clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
            for _ in range(count):
                begun = clock()
                self.run()
                self.seconds.append(clock() - begun)
            return
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            self.run()
            event.record()
        torch.cuda.synchronize()
        self.seconds += [one.elapsed_time(other) / 1000 for one, other in itertools.pairwise(events)]
        self.transient = max(self.transient, torch.cuda.max_memory_allocated() - before)

    def row(self) -> dict:
        """What was measured, with the memory of this contender alone."""
        middle = median(self.seconds)
        # A graph's own memory is never given back, and so not allocated within a step.
        memory = self.resident + (0 if self.in_graph() else self.transient)
        return {
            "ms": round(1000 * middle, 3),
            "ms_least": round(1000 * min(self.seconds), 3),
            "ms_most": round(1000 * max(self.seconds), 3),
            "steps": len(self.seconds),
            "images_per_second": round(self.subject.case.batch / middle, 1),
            "memory_bytes": memory if self.on_gpu else None,
            "first_step_seconds": round(self.first_step_seconds, 2),
            "loss": round(self.loss, 4),
        }


def measure(
    subject: Subject, step: str, ways: Sequence[Way], report: Report, device: str, seconds: float = 1.2, rounds: int = 2
) -> None:
    """Time `step` in all `ways`, which take turns, and report a row for each; one that fails is reported with its traceback.

    seconds: about how long each is timed, whatever its speed at least two steps a round.
    """
    contenders: dict[Way, Contender] = {}
    head = {"network": subject.case.network, "step": step, **subject.case._asdict()}
    for way in ways:
        if way.mode == "graphs" and device != "cuda":
            report({**head, **way._asdict(), "failed": "needs a GPU"})
            continue
        with reporting({**head, **way._asdict()}, report):
            contenders[way] = Contender(subject, step, way, device)
            contenders[way].time(1)
        if way in contenders and not contenders[way].seconds:
            del contenders[way]
        free()
    counts = {way: max(2, min(20, int(seconds / rounds / contender.seconds[0]))) for way, contender in contenders.items()}
    for contender in contenders.values():
        contender.seconds.clear()
    for _ in range(rounds):
        for way in list(contenders):
            with reporting({**head, **way._asdict()}, report) as failed:
                contenders[way].time(counts[way])
            if failed:
                del contenders[way]
    for way, contender in contenders.items():
        report({**head, **way._asdict(), **contender.row(), "difference": max(subject.difference.values())})
    contenders.clear()
    free()


def free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def reporting(row: dict, report: Report):
    """A failure inside becomes a row with its reason and traceback, and an item of the list that this gives. A device that does not
    answer any more ends the process."""
    failed: list[str] = []
    try:
        yield failed
    except Exception as error:
        failed.append(reason(error))
        report({**row, "failed": failed[0], "traceback": traceback.format_exc()})
        # Its frames hold tensors.
        traceback.clear_frames(error.__traceback__)
    if failed:
        free()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()


def reason(error: BaseException) -> str:
    """The first of a chain of errors in one line: the end of a capture that failed raises another."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def _memory(on_gpu: bool) -> int:
    return torch.cuda.memory_allocated() if on_gpu else 0


def _reserved(on_gpu: bool) -> int:
    """Bytes that torch has taken from the device and cannot give back."""
    if not on_gpu:
        return 0
    free()
    return torch.cuda.memory_reserved()
