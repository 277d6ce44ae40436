"""A step as a CUDA graph is the step that it was captured from."""

import pytest

pytestmark = [pytest.mark.timeout(300), pytest.mark.cuda_only, pytest.mark.xdist_group("gpu single")]


@pytest.mark.parametrize("name, clip", [("vgg_digits", None), ("resnet_digits", 0.5), ("supernet_digits", None)])
def test_steps_as_graphs_are_those_launched_kernel_by_kernel(on_gpu, name, clip):
    """Weights, momentum, running statistics, alpha, losses, random numbers: before and in the search, for two batch sizes."""
    found = on_gpu("graphs_on_ranks:against_eager", name, clip)
    # Of weights for two batch sizes and with gates, and of the architecture.
    assert found["graphs"] == 4 and found["random"]
    assert not (wrong := {key: off for key, off in found["off"].items() if off > 1e-4}), wrong


def test_a_network_that_cannot_be_captured_trains_without_a_graph_and_warns_once(on_gpu):
    found = on_gpu("graphs_on_ranks:not_capturable")
    assert found["sums"][0] > found["sums"][1] > found["sums"][2] and found["moved"]
    # A capture that fails must leave the device's random numbers as they were, and usable.
    assert found["random"] and 0.9 < found["drawn"] < 1.1
    (warning,) = [one for one in found["warnings"] if "cuda_graphs" in one]
    assert warning.startswith("key 'training.cuda_graphs': this network's steps cannot be captured (")
