"""The options of a job: the command line overrides the site's file, which overrides the defaults."""

import argparse
import re
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dnal_dist.common.paths import expanded

SITE = Path("~/.config/dnal_dist/slurm.yaml")
TIME = re.compile(r"(?:(\d+)-)?(\d{1,3}):(\d\d):(\d\d)")


class Options(BaseModel):
    """One job. Every key may be in the site's file, and on the command line with dashes."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    nodes: int = Field(1, ge=1)
    """machines"""
    gpus_per_node: int | None = Field(None, ge=0)
    """GPUs of each machine, one process each; 0 where there are none"""
    processes_per_node: int | None = Field(None, ge=1)
    """processes a machine, if that is not one a GPU"""
    time: str | None = None
    """time limit of a job, [DAYS-]HH:MM:SS; a longer run resumes in the next job"""
    account: str | None = None
    """SLURM's --account"""
    partition: str | None = None
    """SLURM's --partition"""
    qos: str | None = None
    """SLURM's --qos"""
    constraint: str | None = None
    """SLURM's --constraint"""
    mem: str | None = None
    """memory of each machine, SLURM's --mem"""
    cpus_per_node: int | None = Field(None, ge=1)
    """cores of each machine; without it, one for each process and one for each of its loaders (data.workers)"""
    device_memory: str | None = None
    """memory of one GPU, for example 80GB, for the doctor's estimate; a login node has none"""
    sbatch: list[str] = []
    """any other option of sbatch, for example --sbatch=--reservation=lecture; may be given again"""
    config_file: str = "recipes/accelerate/ddp.yaml"
    """Accelerate config: ddp, fsdp2, zero1, zero2 or zero3.yaml, or your own"""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """in place of the Accelerate config's"""
    container: str | None = None
    """container image to train in: a .sif file (Apptainer), else a value of Pyxis' --container-image"""
    container_mounts: str | None = None
    """folders mounted in the container beside the current one, SOURCE:TARGET[,...]"""
    setup: list[str] = []
    """lines of shell before the training, for example "module load cuda"; may be given again"""
    grace: int = Field(300, ge=20)
    """seconds before its time limit at which a job gets the signal to save"""
    requeue: bool = True
    """whether a job requeues itself"""
    chain: int = Field(1, ge=1)
    """jobs to submit, each after the previous one, in place of requeueing: for sites that do not allow it"""
    allow_changed: list[str] = []
    """key of the recipe that may have changed since the run started, as for dnal_dist.train; may be given again"""
    max_parallel: int | None = Field(None, ge=1)
    """in a sweep: jobs that may run at the same time"""

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, time: str | None) -> str | None:
        if time is not None and not TIME.fullmatch(time):
            raise ValueError(f"expected [DAYS-]HH:MM:SS, for example 12:00:00, found {time!r}")
        return time

    @field_validator("*")
    @classmethod
    def _is_one_line(cls, value):
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and re.search(r"[\r\n\0]", text):
                raise ValueError("expected one line")
        return value

    @model_validator(mode="after")
    def _is_consistent(self):
        if self.gpus_per_node is None:
            raise ValueError("give --gpus-per-node (0 where there are none), or gpus_per_node in the site's file")
        if self.time is None:
            raise ValueError("give --time, or time in the site's file")
        days, hours, minutes, seconds = (int(part or 0) for part in TIME.fullmatch(self.time).groups())
        if (total := ((days * 24 + hours) * 60 + minutes) * 60 + seconds) < 2 * self.grace:
            raise ValueError(f"--grace {self.grace} seconds are more than half of --time {self.time} ({total} s); lower it")
        return self

    @property
    def processes(self) -> int:
        """On one machine."""
        return self.processes_per_node or self.gpus_per_node or 1


LISTS = ("sbatch", "setup", "allow_changed")


def add_to(parser: argparse.ArgumentParser) -> None:
    """The options of a job, for the command line."""
    group = parser.add_argument_group("the job", "defaults come from the site's file")
    for name, field in Options.model_fields.items():
        flag, help_ = f"--{name.replace('_', '-')}", field.description
        default = field.default if field.default not in (None, []) else None
        help_ += f" (default: {default})" if default is not None and name != "requeue" else ""
        if name in LISTS:
            group.add_argument(flag, action="append", metavar="KEY" if name == "allow_changed" else "LINE", help=help_)
        elif name == "requeue":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help_)
        else:
            metavar = "N" if "int" in str(field.annotation) else name.rpartition("_")[2].upper()
            group.add_argument(flag, metavar=metavar, help=help_)
    group.add_argument("--site", metavar="YAML", help=f"the site's file (default: {SITE}, if it is there)")


def read(args: argparse.Namespace) -> Options:
    """The options of the command line and the site's file. Raises ValueError, naming the file or the option."""
    path = Path(expanded(args.site, "--site: ")) if args.site else SITE.expanduser()
    found = {}
    if args.site or path.exists():
        try:
            # As text, since YAML reads 12:00:00 as 43 200.
            found = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
        if not isinstance(found, dict):
            raise ValueError(f"{path}: expected keys such as 'partition: gpu', found {type(found).__name__}")
    given = {name: getattr(args, name) for name in Options.model_fields if getattr(args, name) is not None}
    for name in LISTS:
        if name in given and isinstance(found.get(name), list):
            given[name] = [*found[name], *given[name]]
    try:
        return Options.model_validate(found | given)
    except ValidationError as error:
        raise ValueError("; ".join(_describe(e, path, given) for e in error.errors())) from None


def _describe(error: dict, path: Path, given: dict) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    key = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key '{key}' (known: {', '.join(Options.model_fields)})"
    where = f"--{key.replace('_', '-')}" if key in given else f"{path}: key '{key}'"
    return f"{where}: {message[0].lower()}{message[1:]}"
