"""The run that the doctor examines, and what its checks return."""

import functools
import json
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from dnal_dist import nets, recipe
from dnal_dist.common.errors import InputError, reason
from dnal_dist.common.shipped import named
from dnal_dist.common.text import spaced
from dnal_dist.data.shards import Shards

PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Finding(NamedTuple):
    status: str
    """pass, warn or fail."""
    found: str
    remedy: str = ""
    """The recipe key or the command that solves it; empty for what passes."""


def passes(found: str) -> Finding:
    return Finding("pass", found)


def warns(found: str, remedy: str) -> Finding:
    return Finding("warn", found, remedy)


def fails(found: str, remedy: str) -> Finding:
    return Finding("fail", found, remedy)


class Config(NamedTuple):
    """The keys of an Accelerate config that the checks use."""

    path: Path
    processes: int
    """On one machine."""
    backend: str
    """ddp, fsdp2, zero1, ...; single: none of them."""
    precision: str
    """no, bf16 or fp16."""
    accumulation: int

    def expected(self, processes: int) -> str:
        """The backend of a launch of `processes`."""
        return "single" if processes == 1 and self.backend == "ddp" else self.backend


def read_config(path: Path) -> Config:
    """Raises InputError for a file that is not an Accelerate config."""
    try:
        config = yaml.safe_load(path.read_text())
        kind, machines = str(config.get("distributed_type", "NO")).upper(), int(config.get("num_machines") or 1)
        deepspeed = config.get("deepspeed_config") or {}
        if file := deepspeed.get("deepspeed_config_file"):
            stage = json.loads(Path(file).read_text())["zero_optimization"]["stage"]
        else:
            stage = deepspeed.get("zero_stage", 2)
        backend = {"FSDP": "fsdp2", "DEEPSPEED": f"zero{stage}", "NO": "single"}.get(kind, "ddp")
        processes = max(1, int(config.get("num_processes") or 1) // machines)
        accumulation = config.get("gradient_accumulation_steps") or deepspeed.get("gradient_accumulation_steps") or 1
        accumulation = int(accumulation) if str(accumulation).isdigit() else 1
        precision = str(config.get("mixed_precision") or "no").lower()
        return Config(path, processes, backend, {"false": "no"}.get(precision, precision), accumulation)
    except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        where = named("recipes/accelerate")
        raise InputError(f"--config-file {path}: not an Accelerate config ({reason(error)}); see {where}") from None


@dataclass
class Case:
    """A planned run: its recipe, and where and how it will be started."""

    settings: recipe.Recipe
    nodes: int = 1
    processes: int = 1
    """On one node."""
    config: Config | None = None
    seconds: float | None = None
    """Time limit of the job."""
    grace: float | None = None
    """Seconds between the signal to save and the end of the job."""
    device_memory: int | None = None
    """Bytes of one device."""
    cpu: bool = False
    """Train without GPUs, even if this machine has some."""
    partition: str | None = None
    quick: bool = False
    temporary: list[Path] = field(default_factory=list)
    """Folders to remove at the end."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.processes

    @property
    def backend(self) -> str:
        """Of the whole run."""
        return self.config.expected(self.ranks) if self.config else "single" if self.ranks == 1 else "ddp"

    @property
    def folder(self) -> Path:
        return Path(self.settings.output)

    @property
    def existing(self) -> Path:
        """The run folder, or its nearest parent that exists."""
        return nearest(self.folder)

    @property
    def classes(self) -> int:
        return self.settings.model.num_classes or self.network.num_classes

    @functools.cached_property
    def network(self) -> nets.GatedNetwork:
        """On the CPU. Raises InputError."""
        return nets.build(**self.settings.network)

    @functools.cached_property
    def scratch(self) -> Path:
        return self.folder_in(Path(tempfile.gettempdir()))

    @functools.cached_property
    def splits(self) -> dict[str, Shards | InputError]:
        """The shards of train and val, or why they cannot be used. Remote ones would be copied into the scratch folder."""
        return {key: self._open(key) for key in ("train", "val")}

    def _open(self, key: str) -> Shards | InputError:
        data = self.settings.data
        try:
            return Shards(getattr(data, key), f"data.{key}", self.classes, data.model_copy(update={"cache": str(self.scratch)}))
        except InputError as error:
            return error

    @property
    def usable(self) -> list[Shards]:
        return [shards for shards in self.splits.values() if isinstance(shards, Shards)]

    def shards(self, key: str) -> Shards:
        """Of one split, for a check that needs them. Raises InputError where the check of the shards themselves fails."""
        if isinstance(self.splits[key], InputError):
            raise InputError(f"not checked, since the shards of data.{key} cannot be used; correct key 'data.{key}'")
        return self.splits[key]

    def folder_in(self, parent: Path) -> Path:
        """A new folder in `parent`, removed when the doctor ends, even if a check still writes there."""
        self.temporary.append(Path(tempfile.mkdtemp(prefix=".dnal_dist-doctor-", dir=parent)))
        return self.temporary[-1]

    def close(self) -> None:
        for path in self.temporary:
            # Files that a check still writes may be in the way of the first attempts.
            for _ in range(3):
                shutil.rmtree(path, ignore_errors=True)

    @functools.cached_property
    def checkpoint_bytes(self) -> int:
        """Tensors of a checkpoint in the search, the largest of a run."""
        with torch.no_grad():
            weights = sum(p.numel() * p.element_size() for p in self.network.parameters())
            buffers = sum(b.numel() * b.element_size() for b in self.network.buffers())
        # BatchNorm's statistics of each process are kept beside their mean.
        return 2 * weights + buffers * (1 + (self.ranks > 1) * self.ranks) + 8 * self.network.num_gates


def refused(error: InputError) -> Finding:
    """The remedy is behind the message's last semicolon, or on its last line."""
    lines = str(error).splitlines()
    found, _, remedy = lines[0].rpartition("; ") if len(lines) == 1 else (" ".join(" ".join(lines[:-1]).split()), "", lines[-1])
    return fails(found or remedy, remedy if found else "correct it")


def bounded(check: Callable[[Case], Finding], case: Case, seconds: float, late: Callable[[str, str], Finding] = fails) -> Finding:
    """The finding of `check`, or `late` after `seconds`: a file system or a server may never answer."""
    findings: list[Finding] = []
    thread = threading.Thread(target=lambda: findings.append(_checked(check, case)), daemon=True)
    thread.start()
    thread.join(max(0.1, seconds))
    if findings:
        return findings[0]
    return late(f"no answer within {seconds:.0f} s", "check whether its disk, its server or this machine hangs, then try again")


def _checked(check: Callable[[Case], Finding], case: Case) -> Finding:
    try:
        return check(case)
    except InputError as error:
        return refused(error)
    except OSError as error:
        return fails(reason(error), "check that path and its permissions")
    except Exception as error:
        # A broken check must not hide the findings of the others.
        found = f"the check itself broke ({type(error).__name__}: {reason(error)})"
        return fails(found, "check it by hand, and report the error")


def nearest(path: Path) -> Path:
    """`path`, or the nearest of its parents that exists."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.exists())


def many(count: int, word: str) -> str:
    return f"{spaced(count)} {word}" + "s" * (count != 1)
