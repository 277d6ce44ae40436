"""GPUs of this machine. Only the processes that tests/gpu starts see them: every other test computes on the CPU, wherever it runs.

DNAL_GPU_TESTS_ON=cpu     run what can be run of tests/gpu on the CPU: a rehearsal where there is no GPU
DNAL_GPU_FIGURES=PATH     append what those tests measure to PATH, a JSON object a line
"""

import contextlib
import json
import os
import time

# What CUDA_VISIBLE_DEVICES was before it was hidden; processes that tests start inherit it.
KEPT = "DNAL_GPUS_OF_TESTS"
DEVICE = "cpu" if os.environ.get("DNAL_GPU_TESTS_ON") == "cpu" else "cuda"


def hide() -> None:
    """Let this process, and those that it starts, find no GPU. To be called before torch looks for one."""
    os.environ.setdefault(KEPT, os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def environment(device: str = DEVICE) -> dict[str, str]:
    """For a process that is to compute on `device`, "cuda" or "cpu", in full float32: TF32 would differ by 1e-3."""
    # What a context on the CPU leaves behind.
    found = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    if device == "cuda":
        found |= {"CUDA_VISIBLE_DEVICES": os.environ.get(KEPT, "all"), "NVIDIA_TF32_OVERRIDE": "0"}
        if found["CUDA_VISIBLE_DEVICES"] == "all":
            del found["CUDA_VISIBLE_DEVICES"]
    return found


def count() -> tuple[int, str]:
    """Number of GPUs that processes of tests/gpu see, and why there is none. Asks the driver, since torch takes seconds."""
    if DEVICE == "cpu":
        return 1, ""
    if (kept := os.environ.get(KEPT, "all")) != "all":
        visible = len([name for name in kept.split(",") if name.strip()])
        if not visible:
            return 0, "CUDA_VISIBLE_DEVICES is empty"
    else:
        visible = 1 << 10
    try:
        import pynvml

        pynvml.nvmlInit()
        found = pynvml.nvmlDeviceGetCount()
    except Exception as error:
        return 0, f"no GPU here ({error})"
    return min(found, visible), "" if found else "the driver lists no GPU"


def record(name: str, **values) -> None:
    """Append figures to the file that DNAL_GPU_FIGURES names, if it names one."""
    if path := os.environ.get("DNAL_GPU_FIGURES"):
        line = json.dumps({"test": name, "at": round(time.time(), 1), "device": DEVICE, **values}) + "\n"
        with contextlib.suppress(OSError), open(path, "a") as file:
            file.write(line)
