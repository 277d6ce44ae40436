"""One process among others: everything that is sent between processes is sent here, or by what a backend wraps."""

import gc
import hashlib
import multiprocessing
import os
import shutil
import sys
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist.common.cores import cores
from dnal_dist.common.errors import InputError
from dnal_dist.distributed import accelerate_config, backend
from dnal_dist.distributed.wrapper import Options, Trained

# How long a collective waits for a process that does not come.
TIMEOUT = timedelta(minutes=10)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Context:
    """The processes that `accelerate launch` started (or this one alone): who they are, and how they agree.

    Raises InputError if Accelerate was asked for something that would silently not be done.
    """

    def __init__(self, tracker: str = "none", folder: str | None = None):
        """tracker: what Accelerate is to log to, a name it knows or "none". folder: where trackers write that write files."""
        accelerate_config.check_launched()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        found = torch.cuda.device_count() if os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true" else 0
        on_gpu = found >= local
        if not on_gpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        self.config = accelerate_config.read()
        log_with = None if tracker == "none" else tracker
        handlers = [InitProcessGroupKwargs(timeout=TIMEOUT)]
        # The backends are wrapped here, not by Accelerate: on a machine without a GPU it would quietly make DDP of them.
        hidden = {name: os.environ.pop(name, None) for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")}
        self.accelerator = Accelerator(
            cpu=not on_gpu, mixed_precision="no", kwargs_handlers=handlers, log_with=log_with, project_dir=folder
        )
        os.environ.update({name: value for name, value in hidden.items() if value is not None})
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        if self.device.type == "cuda" and self.device.index is None:
            # One process alone: Accelerate leaves the number out, and its tensors' devices have one.
            self.device = torch.device("cuda", torch.cuda.current_device())
        if not on_gpu:
            # More threads than cores would make each collective wait for a process that is not scheduled.
            torch.set_num_threads(max(1, min(torch.get_num_threads(), cores() // local)))
        self.idle_gpus = 0 if on_gpu else found
        """GPUs that are left alone, since they are fewer than the processes of this machine and NCCL takes one for each."""
        self.backend = self.config.backend or ("ddp" if self.world_size > 1 else "single")
        """single, ddp, fsdp2, zero1, zero2 or zero3."""
        expected = int(os.environ.get("WORLD_SIZE", 1))
        if expected != self.world_size:
            raise InputError(f"{expected} processes were launched, but Accelerate joined only {self.world_size} of them")
        if self.config.backend is not None and not torch.distributed.is_initialized():
            store = None if "MASTER_ADDR" in os.environ else torch.distributed.HashStore()
            kind = "nccl" if on_gpu else "gloo"
            torch.distributed.init_process_group(kind, store=store, rank=self.rank, world_size=self.world_size, timeout=TIMEOUT)
        fp16 = self.config.dtype == torch.float16
        self.precision = str(self.config.dtype).removeprefix("torch.")
        """Of convolutions and activations; all else is float32."""
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)

    layout, memory_format = "contiguous", torch.contiguous_format
    """Of images and activations."""

    def tune(self, training, network: nn.Module | None = None, before: str | None = None) -> None:
        """Set what the recipe's part `training` says of this device: TF32, cuDNN's choice of algorithms, the memory format.

        What "auto" is on a CPU depends on the network, or is what it was `before`: sums round differently in each."""
        layout = training.memory_format
        if layout == "auto":
            alone = before or ("channels_last" if network is not None and _has_depthwise(network) else "contiguous")
            layout = "channels_last" if self.device.type == "cuda" else alone
        self.layout, self.memory_format = layout, LAYOUTS[layout]
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = training.cudnn_benchmark
            # Not by their `fp32_precision`: torch.compile still reads these, and that fails once the two have been mixed.
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = training.tf32

    def wrap(self, network: nn.Module, sgd, momentum: dict[str, Tensor], training) -> Trained:
        """`network` for its weight steps, on the backend that was asked for. sgd and training are parts of the recipe."""
        # Parts of the last wrap that know each other would wait for the collector, with all their memory.
        gc.collect()
        options = Options(
            self.backend,
            self.device,
            self.world_size,
            self.config.dtype,
            self.scaler,
            self.config.settings,
            training.sync_batchnorm,
            training.activation_checkpointing or self.config.activation_checkpointing,
            training.compile,
            self._graphs(training),
            self.memory_format,
        )
        return backend(self.backend)(network, sgd, momentum, options)

    def _graphs(self, training) -> bool:
        eager = training.compile or training.activation_checkpointing or self.config.activation_checkpointing
        able = self.backend == "single" and self.device.type == "cuda" and not self.scaler.is_enabled()
        return training.cuda_graphs and able and not eager

    def accumulation_steps(self, data) -> int:
        """Micro-batches of a local batch; see the function of this name. data: that part of the recipe."""
        return accumulation_steps(data.global_batch // self.world_size, data.per_device_batch_limit, self.config.accumulation)

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

    def agree(self, what: str, found: dict[str, Tensor]) -> None:
        """Stop, naming process and site, if the tensors in `found` are not the same, bit for bit, on all processes."""
        if self.world_size == 1:
            return
        # The whole is compared first: there may be hundreds of sites.
        digests = {name: _digest(tensor) for name, tensor in found.items()}
        whole = hashlib.sha256(repr(digests).encode()).hexdigest()
        if len(set(gather_object([whole]))) == 1:
            return
        first, *others = gather_object([digests])
        for rank, other in enumerate(others, 1):
            if wrong := [name for name in first if first[name] != other.get(name)]:
                more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
                raise InputError(
                    f"the processes disagree: {what} of {wrong[0]}{more} on process {rank} is not what it is on process 0; go on "
                    "from the last checkpoint by the same command, and suspect that machine if it comes back"
                )

    def gather(self, items: list) -> list:
        """The lists of all processes, joined, on all of them. For what is rare and small."""
        return gather_object(items) if self.world_size > 1 else items

    def gather_tensor(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, each of shape (n,), as (world size, n), on all of them."""
        if self.world_size == 1:
            return tensor[None]
        gathered = tensor.new_empty(self.world_size * len(tensor))
        torch.distributed.all_gather_into_tensor(gathered, tensor)
        return gathered.view(self.world_size, -1)

    def from_main(self, value):
        """The main process's value, on all processes."""
        return broadcast_object_list([value])[0] if self.world_size > 1 else value

    def start_tracker(self, project: str, config: dict | None, settings: dict):
        """On the main process. settings: {tracker: arguments of its start}. Returns what the tracker's own library calls a run."""
        # One that could not be started before stays there.
        self.accelerator.trackers.clear()
        self.accelerator.init_trackers(project, config, settings)
        (tracker,) = self.accelerator.trackers
        return tracker.tracker

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
        remove_temp()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def accumulation_steps(local_batch: int, limit: int | None, steps: int = 1) -> int:
    """Micro-batches of at most `limit` images, taken one after the other, into which a process divides its local batch: as many as
    the Accelerate config says, if `steps` is above 1, else the fewest. Raises InputError if it cannot be divided so."""
    limit = limit or local_batch
    if steps == 1:
        return next(n for n in range(1, local_batch + 1) if local_batch % n == 0 and local_batch // n <= limit)
    if local_batch % steps or local_batch // steps > limit:
        raise InputError(
            f"the Accelerate config asks for gradient_accumulation_steps {steps}, which does not divide the {local_batch} images "
            f"of a process into equal parts of at most {limit}; leave it out and set key 'data.per_device_batch_limit'"
        )
    return steps


def _has_depthwise(network: nn.Module) -> bool:
    """Whether it has depthwise convolutions, which take 0.6 to 0.9 of their time on a CPU in channels_last; others gain or lose."""
    return any(isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels for m in network.modules())


def remove_temp() -> None:
    """What Python would remove at the regular end of a process: the folder with the sockets of its loaders."""
    if place := multiprocessing.current_process()._config.get("tempdir"):
        shutil.rmtree(place, ignore_errors=True)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().numpy().tobytes()).hexdigest()
