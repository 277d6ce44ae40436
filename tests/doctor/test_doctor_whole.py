"""The doctor's launch of real processes, and all of the doctor as a command."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from in_process import called
from runs import arguments

from dnal_dist.common.errors import InputError
from dnal_dist.doctor import __main__, cluster, command, launch
from dnal_dist.doctor.case import Case, Config, Finding, read_config


def test_accelerate_configs_are_read():
    found = {path.stem: read_config(path) for path in Path("recipes/accelerate").glob("*.yaml")}
    assert {name: config.backend for name, config in found.items()} == {name: name for name in found}
    assert len(found) == 5 and all(config.processes == 2 and config.precision == "no" for config in found.values())
    assert found["ddp"].expected(1) == "single" and found["zero1"].expected(1) == "zero1"
    with pytest.raises(InputError, match="not an Accelerate config"):
        read_config(Path("README.md"))


def launched(case: Case, silent: float = 60.0, gpus: bool = True, **changes) -> Finding:
    """The finding for these facts of a probe, whose last sign of life is `silent` seconds ago."""
    one = launch.Launch(case)
    one.processes, one.gpus, one.output = 2, gpus, io.BytesIO()
    facts = {"up": True, "backend": "fsdp2", "world_size": 2, "device": "one H100", "precision": "float32", "reduced": ["2 images"]}
    steps = {kind: (1.0, 0.1) for kind in ("pretrain", "weights", "architecture")}
    facts |= {"steps": steps, "alike": True} | changes
    return one.judge({key: value for key, value in facts.items() if value is not None}, 5.0, silent)


@pytest.mark.parametrize(
    ("changes", "status", "words", "remedy"),
    [
        ({}, "pass", "fsdp2 on 2 of 16 processes", ""),
        ({"backend": "ddp"}, "fail", "expected fsdp2, found ddp", "distributed_type"),
        ({"world_size": 1}, "fail", "expected 2 processes, found fsdp2 on 1", "num_processes"),
        ({"precision": "bfloat16"}, "fail", "expected float32", "mixed_precision"),
        (
            {"steps": {"weights": (float("nan"), 0.1)}},
            "fail",
            "loss of the weights step is not finite",
            "phases.*.optimizer.lr",
        ),
        ({"alike": False}, "fail", "do not have the same weights", "network"),
        ({"alike": None}, "fail", "not all steps finished after 5 s", "NCCL_DEBUG"),
        ({"alike": None, "silent": 1.0}, "warn", "not all steps finished", "by hand"),
        ({"alike": None, "gpus": False}, "warn", "not all steps finished", "by hand"),
        ({"alike": None, "backend": None}, "fail", "the network was not yet wrapped", "NCCL_DEBUG"),
        ({"alike": None, "backend": None, "world_size": None}, "fail", "had not joined one another", "NCCL_DEBUG"),
    ],
)
def test_facts_of_a_probe_are_compared_with_the_config(case_of, changes, status, words, remedy):
    case = case_of(nodes=2, processes=8, config=Config(Path("fsdp2.yaml"), 8, "fsdp2", "no", 1))
    one = launched(case, **changes)
    assert one.status == status and words in one.found and remedy in one.remedy, one


def test_an_unusable_config_fails(case_of, tmp_path):
    path = tmp_path / "fsdp1.yaml"
    path.write_text(Path("recipes/accelerate/fsdp2.yaml").read_text().replace("fsdp_version: 2", "fsdp_version: 1"))
    case = case_of(processes=1, config=read_config(path))
    with launch.Launch(case) as one:
        found = one.finding(400)
        assert one.process.poll() is not None
    assert found.status == "fail" and "FSDP in its first version" in found.found and "fsdp1.yaml" in found.remedy, found


def test_a_slow_launch_is_ended(case_of):
    case = case_of(processes=2, config=read_config(Path("recipes/accelerate/ddp.yaml")))
    with launch.Launch(case) as one:
        found = one.finding(0.5)
        assert one.process.poll() is not None
    assert found.status == "warn" and "no process was up" in found.found and "may be busy" in found.found, found
    assert "accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 2 -m dnal_dist.doctor.probe" in found.remedy


def test_an_error_of_processes_that_have_not_ended_is_named(case_of):
    case = case_of(processes=2, config=read_config(Path("recipes/accelerate/ddp.yaml")))
    with launch.Launch(case) as one:
        one.end()
    one.process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    with tempfile.TemporaryFile() as one.output:
        one.output.write(b"RuntimeError: no address")
        found = one.finding(0.1)
    assert found.status == "fail" and "not finished after" in found.found and "no address" in found.found, found


class Left(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in the test's own process, which spares the seconds of importing torch: exit code and stdout."""

    def leave(code: int):
        raise Left(code)

    def run(*words) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["doctor", *map(str, words)])
        monkeypatch.setattr(command.signal, "signal", lambda *_: None)
        monkeypatch.setattr(command.os, "_exit", leave)
        # Counted from the start of this process.
        monkeypatch.setattr(command, "LIMIT", 1e6)
        monkeypatch.setattr(command, "EACH", 100.0)
        with pytest.raises(Left) as left:
            __main__.main()
        return left.value.args[0], capsys.readouterr().out

    return run


def test_all_checks_pass_with_a_launch_on_two_processes(case_of, tmp_path, monkeypatch):
    """With more time than the command takes: this machine may have other things to do."""
    scratch, parent = tmp_path / "scratch", tmp_path / "runs"
    scratch.mkdir()
    parent.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(command, "EACH", 100.0)
    config = read_config(Path("recipes/accelerate/zero2.yaml"))
    facts = {"processes": 2, "config": config, "seconds": 43_200.0, "device_memory": 24 << 30}
    found = command.examine(case_of(f"output={parent}/run", **facts), 400)
    assert list(found) == [*list(command.CHECKS)[:-1], "launch", "saving"]
    assert not [one for one in found.values() if one.status == "fail"], found
    assert found["launch"].status == "pass" and found["launch"].found.startswith("zero2 on 2 of 2 processes")
    assert all(f"{kind} " in found["launch"].found for kind in ("pretrain", "weights", "architecture"))
    assert not list(parent.iterdir()) and not list(scratch.glob("*doctor*"))


def test_a_terminated_doctor_leaves_nothing(digits, tmp_path):
    (tmp_path / "scratch").mkdir()
    words = [*arguments(digits, tmp_path / "run"), "--config-file", "recipes/accelerate/ddp.yaml"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "scratch")}
    process = subprocess.Popen([sys.executable, "-m", "dnal_dist.doctor", *words], stdout=subprocess.DEVNULL, env=environment)
    while process.poll() is None and not list((tmp_path / "scratch").glob(".dnal_dist-doctor-*/recipe.yaml")):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scratch"]
    assert not list((tmp_path / "scratch").glob(".dnal_dist-doctor-*"))


def test_json_lists_every_check(run, digits, tmp_path):
    code, out = run(*arguments(digits, tmp_path / "run"), "--quick", "--json", "--time", "12:00:00", "--device-memory", "24GiB")
    found = {one.pop("check"): one for one in json.loads(out)}
    assert code == 0 and list(found) == [*list(command.CHECKS)[:-1], "launch", "saving"]
    assert all(set(one) == {"status", "found", "remedy"} and one["status"] in ("pass", "warn") for one in found.values())
    assert "--quick" in found["launch"]["found"] and "--quick" in found["saving"]["found"]


def test_the_table_is_plain_in_a_pipe_and_a_failure_exits_with_1(run, digits, tmp_path):
    code, out = run(*arguments(digits, tmp_path / "run", "data.global_batch=5000"), "--quick")
    assert code == 1
    lines = out.splitlines()
    (failed,) = [line for line in lines if line.startswith("fail  training shards")]
    assert "a step takes 5000 images" in failed and "remedy: lower it or add shards" in lines[lines.index(failed) + 1]
    assert " 1 failed" in lines[-1] and not (tmp_path / "run").exists()


def test_a_pipe_closed_early_keeps_the_exit_code(monkeypatch, run, digits, tmp_path):
    """As by head."""
    for words, code in (((), 0), (("--json",), 0), (("data.global_batch=5000",), 1)):
        (end, begin), before = os.pipe(), os.dup(1)
        os.close(end)
        os.dup2(begin, 1)
        monkeypatch.setattr(sys, "stdout", sys.__stdout__)
        try:
            assert run(*arguments(digits, tmp_path / "run"), *words, "--quick", "--cpu", "--grace", "60")[0] == code
        finally:
            os.dup2(before, 1)
            os.close(before)
            os.close(begin)


def test_the_shipped_config_is_found_from_any_folder(case_of, tmp_path, monkeypatch):
    path = Path("recipes/digits.yaml").absolute()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["doctor", str(path), "--processes-per-node", "2", "--cpu", "--grace", "60"])
    asked = command.case_of(__main__.arguments())
    assert (asked.backend, asked.ranks, asked.cpu, asked.grace) == ("ddp", 2, True, 60.0)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["recipes/none.yaml"], "recipes/none.yaml: no such recipe"),
        (["recipes/digits.yaml", "seeds=3"], "unknown key 'seeds'"),
        (["recipes/digits.yaml", "--nodes", "0"], "--nodes 0: expected at least 1"),
        (["recipes/digits.yaml", "--grace", "0"], "--grace 0.0: expected seconds"),
        (["recipes/digits.yaml", "--time", "soon"], "--time: expected a time"),
        (["recipes/digits.yaml", "--device-memory", "80"], "--device-memory 80: expected an amount"),
        (["recipes/digits.yaml", "--config-file", "none.yaml"], "--config-file none.yaml: not an Accelerate config"),
    ],
)
def test_unreadable_input_exits_with_2(monkeypatch, capsys, words, found):
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    code, _, error = called(__main__.main, capsys, *words)
    assert code == 2 and error.startswith("error: ") and found in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("30:00", 1800), ("12:00:00", 43_200), ("1-12", 129_600), ("1-12:30", 131_400), ("2d", 172_800)],
)
def test_sbatch_times_are_read(text, seconds):
    assert cluster.seconds_of(text) == seconds
