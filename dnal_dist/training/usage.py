"""Resources that each phase uses: time, devices, images, bytes between processes, energy. Sums continue over stops and resumes."""

import contextlib
import math
import time

import pynvml
import torch

from dnal_dist.checkpoint.format import RunState, Usage
from dnal_dist.distributed.context import Context
from dnal_dist.training.run import Run

JOULES_PER_KWH = 3.6e6


class Clock:
    """Measures the present phase of `run` from here on, on top of the usage before a resume."""

    def __init__(self, run: Run):
        state = run.state
        self.run, self.phase, self.step, self.begun = run, state.phase, state.step, time.monotonic()
        self.seconds = state.seconds.get(state.phase, 0.0)
        self.joules = joules(run.context)
        run.breakdown.start()
        self.before = state.usage.get(state.phase)
        if self.before is None:
            # A checkpoint of an earlier release, in the midst of a phase, has only its seconds.
            images, device_seconds = state.step * run.recipe.data.global_batch, self.seconds * run.context.world_size
            self.before = Usage(images=images, device_seconds=device_seconds, energy_kwh=0.0 if state.step == 0 else None)

    def record(self, bytes_sent: int | None = None) -> None:
        """Put the usage up to now into the run's state. All processes must call this."""
        run, passed = self.run, time.monotonic() - self.begun
        used, kwh = joules(run.context), None
        if None not in (used, self.joules, self.before.energy_kwh):
            kwh = self.before.energy_kwh + (used - self.joules) / JOULES_PER_KWH
        run.state.seconds[self.phase] = self.seconds + passed
        run.state.usage[self.phase] = Usage(
            images=self.before.images + (run.state.step - self.step) * run.recipe.data.global_batch,
            device_seconds=self.before.device_seconds + passed * run.context.world_size,
            energy_kwh=kwh,
            bytes_sent=bytes_sent,
        )


def summary(state: RunState, phase: str) -> dict[str, float]:
    """`seconds`, `images`, `device_seconds`, `energy_kwh` and `bytes_sent` of a phase, those that are known."""
    known = state.usage[phase].model_dump(exclude_none=True) if phase in state.usage else {}
    rounded = {key: round(value, 9 if key == "energy_kwh" else 3) for key, value in known.items()}
    return {"seconds": round(state.seconds[phase], 3), **rounded}


def joules(context: Context) -> float | None:
    """Joules used by the GPUs of all processes since their drivers were loaded; None without GPUs, or if one has no counter."""
    if context.device.type != "cuda":
        return None
    used = math.nan
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        # By UUID: CUDA and NVML may number the devices of a machine differently.
        name = f"GPU-{torch.cuda.get_device_properties(context.device).uuid}"
        used = pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(name)) / 1e3
    total = context.sum_(torch.tensor([used], dtype=torch.float64, device=context.device)).item()
    return None if math.isnan(total) else total
