"""A budget: what it may be, that the exact step meets it, that the loop drives the expected cost to it, that a miss is an error."""

import json
import re

import pytest
import torch
from runs import SHORT, Killed, arguments, at, killed, records, tensors, training_records

from dnal_dist import nets, recipe
from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.common.errors import InputError
from dnal_dist.nets import cost, masks
from dnal_dist.recipe import SGD, ArchitectureSettings, Target
from dnal_dist.search import budgets, controller, selection
from dnal_dist.search.architecture import Architecture

SMALL_NETWORKS = sorted({"vgg_digits", "resnet_digits", "supernet_digits"} & set(nets.NETWORKS))


def asked(unit: str, text, **settings) -> ArchitectureSettings:
    return ArchitectureSettings(target=Target(**{unit: text}), **settings)


@pytest.mark.parametrize(
    "text, number, relative",
    [
        ("300M", 300e6, False),
        ("1.2G", 1.2e9, False),
        ("40k", 40e3, False),
        (".5x", 0.5, True),
        ("50%", 0.5, True),
        ("1e6", 1e6, False),
        (7, 7, False),
    ],
)
def test_amounts(text, number, relative):
    assert recipe.amount(text) == (pytest.approx(number), relative)


@pytest.mark.parametrize("text", ["", "M", "-3M", "0x", "0", "3 apples", "nan", "inf", "1e999", "1e300T", "1e308x", True, [1]])
def test_malformed_amounts_are_refused(text):
    with pytest.raises(ValueError, match="expected an amount such as 300M"):
        recipe.amount(text)


@pytest.mark.parametrize(
    "override, words",
    [
        ("architecture.target={}", r"'architecture\.target'.*one or several of 'macs', 'params' and 'latency'"),
        ("architecture.target={flops: 1M}", r"'architecture\.target'.*'flops' counts a multiply-add.*give 'macs'"),
        ("architecture.target={latency: 3ms}", r"'architecture\.target'.*'latency' needs 'table'.*--profile FILE"),
        ("architecture.target={latency: 3, table: x}", r"'architecture\.target\.latency': expected a latency such as 3ms"),
        ("architecture.target.macs=lots", r"'architecture\.target\.macs': expected an amount such as 300M.*'lots'"),
        ("architecture.target.macs=[1]", r"'architecture\.target\.macs': expected an amount such as 300M"),
        ("architecture.target=0.5x", r"'architecture\.target': say what the amount counts, such as \{macs: 0\.5x\}"),
        ("architecture={penalty_weight: 0.1, target: {macs: 1M}}", r"'architecture'.*exactly one of 'penalty_weight'.*'target'"),
        ("architecture={}", r"'architecture'.*exactly one of 'penalty_weight'.*'target'"),
        ("architecture.tolerance=0", r"'architecture\.tolerance'.*greater than 0"),
    ],
)
def test_an_impossible_target_is_reported_with_its_key(override, words):
    with pytest.raises(InputError, match=words) as caught:
        recipe.load("recipes/digits.yaml", [override])
    assert "\n" not in str(caught.value)


def test_a_target_in_an_override_replaces_the_penalty_weight():
    for override in ("architecture.target.macs=0.3x", "architecture.target={macs: 0.3x}"):
        settings = recipe.load("recipes/digits.yaml", [override]).architecture
        assert settings.penalty_weight is None and settings.target.chosen == [("macs", "0.3x")]


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_targets_out_of_reach_are_refused_and_those_at_the_edge_are_not(name, unit):
    net = nets.build(name)
    full = getattr(cost.count(net, 8), unit)
    closed, _ = masks.rescue(net, torch.zeros(net.num_gates, dtype=torch.bool))
    floor = getattr(cost.count(net, 8, closed), unit)
    for text, words in (
        (full, "not below"),
        ("1x", "not below"),
        (floor - 1, f"{floor:,}, the least"),
        ("1e-6x", f"{floor:,}, the least"),
    ):
        with pytest.raises(InputError, match=rf"'architecture\.target\.{unit}'.*{words}"):
            budgets.read(asked(unit, text), net, 8)
    least = budgets.read(asked(unit, floor), net, 8)
    assert (least.least, least.most, least.full) == (floor, floor, full)
    assert least.of(cost.count(net, 8, selection.select(net, 8, torch.randn(net.num_gates), least))) == floor


def alphas(net: nets.GatedNetwork) -> dict[str, torch.Tensor]:
    """As a search may leave them: without any order, of whole layers that are stronger than others, and all alike."""
    torch.manual_seed(0)
    by_site = torch.cat([1.5 * torch.randn(()) + torch.randn(channels) for channels in net.gate_sites.values()])
    return {"any": torch.randn(net.num_gates), "by site": by_site, "alike": torch.zeros(net.num_gates)}


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("share", [0.03, 0.1, 0.3, 0.95])
@pytest.mark.parametrize("width", [0.25, 1])
@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_the_exact_step_lands_inside_the_tolerance(name, width, share, unit):
    """And keeps no channel that computes nothing."""
    net = nets.build(name, width=width)
    try:
        target = budgets.read(asked(unit, f"{share}x"), net, 17)
    except InputError:
        pytest.skip(f"{share:.0%} is below the floor of a network this narrow")
    for kind, alpha in alphas(net).items():
        keep = selection.select(net, 17, alpha, target)
        found = target.of(cost.count(net, 17, keep))
        assert target.least <= found <= target.most <= share * target.full, kind
        assert torch.equal(masks.present(net, keep), keep), kind


def test_filling_up_equals_adding_one_channel_after_the_other_at_few_costs(monkeypatch):
    """Where all channels of a site are alike, their rank leaves much of the target to be filled by others."""
    net, costs, many, plain = nets.build("supernet_digits"), [], 0, cost.expected
    monkeypatch.setattr(cost, "expected", lambda *arguments: costs.append(1) or plain(*arguments))
    for seed in range(3):
        torch.manual_seed(seed)
        levels = [10.0 * (site % 2 == 0) + float(torch.randn(())) for site in range(len(net.gate_sites))]
        alpha = torch.cat([torch.full((n,), level) for n, level in zip(net.gate_sites.values(), levels, strict=True)])
        target = budgets.read(asked("params", "0.4x", tolerance=0.002), net, 17)
        choice = selection.Choice(net, 17, alpha, target)
        ranked = expected = choice.by_rank()
        costs.clear()
        filled = choice.fill(ranked)
        many, sites = many + sum(filled) - sum(ranked), set(range(len(ranked)))
        assert len(costs) <= 40
        while choice.cost(expected) < target.least:
            open_ = {site for site in sites if expected[site] < len(choice.orders[site])}
            site = max(open_, key=lambda s: choice.sorted[s][expected[s]])
            more = choice.changed(expected, site, 1)
            sites, expected = (sites - {site}, expected) if choice.cost(more) > target.most else (sites, more)
        assert filled == expected
    assert many > 100


@pytest.mark.parametrize("round_to", [4, 8])
@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_sites_keep_multiples_of_what_they_are_rounded_to(name, round_to):
    net = nets.build(name)
    settings = asked("macs", "0.4x", round_to=round_to, tolerance=0.1)
    target = budgets.read(settings, net, 8)
    for kind, alpha in alphas(net).items():
        keep = selection.select(net, 8, alpha, target, round_to)
        assert target.of(cost.count(net, 8, keep)) in target, kind
        for site, part in net.by_site(keep).items():
            assert int(part.sum()) % round_to == 0 or part.all(), (kind, site)
        opened = budgets.rounded(net, keep & (torch.rand(net.num_gates) < 0.5), alpha, round_to)
        assert all(int(part.sum()) % round_to == 0 or part.all() for part in net.by_site(opened).values())


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_the_rest_of_a_budget_goes_to_the_strongest_channels_that_fit(name):
    net = nets.build(name)
    target = budgets.read(asked("macs", "0.3x", tolerance=1e-5), net, 8)
    for alpha in list(alphas(net).values())[:2]:
        choice = selection.Choice(net, 8, alpha, target)
        ranked = choice.by_rank()
        filled = choice.fill(ranked)
        assert target.most >= choice.cost(filled) >= choice.cost(ranked)
        room = [site for site, order in enumerate(choice.orders) if ranked[site] < len(order)]
        fits = [site for site in room if choice.cost(choice.changed(ranked, site, 1)) <= target.most]
        if fits:
            strongest = max(fits, key=lambda site: choice.sorted[site][ranked[site]])
            assert filled[strongest] > ranked[strongest]
        left = [site for site, order in enumerate(choice.orders) if filled[site] < len(order)]
        if choice.cost(filled) not in target:
            assert all(choice.cost(choice.changed(filled, site, 1)) > target.most for site in left)


def test_an_exchange_meets_budgets_that_filling_cannot():
    net = nets.build("vgg_digits", width=0.125)
    reached = 0
    for seed in range(40):
        alpha = torch.randn(net.num_gates, generator=torch.Generator().manual_seed(seed))
        target = budgets.read(asked("macs", "0.2x"), net, 8)
        choice = selection.Choice(net, 8, alpha, target)
        if choice.cost(choice.fill(choice.by_rank())) not in target:
            assert target.of(cost.count(net, 8, selection.select(net, 8, alpha, target))) in target
            reached += 1
    assert reached


def test_the_exact_step_keeps_the_strongest():
    """Of each site, and of the network as far as the budget's last channels allow."""
    torch.manual_seed(0)
    net = nets.build("vgg_digits")
    alpha = torch.randn(net.num_gates)
    target = budgets.read(asked("macs", "0.2x"), net, 8)
    keep = selection.select(net, 8, alpha, target)
    for site, part in net.by_site(keep).items():
        strength = net.by_site(alpha)[site]
        assert strength[part].min() > strength[~part].max()
    kept = alpha[keep].sort().values
    assert (alpha[~keep] > kept[len(kept) // 10]).sum() <= 5


def test_a_target_between_two_networks_is_missed_from_below():
    net = nets.build("vgg_digits")
    closed, _ = masks.rescue(net, torch.zeros(net.num_gates, dtype=torch.bool))
    floor = cost.count(net, 8, closed).macs
    target = budgets.Budget("macs", floor + 1, floor + 2, cost.count(net, 8).macs)
    assert cost.count(net, 8, selection.select(net, 8, torch.randn(net.num_gates), target)).macs == floor


@pytest.mark.parametrize(
    ("kind", "share"), [("sigmoid", 0.05), ("scaled_sigmoid", 0.5), ("expected_macs", 0.5), ("root_macs", 0.05)]
)
def test_the_loop_drives_the_expected_cost_to_the_budget(kind, share):
    """Against a steady push on every channel, whichever way that goes; the budget may lie on either side of the beginning."""
    net = nets.build("vgg_digits")
    settings = asked("macs", f"{share}x", penalty=kind, optimizer=SGD(lr=0.05), delta_final=20.0)
    target = budgets.read(settings, net, 8)
    for push in (-1e-4, 1e-4):
        architecture, lag, steps = Architecture(net.num_gates), 0.0, 300
        torch.manual_seed(0)
        unevenly = push * torch.rand(net.num_gates)
        optimizer = torch.optim.SGD(architecture.parameters(), 0.05, 0.9)

        def of_full(gates):
            return cost.expected(net, 8, gates).macs / target.full

        loop = controller.Loop(target, settings, of_full, architecture, steps)
        for step in range(steps):
            delta = 20 ** (step / steps)
            weight, lag = loop.weight(delta, step / steps, lag)
            (gradient,) = torch.autograd.grad(weight * architecture.penalty(kind, delta, of_full), architecture.alpha)
            architecture.alpha.grad = gradient + unevenly
            optimizer.step()
        reached = float(of_full(architecture.gates(20)).detach())
        assert reached == pytest.approx(share, rel=0.15)


def test_the_penalty_of_expected_macs_is_the_fraction_with_its_gradient():
    net = nets.build("resnet_digits")
    architecture = Architecture(net.num_gates)
    full = cost.count(net, 8).macs
    torch.nn.init.normal_(architecture.alpha)
    penalty = architecture.penalty("expected_macs", 2.0, lambda gates: cost.expected(net, 8, gates).macs / full)
    (gradient,) = torch.autograd.grad(penalty, architecture.alpha)
    with torch.no_grad():
        architecture.alpha += 10
        assert float(architecture.penalty("expected_macs", 100.0, lambda g: cost.expected(net, 8, g).macs / full)) == pytest.approx(
            1
        )
    assert (gradient > 0).all()


def test_the_penalty_of_root_macs_pushes_by_the_root_of_the_price():
    """Between two channels of equal gates; and it is a mean of gates, so between 0 and 1."""
    net = nets.build("vgg_digits")
    architecture, full = Architecture(net.num_gates), cost.count(net, 8).macs

    def share(gates):
        return cost.expected(net, 8, gates).macs / full

    gates = architecture.gates(1.0).detach().requires_grad_()
    (price,) = torch.autograd.grad(share(gates), gates)
    penalty = architecture.penalty("root_macs", 1.0, share)
    (push,) = torch.autograd.grad(penalty, architecture.alpha)
    assert penalty.item() == pytest.approx(0.5)
    assert price.max() > 4 * price.min()
    torch.testing.assert_close(push / push[0], (price / price[0]).sqrt(), rtol=1e-4, atol=0)


AFTER = ("architecture.target={macs: 0.2x}", "phases.search.steps=40")


def test_a_run_ends_inside_its_budget_and_records_its_weight(train_here, digits, tmp_path):
    ended = train_here(*arguments(digits, tmp_path, *SHORT, *AFTER))
    assert ended.code == 0, ended.err
    (prune,) = records(tmp_path, "prune")
    assert "threshold" not in prune and prune["budget"]["unit"] == "macs"
    assert re.search(r"^budget +[\d,]+ of [\d,]+ MACs, (99\.\d\d|100\.00) %$", ended.out, re.M), ended.out
    assert all(r["loss"] == r["cross_entropy"] for r in records(tmp_path, "train"))
    full = prune["full"]["exact"]["macs"]
    assert 0.2 * 0.99 * full <= prune["compact"]["exact"]["macs"] <= 0.2 * full
    weights = {r["penalty_weight"] for r in records(tmp_path, "train") if r["phase"] == "search" and r["step"] > 1}
    assert len(weights) > 10, "it is driven, not given"


def test_a_search_towards_a_budget_resumes_bit_equal(train_here, digits, tmp_path):
    """Killed in the middle of its search, of 22 iterations an epoch."""

    longer = (*SHORT, "architecture.target={macs: 0.2x}", "phases.search.epochs=3")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train_here(*arguments(digits, whole, *longer)).code == 0

    # The first is that of the start, the second that of the search's.
    with at("checkpoint", after=killed(2)), pytest.raises(Killed):
        train_here(*arguments(digits, run, *longer))
    assert checkpoint.latest(run / "checkpoints")[1].state.step == 22
    assert train_here(*arguments(digits, run, *longer)).code == 0
    assert training_records(run) == training_records(whole) and tensors(run) == tensors(whole)


def test_a_target_out_of_reach_is_refused_before_training(train_here, digits, tmp_path):
    ended = train_here(*arguments(digits, tmp_path / "run", *SHORT, "architecture.target.macs=0.0001x"))
    assert ended.code == 2 and not (tmp_path / "run").exists()
    (line,) = ended.err.splitlines()
    assert line.startswith("error: key 'architecture.target.macs': 0.0001x is ") and line.endswith("raise it")


def test_a_missed_target_is_an_exit_code_of_its_own_and_the_network_is_kept(train_here, digits, tmp_path):
    """No network of this kind costs within a millionth of this."""
    changes = ("architecture.target.macs=20011", "architecture.tolerance=1e-6", "architecture.min_macs=0")
    for resume in ([], ["--resume"]):
        ended = train_here(*arguments(digits, tmp_path, *SHORT, *changes), *resume)
        assert ended.code == 3
        (line,) = ended.err.splitlines()
        assert line.startswith("error: key 'architecture.target.macs': missed, the network costs ") and "tolerance" in line
    assert json.loads((tmp_path / "compact" / "architecture.json").read_text())["network"]
    (prune,) = records(tmp_path, "prune")
    assert prune["compact"]["exact"]["macs"] < 20011
