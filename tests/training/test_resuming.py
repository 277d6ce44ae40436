"""What the same command makes of a run folder, and what may have changed meanwhile."""

import re
import shutil

import pytest
from runs import SHORT, SMALL, Killed, arguments, at, killed, reach, records, tensors, training_records

from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.training import stopping


@pytest.mark.parametrize(("which", "when"), [(0, "before"), (0, "after"), (1, "before"), (2, "after"), (3, "before"), (4, "after")])
def test_a_run_killed_around_a_checkpoint_records_nothing_twice(train_here, short, digits, tmp_path, which, when):
    """Records of the next phase carry the same global step as the checkpoint it begins with. The five checkpoints of a short run
    are those at its start and at the ends of its phases; killed before the first, it starts again."""
    run = tmp_path / "run"
    with at("checkpoint", **{when: killed(which)}), pytest.raises(Killed):
        train_here(*arguments(digits, run, *SHORT))
    ended = train_here(*arguments(digits, run, *SHORT))
    assert ended.code == 0, ended.err
    assert training_records(run) == training_records(short)
    assert tensors(run) == tensors(short)
    anew = f"{run}: the run ended before its first checkpoint; it starts again"
    assert (anew in ended.out) == (which == 0 and when == "before")


@pytest.mark.parametrize("left", ["metrics.jsonl", "half a recipe.yaml"])
def test_a_run_killed_at_its_start_starts_again(train_here, digits, tmp_path, left):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    if "recipe" in left:
        (run / "recipe.yaml").write_text("name: di" if "half" in left else "")
    (run / ".compact.unfinished").mkdir()
    ended = train_here(*arguments(digits, run, *SHORT))
    assert ended.code == 0 and [r["resumed"] for r in records(run, "start")] == [False]
    assert not list(run.glob(".*.unfinished"))


def test_a_finished_run_is_reported_again_and_not_trained_again(train_here, short, digits):
    before, weights = (short / "metrics.jsonl").read_bytes(), tensors(short)
    (short / "report.html").unlink()
    ended = train_here(*arguments(digits, short, *SHORT), "--resume", report=True)
    assert ended.code == 0, ended.err
    assert "this run is finished" in ended.out and "accuracy after finetune" in ended.out
    assert (short / "metrics.jsonl").read_bytes() == before and tensors(short) == weights
    assert (short / "report.html").exists()


def test_a_run_killed_before_its_last_record_gets_it(train_here, short, digits):
    whole = training_records(short)
    lines = (short / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert '"kind": "end"' in lines[-1]
    (short / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    assert train_here(*arguments(digits, short, *SHORT), "--resume").code == 0
    assert training_records(short) == whole


def unfinished(run) -> None:
    """Remove the last checkpoint, that of the end."""
    shutil.rmtree(checkpoint.found(run / "checkpoints")[0])


@pytest.mark.parametrize(
    "change, key",
    [
        ("architecture.penalty_weight=0.5", ("architecture.penalty_weight", (0.037, 0.5))),
        ("seed=1", ("seed", (0, 1))),
        ("phases.finetune.steps=5", ("phases.finetune.steps", (4, 5))),
        ("phases.search.schedule={kind: cosine, offset: 3.0}", ("phases.search.schedule.kind", ("constant", "cosine"))),
        ("data.augmentation.padding=2", ("data.augmentation.padding", (1, 2))),
    ],
)
def test_another_recipe_is_shown_and_refused(train_here, short, digits, change, key):
    unfinished(short)
    before = {path: path.read_bytes() for path in short.rglob("*") if path.is_file()}
    ended = train_here(*arguments(digits, short, *SHORT, change))
    assert ended.code == 2
    first, *diff, last = ended.err.splitlines()
    assert first == f"error: {short}: the recipe has changed since the run began:"
    name, values = key
    assert diff[:2] == [f"  - {name}: {values[0]}", f"  + {name}: {values[1]}"]
    assert f"remove the folder (outside of SLURM: --allow-changed {name} " in last and last.endswith("or --overwrite)")
    assert {path: path.read_bytes() for path in short.rglob("*") if path.is_file()} == before


def test_an_allowed_change_is_made_and_recorded(train_here, short, digits):
    """The finetune is made longer; not that of a run that is finished."""
    before = (short / "recipe.yaml").read_bytes()
    longer = (*arguments(digits, short, *SHORT, "phases.finetune.steps=6"), "--allow-changed", "phases.finetune")
    ended = train_here(*longer)
    assert ended.code == 2 and (short / "recipe.yaml").read_bytes() == before
    assert "SLURM: --overwrite; a finished run can never change)" in ended.err and "--allow" not in ended.err
    unfinished(short)
    ended = train_here(*longer)
    assert ended.code == 0 and "changed: phases.finetune.steps: 4 -> 6" in ended.out, ended
    assert records(short, "start")[-1]["changed"] == {"phases.finetune.steps": [4, 6]}
    assert records(short, "train")[-1]["global_step"] == 14
    # It is the run's recipe from then on.
    assert "this run is finished" in train_here(*longer[:-2]).out and "steps: 6" in (short / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    "change, allowed, message",
    [
        (
            "model.width=0.5",
            ["model.width"],
            r"- model\.width: 1\.0\n  \+ model\.width: 0\.5\nundo that, .*: --overwrite; model\.width can never change\)",
        ),
        ("seed=1", ["sed"], r"--allow-changed sed: no such key in the recipe"),
        ("seed=1", ["phases"], r"undo that, or .*SLURM: --allow-changed seed or --overwrite\)"),
    ],
)
def test_other_changes_cannot_be_allowed(train_here, short, digits, change, allowed, message):
    unfinished(short)
    options = [word for key in allowed for word in ("--allow-changed", key)]
    ended = train_here(*arguments(digits, short, *SHORT, change), *options)
    assert ended.code == 2 and re.search(message, ended.err), ended.err


def test_a_phase_cannot_become_shorter_than_it_is(train_here, digits, tmp_path):
    run, longer = tmp_path / "run", (*SHORT, "phases.pretrain.steps=9")
    with at("weight step", before=killed(5)), pytest.raises(Killed):
        train_here(*arguments(digits, run, *longer, "checkpoint.every_steps=1"))
    ended = train_here(*arguments(digits, run, *SHORT, "phases.pretrain.steps=3"), "--allow-changed", "phases.pretrain")
    assert ended.code == 2
    assert "key 'phases.pretrain': the run has taken 5 of its iterations already, so 3 are too few; make it longer" in ended.err


def test_shards_may_move_but_not_change(train_here, short, digits, tmp_path):
    """The order of samples would not go on as it began, and nobody would see it."""
    moved = shutil.copytree(digits, tmp_path / "moved")
    ended = train_here(*arguments(moved, short, *SHORT))
    assert ended.code == 0 and "this run is finished" in ended.out, ended.err
    shutil.copy(digits / "train-000001.tar", moved / "train-000000.tar")
    (moved / "index.json").unlink()
    before = (short / "recipe.yaml").read_bytes()
    ended = train_here(*arguments(moved, short, *SHORT))
    assert ended.code == 2 and (short / "recipe.yaml").read_bytes() == before
    assert "error: key 'data.train': the shards are not those that the run began with; put those back, or remove the" in ended.err
    assert train_here(*arguments(moved, short, *SHORT), "--allow-changed", "data").code == 0


def test_keys_without_effect_on_the_result_may_change(train_here, short, digits):
    moved = short.rename(short.parent / "moved")
    others = ("data.workers=1", "data.cache_gb=5", "tracking.log_every=3")
    assert train_here(*arguments(digits, moved, *SHORT, *others), "--resume").code == 0


def test_two_runs_do_not_share_a_folder(train_command, train_here, digits, tmp_path, monkeypatch):
    run = tmp_path / "run"
    process = train_command.start(*arguments(digits, run, *SMALL, "phases.pretrain.epochs=1000"))
    reach(process, run, "pretrain", 3)
    monkeypatch.setattr("dnal_dist.training.run_folder.LOCK_SECONDS", 0.2)
    for option in ((), ("--overwrite",)):
        ended = train_here(*arguments(digits, run, *SMALL, "phases.pretrain.epochs=1000"), *option)
        assert ended.code == 2
        assert ended.err.startswith(
            f"error: key 'output': another process trains in {run}; wait for its end, or name another folder"
        )
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == stopping.STOPPED
    assert checkpoint.latest(run / "checkpoints")[1].state.phase == "pretrain"


def test_resuming_a_run_that_never_began_starts_it(train_here, digits, tmp_path):
    ended = train_here(*arguments(digits, tmp_path / "run", *SHORT), "--resume")
    assert ended.code == 0, ended.err
    assert [r["resumed"] for r in records(tmp_path / "run", "start")] == [False]
