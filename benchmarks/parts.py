"""The parts of the GPU benchmark. Each takes a `Part`, and reports its rows to it as they are measured."""

import functools
import importlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from stepping import PUBLISHED, STEPS, Contender, Way, free, measure, reporting
from subject import Case, Subject

OURS, CONTIGUOUS = Way(), Way(layout="contiguous")
TF32, COMPILED = Way(precision="tf32"), Way(mode="compile")
GRAPHS, CONTIGUOUS_GRAPHS = Way(mode="graphs"), Way(layout="contiguous", mode="graphs")
TUNED = Way(mode="graphs", cudnn_benchmark=True)
# The published formulation, given this project's precision and layout.
BEST = Way("formulation", "bf16", "channels_last")
SUPERNET = ("proxyless_supernet", 224)

RESNET50 = ("resnet50_imagenet", 224)
# The same with compact networks whose sites keep multiples of 8 channels.
SUPERNET8, RESNET8, MOBILENET8 = (*SUPERNET, 8), (*RESNET50, 8), ("mobilenetv2_imagenet", 224, 8)

# Parts that time steps: for each the network, its image size and perhaps the multiples that it keeps, and lists of batch, steps and
# ways, in this order.
STEP_PARTS: dict[str, list[tuple[tuple, int, tuple[str, ...], list[Way]]]] = {
    "supernet96-bf16": [(SUPERNET, 96, STEPS[:3], [GRAPHS, OURS, PUBLISHED])],
    "supernet96-contiguous": [(SUPERNET, 96, STEPS[:3], [CONTIGUOUS, CONTIGUOUS_GRAPHS])],
    "multiples": [
        (RESNET8, 128, ("finetune",), [GRAPHS, OURS, PUBLISHED]),
        (SUPERNET8, 96, ("finetune",), [GRAPHS, PUBLISHED]),
        (MOBILENET8, 256, ("finetune",), [GRAPHS, PUBLISHED]),
    ],
    "supernet96-finetune": [(SUPERNET, 96, ("finetune",), [CONTIGUOUS, CONTIGUOUS_GRAPHS, PUBLISHED])],
    "supernet96-finetune-last": [(SUPERNET, 96, ("finetune",), [OURS, GRAPHS])],
    "supernet32-graphs": [
        (SUPERNET, 32, ("finetune",), [CONTIGUOUS, CONTIGUOUS_GRAPHS, PUBLISHED]),
        (SUPERNET, 32, ("pretrain", "architecture"), [OURS, GRAPHS]),
    ],
    "supernet96-tf32": [
        (SUPERNET, 96, STEPS, [TF32, Way(precision="tf32", layout="contiguous")]),
        (SUPERNET, 96, ("pretrain",), [Way("formulation", "fp32", "contiguous"), Way(precision="fp32")]),
    ],
    "cudnn-benchmark": [
        (RESNET50, 128, ("pretrain", "finetune"), [TUNED]),
        (("mobilenetv2_imagenet", 224), 256, ("pretrain", "finetune"), [TUNED]),
        (SUPERNET, 96, ("pretrain", "architecture", "finetune"), [TUNED]),
    ],
    "resnet50": [
        (RESNET50, 128, ("pretrain", "architecture"), [GRAPHS, OURS, CONTIGUOUS, PUBLISHED]),
        (RESNET50, 128, ("finetune",), [OURS, GRAPHS, CONTIGUOUS, CONTIGUOUS_GRAPHS, PUBLISHED]),
        (RESNET50, 128, ("search weights",), [OURS, TF32, PUBLISHED]),
    ],
    "mobilenetv2": [(("mobilenetv2_imagenet", 224), 256, STEPS, [GRAPHS, OURS, PUBLISHED])],
    "supernet32": [(SUPERNET, 32, STEPS, [OURS, GRAPHS, PUBLISHED])],
    "cifar": [
        (("resnet56_cifar", 32), 128, STEPS, [OURS, GRAPHS, PUBLISHED]),
        (("vgg16_cifar", 32), 128, ("pretrain", "finetune"), [OURS, GRAPHS, PUBLISHED]),
        (("resnet56_cifar", 32), 128, STEPS, [CONTIGUOUS, CONTIGUOUS_GRAPHS, TF32]),
    ],
    "formulation-best": [(SUPERNET, 96, STEPS, [OURS, BEST])],
    "compile-finetune": [(SUPERNET, 96, ("finetune",), [OURS, COMPILED])],
    "compile-cifar": [(("resnet56_cifar", 32), 128, ("pretrain", "architecture", "finetune"), [OURS, COMPILED])],
    "compile-mobilenetv2": [(("mobilenetv2_imagenet", 224), 256, ("pretrain", "finetune"), [OURS, COMPILED])],
}


# The other parts, by module and function.
MODULES = {
    "machine": ("kernels", "machine"),
    "depthwise": ("kernels", "depthwise"),
    "depthwise-benchmark": ("kernels", "depthwise"),
    "optimizer": ("kernels", "optimizers"),
    "loader": ("loading", "loader"),
}


class Part:
    """One part at work: its device, its rows, and the file OUT/NAME.json that holds them from the moment they are reported."""

    def __init__(self, name: str, device: str, seconds: float, out: Path):
        self.name, self.device, self.out = name, device, out
        self.small = device == "cpu"
        """Whether to show only that it works."""
        self.begun, self.seconds = time.monotonic(), seconds
        self.rows: list[dict] = []
        self.write()

    def left(self) -> float:
        """Seconds until it should have ended."""
        return self.seconds - (time.monotonic() - self.begun)

    def report(self, row: dict) -> None:
        self.rows.append({key: value for key, value in row.items() if value is not None})
        print(
            f"{time.monotonic() - self.begun:6.1f} s  " + "  ".join(f"{v}" for k, v in row.items() if k != "traceback"), flush=True
        )
        self.write()

    def write(self) -> None:
        content = {"part": self.name, "machine": describe(self.device), "rows": self.rows}
        unfinished = self.out / f"{self.name}.json.unfinished"
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(unfinished, self.out / f"{self.name}.json")


def describe(device: str) -> dict:
    """The machine and its software, as every file of results holds them."""
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "driver": _driver(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "memory_gb": round(memory / 1e9, 1)}
    return found


@functools.cache
def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.split("\n")[0] or None
    except (OSError, subprocess.TimeoutExpired):
        return None


# What stands for them where it is only to be shown that a part works: a network of the same kind, and its image size.
SMALL = {
    "proxyless_supernet": ("supernet_digits", 8),
    "mobilenetv2_imagenet": ("mobilenetv2_cifar", 16),
    "resnet50_imagenet": ("resnet50_imagenet", 32),
    "resnet56_cifar": ("resnet_digits", 8),
    "vgg16_cifar": ("vgg_digits", 8),
}


def reduced(network: str, image_size: int, multiple: int, batch: int, small: bool) -> Case:
    """The case, or one that a CPU can take in a moment."""
    if small:
        return Case(SMALL[network][0], 4, SMALL[network][1], 0.125, multiple)
    return Case(network, batch, image_size, multiple=multiple)


def named(network: str, image_size: int, multiple: int = 1) -> tuple[str, int, int]:
    return network, image_size, multiple


def steps(part: Part, subject: Subject) -> None:
    """A part of STEP_PARTS. subject: of its first case."""
    for network, batch, names, ways in STEP_PARTS[part.name]:
        case = reduced(*named(*network), batch, part.small)
        if case._replace(batch=subject.case.batch) != subject.case:
            with reporting(case._asdict(), part.report) as failed:
                subject = Subject(case)
            if failed:
                continue
        for step in names:
            if part.left() < 4:
                part.report({**case._asdict(), "step": step, "failed": "not run: no time was left"})
                continue
            measure(subject.of(case.batch), step, ways, part.report, part.device, *((0.1, 1) if part.small else ()))


def batchmax(part: Part, subject: Subject) -> None:
    """The largest batch that fits in the supernet's pretrain step: predicted from two small ones, then tried."""
    ways = [OURS, Way("formulation", "bf16", "contiguous"), PUBLISHED]
    if part.device != "cuda":
        for way in ways:
            part.report({"step": "pretrain", **way._asdict(), "failed": "needs a GPU"})
        return
    for way in ways:
        row = {"network": SUPERNET[0], "step": "pretrain", **way._asdict()}
        with reporting(row, part.report):
            part.report({**row, **_largest(part, subject, way)})
        free()


def _largest(part: Part, subject: Subject, way: Way) -> dict:
    one, other = (_memory_of(subject.of(batch), way) for batch in (16, 48))
    each = (other - one) / 32
    free()
    available = torch.cuda.mem_get_info()[0]
    batch = predicted = int((available - (one - 16 * each)) / each)
    fits, fails = 48, None
    for _ in range(8):
        if part.left() < 8 or batch <= fits or (fails is not None and batch >= fails):
            break
        try:
            _memory_of(subject.of(batch), way)
            fits, batch = batch, int(batch * 1.03) + 1
        except torch.OutOfMemoryError:
            fails, batch = batch, int(batch * 0.96)
        free()
    return {"fits": fits, "fails": fails, "predicted": predicted, "bytes_each": round(each), "memory_bytes": available}


def _memory_of(subject: Subject, way: Way) -> int:
    contender = Contender(subject, "pretrain", way, "cuda")
    contender.time(1)
    return contender.row()["memory_bytes"]


def run(name: str, device: str, out: Path, others: list[str], begin: Callable[[], float]) -> None:
    """Run a part. others: the parts chosen beside it. begin: waits until the device is free, then returns about how many seconds
    the part may take; what needs no device is made before."""
    subject, threads = None, torch.get_num_threads()
    # Another part is being timed.
    torch.set_num_threads(min(4, threads))
    if name in STEP_PARTS or name == "batchmax":
        network, batch, *_ = STEP_PARTS[name][0] if name in STEP_PARTS else (SUPERNET, 16)
        subject = Subject(reduced(*named(*network), batch, device == "cpu"))
    seconds = begin()
    if name != "work":
        torch.set_num_threads(threads)
    part = Part(name, device, seconds, out)
    if subject is not None:
        (steps if name in STEP_PARTS else batchmax)(part, subject)
    elif name == "work":
        from counting import count

        with reporting({}, part.report):
            for network in {named(*case): None for other in others for case, *_ in STEP_PARTS.get(other, [])}:
                count(reduced(*network, 1, part.small), part.report)
    else:
        module, function = MODULES[name]
        take: Callable[[Part], None] = getattr(importlib.import_module(module), function)
        take(part)
