"""Exported programs as files, one function for each kind."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.export import ExportedProgram

from dnal_dist.common.errors import InputError, reason
from dnal_dist.export.program import SLOW

# What ONNX's own operations are called.
_SLOW_ONNX = ("ScatterND", "ScatterElements", "Scatter", "GatherND")


def write_torch(text: str, state: dict[str, Tensor], folder: Path) -> None:
    """model.py and model.safetensors."""
    (folder / "model.py").write_text(text, encoding="utf-8")
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "model.safetensors")


def write_pt2(program: ExportedProgram, folder: Path, opset: int | None = None) -> None:
    torch.export.save(program, folder / "model.pt2")


def write_onnx(program: ExportedProgram, folder: Path, opset: int | None = None) -> None:
    """model.onnx. Raises InputError if the exporter is missing or cannot, or for operations that runtimes are slow with."""
    _require("onnx", "onnx", "onnxscript")
    names = {"input_names": ["images"], "output_names": ["logits"], "opset_version": opset}
    with _quiet():
        try:
            torch.onnx.export(
                program, (), folder / "model.onnx", dynamo=True, external_data=False, verbose=False, optimize=True, **names
            )
        except Exception as error:  # of many kinds: the exporter's own
            why = str(error).strip().splitlines()
            raise InputError(f"--to onnx: the network cannot be exported ({why[0] if why else error!r:.200})") from None
    import onnx

    used = {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}
    if slow := sorted(used.intersection(_SLOW_ONNX)):
        raise InputError(f"--to onnx: the file has {', '.join(slow)}, as {', '.join(SLOW)} become, which runtimes are slow with")


def write_openvino(program: ExportedProgram, folder: Path, opset: int | None = None) -> None:
    """model.xml and model.bin, from model.onnx."""
    _require("openvino", "openvino")
    import openvino

    made = not (folder / "model.onnx").exists()
    if made:
        write_onnx(program, folder, opset)
    openvino.save_model(openvino.convert_model(folder / "model.onnx"), folder / "model.xml", compress_to_fp16=False)
    if made:
        (folder / "model.onnx").unlink()


def write_executorch(program: ExportedProgram, folder: Path, opset: int | None = None) -> None:
    """model.pte, lowered to XNNPACK, for as many images at a time as ExecuTorch plans memory for; height and width are fixed."""
    _require("executorch", "executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    (node,) = (
        node for node in program.graph.nodes if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    )
    if not all(isinstance(size, int) for size in node.meta["val"].shape[2:]):
        raise InputError("--to executorch: its files are of one height and width; leave out --any-size, or executorch")
    with _quiet():
        try:
            made = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        except Exception as error:  # of many kinds: the exporter's own
            raise InputError(f"--to executorch: the network cannot be exported ({reason(error)})") from None
    (folder / "model.pte").write_bytes(made.buffer)


WRITERS: dict[str, Callable[[ExportedProgram, Path, int | None], None]] = {
    "pt2": write_pt2,
    "onnx": write_onnx,
    "openvino": write_openvino,
    "executorch": write_executorch,
}


def _require(kind: str, *modules: str) -> None:
    import importlib.util

    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        extra = kind if kind in ("openvino", "executorch") else "export"
        raise InputError(f"--to {kind}: {missing[0]} is not installed; pip install 'dnal-dist[{extra}]', or leave it out")


class _quiet(warnings.catch_warnings):
    """Without the exporters' advice, which is for those who wrote the network."""

    def __enter__(self):
        found = super().__enter__()
        warnings.simplefilter("ignore")
        self.levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")}
        for name in self.levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        return found

    def __exit__(self, *found):
        for name, level in self.levels.items():
            logging.getLogger(name).setLevel(level)
        super().__exit__(*found)
