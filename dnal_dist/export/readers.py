"""Exported files on batches of images. It needs nothing of this project: as a program of its own it is what proves the files.

python readers.py FOLDER FILE PRECISION ...     arrays of images on stdin -> their logits on stdout, in each precision
"""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

Runner = Callable[[np.ndarray], np.ndarray]
"""Images (n, 3, H, W) -> logits (n, classes)."""
# The file that a reader opens, by the name of its runtime in commands.
FILES = {"torch": "model.py", "pt2": "model.pt2", "onnx": "model.onnx", "openvino": "model.xml", "executorch": "model.pte"}


def opened(folder: Path, file: str, threads: int | None = None, precision: str = "float32") -> Runner:
    """What runs a file of an export. threads: of the CPU; None leaves them to the runtime. model.py is a program, which this runs:
    only for exports of one's own. Raises ImportError for a runtime that is not installed, and whatever it raises."""
    path = Path(folder) / file
    if file == "model.onnx":
        return _onnx(path, threads)
    if file == "model.xml":
        return _openvino(path, threads)
    if file == "model.pte":
        return _executorch(path)
    import torch

    if threads:
        torch.set_num_threads(threads)
    own = network(path).to(getattr(torch, precision)) if file == "model.py" else torch.export.load(path).module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return own(torch.from_numpy(images)).numpy()

    return run


def network(path: Path):
    """The torch network of a model.py, which is a program that this runs."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("exported_model", path)
    module = importlib.util.module_from_spec(spec)
    # An export holds its files alone, whose digests are in its manifest.
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module.load()


def _onnx(path: Path, threads: int | None) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _openvino(path: Path, threads: int | None) -> Runner:
    import openvino

    # By default it may compute in bfloat16 where the processor can.
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
    model = openvino.Core().compile_model(path, "CPU", settings)
    return lambda images: np.array(model([images])[0])


def _executorch(path: Path) -> Runner:
    import torch
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    # It has planned its memory for so many images at a time.
    most = program.metadata("forward").input_tensor_meta(0).sizes()[0]

    def run(images: np.ndarray) -> np.ndarray:
        # A copy of the logits, whose memory the next call uses again.
        parts = torch.from_numpy(np.ascontiguousarray(images)).split(most)
        return np.concatenate([method.execute([part])[0].numpy().copy() for part in parts])

    # What a method points to must stay.
    run.program = program
    return run


def send(pipe: BinaryIO, array: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    pipe.write(len(content.getbuffer()).to_bytes(8) + content.getbuffer())
    pipe.flush()


def receive(pipe: BinaryIO) -> np.ndarray | None:
    """The next array; None at the end. Raises ValueError for what is none."""
    size = pipe.read(8)
    return np.load(io.BytesIO(pipe.read(int.from_bytes(size))), allow_pickle=False) if size else None


def main() -> None:
    # What a runtime prints must not get among the logits.
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    folder, file, *precisions = sys.argv[1:]
    runs = {precision: opened(Path(folder), file, None, precision) for precision in precisions}
    while (images := receive(sys.stdin.buffer)) is not None:
        for precision, run in runs.items():
            send(results, run(images.astype(precision, copy=False)))
    strangers = {name.partition(".")[0] for name in sys.modules} & {"dnal_dist", "data_tools"}
    sys.exit(f"{file} imports {strangers}" if strangers else 0)


if __name__ == "__main__":
    main()
