"""Several runs in a row tell the mean and the spread over their seeds, each number of it computed anew here from the records."""

import json
import math

import pytest
import yaml
from comparing import ACCURACIES, MACS, command, printed, recipe, run_of
from made_up import changed, made_up_run, save

from dnal_dist.recipe import dump, load
from dnal_dist.report import comparison, comparison_files, pareto
from dnal_dist.report.pareto import Point


def deviation(values) -> float:
    middle = sum(values) / len(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))


def test_seeds_are_one_row_of_mean_and_deviation(sweep):
    text, lines = printed(sweep)
    rows = {float(row["architecture.penalty_weight"]): row for row in lines}
    assert rows.keys() == ACCURACIES.keys()
    for weight, row in rows.items():
        for name, values in (("accuracy", ACCURACIES[weight]), ("macs", MACS[weight])):
            assert float(row[f"{name}_mean"]) == pytest.approx(sum(values) / 3)
            assert float(row[f"{name}_std"]) == pytest.approx(deviation(values))
        assert float(row["macs_ratio_mean"]) == pytest.approx(sum(MACS[weight]) / 3 / 313_472_778)
        assert (row["finished"], row["unfinished"], row["seeds"]) == ("3", "0", "0 1 2")
    # 161.17 +- 1.26 M and 93.75 +- 0.06 %, by hand.
    (line,) = [line for line in text.splitlines() if line.strip("> ").startswith("1e-4") and "%" in line]
    assert "93.75 ± 0.06 %" in line and "161 ± 1 M" in line and "51.4 ± 0.4 %" in line


def test_rows_are_named_by_what_they_differ_in(sweep):
    assert comparison.compare([sweep]).keys == ["architecture.penalty_weight"]


def test_one_run_has_no_deviation(tmp_path):
    paths = [run_of(tmp_path / str(weight), recipe(weight), 0.9, 10**8) for weight in (1e-4, 2e-4)]
    text, lines = printed(*paths)
    assert len(lines) == 2 and all(row["accuracy_std"] == "" and row["accuracy_mean"] == "0.9" for row in lines)
    assert "±" not in text


@pytest.mark.parametrize("deep", [False, True], ids=["sweep", "a folder of sweeps"])
def test_a_sweeps_folder_stands_for_its_runs(sweep, deep):
    whole = comparison.compare([sweep.parent if deep else sweep])
    assert [len(row.finished) for row in whole.rows] == [3, 3] and whole.parent == sweep
    # Given twice, a run counts once; what an earlier comparison left is no run.
    (sweep / "comparison.md").write_text("old")
    again = comparison.compare([sweep, *sorted(sweep.iterdir())])
    assert [len(row.finished) for row in again.rows] == [3, 3]


def test_unfinished_runs_are_listed_and_not_averaged(sweep):
    run_of(sweep / "dies", recipe(1e-4, 7), 0.1, records=made_up_run()[:-2])
    run_of(sweep / "alone", recipe(9e-4, 0), records=made_up_run()[:4])
    (sweep / "queued").mkdir()
    (sweep / "queued" / "recipe.yaml").write_text("name: queued\n")
    save(sweep / "empty", [], b'{"kind": "sta')
    text, (first, _, last) = printed(sweep)
    assert float(first["accuracy_mean"]) == pytest.approx(0.9375) and (first["finished"], first["unfinished"]) == ("3", "1")
    assert last["accuracy_mean"] == "" and last["finished"] == "0" and last["not_dominated"] == "0"
    assert "3 of 4" in text and "0 of 1" in text
    assert "dies: Not finished: at iteration 40 of 40 of finetune." in text
    assert "queued: has not begun." in text and "empty: has not begun." in text


def test_rows_stand_among_the_published_ones(sweep):
    text, _ = printed(sweep)
    own = [" ".join(line.split()) for line in text.splitlines() if line.startswith("> ours")]
    macs, params = [f"{deviation([value / scale for value in MACS[1e-4]]):.2f}" for scale in (1e6, 1e8)]
    assert own[0] == f"> ours 1e-4 161.17 ± {macs} (1.95x) 1.61 ± {params} (1.95x) 93.75 ± 0.06 99.90 ± 0.00 2+3+4"
    macs = f"{deviation([value / 1e6 for value in MACS[4e-4]]):.2f}"
    assert own[1] == f"> ours 4e-4 22.20 ± {macs} (14.12x) 0.22 ± 0.00 (14.12x) 89.99 ± 0.12 99.90 ± 0.00 2+3+4"
    body = [line for line in text.splitlines() if "DNAL 1e-4" in line or "GAL-0.1" in line or "ours 1e-4" in line]
    assert ["GAL-0.1" in body[0], "DNAL" in body[1], "ours" in body[2]] == [True] * 3, "by FLOPs"
    assert "Not comparable" not in text


def test_another_set_up_is_reported_and_judged_apart(tmp_path):
    paths = [run_of(tmp_path / str(w), recipe(w), a, m, val=500) for w, a, m in ((1e-4, 0.5, 10**8), (2e-4, 0.4, 10**7))]
    found = comparison.compare(paths)
    # 10 M with 40 % would be dominated by many a published row.
    assert set(found.front) == set(found.rows)
    assert "Not comparable with the published rows of VGG16 on CIFAR-10" in printed(*paths)[0]


def test_dominance_needs_accuracy_and_cost():
    cheap, dear = Point("own", "", 1.0, 90.0), Point("own", "", 4.0, 95.0)
    worse, as_good = Point("own", "", 2.0, 89.0), Point("own", "", 4.0, 90.0)
    assert pareto.front([dear, worse, cheap, as_good]) == [cheap, dear]
    theirs = Point("others", "", 0.5, 99.0)
    assert pareto.front([dear, cheap, theirs]) == [theirs]
    apart = Point("own", "", 4.0, 95.0, comparable=False)
    assert pareto.front([apart, theirs]) == [apart]


def test_the_front_counts_published_rows(sweep):
    # No row of VGG16's table has 93.75 % for less than 161.97 M; 4e-4 at 22.04 M has 89.92 %, DNAL's 3e-4 29.77 M 89.93 %.
    assert len(comparison.compare([sweep]).front) == 2
    run_of(sweep / "bad", recipe(3e-4), 0.85, 50_000_000)
    assert [row.label(["architecture.penalty_weight"]) for row in comparison.compare([sweep]).front] == ["1e-4", "4e-4"]


@pytest.mark.parametrize("fact", [{"precision": "bfloat16"}, {"train_samples": 5_000}, {"val": 500}])
def test_runs_of_other_settings_share_no_row(tmp_path, fact):
    """Told by `start` alone: the recipe is the same."""
    one, two = (run_of(tmp_path / str(i), recipe(seed=i), **{"precision": "float32"} | more) for i, more in enumerate(({}, fact)))
    found = comparison.compare([one, two])
    key = "val_samples" if "val" in fact else next(iter(fact))
    assert [len(row.finished) for row in found.rows] == [1, 1] and found.keys == [key]
    assert f"{key}=" in found.rows[1].label(found.keys)


def test_a_run_changed_on_the_way_is_a_row_of_its_own(tmp_path):
    first, *rest = made_up_run()
    again = first | {"resumed": True}
    weight, logs = {"architecture.penalty_weight": [0.0, 1e-4]}, {"tracking.log_every": [1, 2]}
    paths = [
        run_of(tmp_path / str(seed), recipe(seed=seed), records=[first | {"changed": begun}, again, *rest])
        for seed, begun in enumerate(({}, logs, weight))
    ]
    # It is in the start that went on; another precision there is no setting either.
    paths.append(run_of(tmp_path / "both", recipe(seed=9), records=[first, *rest], precision="float32"))
    lines = (paths[-1] / "metrics.jsonl").read_text()
    (paths[-1] / "metrics.jsonl").write_text(json.dumps(again | {"precision": "bfloat16", "changed": None}) + "\n" + lines)
    found = comparison.compare(paths)
    assert sorted(len(row.finished) for row in found.rows) == [1, 1, 2] and "changed" in found.keys
    remarks = "\n".join(comparison_files.remarks(found))
    assert "(architecture.penalty_weight: 0 -> 1e-4)" in remarks and "precision: bfloat16 -> float32" in remarks


def test_other_code_and_backends_within_a_row_are_reported(tmp_path):
    paths = [
        run_of(tmp_path / str(i), recipe(seed=i), code=code, backend=backend)
        for i, (code, backend) in enumerate((("a" * 40, "ddp"), ("b" * 40 + "+", "zero3")))
    ]
    text, lines = printed(*paths)
    assert len(lines) == 1
    assert "had different code: aaaaaaaaaaaa, bbbbbbbbbbbb+." in text and "had different backends: ddp, zero3." in text


def test_rows_are_in_the_order_of_what_varies(tmp_path):
    # Neither the order of words (1e-4, 5e-5, 9e-5) nor that of costs.
    paths = [run_of(tmp_path / str(w), recipe(w), 0.9, macs) for w, macs in ((1e-4, 10**8), (9e-5, 10**6), (5e-5, 10**7))]
    found = comparison.compare(paths)
    assert [row.settings["architecture.penalty_weight"] for row in found.rows] == [5e-5, 9e-5, 1e-4]
    assert [line[0] for line in comparison_files.table(found).rows] == ["5e-5", "9e-5", "1e-4"]


def test_a_collapsed_row_is_marked_in_the_table(tmp_path):
    collapsed = changed(made_up_run(), "prune", collapsed=True)
    run_of(tmp_path / "whole", recipe(1e-4), 0.95, 10**8)
    for seed, records in enumerate((collapsed, made_up_run())):
        run_of(tmp_path / f"part{seed}", recipe(3e-4, seed), 0.9, 10**6, records=records)
    found = comparison.compare([tmp_path])
    assert [line[-1] for line in comparison_files.table(found).rows] == ["yes", "yes, 1 of 2 collapsed"]
    assert [line["collapsed"] for line in printed(tmp_path)[1]] == ["0", "1"]
    assert "3e-4 (collapsed)" in {point.label for point, _ in found.diagrams[0].marks}


def submitted(folder):
    (folder / "submit").mkdir(parents=True)
    (folder / "submit" / "jobs.jsonl").write_text('{"job": "1_0", "time": 1}\n')
    return folder


def test_a_submitted_sweep_is_compared_as_far_as_it_has_begun(sweep):
    submitted(sweep / "waits")
    (sweep / "submit" / "001").mkdir(parents=True)
    (sweep / "submit" / "001" / "0.yaml").write_text("name: vgg\n")
    for given in ([sweep], sorted(sweep.iterdir())):
        text, _ = printed(*given)
        assert "Comparison of 6 runs in 2 rows; 1 more not begun" in text and "waits: has not begun." in text
        assert "submit: " not in text and "(> not dominated)" in text and "(> these runs)" in text


def test_a_sweep_that_has_not_begun_names_the_run_list(tmp_path):
    for name in "ab":
        submitted(tmp_path / "sweep" / name)
    done = command(tmp_path / "sweep")
    assert done.returncode == 2 and not done.stdout
    place = tmp_path / "sweep"
    assert done.stderr == f"error: {place}: none of its 2 runs has begun; see python -m dnal_dist.runs {place}\n"


def test_other_networks_and_validation_sets_are_reported(tmp_path):
    one = run_of(tmp_path / "one", recipe())
    other = recipe() | {"model": {"name": "vgg_digits"}, "data": {"val": "digits/val.tar"}}
    two = save(tmp_path / "two", made_up_run(), recipe=yaml.safe_dump(other))
    found = comparison.compare([one, two])
    assert found.keys[0] == "model.name" and {"data.val", "data.image_size"} < set(found.keys)
    assert len(found.diagrams) == 2
    (warning,) = [remark for remark in comparison_files.remarks(found) if "validation sets" in remark]
    assert warning.startswith("WARNING") and "cifar/val.tar (10,000)" in warning and "digits/val.tar (355)" in warning


def test_misleading_comparisons_are_reported(tmp_path):
    a = run_of(tmp_path / "a", recipe(seed=1), world_size=1)
    b = run_of(tmp_path / "b", recipe(seed=1), records=changed(made_up_run(), "prune", collapsed=True), world_size=2)
    text = "\n".join(comparison_files.remarks(comparison.compare([a, b])))
    assert "more than one run of seed 1" in text and "had 1, 2 processes" in text and "b: the architecture collapsed" in text


def test_runs_without_a_recipe_are_never_one_row(tmp_path):
    paths = [save(tmp_path / name, made_up_run(), recipe=None) for name in "ab"]
    assert [len(row.finished) for row in comparison.compare(paths).rows] == [1, 1]


def test_a_key_that_an_earlier_release_lacked_has_its_default(tmp_path):
    new = yaml.safe_load(dump(load("recipes/digits.yaml", ["seed=1"])))
    whole = {key: value for key, value in new.items() if key not in ("training", "seed")}
    assert new["training"]
    paths = [save(tmp_path / str(i), made_up_run(), recipe=yaml.safe_dump(tree)) for i, tree in enumerate((whole, new))]
    (row,) = comparison.compare(paths).rows
    assert len(row.finished) == 2
