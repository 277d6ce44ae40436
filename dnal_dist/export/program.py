"""The deployment form of a compact network as a torch.export program."""

from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dnal_dist.common.errors import InputError, reason
from dnal_dist.nets.whole import deployed

# Operations that runtimes are slow with, or do not have. Sums of branches need none (see nets.whole).
SLOW = ("index_add", "index_put", "index_copy", "scatter")


def program(network: nn.Module, image_size: int, any_size: bool = False, fold: bool = False) -> ExportedProgram:
    """The function of a compact network in eval mode on images float (n, 3, H, W), for any n.

    any_size: for any H and W too, otherwise both are image_size. fold: BatchNorms behind convolutions become part of them. Raises
    InputError if the forward pass cannot be read so, or has an operation of SLOW.
    """
    module = deployed(network).eval()
    found = _exported(module, _example(network, image_size), any_size)
    if fold:
        found = _exported(_folded(found), _example(network, image_size), any_size)
    used = {str(node.target) for node in found.graph.nodes if node.op == "call_function"}
    if slow := sorted(name for name in used if any(word in name for word in SLOW)):
        raise InputError(f"the network has the operations {', '.join(slow)}, which runtimes are slow with; write it without them")
    return found


def _example(network: nn.Module, image_size: int) -> Tensor:
    # Two images, since torch.export takes a size of 1 for a constant.
    return torch.zeros(2, 3, image_size, image_size, dtype=next(network.parameters()).dtype)


def _exported(module: nn.Module, images: Tensor, any_size: bool) -> ExportedProgram:
    sizes = {0: Dim("batch", min=1)} | ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if any_size else {})
    if any_size:
        # With other sizes, so that no size within the network is 1, which would be taken for a constant.
        images = images.new_zeros(2, 3, 2 * images.shape[2], 3 * images.shape[3])
    try:
        with torch.no_grad():
            return torch.export.export(module, (images,), dynamic_shapes=(sizes,))
    except Exception as error:  # of many kinds: whatever torch.export makes of a network
        what = "--any-size: the network takes images of one size only" if any_size else "the network cannot be exported"
        raise InputError(f"{what} ({reason(error)})") from None


def _folded(found: ExportedProgram) -> GraphModule:
    """The program with each BatchNorm in the weight and bias of the convolution before it."""
    module = found.module(check_guards=False)
    for node in list(module.graph.nodes):
        before = node.args[0] if node.args else None
        if not (_is(node, "batch_norm") and isinstance(before, Node) and _is(before, "conv2d") and len(before.users) == 1):
            continue
        conv = dict(zip(("weight", "bias"), before.args[1:3], strict=False))
        names = [conv["weight"], conv.get("bias"), *node.args[3:5], *node.args[1:3]]
        if len(conv["weight"].users) > 1 or not all(name is None or name.op == "get_attr" for name in names):
            continue
        weight, bias, mean, var, scale, shift = (None if name is None else attrgetter(name.target)(module) for name in names)
        weight, bias = fuse_conv_bn_weights(weight, bias, mean, var, node.args[7], scale, shift)
        path = conv["weight"].target.rpartition(".")[0]
        holder = module.get_submodule(path)
        holder.weight, holder.bias = weight, bias
        with module.graph.inserting_before(before):
            with_bias = module.graph.get_attr(f"{path}.bias".lstrip("."))
        before.args = (*before.args[:2], with_bias, *before.args[3:])
        node.replace_all_uses_with(before)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _is(node: Node, name: str) -> bool:
    return node.op == "call_function" and str(node.target).startswith(f"aten.{name}.")
