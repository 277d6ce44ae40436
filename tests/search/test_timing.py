"""Latency as a budget: predictions from a table of layers, and networks that keep to it."""

import pytest
import torch
from runs import SHORT, arguments, records

from dnal_dist import nets, recipe
from dnal_dist.common.errors import InputError
from dnal_dist.export.latency import device_name
from dnal_dist.nets import cost, masks
from dnal_dist.recipe import ArchitectureSettings, Target
from dnal_dist.report import records as reported
from dnal_dist.report import words
from dnal_dist.search import budgets, selection, taylor, timing
from dnal_dist.search.architecture import Architecture
from dnal_dist.training import timed
from dnal_dist.training.stopping import STOPPED

PER_CHANNEL = 1e-6


def table_of(name: str, path, device: str = "none") -> str:
    """A file in which each layer takes PER_CHANNEL for each output channel; aligned numbers take half of it."""
    network = recipe.load("recipes/digits.yaml", [f"model.name={name}"]).network
    net = nets.build(name)
    widths = [len(layer.outputs) for layer in net.graph.layers.values()]
    points = {width: sorted({1, 3, *range(7, width + 1, 8), *range(4, width + 1, 4), width}) for width in widths}

    def seconds(channels: int) -> float:
        return PER_CHANNEL * channels / (1 if channels % timing.ALIGNED else 2)

    kinds = {str(w): timing.Grid(inputs=[1], outputs=p, seconds=[[seconds(n) for n in p]]) for w, p in points.items()}
    facts = {"device": device, "runtime": "eager", "batch": 1, "threads": 1, "glue": PER_CHANNEL}
    path.write_text(timing.Table(network=network, kinds=kinds, layers=[*map(str, widths)], **facts).model_dump_json())
    return str(path)


def asked(path: str, **target) -> ArchitectureSettings:
    return ArchitectureSettings(target=Target(table=path, **target), tolerance=0.03)


@pytest.mark.parametrize("name", ["vgg_digits", "supernet_digits"])
def test_a_prediction_is_the_sum_of_the_layers_that_are_left(name, tmp_path):
    net, table = nets.build(name), timing.load(table_of(name, tmp_path / "table"), {})
    torch.manual_seed(0)
    for keep in (masks.all_open(net), masks.rescue(net, torch.rand(net.num_gates) < 0.2)[0]):
        left = [row["outputs"][0] for row in cost.by_layer(net, 8, keep) if row["macs"]]
        expected = sum(1 + (n if n % timing.ALIGNED else n / 2) for n in left)
        assert float(table.predict(net, 8, keep.double())) == pytest.approx(PER_CHANNEL * expected, rel=1e-6)
    gates = torch.full((net.num_gates,), 0.37, requires_grad=True)
    (slope,) = torch.autograd.grad(table.predict(net, 8, gates), gates)
    assert bool(slope.isfinite().all()) and float(slope.max()) > 0
    # A search begins with all gates at 0.5, where layers have whole numbers of channels, and one that diverges ends with none.
    halves = torch.full((net.num_gates,), 0.5, dtype=torch.float64)
    slopes = []
    for gates in (halves.requires_grad_(), halves.detach() + 1e-4):
        (slope,) = torch.autograd.grad(table.predict(net, 8, gates.requires_grad_()), gates)
        slopes.append(slope)
    assert torch.allclose(*slopes, rtol=0.5, atol=1e-9) and float(slopes[0].max()) > 0
    assert bool(table.predict(net, 8, halves.detach() * torch.nan).isnan())


def test_taylor_weighs_a_channel_by_the_time_that_it_takes(tmp_path):
    net, path = nets.build("vgg_digits"), table_of("vgg_digits", tmp_path / "table")
    target = budgets.read(asked(path, latency="0.4x"), net, 8, recipe.load("recipes/digits.yaml").network)
    architecture = Architecture(net.num_gates, hard=True)
    architecture.alpha.data += 1
    ranks = taylor.strength(net, 8, architecture, target)
    assert torch.allclose(ranks, torch.full_like(ranks, 2 / (1e9 * PER_CHANNEL)))


@pytest.mark.parametrize("target", [{"latency": "0.4x"}, {"latency": "40%", "macs": "0.9x"}, {"latency": "0.9x", "macs": "0.2x"}])
def test_all_budgets_hold_and_the_tightest_is_met(target, tmp_path):
    net, path = nets.build("vgg_digits"), table_of("vgg_digits", tmp_path / "table")
    network = recipe.load("recipes/digits.yaml").network
    budget = budgets.read(asked(path, **target), net, 8, network)
    torch.manual_seed(0)
    keep = selection.select(net, 8, torch.randn(net.num_gates), budget)
    rows = {row["unit"]: row for row in budget.records(net, 8, keep)}
    assert rows.keys() == set(target) and budget.missed(net, 8, keep) is None
    assert all(row["used"] <= row["most"] for row in rows.values())
    tight = "latency" if target["latency"] != "0.9x" else "macs"
    assert rows[tight]["used"] >= rows[tight]["least"]
    everything = budget.missed(net, 8, masks.all_open(net))
    assert everything is not None and "missed, the network costs" in everything


def test_targets_out_of_reach_and_tables_that_are_none_are_refused(tmp_path):
    net, path = nets.build("vgg_digits"), table_of("vgg_digits", tmp_path / "table")
    network = recipe.load("recipes/digits.yaml").network
    for latency, message in (("1s", "is not below the .* ms of the full network"), ("1us", "is below .* ms, the least")):
        with pytest.raises(InputError, match=message):
            budgets.read(asked(path, latency=latency), net, 8, network)
    with pytest.raises(InputError, match="measured for name 'vgg_digits', not 'resnet_digits'"):
        budgets.read(asked(path, latency="0.5x"), net, 8, network | {"name": "resnet_digits"})
    eights = tmp_path / "eights"
    eights.write_text((tmp_path / "table").read_text().replace('"round_to":1', '"round_to":8'))
    with pytest.raises(InputError, match=r"key 'architecture\.round_to': 1, but .* multiples of 8 channels only; set it to 8"):
        budgets.read(asked(str(eights), latency="0.5x"), net, 8, network)
    assert timing.load(str(eights), network, 16).round_to == 8
    with pytest.raises(InputError, match="lacks the times of some layers"):
        timing.load(path, network, layers=8)
    text = (tmp_path / "table").read_text()
    wrong = (text.replace('"threads":1', '"threads":0'), text.replace('"outputs":[1,', '"outputs":[100000000000,'))
    for number, content in enumerate(("[", "{}", "[1]", *wrong)):
        (tmp_path / str(number)).write_text(content)
        with pytest.raises(InputError, match=r"key 'architecture\.target\.table': .*--profile FILE"):
            timing.load(str(tmp_path / str(number)), network)


def test_a_run_keeps_to_its_latency(train_here, digits, tmp_path):
    path = table_of("vgg_digits", tmp_path / "table")
    target = (f"architecture.target={{latency: 0.5x, params: 0.9x, table: {path}}}", "architecture.tolerance=0.05")
    ended = train_here(*arguments(digits, tmp_path / "run", *SHORT, *target))
    assert ended.code == 0, ended.err
    (pruned,) = records(tmp_path / "run", "prune")
    assert [pruned["budget"]["unit"], *(one["unit"] for one in pruned["further_budgets"])] == ["params", "latency"]
    latency = pruned["further_budgets"][0]
    assert latency["least"] <= latency["used"] <= latency["most"] == latency["full"] // 2
    rows = [
        value
        for label, value in words.rows(reported.summary(tmp_path / "run") | {"untrained": False, "ended": set()}, False)
        if label == "budget"
    ]
    assert len(rows) == 2 and "as predicted" in rows[1]


def with_table(train_here, digits, tmp_path, **target):
    """Records of pruning, and the report's words, of a short run whose table claims to be of this machine."""
    path = table_of("vgg_digits", tmp_path / "table", device_name(torch.device("cpu")))
    asked = ", ".join(f"{key}: {value}" for key, value in {**target, "table": path}.items())
    ended = train_here(*arguments(digits, tmp_path / "run", *SHORT, f"architecture.target={{{asked}}}"))
    pruned = next(iter(records(tmp_path / "run", "prune")), None)
    if pruned is None:
        return ended, None, []
    found = reported.summary(tmp_path / "run") | {"untrained": False, "ended": set()}
    return ended, pruned, [value for label, value in words.rows(found, False) if label == "budget"]


@pytest.mark.parametrize("target", [{"latency": "0.5x"}, {"latency": "120us", "params": "0.99x"}])
def test_the_measured_latency_is_within_5_percent_below_the_target(target, train_here, digits, tmp_path, monkeypatch):
    """On a device where each network takes otherwise than the table says, the more so the smaller it is."""
    seen = []

    def latency(timer, keep):
        predicted = float(timer.budget.used(timer.supernet, 8, keep.double()))
        seen.append(1.4 * predicted * (timer.budget.full / predicted) ** 0.2)
        return seen[-1]

    monkeypatch.setattr(timed.Timer, "latency", latency)
    ended, pruned, rows = with_table(train_here, digits, tmp_path, **target)
    assert ended.code == 0, ended.err
    found = next(row for row in (pruned["budget"], *pruned.get("further_budgets", ())) if row["unit"] == "latency")
    assert 0.95 * found["most"] <= seen[-1] <= found["most"] and len(seen) > 1
    # The record holds whole nanoseconds, rounded up.
    assert abs(found["used"] - seen[-1]) <= 1 and found["predicted"] < 0.9 * found["used"]
    assert any("measured when pruned" in row for row in rows)


def test_channels_are_added_by_measurement_where_the_table_misleads(train_here, digits, tmp_path, monkeypatch):
    seen = []

    def latency(timer, keep):
        most = timer.budget.most if not seen else seen[0][1] / 0.6
        seen.append((keep, 0.6 * most * int(keep.sum()) / int((seen[0][0] if seen else keep).sum())))
        return seen[-1][1]

    monkeypatch.setattr(timed.Timer, "latency", latency)
    # Without a second look at the table.
    monkeypatch.setattr(timed, "PREDICTED", 1)
    ended, pruned, _ = with_table(train_here, digits, tmp_path, latency="0.5x")
    assert ended.code == 0, ended.err
    (first, least), *_, (last, most) = seen
    assert least < 0.7 * pruned["budget"]["most"] and 0.95 * pruned["budget"]["most"] <= most <= pruned["budget"]["most"]
    assert 2 < len(seen) < timed.MOST and bool((last >= first).all()) and sum(pruned["kept"].values()) == int(last.sum())


@pytest.mark.parametrize(("times", "used"), [([0.9, 0.995, 1.3], 0.995), ([1.6, 0.6, 0.7, None], 0.7)])
def test_the_best_of_the_measured_counts(times, used, train_here, digits, tmp_path, monkeypatch):
    """Also one that is nearer to the target than is aimed at, and if a measurement fails; None: one that does."""
    left, seen = [*times], []

    def latency(timer, keep):
        seen.append(left.pop(0) if len(left) > 1 else left[0])
        if seen[-1] is None:
            raise OSError("no such runtime")
        return seen[-1] * timer.budget.most

    monkeypatch.setattr(timed.Timer, "latency", latency)
    ended, pruned, _ = with_table(train_here, digits, tmp_path, latency="0.5x")
    assert pruned["budget"]["used"] / pruned["budget"]["most"] == pytest.approx(used, abs=1e-3)
    assert ended.code == (0 if used > 0.95 else 3) and ("not measured again" in ended.out) == (None in seen)


def test_a_stop_ends_the_measurements_and_the_run_prunes_again(train_here, digits, tmp_path, monkeypatch):
    seen = []

    def latency(timer, keep):
        seen.append(keep)
        if len(seen) == 1:
            (tmp_path / "run" / "stop").touch()
        return 1.4 * float(timer.budget.used(timer.supernet, 8, keep.double()))

    monkeypatch.setattr(timed.Timer, "latency", latency)
    ended, *_ = with_table(train_here, digits, tmp_path, latency="0.5x")
    assert ended.code == STOPPED
    assert len(seen) == 1 and [stop["phase"] for stop in records(tmp_path / "run", "stop")] == ["prune"]
    ended, pruned, _ = with_table(train_here, digits, tmp_path, latency="0.5x")
    assert ended.code == 0 and len(seen) > 2 and pruned["budget"]["used"] <= pruned["budget"]["most"]


def test_where_it_cannot_be_measured_the_prediction_counts(train_here, digits, tmp_path, monkeypatch):
    def latency(*_):
        raise OSError("no such runtime")

    monkeypatch.setattr(timed.Timer, "latency", latency)
    ended, pruned, rows = with_table(train_here, digits, tmp_path, latency="0.5x")
    assert ended.code == 0 and "latency was not measured (no such runtime)" in ended.out
    assert "predicted" not in pruned["budget"] and pruned["budget"]["used"] <= pruned["budget"]["most"]
    assert "as predicted" in rows[0]


def test_networks_are_timed_as_the_table_says(train_here, digits, tmp_path, monkeypatch):
    """Really timed: what is found depends on the machine, so that the target may be missed."""
    monkeypatch.setattr(timed, "SECONDS", 0.3)
    ended, pruned, rows = with_table(train_here, digits, tmp_path, latency="0.99x")
    assert ended.code in (0, 3) and "latency measured" in ended.out
    assert pruned["budget"]["predicted"] > 0 and pruned["budget"]["used"] > 0 and "measured when pruned" in rows[0]


def test_channels_are_interpolated_among_multiples_of_the_same_groups():
    grid = timing.Grid(inputs=[1], outputs=[1, 7, 8, 16, 24, 32, 48], seconds=[[1.0, 7.0, 80.0, 1600.0, 240.0, 3200.0, 4800.0]])
    ask = torch.tensor([4.0, 5.0, 8.0, 16.0, 24.0, 32.0, 40.0, 20.0, 24.5], dtype=torch.float64)
    found = grid.at(torch.ones_like(ask), ask).tolist()
    # Channels that are on their way have a slope, however few there are.
    few, gates = timing.Grid(inputs=[1], outputs=[1, 4, 12, 15, 16], seconds=[[1.0, 4.0, 12.0, 15.0, 16.0]]), ask[1:2] + 0.1
    (slope,) = torch.autograd.grad(few.at(torch.ones(1), gates.requires_grad_()).sum(), gates)
    assert float(slope) == pytest.approx(1.0)
    # 4 and 20 have no points of their own kind: as multiples of 8; 40 is beyond them. On its way, as a multiple of 16.
    assert found == pytest.approx([80.0, 5.0, 80.0, 1600.0, 240.0, 3200.0, 240.0, 200.0, 2450.0])
