"""What dnal_dist.plan computes for a recipe, and how it is printed; steps are measured in tests/distributed/test_plan.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from in_process import called
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnal_dist import nets, plan, recipe
from dnal_dist.distributed import estimate

RECIPE, DIGITS = "recipes/proxyless.yaml", "recipes/digits.yaml"


def test_tables_are_printed_whole(capsys):
    words = ("recipes/resnet56_cifar.yaml", "data.global_batch=384", "--ranks", 64, "--device-memory", "30MB")
    code, out, _ = called(plan.main, capsys, *words)
    assert code == 0 and all(backend in out for backend in estimate.BACKENDS) and "2 x 3" in out


def test_json_adds_up(capsys):
    words = (DIGITS, "--ranks", 2, "--device-memory", "24GiB", "--precision", "bf16", "--json")
    found = json.loads(called(plan.main, capsys, *words)[1])
    assert found["device_memory"] == 24 * 2**30 and list(found["backends"]) == list(estimate.BACKENDS)
    for one in found["backends"].values():
        assert one["memory"].pop("total") == sum(one["memory"].values())
        assert one["fits"] and one["parts"] * one["images_at_a_time"] == found["share"]
        assert one["architecture_step"]["by_operation"]["all-reduce"] == {"collectives": 1, "bytes": 4 * found["gates"]}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([RECIPE, "--ranks", "5"], "error: key 'data.global_batch': 384 images cannot be divided evenly among 5 ranks"),
        ([RECIPE, "--ranks", "0"], "error: --ranks 0: expected at least 1"),
        ([RECIPE, "--device-memory", "80"], "error: --device-memory 80: expected an amount such as 80GB, 24GiB or 500MB"),
        ([RECIPE, "--device-memory", "0GB"], "error: --device-memory 0GB: expected"),
        ([RECIPE, "model.name=vgg17"], "error: key 'model.name': no network is called 'vgg17'"),
        (["recipes/none.yaml"], "error: recipes/none.yaml: no such recipe"),
        (
            ["recipes/vgg16_cifar.yaml", "data.image_size=8"],
            "error: key 'data.image_size': the network cannot take images of 8x8 pixels",
        ),
    ],
)
def test_a_fault_is_one_line(capsys, words, expected):
    code, out, error = called(plan.main, capsys, *words)
    assert (code, out, error.count("\n")) == (2, "", 1) and error.startswith(expected)


def test_accumulation_grows_as_memory_shrinks():
    settings = recipe.load(DIGITS, ["data.global_batch=38400"])
    whole = {backend: one["memory"] for backend, one in estimate.plan(settings, 2)["backends"].items()}
    # Beside the activations there is room for what backends differ in, and for what they keep from one part to the next.
    beside = max(memory["total"] - memory["activations"] for memory in whole.values()) + 8 * 10**6
    devices = [int((beside + share * whole["ddp"]["activations"]) / estimate.USABLE) for share in (1, 0.4, 0.1)] + [10**6]
    found = [estimate.plan(settings, 2, device)["backends"] for device in devices]
    for backend in estimate.BACKENDS:
        own = [one[backend] for one in found]
        assert [one["fits"] for one in own] == [True, True, True, False]
        parts = [one["parts"] for one in own]
        assert parts == sorted(set(parts)) and parts[0] == 1 and own[-1]["images_at_a_time"] == 1
        assert all(one["memory"]["total"] <= estimate.USABLE * device for one, device in zip(own[:-1], devices[:-1], strict=True))


def test_the_limit_of_the_recipe_is_kept():
    settings = recipe.load(DIGITS, ["data.global_batch=384", "data.per_device_batch_limit=10"])
    found = estimate.plan(settings, 4)["backends"]["ddp"]
    assert (found["parts"], found["images_at_a_time"]) == (12, 8)


def test_activations_shrink_with_precision_and_checkpointing():
    net = nets.build("supernet_digits")
    full, low, again = (estimate.activations(net, 8, *how) for how in ((), ("bf16",), ("no", True)))
    assert low.each == pytest.approx(full.each / 2, rel=0.1)
    assert again.each < full.each / 2


def test_activations_are_those_of_a_convolution_a_norm_and_a_relu():
    net = nets.build("vgg_digits")
    # Of each unit: what the convolution takes, what the norm takes; what ReLU gives is the next one's, or goes to a pool with
    # its indices, of 8 bytes. Then the averages, and what cross-entropy keeps.
    found, side, size = 0, 8, 8
    for stage in net.stages:
        found += sum(2 * 4 * conv.norm.num_features * side**2 for conv in stage)
        side //= 2
        found += (4 + 8) * stage[-1].norm.num_features * side**2
    assert estimate.activations(net, size).each == pytest.approx(found, rel=0.02)


def test_nothing_takes_memory():
    class NothingLarge(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            # Numbers of channels are no weights or activations.
            large = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel() > 1000]
            assert all(t.is_meta for t in large), function
            return out

    with NothingLarge():
        estimate.plan(recipe.load("recipes/resnet56_cifar.yaml"), 64, 10**10)


def test_a_single_process_sends_nothing_to_another():
    net = nets.build("vgg_digits")
    assert estimate.traffic(net, "ddp", 1, 8) == estimate.traffic(net, "fsdp2", 1, 8) == ([], [])
    assert not estimate.traffic(net, "zero3", 1, 8)[1]


def test_a_planned_network_stays_as_it_is():
    net = nets.build("vgg_digits").eval()
    estimate.traffic(net, "ddp", 2, 8, "bf16")
    estimate.activations(net, 8, "bf16", True)
    assert not net.training and all(
        p.device.type == "cpu" and p.dtype == torch.float32 and p.grad is None for p in net.parameters()
    )


def test_the_docs_page_holds_the_planned_table(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    from traffic import table

    assert f"\n{table()}\n" in Path("docs/distributed.md").read_text(encoding="utf-8"), "run benchmarks/traffic.py again"


def test_neither_accelerate_nor_deepspeed_is_loaded():
    words = "import sys; import dnal_dist.plan; assert not {'accelerate', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", words], check=True)


def test_adamw_and_an_average_are_counted():
    def kept(*overrides) -> int:
        return estimate.plan(recipe.load("recipes/digits.yaml", overrides), 2)["backends"]["ddp"]["memory"]["optimizer"]

    assert kept("phases.search.optimizer.kind=adamw") == kept("phases.pretrain.ema=0.9") == 2 * kept()
    assert kept("phases.pretrain.optimizer.kind=adamw", "phases.pretrain.ema=0.9") == 3 * kept()
