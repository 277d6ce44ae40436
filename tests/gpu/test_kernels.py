"""Kernels that only a GPU has, against what the CPU computes."""

import gpus
import pytest

pytestmark = pytest.mark.timeout(300)

# Relative to the largest value: what each type rounds, with a factor for sums of a few hundred of them.
ROUNDING = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
TWO_GPUS = pytest.mark.skipif(gpus.count()[0] < 2, reason="needs two GPUs")


@pytest.mark.xdist_group("gpu ddp")
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=TWO_GPUS)])
def test_batchnorm_across_processes_is_that_of_the_whole_batch(on_gpu, processes):
    """Output, gradients and running statistics, in both layouts and all types."""
    found = on_gpu("kernels_on_ranks:batchnorm", processes=processes)
    assert len(found) >= 12
    for kind, off in found.items():
        for name, value in off.items():
            # Statistics are taken in float32 of whatever x holds.
            allowed = ROUNDING["float32" if name in ("mean", "variance") else kind.split()[0]]
            assert value <= allowed, f"{kind}: {name} is off by {value:.1e}, allowed {allowed:.0e}"


@pytest.mark.xdist_group("gpu compile")
def test_compiled_segments_follow_the_plain_trajectory_and_compile_a_bounded_number_of_times(on_gpu, ranks, tmp_path):
    """A segment is compiled for each way in which it is called, without gates, with, and with those that learn, and at most once
    more; a module of the compact network once."""
    from test_backends import by_case, compare

    from dnal_dist import nets
    from dnal_dist.nets import compact, masks
    from dnal_dist.nets.gate import segments

    case, net = "vgg_digits:1:1:batch", nets.build("vgg_digits")
    number, modules = len(segments(net)), len(list(compact.compact(net, masks.all_open(net)).modules()))
    found = on_gpu("kernels_on_ranks:compiled", str(tmp_path / "ours"), [f"{case}:compile"], timeout=140)
    assert not found["failed"], found["failed"]
    ranks.run("single", 1, "trajectory_on_ranks:trajectories", tmp_path / "exact", [case])
    ours = by_case(tmp_path / "ours", [f"{case}:compile"])[f"{case}:compile"]
    ours = {name: tensor for name, tensor in ours.items() if not name.endswith("left in memory")}
    compare(ours, by_case(tmp_path / "exact", [case])[case], 1e-4)
    assert number <= found["graphs"] <= 4 * number + modules, f"{found} of {number} segments and {modules} modules"


@pytest.mark.xdist_group("gpu single")
def test_a_checkpoint_copies_each_tensor_once_and_another_thread_writes_it(on_gpu, digits, tmp_path):
    shards = [f"data.train={digits}/train-000000.tar", f"data.val={digits}/val-000000.tar"]
    changes = [*shards, f"output={tmp_path}/run", "tracking.tracker=none", "tracking.plots=false"]
    found = on_gpu("kernels_on_ranks:copied_by_a_checkpoint", changes)
    assert found["tensors"] > 40 and found["momentum"] > 10 and not found["elsewhere"]
    assert found["threads"] == ["checkpoint_0"] and found["main"] != "checkpoint_0"
    if gpus.DEVICE == "cuda":
        # Beside the tensors, at most their comparisons between processes.
        assert found["copies"] <= found["tensors"] + 6
        assert found["bytes copied"] <= 1.1 * found["bytes"] + 100_000
