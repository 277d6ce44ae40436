"""The batch script of a job, or of an array of them: train.sbatch, filled in."""

import shlex
import sys
from pathlib import Path
from string import Template

import yaml
from options import Options

from dnal_dist.common.paths import expanded
from dnal_dist.common.text import printable

ROOT = Path(__file__).resolve().parent.parent
_BIN = str(Path(sys.executable).parent)


# How the script knows that a run is finished, or that its pretrain is.
ENDED = """grep -qs '"kind": "end"' "$run/metrics.jsonl\""""
PRETRAINED = """ls "$run/checkpoints" 2>/dev/null | grep -q -- '-search$'"""


class _Template(Template):
    """With @, since the shell uses $."""

    delimiter = "@"


def render(
    options: Options, name: str, folders: list[Path], place: Path, command: list[str], array: bool, pretrain: bool = False
) -> str:
    """The script's text. folders: run folders, one for each job of the array. place: folder of this submission, with the
    recipes (0.yaml, ...) and the log. pretrain: the run goes no further than that phase. Raises ValueError, also for a name or a
    path of several lines: each line of a script is a command, whatever stands in the one before."""
    for what, value in (("the job's name", name), ("key 'output'", place), ("the working directory", Path.cwd())):
        if printable(str(value)) != str(value):
            raise ValueError(f"{what}: expected one line without control characters, found {str(value)[:80]!r}; change it")
    template = _Template(Path(__file__).with_name("train.sbatch").read_text(encoding="utf-8"))
    return template.substitute(
        directives="\n".join(f"#SBATCH {line}" for line in _directives(options, name, len(folders), place, array)),
        command=printable(shlex.join(command)),
        workdir=shlex.quote(str(Path.cwd())),
        # The programs of this environment, unless a container has its own.
        setup="\n".join([*options.setup, *([] if options.container else [f"export PATH={shlex.quote(_BIN)}:$PATH"])]),
        which=_which(folders, place, array) + f"\nrequeue={'yes' if options.requeue and options.chain == 1 else shlex.quote('')}",
        patience=options.grace - min(30, options.grace // 4),
        srun=shlex.join(_srun(options)),
        launcher=shlex.join(_launcher(options)).replace("'", "'\\''"),
        launch=shlex.join(_launch(options)),
        finished=PRETRAINED if pretrain else ENDED,
        train=shlex.join(_train(options, pretrain)),
    )


def _train(options: Options, pretrain: bool) -> list[str]:
    return [*(["--until", "pretrain"] if pretrain else []), *(w for key in options.allow_changed for w in ("--allow-changed", key))]


def _directives(options: Options, name: str, jobs: int, place: Path, array: bool) -> list[str]:
    # SLURM reads a percent sign as the start of a pattern.
    log = str(place).replace("%", "%%") + ("/log-%a.txt" if array else "/log.txt")
    directives = {
        "job-name": name,
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": options.gpus_per_node or None,
        "cpus-per-task": options.cpus_per_node,
        "mem": options.mem,
        "time": options.time,
        "account": options.account,
        "partition": options.partition,
        "qos": options.qos,
        "constraint": options.constraint,
        "array": f"0-{jobs - 1}{f'%{options.max_parallel}' if options.max_parallel else ''}" if array else None,
        "signal": f"B:USR1@{options.grace}",
        "open-mode": "append",
        "output": log,
    }
    lines = [f"--{key}={_word(str(value))}" for key, value in directives.items() if value is not None]
    lines.append("--requeue" if options.requeue and options.chain == 1 else "--no-requeue")
    return [*lines, *options.sbatch]


def _word(value: str) -> str:
    """Quoted as sbatch reads a directive."""
    return value if shlex.quote(value) == value else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _which(folders: list[Path], place: Path, array: bool) -> str:
    """Lines that set the run, its recipe, and two files by which its jobs communicate."""
    head, task, tail = f"run={shlex.quote(str(folders[0]))}", "0", ""
    if array:
        runs = "\n".join(f"    {shlex.quote(str(folder))}" for folder in folders)
        task, tail = "$SLURM_ARRAY_TASK_ID", "-$SLURM_ARRAY_TASK_ID"
        head = f"runs=(\n{runs}\n)\nrun=${{runs[{task}]}}"
    place_ = shlex.quote(str(place))
    return f"{head}\nrecipe={place_}/{task}.yaml\nhalt={place_}/halt{tail}\nidle={place_}/idle{tail}"


def _mounts(options: Options) -> str:
    return ",".join([f"{Path.cwd()}:{Path.cwd()}", *filter(None, [options.container_mounts])])


def _srun(options: Options) -> list[str]:
    words = [f"--cpus-per-task={options.cpus_per_node}"] if options.cpus_per_node else []
    if options.container and not options.container.endswith(".sif"):
        words += [f"--container-image={options.container}", f"--container-mounts={_mounts(options)}"]
        words.append(f"--container-workdir={Path.cwd()}")
    return words


def _launcher(options: Options) -> list[str]:
    words = ["accelerate", "launch"]
    if options.container and options.container.endswith(".sif"):
        gpus = ["--nv"] if options.gpus_per_node else []
        words = ["apptainer", "exec", *gpus, "--bind", _mounts(options), "--pwd", str(Path.cwd()), options.container, *words]
    return words


def config_file(options: Options) -> Path:
    """Path of the Accelerate config; those that ship with the project are found from any folder."""
    own = Path(expanded(options.config_file, "--config-file: ")).absolute()
    shipped = ROOT / options.config_file
    return shipped if shipped.exists() and not own.exists() else own


def _launch(options: Options) -> list[str]:
    """The launcher's options that are the same on all machines."""
    path = config_file(options)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"--config-file {options.config_file}: cannot be read ({' '.join(str(error).split())}); those of the project are in "
            "recipes/accelerate/"
        ) from None
    if not isinstance(config, dict) or "distributed_type" not in config:
        raise ValueError(
            f"--config-file {options.config_file}: not an Accelerate config (no distributed_type); see recipes/accelerate/"
        )
    words = ["--config_file", str(path), "--num_machines", str(options.nodes)]
    words += ["--num_processes", str(options.nodes * options.processes), "--same_network"]
    if options.mixed_precision:
        words += ["--mixed_precision", options.mixed_precision]
    if config["distributed_type"] == "DEEPSPEED" and options.nodes > 1:
        # DeepSpeed's own launcher opens a shell on each machine; here srun has started one there already.
        words += ["--deepspeed_multinode_launcher", "standard"]
    return words
