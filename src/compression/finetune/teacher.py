"""A teacher whose forward pass takes less time: it is never trained, so that its batch norms can be part of the
convolutions before them, y = W x + b with W = W_0 gamma / sigma and b = (b_0 - mu) gamma / sigma + beta."""

from __future__ import annotations

import logging
import warnings

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def fold_norms(model: nn.Module) -> int:
    """Fold batch norms into the convolutions before them, in place, where the norm alone reads what the convolution
    gives; returns how many. Nothing is done to a network whose forward pass cannot be followed.

    Args:
        model: in evaluation mode, and to stay in it; what it computes stays, up to rounding.
    """
    pairs = _pairs(model)
    for convolution, norm_name in pairs:
        norm = model.get_submodule(norm_name)
        assert isinstance(norm, NORMS)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        convolution.requires_grad_(False)
        parent, _, leaf = norm_name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Identity())
    return len(pairs)


def _pairs(model: nn.Module) -> list[tuple[nn.Conv1d | nn.Conv2d | nn.Conv3d, str]]:
    """Convolutions, and the names of the norms that alone read what they give."""
    calls = _calls(model)
    uses: dict[int, int] = {}
    for module in calls.values():
        uses[id(module)] = uses.get(id(module), 0) + 1
    tensors = [id(tensor) for module in model.modules() for tensor in module.parameters(recurse=False)]
    shared = {one for one in tensors if tensors.count(one) > 1}
    found = []
    for node, norm in calls.items():
        source = node.args[0] if len(node.args) == 1 else None
        convolution = calls.get(source) if isinstance(source, fx.Node) else None
        if (
            isinstance(source, fx.Node)
            and convolution is not None
            and type(convolution) in CONVOLUTIONS
            and type(norm) in NORMS
            and norm.running_mean is not None
            and len(source.users) == 1
            and uses[id(convolution)] == uses[id(norm)] == 1
            and not any(_is_watched(one) for one in (convolution, norm))
            and not any(id(one) in shared for one in (*convolution.parameters(), *norm.parameters()))
        ):
            assert isinstance(convolution, CONVOLUTIONS)
            found.append((convolution, str(node.target)))
    return found


def _calls(model: nn.Module) -> dict[fx.Node, nn.Module]:
    """The modules that a forward pass calls, without those they consist of; none where it cannot be followed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = fx.Tracer().trace(model)
    except Exception as error:  # a network of any origin
        logging.getLogger(__name__).debug("batch norms of the teacher stay: %s", error)
        return {}
    return {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}


def _is_watched(module: nn.Module) -> bool:
    """Whether something other than its forward takes part in what a module does."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or is_parametrized(module)
