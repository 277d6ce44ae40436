"""What each phase of a run takes: time, devices, images, bytes between processes, energy. It goes on over stops and resumes."""

import contextlib
import math
import time

import pynvml
import torch

from dnal_dist.checkpoint.format import Spent

JOULES_PER_KWH = 3.6e6


class Clock:
    """Runs from here on for the phase in which `run` stands, on top of what a stopped part of it took."""

    def __init__(self, run):
        self.run, self.phase, self.step, self.begun = run, run.phase, run.step, time.monotonic()
        self.seconds = run.seconds.get(run.phase, 0.0)
        self.joules = joules(run.context)
        self.before = run.spent.get(run.phase)
        if self.before is None:
            begins = run.step == 0
            # A checkpoint of an earlier release, in the midst of a phase, tells only its seconds.
            images, device_seconds = run.step * run.recipe.data.global_batch, self.seconds * run.context.world_size
            self.before = Spent(images=images, device_seconds=device_seconds, energy_kwh=0.0 if begins else None)

    def tell(self, bytes_sent: int | None = None) -> None:
        """Set what the phase took until now. All processes must come here."""
        run, passed = self.run, time.monotonic() - self.begun
        used, kwh = joules(run.context), None
        if None not in (used, self.joules, self.before.energy_kwh):
            kwh = self.before.energy_kwh + (used - self.joules) / JOULES_PER_KWH
        run.seconds[self.phase] = self.seconds + passed
        run.spent[self.phase] = Spent(
            images=self.before.images + (run.step - self.step) * run.recipe.data.global_batch,
            device_seconds=self.before.device_seconds + passed * run.context.world_size,
            energy_kwh=kwh,
            bytes_sent=bytes_sent,
        )


def told(run, phase: str) -> dict[str, float]:
    """`seconds`, `images`, `device_seconds`, `energy_kwh` and `bytes_sent` of a phase, those that are known."""
    known = run.spent[phase].model_dump(exclude_none=True) if phase in run.spent else {}
    rounded = {key: round(value, 9 if key == "energy_kwh" else 3) for key, value in known.items()}
    return {"seconds": round(run.seconds[phase], 3), **rounded}


def joules(context) -> float | None:
    """What the GPUs of all processes have used since their drivers were loaded; None without GPUs, or where one does not tell."""
    if context.device.type != "cuda":
        return None
    used = math.nan
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        # By its name: CUDA and NVML may count the devices of a machine differently.
        name = f"GPU-{torch.cuda.get_device_properties(context.device).uuid}"
        used = pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(name)) / 1e3
    total = context.sum_(torch.tensor([used], dtype=torch.float64, device=context.device)).item()
    return None if math.isnan(total) else total
