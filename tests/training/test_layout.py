"""The memory format: chosen by the network where the recipe leaves it open, recorded, and kept by a run that resumes."""

import pytest
import torch
from runs import SHORT, arguments, records
from torch import nn

from dnal_dist import recipe
from dnal_dist.distributed.context import Context
from dnal_dist.recipe import Training
from dnal_dist.training import loop, setup, state


@pytest.mark.parametrize("asked", ["auto", "contiguous", "channels_last"])
@pytest.mark.parametrize("before", [None, "contiguous", "channels_last"])
@pytest.mark.parametrize("groups, chosen", [(1, "contiguous"), (2, "contiguous"), (8, "channels_last")])
def test_depthwise_convolutions_choose_it_where_nothing_else_does(groups, chosen, before, asked):
    context = Context()
    assert context.device.type == "cpu"
    context.tune(Training(memory_format=asked), nn.Sequential(nn.Conv2d(8, 8, 3, groups=groups)), before)
    assert context.layout == (asked if asked != "auto" else before or chosen)
    assert torch.empty(2, 3, 4, 4).to(memory_format=context.memory_format).stride(1) == (1 if "last" in context.layout else 16)


@pytest.mark.parametrize("recorded, kept", [("contiguous", "contiguous"), ("channels_last", "channels_last"), (None, "contiguous")])
def test_a_run_goes_on_in_the_layout_that_it_began_in(digits, tmp_path, recorded, kept):
    """Checkpoints of earlier releases name none: on a CPU it was contiguous."""
    settings = recipe.load(*_split(arguments(digits, tmp_path / "run", *SHORT, "model.name=supernet_digits")))
    run = setup.prepare(settings, Context())
    assert run.state.memory_format == records(run.folder, "start")[0]["memory_format"] == "channels_last"
    run.state.memory_format = recorded
    state.save(run, {})
    run.writer.settle()
    run.log.close()
    run.close()
    again = setup.prepare(settings, Context())
    batches = loop.training_batches(again)
    layout = torch.channels_last if kept == "channels_last" else torch.contiguous_format
    assert next(batches).images.is_contiguous(memory_format=layout)
    batches.close()
    assert again.state.memory_format == records(run.folder, "start")[-1]["memory_format"] == kept
    again.log.close()
    again.close()


def _split(line: list[str]) -> tuple[str, list[str]]:
    return line[0], line[1:]
