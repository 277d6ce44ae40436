"""Times of layers and networks in one runtime: those that torch and ONNX Runtime take here, or what a command of the user's says.

Every time that is taken here is a ratio to a reference that is run right before it, times the reference's shortest time: what slows
the processor down slows both.
"""

import importlib
import math
import re
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from dnal_dist.common.errors import InputError, reason
from dnal_dist.export import files, latency
from dnal_dist.export.program import program

# Pairs of a measurement: at least, and more while that takes fewer seconds.
PAIRS, SECONDS = 9, 0.02
NETWORK_SECONDS = 1.0
# A command that is given a file has so many seconds.
PATIENCE = 120.0


class Bench:
    """Times modules in one runtime, on one thread setting, beside its reference."""

    def __init__(self, runtime: str, batch: int, threads: int, device: torch.device):
        """runtime: eager or onnx. Raises InputError for others."""
        if runtime not in ("eager", "onnx"):
            raise InputError(f"--runtime {runtime}: a table is made of eager or onnx, or by --command")
        self.runtime, self.batch, self.threads, self.device = runtime, batch, threads, device
        # One thread's own time leaves out that of other programs.
        self.clock = time.thread_time if device.type == "cpu" and threads == 1 else time.perf_counter
        self.unit = float("inf")
        # What a call of the runtime takes that computes nothing: a network is one call, however many layers it has.
        self.call = 0.0
        self.reference = self._runner(cell(nn.Conv2d(32, 32, 3, padding=1), True), (32, 16, 16))
        if runtime == "onnx":
            self.call = statistics.median(self._ratios(self._runner(nn.Linear(1, 1), (1,)), 10 * SECONDS))

    def facts(self) -> dict:
        """What tables of other such facts do not hold for."""
        names = ["torch"] + ["onnxruntime"] * (self.runtime == "onnx")
        versions = {name: importlib.import_module(name).__version__ for name in names}
        return _facts(self, latency.device_name(self.device), versions)

    def layer(self, module: nn.Module, shape: tuple[int, ...]) -> float:
        """The ratio for a layer on a batch of inputs of this shape, without what a call takes."""
        return max(statistics.median(self._ratios(self._runner(module, shape), SECONDS)) - self.call, 1e-6)

    def network(self, module: nn.Module, image_size: int) -> float:
        """Seconds for a batch of images."""
        images = torch.randn(self.batch, 3, image_size, image_size, device=self.device)
        with tempfile.TemporaryDirectory() as folder:
            run = latency.runner(module.to(self.device), images, self.runtime, self.threads, Path(folder))
            return statistics.median(self._ratios(run, NETWORK_SECONDS)) * self.unit

    def _runner(self, module: nn.Module, shape: tuple[int, ...]) -> Callable:
        images = torch.randn(self.batch, *shape, device=self.device)
        module = module.eval().to(self.device)
        if self.runtime == "eager":
            return lambda: module(images)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "model.onnx").write_bytes(layer_model(module, images))
            return latency.reader(Path(folder), images, self.runtime, self.threads)

    @torch.no_grad()
    def _ratios(self, run: Callable, seconds: float) -> list[float]:
        """To the mean of the reference before and after."""
        found: list[float] = []
        run()
        end, before = time.perf_counter() + seconds, self._once(self.reference)
        while len(found) < PAIRS or time.perf_counter() < end:
            own, after = self._once(run), self._once(self.reference)
            found.append(2 * own / (before + after))
            self.unit, before = min(self.unit, after), after
        return found

    def _once(self, run: Callable) -> float:
        """Seconds of the second of two runs; the first finds what another left in the caches."""
        run()
        latency.wait(self.device)
        start = self.clock()
        run()
        latency.wait(self.device)
        return self.clock() - start


class CommandBench:
    """Asks a command for the milliseconds that a device takes for an ONNX file: the last line that it prints. `{file}` in the
    command is the file's path. Layers are files of one batch; networks are of any, so that the command chooses `batch`."""

    runtime, device, unit = "command", torch.device("cpu"), 1.0

    def __init__(self, command: str, batch: int, threads: int):
        if "{file}" not in command:
            raise InputError(f"--command {command}: has no {{file}} where the path of the ONNX file belongs")
        try:
            self.words = shlex.split(command)
        except ValueError as error:
            raise InputError(f"--command {command}: {error}") from None
        self.command, self.batch, self.threads = command, batch, threads

    def facts(self) -> dict:
        return _facts(self, self.command, {})

    @cached_property
    def call(self) -> float:
        """Seconds of what computes nothing."""
        return self._layer(nn.Linear(1, 1), (1,))

    def layer(self, module: nn.Module, shape: tuple[int, ...]) -> float:
        return max(self._layer(module, shape) - self.call, 1e-9)

    def _layer(self, module: nn.Module, shape: tuple[int, ...]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            (path := Path(folder) / "layer.onnx").write_bytes(layer_model(module, torch.zeros(self.batch, *shape)))
            return self._seconds(path)

    def network(self, module: nn.Module, image_size: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            files.write_onnx(program(module, image_size), Path(folder))
            return self._seconds(Path(folder) / "model.onnx")

    def _seconds(self, path: Path) -> float:
        words = [word.replace("{file}", str(path)) for word in self.words]
        try:
            ended = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(f"--command {self.command}: {reason(error)}") from None
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or [""])[-1]
            raise InputError(f"--command {self.command}: ended with exit code {ended.returncode}: {last[-200:]}")
        last = (ended.stdout.strip().splitlines() or [""])[-1]
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*(?:ms)?\s*", last)
        if found is None or not 0 < float(found[1]) < math.inf:
            raise InputError(f"--command {self.command}: its last line is no number of milliseconds above 0, but {last[-80:]!r}")
        return float(found[1]) / 1000


def _facts(bench: Bench | CommandBench, device: str, versions: dict[str, str]) -> dict:
    return {"device": device, "runtime": bench.runtime, "batch": bench.batch, "threads": bench.threads, "versions": versions}


def cell(layer: nn.Module, norm: bool) -> nn.Module:
    """A layer with what usually follows it."""
    if not norm:
        return layer
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU())


def layer_model(module: nn.Module, images: Tensor) -> bytes:
    """The ONNX file of a layer (see cell), as torch's exporter would write it, in a thousandth of its time."""
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise InputError(f"{error.name}, which writes ONNX files, is not installed; pip install 'dnal-dist[export]'") from None
    layer = module[0] if isinstance(module, nn.Sequential) else module
    weights = [numpy_helper.from_array(layer.weight.detach().numpy(), "weight")]
    weights.append(numpy_helper.from_array(torch.zeros(len(layer.weight)).numpy(), "bias"))
    if isinstance(layer, nn.Linear):
        steps = [helper.make_node("Gemm", ["images", "weight", "bias"], ["found"], transB=1)]
    else:
        pads = [*layer.padding, *layer.padding]
        settings = {"kernel_shape": layer.kernel_size, "strides": layer.stride, "dilations": layer.dilation, "pads": pads}
        steps = [helper.make_node("Conv", ["images", "weight", "bias"], ["found"], group=layer.groups, **settings)]
    steps.append(helper.make_node("Relu" if isinstance(module, nn.Sequential) else "Identity", ["found"], ["logits"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("images", images.shape), ("logits", None))
    ]
    graph = helper.make_graph(steps, "layer", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
