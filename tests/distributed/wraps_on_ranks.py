"""A job of test_runs, in bf16: what goes into a wrap comes out of it."""

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist import nets
from dnal_dist.distributed.context import Context
from dnal_dist.recipe import SGD, Training
from dnal_dist.training.steps import weight_step

IMAGES, LABELS = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 3, torch.arange(8)


def statistics(net) -> int:
    return sum(2 * m.num_features for m in net.modules() if isinstance(m, _BatchNorm))


def wraps(context: Context) -> None:
    assert context.precision == "bfloat16"
    torch.manual_seed(0)
    net = nets.build("vgg_digits", 9)  # whose bias ZeRO-3 pads
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    saved = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    trained = context.wrap(net, SGD(lr=0.1), saved, Training())
    with trained.gathered() as momentum:
        for name, tensor in net.state_dict().items():
            assert torch.equal(before[name], tensor), f"{name} lost its low bits"
        assert momentum.keys() == saved.keys()
        for name, buffer in momentum.items():
            assert torch.equal(saved[name], buffer.cpu()), f"momentum of {name}"
    if context.backend == "zero3":
        # What is looked at for values that are not finite holds no padding, whose memory nobody has written to.
        for part in trained.shares():
            held = context.sum_(torch.tensor([sum(tensor.numel() for tensor in part)], dtype=torch.float64))
            assert int(held) == sum(tensor.numel() for tensor in before.values() if tensor.is_floating_point()) - statistics(net)
    trained.close()
    # Without momentum there is none to save, after a step either.
    trained = context.wrap(net, SGD(lr=0.1, momentum=0.0), {}, Training())
    weight_step(trained, IMAGES, LABELS, 8)
    with trained.gathered() as momentum:
        assert not momentum
    trained.close()
    # All processes have the same images, so that statistics over all of them are those of each.
    first = {}
    for sync in (False, True):
        net.load_state_dict(before)
        trained = context.wrap(net, SGD(lr=0.1), {}, Training(sync_batchnorm=sync))
        outcome = weight_step(trained, IMAGES, LABELS, 8)
        with trained.gathered():
            norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
            assert all(norm.running_mean.dtype == norm.running_var.dtype == torch.float32 for norm in norms)
            first[sync] = [norms[0].running_mean.clone(), norms[0].running_var.clone(), outcome.cross_entropy / 8]
        trained.close()
    for one, other in zip(first[False], first[True], strict=True):
        torch.testing.assert_close(one, other, rtol=3e-3, atol=3e-4)
