"""The table of latencies of a network's layers on this machine, from which search.timing predicts those of its compact networks.

Every time is a ratio to a reference that is run right before it, times the reference's shortest time: a processor that slows down,
or has other work, slows both.
"""

import importlib
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dnal_dist import nets, recipe
from dnal_dist.common import atomic
from dnal_dist.common.errors import InputError, reason, remedy
from dnal_dist.export import latency
from dnal_dist.nets import compact
from dnal_dist.nets.gate import GatedNetwork
from dnal_dist.nets.masks import rescue
from dnal_dist.nets.whole import whole
from dnal_dist.search import timing
from dnal_dist.search.selection import rounded
from dnal_dist.search.timing import ALIGNED, Grid, Table

# Fractions of a layer's channels that are timed, among aligned numbers and among others; and where all are aligned.
FRACTIONS = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
EIGHTHS = tuple(n / 8 for n in range(1, 9))
# Pairs of a measurement: at least, and more while that takes fewer seconds.
PAIRS, SECONDS = 9, 0.02
NETWORK_SECONDS = 1.0
# Whole networks by which the factor and the glue are found.
NETWORKS = 10


class Bench:
    """Times modules of a recipe's network in one runtime, on one thread setting, beside its reference."""

    def __init__(
        self, settings: recipe.Recipe, runtime: str, batch: int, threads: int, device: torch.device, tell: Callable[[str], None]
    ):
        self.runtime, self.batch, self.threads, self.device, self.tell = runtime, batch, threads, device, tell
        self.settings, self.size, self.round_to = settings.network, settings.data.image_size, settings.architecture.round_to
        torch.manual_seed(0)
        self.net = nets.build(**self.settings).eval().to(device)
        # One thread's own time leaves out that of other programs.
        self.clock = time.thread_time if device.type == "cpu" and threads == 1 else time.perf_counter
        self.unit = float("inf")
        self._folder = tempfile.TemporaryDirectory()
        # What a call of the runtime takes that computes nothing: a network is one call, however many layers it has.
        self.call = 0.0
        self.reference = self.runner(_cell(nn.Conv2d(32, 32, 3, padding=1), True), (32, 16, 16))
        if runtime == "onnx":
            self.call = min(self.times(self.runner(nn.Linear(1, 1), (1,)), 10 * SECONDS))

    def facts(self) -> dict[str, str | int | dict[str, str]]:
        """What tables of other such facts do not hold for."""
        names = ["torch"] + ["onnxruntime"] * (self.runtime == "onnx")
        versions = {name: importlib.import_module(name).__version__ for name in names}
        where = latency.device_name(self.device)
        return {"device": where, "runtime": self.runtime, "batch": self.batch, "threads": self.threads, "versions": versions}

    def runner(self, module: nn.Module, shape: tuple[int, ...]) -> Callable:
        images = torch.randn(self.batch, *shape, device=self.device)
        module = module.eval().to(self.device)
        if self.runtime == "eager":
            return lambda: module(images)
        if self.runtime == "onnx":
            return _onnx(module, images, self.threads)
        raise InputError(f"--runtime {self.runtime}: a table is made of eager or onnx")

    def network(self, module: nn.Module) -> Callable:
        images = torch.randn(self.batch, 3, self.size, self.size, device=self.device)
        with tempfile.TemporaryDirectory() as folder:
            return latency.runner(module.to(self.device), images, self.runtime, self.threads, Path(folder))

    @torch.no_grad()
    def times(self, run: Callable, seconds: float = SECONDS) -> list[float]:
        """Ratios to the mean of the reference before and after."""
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


def _cell(layer: nn.Module, norm: bool) -> nn.Module:
    """A layer with what usually follows it."""
    if not norm:
        return layer
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU())


def _onnx(module: nn.Module, images: Tensor, threads: int) -> Callable:
    """A session of a layer, as torch's exporter would write it, in a thousandth of its time."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise InputError(f"--runtime onnx: {error.name} is not installed; pip install 'dnal-dist[export]'") from None
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
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session, array = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]), images.numpy()
    return lambda: session.run(None, {"images": array})


@torch.no_grad()
def table(bench: Bench) -> Table:
    """The table of the bench's network. Raises InputError."""
    kinds, shapes = _layers(bench.net, bench.size)
    grids, known = {}, dict.fromkeys(kinds)
    for number, kind in enumerate(known, 1):
        bench.tell(f"layers of kind {number} of {len(known)}: {kind}")
        grids[kind] = _grid(*shapes[kind], bench)
    for kind, ratios in grids.items():
        seconds = [[ratio * bench.unit for ratio in row] for row in ratios.seconds]
        grids[kind] = ratios.model_copy(update={"seconds": seconds})
    found = Table(network=bench.settings, kinds=grids, layers=kinds, round_to=bench.round_to, **bench.facts())
    return _fitted(found, [(predicted, measured) for _, predicted, measured in checked(found, bench, NETWORKS, 0)])


def _layers(net: GatedNetwork, image_size: int) -> tuple[list[str], dict[str, tuple]]:
    """The kind of each layer, and of each kind the layer's module, the shape of its input, and which sides are free."""
    seen: dict[str, tuple[int, ...]] = {}
    modules = {path: net.get_submodule(path) for path in net.graph.layers}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, path=path: seen.update({path: tuple(inputs[0].shape[1:])}))
        for path, module in modules.items()
    ]
    net(torch.zeros(1, 3, image_size, image_size, device=next(net.parameters()).device))
    for hook in hooks:
        hook.remove()
    kinds, shapes = [], {}
    for path, layer in net.graph.layers.items():
        module, shape = modules[path], seen[path]
        free = [bool((net.gating.of_label[side] != net.gating.always).any()) for side in (layer.inputs, layer.outputs)]
        if isinstance(module, nn.Linear):
            words = f"linear {module.in_features}-{module.out_features}"
        else:
            kernel = "x".join(map(str, module.kernel_size))
            words = f"conv {module.in_channels}-{module.out_channels} {kernel}/{module.stride[0]}"
            words += f" of {shape[1]}x{shape[2]}" + (f" in {module.groups} groups" if module.groups > 1 else "")
        words += " with norm" * (path in net.graph.norms) + " (fixed inputs)" * (not free[0]) + " (fixed outputs)" * (not free[1])
        kinds.append(words)
        shapes[words] = (module, shape, free, path in net.graph.norms)
    return kinds, shapes


def _points(channels: int, free: bool, round_to: int) -> list[int]:
    """The numbers of channels that are timed."""
    if not free:
        return [channels]
    if round_to % ALIGNED == 0:
        return sorted({min(channels, max(1, round(part * channels / round_to)) * round_to) for part in EIGHTHS})
    aligned = {max(ALIGNED, round(part * channels / ALIGNED) * ALIGNED) for part in FRACTIONS}
    return sorted({n for n in {1, channels} | aligned | {n - 1 for n in aligned} if 0 < n <= channels})


def _grid(module: nn.Module, shape: tuple[int, ...], free: list[bool], norm: bool, bench: Bench) -> Grid:
    """Ratios to the reference in place of seconds."""
    linear = isinstance(module, nn.Linear)
    ins, outs = (module.in_features, module.out_features) if linear else (module.in_channels, module.out_channels)
    whole_only = not linear and module.groups > 1
    inputs, outputs = _points(ins, free[0] and not whole_only, bench.round_to), _points(outs, free[1], bench.round_to)
    rows = []
    for i in inputs:
        rows.append([])
        for o in outputs:
            run = bench.runner(*_narrow(module, shape, i, o, norm))
            rows[-1].append(max(statistics.median(bench.times(run)) - bench.call, 1e-6))
    return Grid(inputs=inputs, outputs=outputs, seconds=rows)


def _narrow(module: nn.Module, shape: tuple[int, ...], inputs: int, outputs: int, norm: bool) -> tuple[nn.Module, tuple[int, ...]]:
    """A layer like `module` of fewer channels, and the shape of its input."""
    if isinstance(module, nn.Linear):
        return nn.Linear(inputs, outputs), (*shape[:-1], inputs)
    groups = 1
    if module.groups > 1:
        groups = max(1, round(module.groups * outputs / module.out_channels))
        outputs = max(groups, outputs // groups * groups)
        inputs = max(1, module.in_channels // module.groups) * groups
    size = {"kernel_size": module.kernel_size, "stride": module.stride, "padding": module.padding, "dilation": module.dilation}
    layer = nn.Conv2d(inputs, outputs, groups=groups, bias=module.bias is not None, **size)
    return _cell(layer, norm), (inputs, *shape[1:])


def masks(net: GatedNetwork, count: int, round_to: int, seed: int) -> Iterator[Tensor]:
    """Random keep masks, bool (N,): of a tenth to nine tenths of all channels, and in each site of half to one and a half
    times that fraction."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        fraction, parts = 0.1 + 0.8 * (number + 0.5) / count, []
        for channels in net.gate_sites.values():
            own = fraction * float(torch.rand((), generator=generator) + 0.5)
            kept = min(channels, max(1, round(own * channels)))
            parts.append(torch.randperm(channels, generator=generator) < kept)
        keep = rescue(net, torch.cat(parts))[0]
        yield rounded(net, keep, torch.rand(net.num_gates, generator=generator), round_to)


def checked(found: Table, bench: Bench, count: int, seed: int) -> Iterator[tuple[Tensor, float, float]]:
    """Random compact networks: the mask, seconds as predicted, and as measured."""
    for number, keep in enumerate(masks(bench.net, count, bench.round_to, seed), 1):
        bench.tell(f"whole network {number} of {count}")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = whole(compact.compact(bench.net, keep)).eval()
            measured = statistics.median(bench.times(bench.network(module), NETWORK_SECONDS)) * bench.unit
            yield keep, float(found.predict(bench.net, bench.size, keep.double())), measured


def _fitted(found: Table, rows: list[tuple[float, float]]) -> Table:
    """With the factor and the glue that fit whole networks best, relative to their times. rows: seconds as predicted, and as
    measured."""
    if not rows:
        return found
    layers = float(len(found.layers))
    sides = torch.tensor([[predicted / measured, layers / measured] for predicted, measured in rows], dtype=torch.float64)
    factor, glue = torch.linalg.lstsq(sides, torch.ones(len(rows), 1, dtype=torch.float64)).solution.flatten().tolist()
    if factor <= 0:
        factor, glue = statistics.median(measured / predicted for predicted, measured in rows), 0.0
    return found.model_copy(update={"factor": factor, "glue": glue})


def kept(path: Path, bench: Bench) -> tuple[Table, bool]:
    """The table in a file, or measured and written there; and whether it was. Raises InputError, also for another table there."""
    if path.exists():
        found = timing.load(str(path), bench.settings, bench.round_to)
        if other := next((name for name, value in bench.facts().items() if getattr(found, name) != value), None):
            there = getattr(found, other)
            text = ", ".join(f"{name} {version}" for name, version in there.items()) if isinstance(there, dict) else there
            raise InputError(f"--profile {path}: holds a table of {other} {text or 'unknown'}; name another file, or remove it")
        return found, False
    found = table(bench)
    try:
        atomic.put(path, (found.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(f"--profile {path}: cannot be written ({reason(error)}); {remedy(error)}") from None
    return found, True
