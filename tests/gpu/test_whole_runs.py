"""Whole runs on a GPU, as a user starts them: every Accelerate config, stops and resumes across devices, and the doctor."""

import contextlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gpus
import psutil
import pytest
from runs import SMALL, family, reach, records

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
NAMES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Enough for 99 % of the validation images.
LEARNS = ("phases.pretrain.epochs=3", "phases.search.epochs=6", "phases.finetune.epochs=11", "architecture.penalty_weight=0.01")
if gpus.DEVICE == "cpu":
    # A rehearsal: bfloat16 takes a second a step on many CPUs.
    LEARNS = ("phases.pretrain.steps=2", "phases.search.steps=4", "phases.finetune.steps=2", "data.global_batch=16")
# In float32, so that trajectories can be compared; all checkpoints stay.
EXACT = (*SMALL, "phases.pretrain.steps=5", "phases.search.steps=6", "phases.finetune.steps=5", "checkpoint.every_steps=1")
EXACT += ("checkpoint.keep.last=100", "training.tf32=false")
LAUNCHES = [("ddp", "fp16"), *((name, "bf16") for name in ("ddp", "fsdp2", "zero1", "zero2", "zero3"))]


class Command:
    """`python -m MODULE ...` on a device, under `accelerate launch` where a config is named."""

    def start(self, *arguments, module: str = "dnal_dist.train", device: str = gpus.DEVICE, config: str | None = None, **options):
        """In a session of its own. options: of the launcher."""
        launcher = []
        if config is not None:
            launcher = ["accelerate.commands.launch", "--config_file", f"recipes/accelerate/{config}.yaml", "--num_processes", "1"]
            launcher += [word for name, value in options.items() for word in (f"--{name}", str(value))] + ["-m"]
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        return subprocess.Popen(
            [sys.executable, "-m", *launcher, module, *map(str, arguments)],
            cwd=ROOT,
            env=gpus.environment(device) | {"PYTHONFAULTHANDLER": "1"} | hidden,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, process, timeout: float = 200) -> tuple[int, str, str]:
        """Exit code and output; a process that does not end is killed with all that it started."""
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for one in reversed(family(process)):
                with contextlib.suppress(psutil.Error):
                    one.kill()
            out, err = process.communicate(timeout=30)
            pytest.fail(f"not over after {timeout:g} s: {out[-3000:]}{err[-6000:]}")
        return process.returncode, out, err

    def __call__(self, *arguments, **options) -> tuple[int, str, str]:
        return self.finish(self.start(*arguments, **options))


@pytest.fixture(scope="session")
def command() -> Command:
    return Command()


@pytest.fixture(scope="session")
def shards(once) -> list[str]:
    from data_tools import make_shards

    def make(folder: Path) -> None:
        folder.mkdir()
        make_shards.digits(folder)

    folder = once("gpu-digits", make)
    return [f"data.train={folder}/train-*.tar", f"data.val={folder}/val-*.tar", "tracking.tracker=none", "tracking.plots=false"]


def accuracy(run: Path) -> float:
    return [record for record in records(run, "eval") if record["phase"] == "finetune"][-1]["accuracy"]


def check_energy_and_memory(run: Path) -> dict[str, float]:
    """Of a finished run on a GPU, each in its records; returns the sums."""
    phases = {record["phase"]: record for record in records(run, "phase")}
    peaks = [record["device_memory_bytes"] for record in records(run, "train")]
    assert all(peaks) and max(peaks) > 1e6, "no memory in the records"
    energies = [record.get("energy_kwh") for record in phases.values()]
    assert None not in energies and sum(energies) > 0, f"no energy in the records: {energies}"
    start = records(run, "start")[0]
    assert start["environment"]["driver"] and start["environment"]["cuda"] and start["environment"]["cudnn"]
    return {"energy_kwh": sum(energies), "peak_bytes": max(peaks), "seconds": sum(p["seconds"] for p in phases.values())}


@pytest.mark.parametrize(
    "config, precision",
    [pytest.param(*launch, marks=pytest.mark.xdist_group(f"gpu launch {' '.join(launch)}")) for launch in LAUNCHES],
)
def test_each_accelerate_config_trains_and_low_precision_costs_at_most_a_percent(
    command, shards, once, tmp_path, config, precision, request
):
    precision = "no" if gpus.DEVICE == "cpu" and precision == "fp16" else precision
    changes = ("recipes/digits.yaml", *shards, *LEARNS)
    run = tmp_path / "run"
    code, out, err = command(*changes, f"output={run}", config=config, mixed_precision=precision)
    assert code == 0, out[-3000:] + err[-6000:]
    start = records(run, "start")[0]
    assert (start["backend"], start["precision"]) == ("single" if config == "ddp" else config, NAMES[precision])
    assert (start["device"] == "CPU") == (gpus.DEVICE == "cpu")
    figures = check_energy_and_memory(run) if gpus.DEVICE == "cuda" else {}

    def exact(folder: Path) -> None:
        code, out, err = command(*changes, f"output={folder}", "training.tf32=false")
        assert code == 0, out[-3000:] + err[-6000:]

    found, reference = accuracy(run), accuracy(once("gpu-float32", exact))
    gpus.record(request.node.name, accuracy=found, float32=reference, **figures)
    assert gpus.DEVICE == "cpu" or (reference > 0.97 and found >= reference - 0.01)


def losses(run: Path) -> dict[tuple[str, int], float]:
    """By phase and step; the last record of each."""
    return {(record["phase"], record["step"]): record["cross_entropy"] for record in records(run, "train")}


def check_same_losses(run: Path, other: Path) -> float:
    """Within 1e-4 of one another, at every step; returns the largest relative difference."""
    ours, exact = losses(run), losses(other)
    assert ours.keys() == exact.keys() and len(ours) == 16
    off = {step: abs(ours[step] - exact[step]) / max(exact[step], 1e-2) for step in exact}
    assert max(off.values()) <= 1e-4, f"{max(off, key=off.get)} is off by {max(off.values()):.1e}: {off}"
    return max(off.values())


@pytest.fixture(scope="session")
def whole(command, shards, once):
    """whole(device): a run without a stop, with a checkpoint at each step."""

    def make(device: str) -> Path:
        def train(run: Path) -> None:
            code, out, err = command("recipes/digits.yaml", *shards, *EXACT, f"output={run}", device=device)
            assert code == 0, out[-3000:] + err[-6000:]

        return once(f"gpu-whole-{device}", train)

    return make


@pytest.mark.xdist_group("gpu resume")
def test_a_run_has_the_losses_of_the_cpu(whole, request):
    """Float32 from the first step to the last, over pruning and into the finetune."""
    ours = whole(gpus.DEVICE)
    saves = [record for record in records(ours, "checkpoint") if "write_seconds" in record]
    pauses = {"pauses": [record["pause_seconds"] for record in saves], "writes": [record["write_seconds"] for record in saves]}
    gpus.record(request.node.name, **pauses, step=[1 / record["images_per_second"] * 16 for record in records(ours, "train")])
    assert len(saves) > 10
    off = check_same_losses(ours, whole("cpu"))
    gpus.record(request.node.name, losses_off=off)


@pytest.mark.parametrize("phase, step", [("search", 8), ("finetune", 13)])
@pytest.mark.parametrize(
    "begun, resumed",
    [
        pytest.param(gpus.DEVICE, "cpu", marks=pytest.mark.xdist_group("gpu resume on the CPU"), id="on the CPU"),
        pytest.param("cpu", gpus.DEVICE, marks=pytest.mark.xdist_group("gpu resume"), id="on the GPU"),
    ],
)
def test_a_checkpoint_resumes_on_the_other_device(whole, command, shards, tmp_path, begun, resumed, phase, step, request):
    """All later checkpoints are removed, as after a crash. Losses go on as if nothing had happened."""
    run = shutil.copytree(whole(begun), tmp_path / "run")
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    code, out, err = command("recipes/digits.yaml", *shards, *EXACT, f"output={run}", device=resumed)
    assert code == 0 and f"resumed in {phase} after" in out, out[-3000:] + err[-6000:]
    starts = records(run, "start")
    assert [start["resumed"] for start in starts] == [False, True]
    assert [start["device"] == "CPU" for start in starts] == [begun == "cpu", resumed == "cpu"]
    gpus.record(request.node.name, losses_off=check_same_losses(run, whole("cpu")))


@pytest.mark.xdist_group("gpu stop")
def test_sigterm_stops_a_run_with_code_75_and_the_same_command_resumes_it(command, shards, tmp_path):
    run = tmp_path / "run"
    changes = ("recipes/digits.yaml", *shards, *SMALL, f"output={run}", "data.workers=2", "phases.search.steps=6")
    process = command.start(*changes, "phases.pretrain.epochs=1000", "phases.finetune.steps=6")
    reach(process, run, "pretrain", 30)
    process.send_signal(signal.SIGTERM)
    code, out, err = command.finish(process, 60)
    assert code == 75, (code, out[-3000:], err[-3000:])
    stopped = records(run, "stop")[-1]
    assert stopped["reason"] == "SIGTERM" and stopped["step"] >= 30
    assert f"stopped (SIGTERM) in pretrain after {stopped['step']} steps" in err
    shorter = ("phases.pretrain.epochs=null", f"phases.pretrain.steps={stopped['step'] + 5}", "--allow-changed", "phases.pretrain")
    code, out, err = command(*changes, "phases.finetune.steps=6", *shorter)
    assert code == 0 and f"resumed in pretrain after {stopped['step']} steps" in out, out[-3000:] + err[-6000:]
    steps = [record["global_step"] for record in records(run, "train")]
    assert steps == list(range(1, stopped["step"] + 5 + 12 + 1))


@pytest.mark.xdist_group("gpu doctor")
def test_the_doctor_finds_the_gpu_and_takes_a_step_there(command, shards, tmp_path):
    changes = ["recipes/digits.yaml", *shards, f"output={tmp_path}/run", "--json"]
    changes += ["data.decode=cuda"] if gpus.DEVICE == "cuda" else []
    code, out, err = command(*changes, module="dnal_dist.doctor")
    assert code in (0, 1) and out.startswith("["), out[-3000:] + err[-6000:]
    found = {one["check"]: one for one in json.loads(out)}
    gpus.record("doctor", found={name: one["status"] + " " + one["found"] for name, one in found.items()})
    # Machines for these tests need not have W&B, which nothing but its tracker uses.
    missing = [] if importlib.util.find_spec("wandb") else ["versions"]
    failed = {name: one for name, one in found.items() if one["status"] == "fail" and name not in missing}
    assert not failed
    if missing:
        assert found["versions"]["status"] == "pass" or "wandb is missing" in found["versions"]["found"]
    if gpus.DEVICE == "cuda":
        assert "driver" in found["GPU"]["found"] and "NCCL" in found["GPU"]["found"]
        assert "NVIDIA" in found["launch"]["found"] and "(this machine's)" in found["device memory"]["found"]
    assert "loss of a step pretrain" in found["launch"]["found"]
