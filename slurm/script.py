"""The batch script of a job, or of an array of them: train.sbatch, filled in."""

import shlex
import sys
from pathlib import Path
from string import Template

import yaml
from options import Options

ROOT = Path(__file__).resolve().parent.parent


class _Template(Template):
    """A shell's own dollars stay."""

    delimiter = "@"


def render(options: Options, name: str, folders: list[Path], place: Path, command: list[str], array: bool) -> str:
    """The script's text. folders: of the runs, one for each job of the array. place: folder of this submission, where the script
    finds the recipes (0.yaml, ...) and writes its log. Raises ValueError."""
    template = _Template(Path(__file__).with_name("train.sbatch").read_text(encoding="utf-8"))
    return template.substitute(
        directives="\n".join(f"#SBATCH {line}" for line in _directives(options, name, len(folders), place, array)),
        command=shlex.join(command),
        workdir=shlex.quote(str(Path.cwd())),
        setup="\n".join([*options.setup, *_path(options)]),
        which=_which(folders, place, array) + f"\nrequeue={'yes' if options.requeue and options.chain == 1 else shlex.quote('')}",
        patience=options.grace - min(30, options.grace // 4),
        srun=shlex.join(_srun(options)),
        launcher=shlex.join(_launcher(options)).replace("'", "'\\''"),
        launch=shlex.join(_launch(options)),
        train=shlex.join(word for key in options.allow_changed for word in ("--allow-changed", key)),
    )


def _directives(options: Options, name: str, jobs: int, place: Path, array: bool) -> list[str]:
    # A percent sign would be the beginning of a pattern of SLURM's.
    log = str(place).replace("%", "%%") + ("/log-%a.txt" if array else "/log.txt")
    asked = {
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
    lines = [f"--{key}={_word(str(value))}" for key, value in asked.items() if value is not None]
    lines.append("--requeue" if options.requeue and options.chain == 1 else "--no-requeue")
    return [*lines, *options.sbatch]


def _word(value: str) -> str:
    """As sbatch reads a word of a directive."""
    return value if shlex.quote(value) == value else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _path(options: Options) -> list[str]:
    """What makes the programs of this environment those of the job."""
    return [] if options.container else [f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"]


def _which(folders: list[Path], place: Path, array: bool) -> str:
    """Lines that name the run, its recipe, and two files for what its jobs tell each other."""
    head, task, tail = f"run={shlex.quote(str(folders[0]))}", "0", ""
    if array:
        runs = "\n".join(f"    {shlex.quote(str(folder))}" for folder in folders)
        task, tail = "$SLURM_ARRAY_TASK_ID", "-$SLURM_ARRAY_TASK_ID"
        head = f"runs=(\n{runs}\n)\nrun=${{runs[{task}]}}"
    place_ = shlex.quote(str(place))
    return f"{head}\nrecipe={place_}/{task}.yaml\nhalt={place_}/halt{tail}\nidle={place_}/idle{tail}"


def _srun(options: Options) -> list[str]:
    words = [f"--cpus-per-task={options.cpus_per_node}"] if options.cpus_per_node else []
    if options.container and not options.container.endswith(".sif"):
        mounts = ",".join([f"{Path.cwd()}:{Path.cwd()}", *filter(None, [options.container_mounts])])
        words += [f"--container-image={options.container}", f"--container-mounts={mounts}", f"--container-workdir={Path.cwd()}"]
    return words


def _launcher(options: Options) -> list[str]:
    words = ["accelerate", "launch"]
    if options.container and options.container.endswith(".sif"):
        mounts = ",".join([f"{Path.cwd()}:{Path.cwd()}", *filter(None, [options.container_mounts])])
        gpus = ["--nv"] if options.gpus_per_node else []
        words = ["apptainer", "exec", *gpus, "--bind", mounts, "--pwd", str(Path.cwd()), options.container, *words]
    return words


def config_file(options: Options) -> Path:
    """Where the Accelerate config is; those that ship with the project are found from any folder."""
    own = Path(options.config_file).absolute()
    return own if own.exists() else next((path for path in [ROOT / options.config_file] if path.exists()), own)


def _launch(options: Options) -> list[str]:
    """The launcher's options that are the same on all machines."""
    path = config_file(options)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"--config-file {options.config_file}: cannot be read ({' '.join(str(error).split())}); the ones that ship with the "
            "project are in recipes/accelerate/"
        ) from None
    if not isinstance(config, dict) or "distributed_type" not in config:
        raise ValueError(f"--config-file {options.config_file}: is no Accelerate config, it has no distributed_type")
    words = ["--config_file", str(path), "--num_machines", str(options.nodes)]
    words += ["--num_processes", str(options.nodes * options.processes), "--same_network"]
    if options.mixed_precision:
        words += ["--mixed_precision", options.mixed_precision]
    if config["distributed_type"] == "DEEPSPEED" and options.nodes > 1:
        # Its own way to other machines is a shell on each; here srun has come to them already.
        words += ["--deepspeed_multinode_launcher", "standard"]
    return words
