"""nvJPEG gives the CPU's images, and batches are copied beside the step that trains."""

import gpus
import pytest

pytestmark = [pytest.mark.timeout(200), pytest.mark.xdist_group("gpu images")]

# Heights and widths: whole blocks of 16 pixels, parts of them, tall, wide.
SIZES = [[64, 64], [37, 53], [375, 500], [500, 333], [16, 200], [25, 23]]
# Mean and largest difference of 255 allowed: what rounding gives where no colour is interpolated; decoders interpolate halved
# colours in their own ways, by which libjpeg's two differ by 3 on average and 24 at most on the same images.
ALLOWED = {"4:4:4": (1.5, 10), "gray": (1.5, 10), "4:2:2": (6.0, 60), "4:2:0": (6.0, 60)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import jpegs

    return jpegs.shard(tmp_path_factory.mktemp("jpegs"))


@pytest.mark.cuda_only
def test_nvjpeg_decodes_what_the_cpu_decodes(on_gpu):
    found = on_gpu("images_on_ranks:decodes", SIZES)
    for kind, (mean, largest) in ALLOWED.items():
        assert found[kind]["mean"] <= mean and found[kind]["largest"] <= largest, f"{kind}: {found}"
        assert found[kind]["alone"] <= largest, f"{kind}: in a list other pixels than alone: {found}"


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_cpu_and_what_nvjpeg_must_not_decode_is_equal(on_gpu, folder, workers):
    """CMYK, RGB and turned JPEGs and the PNG come from the CPU: normalising alone may round otherwise. The one that is cut short is
    a fault in either case."""
    found = on_gpu("images_on_ranks:batches", str(folder), workers)
    assert len(found["cpu"]) == 5 and len(found["nvjpeg"]) == 18
    assert len(found["bad"]) == 1 and "sample 09" in found["bad"][0]
    assert max(largest for _, largest in found["cpu"]) < 0.01
    # The CPU may decode at a reduced scale and resize from there.
    assert max(mean for mean, _ in found["nvjpeg"]) < 6.0


@pytest.mark.cuda_only
def test_nvjpeg_refuses_what_is_no_image_and_nothing_else(on_gpu):
    found = on_gpu("images_on_ranks:refused")
    assert found == {"no image": True, "no scan is left to the CPU": True, "others of the list": True}


@pytest.mark.cuda_only
def test_a_batch_is_copied_while_a_step_runs_and_nobody_waits(on_gpu):
    found = on_gpu("images_on_ranks:overlaps")
    assert found["streams"] == 1 and found["labels"] == [2]
    assert found["kernel took"] > 0.5, "the kernel was too short to show anything"
    assert found["kernel runs on, after the batch"] and found["kernel runs on, after the copy"], found
    assert found["images are right"] and found["layout"] and found["earlier batches differ"]


def test_the_device_is_the_one_that_was_asked_for(on_gpu):
    assert on_gpu("images_on_ranks:facts")["device"].startswith(gpus.DEVICE)
