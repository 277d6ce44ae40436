"""Between the phases: recalibrated BatchNorms, an order of samples that pruning leaves alone, and the cost of what a run kept."""

import json

import pytest
import torch
from in_process import called
from safetensors.torch import load_file

from dnal_dist import cost, recipe
from dnal_dist.data.images import normalise
from dnal_dist.distributed.context import Context
from dnal_dist.nets import compact
from dnal_dist.report import records as report_records
from dnal_dist.training import phases, pruning, setup

FEW = [
    "phases.pretrain.steps=3",
    "phases.search.steps=6",
    "phases.finetune.steps=3",
    "tracking.tracker=none",
    "tracking.plots=false",
    "architecture.recalibration_batches=5",
]


def arguments(digits, output, *changes: str) -> list[str]:
    return [*FEW, f"data.train={digits}/train-*.tar", f"data.val={digits}/val-*.tar", f"output={output}", *changes]


def test_recalibrated_statistics_are_the_means_over_the_next_batches(digits, tmp_path):
    run = setup.prepare(recipe.load("recipes/digits.yaml", arguments(digits, tmp_path / "run")), Context())
    run.state.global_step = 5
    run.compact = compact.compact(run.supernet, torch.rand(run.supernet.num_gates) < 0.5)
    run.compact.train()(torch.randn(8, 3, 8, 8))  # statistics that must not last
    before = {name: tensor.clone() for name, tensor in run.compact.state_dict().items()}
    pruning.recalibrate(run, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.compact.state_dict().items())

    pruning.recalibrate(run, 3)
    source = run.train.batches(5)
    data = run.recipe.data
    batches = [normalise(b.images, data.mean, data.std, b.flips) for b in (next(source) for _ in range(3))]
    norms = [module for module in run.compact.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    found = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    seen: list[list[torch.Tensor]] = [[] for _ in norms]
    for norm, inputs in zip(norms, seen, strict=True):
        norm.register_forward_pre_hook(lambda _, arguments, inputs=inputs: inputs.append(arguments[0].clone()))
    with torch.no_grad():
        for images in batches:
            run.compact.train()(images)
    for (mean, variance), inputs in zip(found, seen, strict=True):
        torch.testing.assert_close(mean, torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0))
        torch.testing.assert_close(variance, torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0))
    assert {m.momentum for m in run.compact.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}
    assert all(torch.equal(before[name], tensor) for name, tensor in run.compact.named_parameters())


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory, train_here):
    """The same run without loader processes and with two."""
    folders = [tmp_path_factory.mktemp("workers") / str(workers) for workers in (0, 2)]
    for folder, workers in zip(folders, (0, 2), strict=True):
        ended = train_here("recipes/digits.yaml", *arguments(digits, folder, f"data.workers={workers}"))
        assert ended.code == 0, ended.err
    return folders


def test_recalibration_leaves_the_order_of_samples_alone(finished, digits, tmp_path, train_here):
    """The finetune's own steps are the same with it, without it and with loader processes: only what pruning evaluates differs."""
    folders = [*finished, tmp_path]
    ended = train_here("recipes/digits.yaml", *arguments(digits, tmp_path, "architecture.recalibration_batches=0"))
    assert ended.code == 0, ended.err
    weights = [load_file(folder / "compact" / "weights.safetensors") for folder in folders]
    trained = [name for name in weights[0] if name.endswith(("weight", "bias"))]
    assert all(torch.equal(weights[0][name], other[name]) for other in weights[1:] for name in trained)
    found = [report_records.load(folder).last("eval", "prune")["cross_entropy"] for folder in folders]
    assert found[0] == found[1] != found[2]


def test_a_run_starts_its_finetune_where_the_search_ended(digits, tmp_path):
    """With recalibration, the finetune's first batch is the one that follows the search's last."""
    run = setup.prepare(recipe.load("recipes/digits.yaml", arguments(digits, tmp_path / "run")), Context())
    seen = []
    batches = run.train.batches

    def watched(start=0):
        for batch in batches(start):
            seen.append((run.state.phase, batch.keys))
            yield batch

    run.train.batches = watched
    phases.train(run)
    taken = [keys for phase, keys in seen if phase in ("pretrain", "search", "finetune")]
    source = batches(0)
    assert taken == [next(source).keys for _ in range(12)]
    recalibrated = [keys for phase, keys in seen if phase == "prune"]
    assert len(recalibrated) == 5 and recalibrated[:3] == taken[-3:]


def test_cost_of_a_recipe_is_printed_layer_by_layer(capsys):
    text = called(cost.main, capsys, "recipes/proxyless.yaml").out
    for words in ("2 260 347 776", "16 034 168", "2 260 456 600", "60704 gates", "stages.2.cells.1.k5e6.depthwise *"):
        assert words in text, words
    printed = json.loads(called(cost.main, capsys, "recipes/vgg16_cifar.yaml", "--json").out)
    full = printed["full"]["exact"]
    assert {kind: sum(layer[kind] for layer in printed["layers"]) for kind in full} == full
    narrow = json.loads(called(cost.main, capsys, "recipes/vgg16_cifar.yaml", "--json", "model.width=0.5").out)
    assert narrow["full"]["exact"]["macs"] < full["macs"] / 2


def test_cost_of_a_run_is_that_of_its_compact_network(finished, capsys):
    printed = json.loads(called(cost.main, capsys, str(finished[0]), "--json").out)
    found = report_records.summary(finished[0])
    assert (printed["full"], printed["kept"]) == (found["full"], found["compact"])
    assert sum(layer["macs"] for layer in printed["layers"]) == found["compact"]["exact"]["macs"]
    parameters = sum(p.numel() for p in compact.load(finished[0] / "compact").parameters())
    assert sum(layer["params"] for layer in printed["layers"]) == parameters
    assert f"{parameters:,}".replace(",", " ") in called(cost.main, capsys, str(finished[0])).out


def test_cost_of_a_missing_recipe_is_one_line(tmp_path, capsys):
    for argv, words in (
        ([str(tmp_path)], "holds no recipe.yaml"),
        (["recipes/none.yaml"], "no such recipe"),
        (["recipes/digits.yaml", "model.width=1e9"], "key 'model.width'"),
        (["recipes/digits.yaml", "model.name=vgg"], "key 'model.name'"),
        (["recipes/vgg16_imagenet.yaml", "data.image_size=16"], "key 'data.image_size'"),
    ):
        code, _, err = called(cost.main, capsys, *argv)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err, err


def test_cost_warns_where_the_records_do_not_hold_the_kept_channels(finished, tmp_path, capsys):
    lines = (finished[0] / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "recipe.yaml").write_text((finished[0] / "recipe.yaml").read_text())
    for change, words in (
        (lambda record: None if record["kind"] == "prune" else record, "not pruned yet; this is the full network"),
        (lambda record: {k: v for k, v in record.items() if k != "mask"}, "do not hold the channels that it kept"),
        (
            lambda record: record | {"mask": 7} if record["kind"] == "prune" else record,
            "do not hold the channels that it kept",
        ),
    ):
        records = [changed for line in lines if (changed := change(json.loads(line)))]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
        _, out, err = called(cost.main, capsys, tmp_path, "--json")
        assert words in err and "kept" not in json.loads(out)
