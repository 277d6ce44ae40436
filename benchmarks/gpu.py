"""Everything about speed on one GPU, in ten minutes: steps against the published formulation, kernels, memory, loading.

    python benchmarks/gpu.py --minutes 10 benchmarks/results/H100      or: make gpu
    python benchmarks/gpu.py --only machine depthwise -- OUT           some parts
    python benchmarks/gpu.py --device cpu --minutes 3 OUT              tiny sizes on a CPU: shows that every part works

The parts run one after the other, what matters most first, each in a process of its own with a time limit, so that a crash or a
hang costs that part alone. Each writes OUT/PART.json row by row, and OUT/results.md is written after each; what failed says why
there.
Needs torch, this repository and its dependencies, no network, nothing installed.
"""

import argparse
import contextlib
import faulthandler
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from tables import write_results

ROOT = Path(__file__).resolve().parent.parent
# What a part needs before it does anything: torch and the device.
LEAST_SECONDS = 20
# Kept for the end: the last table.
RESERVE = 2


class Limit(NamedTuple):
    seconds: int
    what: str


PARTS = {
    "machine": Limit(40, "bandwidth, matrix products, launches"),
    "cifar": Limit(60, "ResNet56 and VGG16 at 32 pixels: eager and as CUDA graphs"),
    "supernet96-bf16": Limit(120, "the supernet, 96 images: eager and as CUDA graphs, against the published formulation"),
    "multiples": Limit(140, "compact networks that keep multiples of 8 channels"),
    "resnet50": Limit(70, "ResNet50, 128 images: all steps"),
    "optimizer": Limit(40, "foreach, fused and plain SGD"),
    "mobilenetv2": Limit(90, "MobileNetV2, 256 images: all steps"),
    "loader": Limit(100, "images/s of the stream and of training, by loader processes and by nvJPEG"),
    "depthwise": Limit(70, "depthwise convolutions by shape, both layouts"),
    "supernet96-finetune": Limit(60, "the compact supernet, contiguous: eager and as CUDA graphs"),
    "supernet96-contiguous": Limit(90, "the supernet's other steps in contiguous memory"),
    "supernet96-finetune-last": Limit(200, "the compact supernet in channels_last"),
    "supernet96-tf32": Limit(120, "the supernet in TF32 and float32"),
    "supernet32-graphs": Limit(80, "the supernet, 32 images, as CUDA graphs"),
    "batchmax": Limit(100, "the largest batch that fits"),
    "cudnn-benchmark": Limit(90, "large networks with cudnn.benchmark"),
    "depthwise-benchmark": Limit(70, "likewise with cudnn.benchmark"),
    "supernet32": Limit(80, "the supernet, 32 images: eager and as CUDA graphs"),
    "formulation-best": Limit(80, "the published formulation given bf16 and channels_last"),
    "compile-finetune": Limit(180, "torch.compile of the compact supernet"),
    "compile-cifar": Limit(120, "torch.compile of ResNet56"),
    "compile-mobilenetv2": Limit(150, "torch.compile of MobileNetV2"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="folder for results")
    parser.add_argument("--minutes", type=float, default=10.0, help="all parts together (default 10)")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help="these parts, in this order")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to try the benchmark itself")
    parser.add_argument("--list", action="store_true", help="print the parts and their time limits")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out is None and not args.list:
        parser.error("say where the results shall go")
    return args


def main() -> None:
    args = arguments()
    if args.list:
        for name, limit in PARTS.items():
            print(f"{name:20} {limit.seconds:4} s   {limit.what}")
        return
    if args.part:
        child(args)
        return
    end = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = args.only or list(PARTS)
    results = {name: {"status": "not run"} for name in chosen}
    with contextlib.ExitStack() as stack:
        # Counted without the device, beside the rest.
        work = Process("work", args, chosen)
        stack.callback(work.kill)
        work.begin(60 * args.minutes)
        stack.callback(write, args.out, results)
        following = Process(chosen[0], args, chosen)
        stack.callback(following.kill)
        for number, name in enumerate(chosen):
            process, left = following, end - time.monotonic() - RESERVE
            if left < LEAST_SECONDS:
                results[name] = {"status": "not run: no time was left"}
                continue
            if name != chosen[-1]:
                # It imports torch and makes its networks meanwhile.
                following = Process(chosen[number + 1], args, chosen)
                stack.callback(following.kill)
            results[name] = run(process, min(PARTS[name].seconds, left))
            print(f"{name}: {results[name]['status']}, {results[name]['seconds']} s", flush=True)
            write(args.out, results)
        with contextlib.suppress(subprocess.TimeoutExpired):
            work.wait(max(1.0, end - time.monotonic() - RESERVE))
    print(args.out / "results.md")
    sys.exit(any(result["status"] == "failed" for result in results.values()))


def write(out: Path, results: dict[str, dict]) -> None:
    """The table; a fault of it must not end what is still measured."""
    try:
        write_results(out, results)
    except Exception:
        traceback.print_exc()


class Process:
    """A part in a process of its own, the leader of a group, that prepares itself and waits for `begin`."""

    def __init__(self, name: str, args: argparse.Namespace, chosen: list[str]):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        }
        device = "cpu" if name == "work" else args.device
        command = [sys.executable, __file__, "--part", name, "--device", args.device, str(args.out)]
        command += ["--only", *chosen]
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        if args.device == "cpu":
            # Two parts at a time: their threads would wait for one another in tiny convolutions.
            environment["OMP_NUM_THREADS"] = "1"
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=self.log, start_new_session=True)

    def begin(self, seconds: float) -> None:
        # It may have ended, by a fault.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{seconds}\n".encode())
            self.process.stdin.flush()

    def wait(self, seconds: float) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        """The part with all processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def errors(self) -> str:
        """The last lines that it wrote; if it hung, where each thread was, the innermost calls."""
        self.log.seek(0)
        text, _, hung = self.log.read().decode(errors="replace").partition("Timeout (0:")
        threads = re.split(r"^(?=Thread 0x|Current thread 0x)", hung, flags=re.MULTILINE)
        return "\n".join([*text.splitlines()[-40:], *(line for thread in threads[1:] for line in thread.splitlines()[:16])])


def run(process: Process, seconds: float) -> dict:
    """Run a part for so many seconds at most; its status, duration, and the last of what it complained of if it failed."""
    begun = time.monotonic()
    try:
        # It is asked to end a little earlier than it is ended.
        process.begin(max(10.0, seconds - 6))
        code = process.wait(seconds)
        status = "done" if code == 0 else "failed"
    except subprocess.TimeoutExpired:
        code, status = None, f"ended at its limit of {seconds:.0f} s"
    finally:
        process.kill()
    found = {"status": status, "seconds": round(time.monotonic() - begun, 1)}
    return found if code == 0 else {**found, "exit_code": code, "errors": process.errors()}


def child(args: argparse.Namespace) -> None:
    """A part at work, in its own process."""
    faulthandler.enable()
    if args.part == "work":
        os.nice(5)
    import torch

    if args.device == "cuda" and args.part != "work" and not torch.cuda.is_available():
        sys.exit("no CUDA device was found; --device cpu tries the benchmark itself at tiny sizes")
    import parts

    def begin() -> float:
        seconds = float(sys.stdin.readline())
        # Where it hangs, if it does, is printed before it is ended.
        faulthandler.dump_traceback_later(seconds + 3, exit=False)
        return seconds

    parts.run(args.part, args.device, args.out, args.only, begin)


if __name__ == "__main__":
    main()
