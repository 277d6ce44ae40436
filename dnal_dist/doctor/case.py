"""What the doctor is asked about, and how it tells what it found."""

import functools
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from dnal_dist import nets, recipe
from dnal_dist.common.errors import InputError
from dnal_dist.data.shards import Shards
from dnal_dist.training import preflight

# With more than two processes nothing else would come to light, and a login node has few cores.
PROBED = 2
PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Finding(NamedTuple):
    status: str
    """pass, warn or fail."""
    found: str
    remedy: str = ""
    """The recipe's key or the command that mends it; empty for what passes."""


def passes(found: str) -> Finding:
    return Finding("pass", found)


def warns(found: str, remedy: str) -> Finding:
    return Finding("warn", found, remedy)


def fails(found: str, remedy: str) -> Finding:
    return Finding("fail", found, remedy)


class Config(NamedTuple):
    """What of an Accelerate config is looked at."""

    path: Path
    processes: int
    """Of one machine."""
    backend: str
    """ddp, fsdp2, zero1, ...; single: none of them."""
    precision: str
    """no, bf16 or fp16."""
    accumulation: int

    def expected(self, processes: int) -> str:
        """The backend of a launch of so many."""
        return "single" if processes == 1 and self.backend == "ddp" else self.backend


def read_config(path: Path) -> Config:
    """Raises InputError for what is no Accelerate config."""
    try:
        told = yaml.safe_load(path.read_text())
        kind, machines = str(told.get("distributed_type", "NO")).upper(), int(told.get("num_machines") or 1)
        own = told.get("deepspeed_config") or {}
        if file := own.get("deepspeed_config_file"):
            stage = json.loads(Path(file).read_text())["zero_optimization"]["stage"]
        else:
            stage = own.get("zero_stage", 2)
        backend = {"FSDP": "fsdp2", "DEEPSPEED": f"zero{stage}", "NO": "single"}.get(kind, "ddp")
        processes = max(1, int(told.get("num_processes") or 1) // machines)
        accumulation = told.get("gradient_accumulation_steps") or own.get("gradient_accumulation_steps") or 1
        accumulation = int(accumulation) if str(accumulation).isdigit() else 1
        precision = str(told.get("mixed_precision") or "no").lower()
        return Config(path, processes, backend, {"false": "no"}.get(precision, precision), accumulation)
    except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"--config-file {path}: not an Accelerate config ({why}); see recipes/accelerate") from None


@dataclass
class Case:
    """A run that is to be: its recipe, and where and how it will be started."""

    settings: recipe.Recipe
    nodes: int = 1
    processes: int = 1
    """Of one node."""
    config: Config | None = None
    seconds: float | None = None
    """Time limit of the job."""
    grace: float | None = None
    """Seconds between the word that the job is to end and its end."""
    device_memory: int | None = None
    """Bytes of one device."""
    cpu: bool = False
    """Whether it is to train without GPUs, though there may be some here."""
    partition: str | None = None
    account: str | None = None
    quick: bool = False
    made: list[Path] = field(default_factory=list)
    """What is to be taken away again."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.processes

    @property
    def backend(self) -> str:
        """The one that the whole run is to have."""
        own = "ddp" if self.config is None else self.config.backend
        return "single" if self.ranks == 1 and own == "ddp" else own

    @property
    def folder(self) -> Path:
        return Path(self.settings.output)

    @property
    def place(self) -> Path:
        """The run folder, or what of its path is there already."""
        here = Path(self.settings.output).absolute()
        return next(path for path in (here, *here.parents) if path.exists())

    @property
    def classes(self) -> int:
        return self.settings.model.num_classes or self.network.num_classes

    @functools.cached_property
    def network(self) -> nets.GatedNetwork:
        """On the CPU. Raises InputError."""
        return preflight.build_network(self.settings.model)

    @functools.cached_property
    def scratch(self) -> Path:
        return self.folder_in(Path(tempfile.gettempdir()))

    @functools.cached_property
    def splits(self) -> dict[str, Shards | InputError]:
        """The shards of train and val, or why there are none. Copies of remote ones would be made in the scratch folder."""
        return {key: self._shards(key) for key in ("train", "val")}

    def _shards(self, key: str) -> Shards | InputError:
        data = self.settings.data
        try:
            return Shards(getattr(data, key), f"data.{key}", self.classes, str(self.scratch), data.cache_gb)
        except InputError as error:
            return error

    def folder_in(self, place: Path) -> Path:
        """A new folder in `place`, gone when the doctor leaves, even if a check still writes there."""
        self.made.append(Path(tempfile.mkdtemp(prefix=".dnal_dist-doctor-", dir=place)))
        return self.made[-1]

    def close(self) -> None:
        for path in self.made:
            # What is written meanwhile may be in the way of the first attempts.
            for _ in range(3):
                shutil.rmtree(path, ignore_errors=True)

    @functools.cached_property
    def tensor_bytes(self) -> int:
        """Of a checkpoint in the search, the largest that a run has."""
        with torch.no_grad():
            weights = sum(p.numel() * p.element_size() for p in self.network.parameters())
            buffers = sum(b.numel() * b.element_size() for b in self.network.buffers())
        # BatchNorm's statistics of each process lie beside those of all.
        return 2 * weights + buffers * (1 + (self.ranks > 1) * self.ranks) + 8 * self.network.num_gates


def refused(error: InputError) -> Finding:
    """The message ends with the remedy: behind its last semicolon, or on its last line."""
    lines = str(error).splitlines()
    found, _, remedy = lines[0].rpartition("; ") if len(lines) == 1 else (" ".join(" ".join(lines[:-1]).split()), "", lines[-1])
    return fails(found or remedy, remedy if found else "correct it")


def bounded(check: Callable[[Case], Finding], case: Case, seconds: float, late: Callable[[str, str], Finding] = fails) -> Finding:
    """What `check` finds, or `late` if it did not come to an end in time: a file system or a server may never answer."""
    found: list[Finding] = []
    thread = threading.Thread(target=lambda: found.append(_judged(check, case)), daemon=True)
    thread.start()
    thread.join(max(0.1, seconds))
    if found:
        return found[0]
    return late(f"no answer within {seconds:.0f} s", "see whether its disk, its server or this machine hangs, then ask again")


def _judged(check: Callable[[Case], Finding], case: Case) -> Finding:
    try:
        return check(case)
    except InputError as error:
        return refused(error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fails(f"{where}{error.strerror or error}", "check that path and its permissions")
    except Exception as error:
        # One check that breaks must not take the answers of the others with it.
        why = " ".join(str(error).split())[:200]
        return fails(f"the check itself broke ({type(error).__name__}: {why})", "look at it by hand, and report it")


def output_of(command: Sequence[str], seconds: float = 5.0) -> str | None:
    """What a program prints on stdout, None if it is not there, fails, or does not answer in time."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def many(count: int, word: str) -> str:
    return f"{count:,}".replace(",", " ") + f" {word}" + "s" * (count != 1)
