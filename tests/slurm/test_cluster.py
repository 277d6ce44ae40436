"""Runs on a real SLURM: two nodes, submitted, preempted, requeued, chained, lost, and refused.

Three tests train for real. For the others, which are about SLURM and the batch script, stand_in.py takes the training's place.
"""

import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from cluster import NODES, Cluster, missing
from job import Job
from runs import records, tensors, training_records

from data_tools import index

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=f"SLURM: {missing()}"),
    # A lane of its own: one cluster, and tests that mostly wait for it.
    pytest.mark.xdist_group("slurm"),
]
RECIPE = "recipes/digits.yaml"


@pytest.fixture(scope="module")
def cluster():
    """With cgroup process tracking where there can be, as on real clusters: a signal to all of a job kills the launcher before any
    process of the training has seen it."""
    found = Cluster(cgroup=missing(cgroup=True) is None)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def changes(digits):
    """Of the recipe, for the stand-in: phases of 2 seconds."""
    steps = (f"phases.{phase}.steps=40" for phase in ("pretrain", "search", "finetune"))
    return (f"data.train={digits}/train-*.tar", f"data.val={digits}/val-*.tar", *steps)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Options of slurm/submit.py with which a job starts the stand-in: in place of Apptainer, in a container that there is not."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "apptainer").write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("stand_in.py")} "$@"\n')
    (folder / "apptainer").chmod(0o755)
    return "--container", "none.sif", "--setup", f"export PATH={folder}:$PATH"


@pytest.fixture(scope="module")
def real(digits, tmp_path_factory):
    """Of the recipe, for a real training: 22 iterations an epoch, and evaluations long enough to be stopped in."""
    folder = tmp_path_factory.mktemp("digits")
    shutil.copy(digits / "train-000000.tar", folder)
    for number in range(4):
        shutil.copy(digits / "val-000000.tar", folder / f"val-{number:06d}.tar")
    index.make(index.find([str(folder)]), None, None, 1)
    data = (f"data.train={folder}/train-000000.tar", f"data.val={folder}/val-*.tar", "data.global_batch=16")
    epochs = ("phases.pretrain.epochs=1", "phases.search.epochs=3", "phases.finetune.epochs=1")
    tracking = ("tracking.log_every=1", "tracking.tracker=none", "tracking.plots=false")
    return (*data, "data.per_device_batch_limit=4", "architecture.recalibration_batches=2", *tracking, *epochs)


def processes(word: str) -> list[psutil.Process]:
    """Those with this word in their command line."""
    return [p for p in psutil.process_iter(["cmdline"]) if any(word in part for part in p.info["cmdline"] or ())]


def two_nodes(cluster, run, changes, *options, doctor: bool = False) -> Job:
    return Job(cluster, run, RECIPE, "--nodes", "2", f"output={run}", *changes, *options, doctor=doctor)


@pytest.fixture(scope="module")
def whole(cluster, real, tmp_path_factory):
    """A run on both nodes that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    job = two_nodes(cluster, run, real, doctor=True)
    assert job.ended() == "COMPLETED", job.log
    return job


def test_two_nodes_train_one_run(whole):
    (start,) = records(whole.run, "start")
    assert (start["world_size"], start["backend"]) == (2, "ddp")
    assert whole.cluster.show(whole.number)["NumNodes"] == "2"
    assert f"rendezvous at {NODES[0]}:{10_000 + int(whole.number)}" in whole.log
    assert re.search(r"checks in \d+ s: .* 0 failed", whole.printed), "the doctor comes first"
    snapshot = whole.run / "submit" / "001"
    assert (snapshot / "0.yaml").read_text() == (whole.run / "recipe.yaml").read_text()
    assert (snapshot / "code.txt").read_text().startswith("commit: ")
    assert "torch==" in (snapshot / "code.txt").read_text()


def test_a_preempted_run_ends_as_if_it_had_not_been(cluster, real, whole, tmp_path):
    job = two_nodes(cluster, tmp_path / "run", real)
    job.reach('"phase": "search"', '"step": 9,')
    job.signal()
    # On a fast machine a phase may be over before the signal has come to all.
    assert job.stopped(1) in ("search", "prune", "finetune")
    assert job.ended() == "COMPLETED", job.log
    assert cluster.show(job.number)["Restarts"] == "1"
    assert [record["resumed"] for record in records(job.run, "start")] == [False, True]
    assert not (job.run / "stop").exists()
    assert tensors(job.run) == tensors(whole.run)
    assert training_records(job.run) == training_records(whole.run)


def test_a_run_preempted_by_a_job_of_more_weight_resumes_on_another_backend(cluster, real, tmp_path):
    """SLURM sends TERM, and takes the nodes after the partition's grace time."""
    few = ("phases.pretrain.epochs=3", "phases.search.steps=4", "phases.finetune.steps=4")
    options = ("--partition", "scrap", "--config-file", "recipes/accelerate/fsdp2.yaml")
    job = two_nodes(cluster, tmp_path / "run", [*real, *few], *options)
    job.reach('"phase": "pretrain"', '"step": 9,')
    other = cluster.run(
        "sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"
    ).stdout.strip()
    assert job.stopped(1) == "pretrain"
    assert cluster.ended(other) == "COMPLETED"
    assert job.ended() == "COMPLETED", job.log
    assert cluster.show(job.number)["Restarts"] == "1"
    assert [(r["backend"], r["world_size"]) for r in records(job.run, "start")] == [("fsdp2", 2)] * 2


def test_a_node_that_fails_costs_the_steps_since_the_last_checkpoint(cluster, changes, stand_in, tmp_path):
    job = two_nodes(cluster, tmp_path / "run", changes, *stand_in, "checkpoint.every_steps=10")
    job.reach('"phase": "search"', '"step": 15,')
    cluster.run("scontrol", "update", f"nodename={NODES[1]}", "state=down", "reason=test")
    # It is taken back as soon as its daemon answers (ReturnToService).
    assert job.ended() == "COMPLETED", job.log
    assert cluster.show(job.number)["Restarts"] == "1"
    assert re.search(r"attempt 2 .* from step-000000[5-9]\d-", job.log), job.log
    assert [record["resumed"] for record in records(job.run, "start")] == [False, True]


def test_a_chain_continues_where_requeueing_is_not_allowed(cluster, changes, stand_in, tmp_path):
    job = two_nodes(cluster, tmp_path / "run", changes, *stand_in, "--chain", "3")
    first, second, third = (json.loads(line)["job"] for line in (job.run / "submit" / "jobs.jsonl").read_text().splitlines())
    assert cluster.show(second)["Dependency"].startswith(f"afterany:{first}")
    job.number = first
    job.reach('"phase": "search"', '"step": 9,')
    job.signal()
    assert cluster.ended(first) == "FAILED" and cluster.show(first)["ExitCode"] == "75:0", job.log
    assert cluster.ended(second) == "COMPLETED", job.log
    assert cluster.ended(third) == "COMPLETED", job.log
    assert "is finished" in job.log and cluster.show(first)["Restarts"] == "0"
    assert [record["resumed"] for record in records(job.run, "start")] == [False, True]


def test_a_run_that_a_person_stops_or_cancels_stays_so(cluster, changes, stand_in, tmp_path):
    job = two_nodes(cluster, tmp_path / "run", changes, *stand_in)
    job.reach('"phase": "pretrain"', '"step": 9,')
    (job.run / "stop").touch()
    assert job.ended() == "FAILED" and cluster.show(job.number)["ExitCode"] == "75:0", job.log
    assert "stopped on request" in job.log and cluster.show(job.number)["Restarts"] == "0"
    again = two_nodes(cluster, job.run, changes, *stand_in)
    again.reach('"kind": "start"', '"resumed": true')
    again.reach('"phase": "pretrain"', '"step": 20,')
    cluster.run("scancel", again.number)
    assert again.ended() == "CANCELLED"
    time.sleep(2)
    assert cluster.state(again.number) == "CANCELLED" and cluster.show(again.number)["Restarts"] == "0"
    assert {path.name for path in (job.run / "submit").iterdir()} == {"001", "002", "jobs.jsonl"}


def test_a_sweep_is_an_array_of_jobs_each_of_which_is_requeued_alone(cluster, changes, stand_in, tmp_path):
    """The last task of an array has the array's own number, which stands for all of them."""
    sweep = tmp_path / "50%a seeds.yaml"
    output = tmp_path / "50%a"
    sweep.write_text(f"recipe: {RECIPE}\noutput: {output}\nvary: {{architecture.penalty_weight: [0.02], seed: [0, 1]}}\n")
    cluster.submit("--skip-doctor", "--sweep", sweep, *changes, *stand_in)
    runs = [output / f"penalty_weight=0.02,seed={seed}" for seed in (0, 1)]
    jobs = [json.loads((run / "submit" / "jobs.jsonl").read_text())["job"] for run in runs]
    assert [job.rpartition("_")[2] for job in jobs] == ["0", "1"]
    path = runs[1] / "metrics.jsonl"
    cluster.wait(lambda: path.exists() and '"step": 9,' in path.read_text(), 120, f"iterations in {path}")
    # Not by scancel: of 22.05 it repeats the signal to a task of an array for a minute and a half.
    script = next(p for p in processes("slurm_script") if p.environ().get("SLURM_ARRAY_TASK_ID") == "1")
    script.send_signal(signal.SIGUSR1)
    for number, (job, run) in enumerate(zip(jobs, runs, strict=True)):
        log = output / "submit" / "001" / f"log-{number}.txt"
        assert cluster.ended(job) == "COMPLETED", log.read_text()
        assert f"seed: {number}\n" in (run / "recipe.yaml").read_text()
        assert cluster.show(job)["Restarts"] == str(number), log.read_text()
        assert f"job {job}: attempt 1" in log.read_text()
    found = cluster.submit("--skip-doctor", "--sweep", sweep, *changes, check=False)
    assert found.returncode == 2 and "this run is finished" in found.stderr


def test_a_run_that_does_not_save_in_time_is_killed_and_resumed_a_few_times(cluster, changes, stand_in, tmp_path):
    job = two_nodes(cluster, tmp_path / "run", changes, *stand_in, "--grace", "20")
    for attempt in (1, 2):
        job.reach('"phase": "pretrain"', '"step": 9,')
        (job.run / "hang").touch()
        if attempt == 2:
            # As if this had happened before.
            (job.run / "submit" / "001" / "idle").write_text("4\n")
        job.signal()
        if attempt == 1:
            cluster.wait(lambda: "; requeued" in job.log, 120, job.log)
            (job.run / "hang").unlink()
            job.reach('"kind": "start"', '"resumed": true')
    assert job.ended() == "FAILED" and "no new checkpoint in 5 attempts" in job.log, job.log
    assert cluster.show(job.number)["Restarts"] == "1"


def test_a_controller_that_is_away_for_a_while_is_waited_for(cluster, changes, stand_in, tmp_path):
    job = two_nodes(cluster, tmp_path / "run", changes, *stand_in)
    job.reach('"phase": "pretrain"', '"step": 9,')
    (script,) = [p for p in processes("slurm_script") if p.environ()["SLURM_JOB_ID"] == job.number]
    cluster.controller(False)
    script.send_signal(signal.SIGUSR1)
    assert job.stopped(1) == "pretrain"
    cluster.controller(True)
    job.reach('"kind": "start"', '"resumed": true')
    job.reach('"phase": "search"', '"step": 9,')
    job.signal()
    assert job.stopped(2) == "search"
    assert job.ended() == "COMPLETED", job.log
    assert cluster.show(job.number)["Restarts"] == "2"
    assert job.log.count("requeued") == 2 and "attempt 3" in job.log, "the logs of all attempts stand in one file"


def test_a_run_that_fails_is_not_tried_again(cluster, changes, stand_in, tmp_path):
    run = tmp_path / "run"
    job = two_nodes(cluster, run, [*changes, "data.train=nowhere/train-*.tar"], *stand_in, "--chain", "2")
    first, second = (json.loads(line)["job"] for line in (run / "submit" / "jobs.jsonl").read_text().splitlines())
    assert cluster.ended(first) == "FAILED" and cluster.ended(second) == "FAILED", job.log
    assert "nowhere" in job.log and "before it got any further" in job.log and "not started" in job.log
    assert job.log.count("attempt 1") == 1


def test_a_shared_pretrain_that_fails_keeps_no_run_waiting(cluster, changes, stand_in, tmp_path):
    """And the same command begins with it again."""
    sweep, grid = tmp_path / "grid.yaml", tmp_path / "grid"
    sweep.write_text(f"recipe: {RECIPE}\noutput: {grid}\nshare: pretrain\nvary: {{architecture.penalty_weight: [0.02]}}\n")
    given = ("--skip-doctor", "--sweep", sweep, *changes, *stand_in)
    runs = grid / "pretrain", grid / "penalty_weight=0.02"

    def jobs() -> list[str]:
        return [json.loads((run / "submit" / "jobs.jsonl").read_text().splitlines()[-1])["job"] for run in runs]

    cluster.submit(*given, "data.train=nowhere/train-*.tar")
    assert [cluster.ended(job) for job in jobs()] == ["FAILED", "CANCELLED"]
    shown = cluster.run(sys.executable, "-m", "dnal_dist.runs", grid).stdout
    assert shown.count("is not in the queue: see its log, or that of the pretrain it waited for") == 2
    cluster.submit(*given)
    assert [cluster.ended(job) for job in jobs()] == ["COMPLETED", "COMPLETED"]


def test_a_launcher_that_is_not_there_ends_the_chain(cluster, changes, tmp_path):
    """As where an environment or a container was set up wrongly: the shell gives 127."""
    job = two_nodes(cluster, tmp_path / "run", changes, "--chain", "2", "--container", "no.sif", "--setup", "[ -z $UNSET ]")
    first, second = (json.loads(line)["job"] for line in (job.run / "submit" / "jobs.jsonl").read_text().splitlines())
    # Or the code of the other node's task, where that was ended before it met the same.
    assert cluster.ended(first) == "FAILED" and cluster.show(first)["ExitCode"] in ("127:0", "143:0"), job.log
    assert cluster.ended(second) == "FAILED" and "not started" in job.log


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--partition", "nope"], ["--partition", "there are main, scrap, vision"]),
        (["--partition", "vision", "--account", "history"], ["account", "--account"]),
        (["--nodes", "3"], ["sbatch", "Node count"]),
    ],
)
def test_a_refusal_of_slurm_is_reported_and_leaves_nothing(cluster, changes, tmp_path, arguments, words):
    found = cluster.submit("--skip-doctor", RECIPE, f"output={tmp_path}/run", *changes, *arguments, check=False)
    assert found.returncode == 2 and found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    assert all(word in found.stderr for word in words), found.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_is_in_the_queue_once(cluster, changes, tmp_path):
    first = two_nodes(cluster, tmp_path / "run", changes, "--sbatch=--hold")
    found = cluster.submit("--skip-doctor", RECIPE, f"output={first.run}", *changes, check=False)
    cluster.run("scancel", first.number)
    assert found.returncode == 2 and f"job {first.number} for this run is in the queue" in found.stderr


def test_a_run_with_a_failing_check_of_the_doctor_is_not_submitted(cluster, changes, tmp_path):
    found = cluster.submit(RECIPE, f"output={tmp_path}/run", *changes, "model.num_classes=4", check=False)
    assert found.returncode == 2 and "a check of the doctor failed" in found.stderr
    assert "fail  labels" in found.stdout and not (tmp_path / "run").exists()
