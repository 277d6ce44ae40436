"""The planner on its own."""

import json
import subprocess
import sys

import pytest
import torch

from dnal_dist import nets, plan, recipe
from dnal_dist.recipe import InputError


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "dnal_dist.plan", *arguments], capture_output=True, text=True, timeout=120)


def test_the_supernet_of_the_paper():
    """16 034 168 parameters and 60 704 gates of four bytes."""
    found = json.loads(run("recipes/proxyless.yaml", "--ranks", "64", "--device-memory", "80GB", "--json").stdout)
    assert found["share"] == 6 and found["backends"].keys() == set(plan.BACKENDS)
    ddp = found["backends"]["ddp"]
    assert ddp["weight_step"]["bytes"] == 4 * 16_034_168
    assert ddp["architecture_step"] == {"collectives": 1, "bytes": 4 * 60_704}
    assert ddp["parts"] == 1
    shown = run("recipes/proxyless.yaml", "--ranks", "64").stdout
    assert "243 kB in 1" in shown and "zero3" in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["no.yaml"], "no.yaml: no such recipe"),
        (["recipes/digits.yaml", "--ranks", "7"], "key 'data.global_batch': 64 is no multiple of 7 processes"),
        (["recipes/digits.yaml", "--ranks", "0"], "--ranks: expected at least 1"),
        (["recipes/digits.yaml", "--device-memory", "much"], "--device-memory: expected an amount such as 80GB"),
        (["recipes/digits.yaml", "model.name=nothing"], "nothing"),
        (["recipes/digits.yaml", "--docs", "README.md"], "README.md: holds no place for the table"),
    ],
)
def test_bad_input_is_one_line(arguments, told):
    found = run(*arguments)
    assert found.returncode == 2 and found.stderr.startswith("error: ") and told in found.stderr
    assert len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize(("text", "size"), [("80GB", 80e9), ("24GiB", 24 * 2**30), ("500 mb", 5e8), ("1.5T", 1.5e12)])
def test_amounts_of_memory(text, size):
    assert plan.size_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "80XB"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(InputError, match="--device-memory"):
        plan.size_of(text)


@pytest.mark.parametrize("name", ["vgg_digits", "resnet_digits", "supernet_digits"])
def test_activations_are_those_that_a_real_forward_pass_keeps(name):
    found = plan.activations(recipe.Network(name=name), 8)
    net, kept = nets.build(name).train(), {}
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = net(torch.randn(6, 3, 8, 8), torch.rand(net.num_gates))
        torch.nn.functional.cross_entropy(logits, torch.zeros(6, dtype=torch.long), reduction="sum")
    assert found.constant + 6 * found.picture == pytest.approx(sum(kept.values()), rel=0.05)


def test_precision_and_checkpointing_need_less():
    model = recipe.Network(name="resnet_digits")
    full = plan.activations(model, 32).picture
    assert plan.activations(model, 32, torch.bfloat16).picture < 0.7 * full
    assert plan.activations(model, 32, checkpointing=True).picture < 0.7 * full


def test_less_memory_means_more_parts_until_nothing_fits():
    needed, kept = plan.Memory(100, 90, 100, 0, 10), plan.Activations(50, 0)
    assert [plan.fit(needed, kept, 8, None, size).parts for size in (800, 600, 450, 400, 350)] == [1, 2, 4, 8, None]
    assert plan.fit(needed, kept, 8, 3, 10_000).parts == 4
    assert plan.fit(needed, kept, 7, None, 600).parts == 7


def test_more_processes_share_more_of_it():
    net = nets.build("vgg_digits")
    for backend in ("fsdp2", "zero1", "zero3"):
        totals = [plan.memory(net, backend, ranks).optimizer for ranks in (2, 4, 8)]
        assert totals == sorted(totals, reverse=True) and totals[0] > 3 * totals[2]
    assert plan.memory(net, "ddp", 2) == plan.memory(net, "ddp", 8)
