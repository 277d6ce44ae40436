"""What the user's Accelerate config asks for is done, or refused with the remedy."""

import os
import re
import subprocess
import sys

import psutil
import pytest
import torch
import yaml
from accelerate.utils import write_basic_config
from launching import execute, succeed

from dnal_dist.common.errors import InputError
from dnal_dist.distributed.accelerate_config import check_launched, read
from dnal_dist.distributed.context import Context
from dnal_dist.recipe import Data

pytestmark = pytest.mark.timeout(1000)

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def configured(monkeypatch, tmp_path, change: dict) -> None:
    for name, value in change.items():
        if name == "ACCELERATE_DEEPSPEED_CONFIG_FILE":
            (tmp_path / "ds.json").write_text(value)
            value = str(tmp_path / "ds.json")
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("change", "backend", "dtype"),
    [
        ({}, None, torch.float32),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, None, torch.bfloat16),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, None, torch.float16),
        (FSDP, "fsdp2", torch.float32),
        ({**FSDP, "ACCELERATE_MIXED_PRECISION": "bf16"}, "fsdp2", torch.bfloat16),
        (ZERO, "zero2", torch.float32),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3", torch.float32),
        ({**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": '{"zero_optimization": {"stage": 1}}'}, "zero1", torch.float32),
    ],
)
def test_the_accelerate_config_is_read(monkeypatch, tmp_path, change, backend, dtype):
    configured(monkeypatch, tmp_path, change)
    found = read()
    assert (found.backend, found.dtype, found.accumulation) == (backend, dtype, 1)


def test_a_configuration_of_deepspeeds_own_is_heeded(monkeypatch, tmp_path):
    text = '{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}, "gradient_accumulation_steps": 4}'
    configured(monkeypatch, tmp_path, {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": text})
    found = read()
    assert (found.backend, found.dtype, found.accumulation) == ("zero2", torch.bfloat16, 4)


LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PMI_SIZE", "PMI_RANK", "ACCELERATE_MIXED_PRECISION")


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, as a launcher does, but no MASTER_ADDR: unset WORLD_SIZE, or"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 is set"),
        ({"RANK": "1", "PMI_SIZE": "4"}, "PMI_SIZE=4, RANK=1 is set"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true is set, as a launcher does, but no ACCELERATE_MIXED"),
        ({"WORLD_SIZE": "1", "RANK": "0", "PMI_SIZE": "1", "PMI_RANK": "0"}, None),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, None),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "WORLD_SIZE=2 is set, as a launcher does, but no MASTER_PORT"),
        ({}, None),
    ],
)
def test_variables_that_another_launch_left_are_named(monkeypatch, left, message):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    if message is None:
        return check_launched()
    with pytest.raises(InputError, match=message):
        check_launched()


def test_settings_of_fsdp2_are_read(monkeypatch):
    for name, value in {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}.items():
        monkeypatch.setenv(name, value)
    assert read().settings == {"reshard_after_forward": False, "min_params": float("inf")}
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP")
    monkeypatch.setenv("FSDP_MIN_NUM_PARAMS", "5000")
    assert read().settings["min_params"] == 5000


def test_deepspeed_does_not_clip_unasked(monkeypatch):
    """Its own default is a norm of 1."""
    for name, value in ZERO.items():
        monkeypatch.setenv(name, value)
    configuration = read().settings["deepspeed"]
    assert configuration["zero_optimization"]["stage"] == 2
    assert not {"gradient_clipping", "optimizer", "scheduler"} & configuration.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({**FSDP, "FSDP_VERSION": "1"}, "first version; set fsdp_version: 2, as in recipes/accelerate/fsdp2.yaml"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "X"}, "leave it out"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage 0; choose 1, 2 or 3"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer"),
        ({**ZERO, "ACCELERATE_GRADIENT_CLIPPING": "1.0"}, r"gradient_clipping 1\.0.*'architecture\.optimizer\.clip_norm'"),
        (
            {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": '{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}'},
            "its own optimizer",
        ),
        (
            {
                **ZERO,
                "ACCELERATE_DEEPSPEED_CONFIG_FILE": '{"zero_optimization": {"stage": 2}, "flops_profiler": {"enabled": true}}',
            },
            "says flops_profiler, which is not heeded here",
        ),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "'training.compile'"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision fp8; choose one of no, bf16, fp16"),
        ({**FSDP, "ACCELERATE_MIXED_PRECISION": "fp16"}, "only goes with DDP"),
        ({**ZERO, "ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision fp16, which only goes with DDP here; choose bf16"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    ],
)
def test_unsupported_configs_are_refused(monkeypatch, tmp_path, change, message):
    configured(monkeypatch, tmp_path, change)
    with pytest.raises(InputError, match=message):
        read()


SCRIPT = "from dnal_dist.distributed.context import Context; found = Context(); print('backend', found.backend, found.world_size)"
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


REFUSED = r"{} asks for \w+ with {} processes, but with --cpu Accelerate starts a single one.*leave --cpu out"


def test_a_launch_that_drops_fsdp_is_refused(script):
    """With --cpu Accelerate starts a single process, and neither FSDP nor DeepSpeed."""
    found = execute(*LAUNCHER, "--config_file=recipes/accelerate/fsdp2.yaml", "--cpu", script)
    assert found.returncode != 0
    assert re.search(REFUSED.format(r"fsdp2\.yaml", 2), found.stderr), found.stderr[-2000:]


@pytest.mark.parametrize(
    ("options", "config", "processes"),
    [
        (["--config_file=recipes/accelerate/ddp.yaml"], r"ddp\.yaml", 2),
        (["--config_file", "recipes/accelerate/zero2.yaml"], r"zero2\.yaml", 2),
        (["--config-file", "nowhere.yaml", "--num_processes", "4"], "the command line", 4),
    ],
)
def test_options_that_the_launcher_drops_are_refused(monkeypatch, options, config, processes):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(psutil.Process, "cmdline", lambda _: ["accelerate", "launch", *options, "--cpu", "script.py"])
    with pytest.raises(InputError, match=REFUSED.format(config, processes)):
        read()


def test_a_config_with_use_cpu_trains_on_the_cpu(script, tmp_path):
    with open("recipes/accelerate/fsdp2.yaml") as file:
        config = {**yaml.safe_load(file), "use_cpu": True, "num_processes": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert "backend fsdp2 1" in succeed(execute(*LAUNCHER, "--config_file", tmp_path / "config.yaml", script)).stdout


def test_a_users_own_default_config_is_taken(script, tmp_path):
    """As `accelerate config default` writes it where there is no GPU."""
    (tmp_path / "accelerate").mkdir()
    write_basic_config(save_location=str(tmp_path / "accelerate/default_config.yaml"))
    assert "backend single 1" in succeed(execute(*LAUNCHER, script, HF_HOME=tmp_path)).stdout


@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_one_process_too_is_on_the_backend_of_the_config(ranks, backend):
    assert ranks.run(backend, 1, "small_on_ranks:backend") == [backend, 1]


@pytest.mark.parametrize(
    ("batch", "limit", "accumulation", "parts"),
    [(64, None, 1, 1), (64, 64, 1, 1), (64, 10, 1, 8), (60, 16, 1, 4), (64, 40, 2, 2), (7, 3, 1, 7)],
)
def test_micro_batches_are_the_fewest_that_fit(batch, limit, accumulation, parts):
    context = Context()
    context.config = context.config._replace(accumulation=accumulation)
    data = Data(train="t", val="v", image_size=8, global_batch=batch, per_device_batch_limit=limit)
    assert context.accumulation_steps(data) == parts


@pytest.mark.parametrize(("limit", "accumulation"), [(None, 3), (8, 2)])
def test_micro_batches_that_do_not_fit_are_refused(limit, accumulation):
    context = Context()
    context.config = context.config._replace(accumulation=accumulation)
    data = Data(train="t", val="v", image_size=8, global_batch=64, per_device_batch_limit=limit)
    with pytest.raises(InputError, match=r"gradient_accumulation_steps \d.*'data\.per_device_batch_limit'"):
        context.accumulation_steps(data)


def test_a_broken_deepspeed_is_named_in_a_line_and_a_broken_wandb_in_a_warning(digits, tmp_path):
    """Installed, but their imports fail: of DeepSpeed where ZeRO is asked for."""
    for name in ("deepspeed", "wandb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('no library for {name}')")
    shards = (f"data.train={digits}/train-*.tar", f"data.val={digits}/val-*.tar", f"output={tmp_path}/run")
    environment = {**os.environ, **ZERO, "ACCELERATE_MIXED_PRECISION": "no", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "dnal_dist.train", "recipes/digits.yaml", *shards]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    (error,) = ended.stderr.splitlines()
    assert ended.returncode == 2
    assert "warning: W&B did not start; the run goes on without it (no library for wandb)" in ended.stdout
    assert re.match(r"error: .*DeepSpeed, which cannot be imported \(no library for deepspeed\): pip install .*ddp\.yaml", error)
