"""One process among others. The only room that imports Accelerate: everything that is sent between processes is sent here."""

import multiprocessing
import os
import sys
import warnings

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist.recipe import InputError


class Parallel:
    """The processes that `accelerate launch` started (or this one alone): who they are, and how they agree.

    Raises InputError if Accelerate was asked for something that this version would silently not do.
    """

    def __init__(self, tracker: str = "none"):
        """tracker: what Accelerate is to log to, a name it knows or "none"."""
        _refuse_what_is_not_there()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        on_gpu = torch.cuda.device_count() >= local
        handlers = [
            # Running statistics are combined at the end of each epoch (see average_statistics), not sent at every step.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ]
        log_with = None if tracker == "none" else tracker
        self.accelerator = Accelerator(cpu=not on_gpu, kwargs_handlers=handlers, log_with=log_with)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        if not on_gpu:
            # More threads than cores would make each collective wait for a process that is not scheduled.
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, min(torch.get_num_threads(), cores // local)))
        self.idle_gpus = 0 if on_gpu else torch.cuda.device_count()
        """GPUs that are left alone, since they are fewer than the processes of this machine and NCCL takes one for each."""
        self.backend = "ddp" if self.world_size > 1 else "single"
        asked = int(os.environ.get("WORLD_SIZE", 1))
        if asked != self.world_size:
            raise InputError(f"{asked} processes were launched, but Accelerate joined only {self.world_size} of them")

    def wrap(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The network as a weight step must call it, and its optimiser; what was wrapped before is let go."""
        self.accelerator.free_memory()
        with warnings.catch_warnings():
            # torch is renaming broadcast_buffers; the new name is not in every release that this project runs on.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            return self.accelerator.prepare(network, optimizer)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def average_(self, tensor: Tensor) -> Tensor:
        """Mean over processes, in place, in one collective; nothing is sent by a single process."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def average_statistics(self, network: nn.Module) -> None:
        """Make BatchNorm's running statistics equal on all processes: mean of means, law of total variance, in float64."""
        norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        if self.world_size == 1 or not norms:
            return
        mean = torch.cat([norm.running_mean.double() for norm in norms])
        variance = torch.cat([norm.running_var.double() for norm in norms])
        moments = self.average_(torch.stack([mean, variance + mean**2]))
        mean, variance = moments[0], moments[1] - moments[0] ** 2
        sizes = [norm.num_features for norm in norms]
        for norm, m, v in zip(norms, mean.split(sizes), variance.split(sizes), strict=True):
            norm.running_mean.copy_(m)
            norm.running_var.copy_(v.clamp_min(0))

    def assert_equal(self, tensor: Tensor, what: str) -> None:
        """Stop if `tensor` is not the same, bit for bit, on all processes."""
        if self.world_size == 1:
            return
        reference = tensor.detach().clone()
        torch.distributed.broadcast(reference, 0)
        different = self.sum_(torch.tensor(float(not torch.equal(reference, tensor)), device=tensor.device))
        if different:
            raise AssertionError(f"{what} differs on {int(different)} of {self.world_size} processes")

    def gather(self, items: list) -> list:
        """The lists of all processes, joined, on all of them. For what is rare and small."""
        return gather_object(items) if self.world_size > 1 else items

    def from_main(self, value):
        """The main process's value, on all processes."""
        return broadcast_object_list([value])[0] if self.world_size > 1 else value

    def start_tracker(self, project: str, config: dict, settings: dict) -> None:
        """On the main process. settings: {tracker: arguments of its start}."""
        self.accelerator.init_trackers(project, config, settings)

    def log(self, values: dict[str, float], step: int) -> None:
        self.accelerator.log(values, step=step)

    def stop_tracker(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def leave(self, code: int) -> None:
        """After close(), end this process with `code` if it is one of several; one alone goes on to its own end.

        Python's finalisation is left out: there a thread of gloo that still holds a tensor can abort the process, though all its
        work is done (github.com/pytorch/pytorch/pull/179291).
        """
        if self.world_size == 1:
            return
        for loader in multiprocessing.active_children():
            loader.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _refuse_what_is_not_there() -> None:
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() == "true":
            raise InputError(
                f"the Accelerate config asks for {name}, which this version does not train with; "
                f"launch with --config_file recipes/accelerate/ddp.yaml"
            )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise InputError(
            "the Accelerate config asks for torch.compile, which this version does not use: set dynamo_backend to 'no'"
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no":
        raise InputError(
            f"the Accelerate config asks for mixed_precision {precision}; this version trains in float32: set it to 'no'"
        )
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation not in ("1", ""):
        raise InputError("the Accelerate config asks for gradient accumulation; this version has none: set it to 1")
