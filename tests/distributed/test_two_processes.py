"""Two real processes over gloo do what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/ddp.yaml"]


def execute(*command) -> subprocess.CompletedProcess:
    found = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=240, env={**os.environ})
    assert found.returncode == 0, found.stdout + found.stderr
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("steps") / "one.safetensors"
    execute(sys.executable, HERE / "steps_on_ranks.py", path)
    return load_file(path)


def test_two_processes_equal_one_on_the_concatenated_batch(reference, tmp_path):
    """Losses, weights, momentum and alpha, over weight steps without and with gates and architecture steps, in float64."""
    execute(*LAUNCH, HERE / "steps_on_ranks.py", tmp_path / "two.safetensors")
    found = load_file(tmp_path / "two.safetensors")
    assert found.keys() == reference.keys()
    assert (int(reference.pop("world_size")), int(found.pop("world_size"))) == (1, 2)
    for name, tensor in reference.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-11, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


def test_what_is_sent_and_what_is_equal_afterwards():
    found = execute(*LAUNCH, HERE / "talk_between_ranks.py")
    # Both write at once, so a line of one may lie within the other's.
    assert all(f"rank {rank} done" in found.stdout for rank in (0, 1))
