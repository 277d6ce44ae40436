"""Which modules a command imports, and which it does not."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "torchvision", "accelerate", "deepspeed", "wandb", "sklearn", "scipy", "matplotlib", "pandas"}
# What a run that neither compiles nor decodes on a GPU has no use for.
UNUSED = {"torch._dynamo", "torch._inductor", "torchvision", "deepspeed", "wandb", "sklearn", "scipy", "sympy", "aiohttp"}


def imported(code: str, *arguments: str) -> set[str]:
    """Names of all modules in memory after `code`, which may end by SystemExit."""
    code = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


DOORS = [
    "train",
    "recipe.__main__",
    "cost",
    "plan",
    "runs",
    "report.__main__",
    "dashboard",
    "stream",
    "doctor.__main__",
    "chaos.__main__",
    "export.__main__",
    "predict",
    "evaluate",
    "latency",
]


@pytest.mark.parametrize("door", [*(f"dnal_dist.{name}" for name in DOORS), "data_tools.make_shards", "data_tools.verify"])
def test_help_is_printed_without_torch(door):
    assert not imported(f"import {door}; {door}.main()", "--help") & HEAVY


def test_training_does_not_import_what_it_does_not_use(digits, tmp_path):
    settings = ["recipes/digits.yaml", f"data.train={digits}/train-*.tar", f"data.val={digits}/val-*.tar"]
    settings += [f"phases.{name}.steps=2" for name in ("pretrain", "search", "finetune")]
    settings += ["tracking.tracker=none", "tracking.plots=false", f"output={tmp_path}/run"]
    found = imported("import dnal_dist.train; dnal_dist.train.main()", *settings)
    assert "torch" in found
    assert not found & UNUSED
