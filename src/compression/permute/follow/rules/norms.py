"""Norms and softmax: a channel passes, and the operator treats those that it pools alike."""

from __future__ import annotations

from torch import Tensor

from ..call import Call, Rule
from ..labels import varying
from .pointwise import combine


def batch_norm(call: Call) -> None:
    """Every channel has statistics, weight and bias of its own."""
    x, *vectors = call.tensors
    call.put(combine(call.graph, [call.operand(x), *(call.vector(vector, 1) for vector in vectors)]))


def layer_norm(call: Call) -> None:
    """Pools the last axes; channels elsewhere keep apart what is pooled."""
    x = call.tensors[0]
    pooled = set(range(x.dim() - len(call["normalized_shape"]), x.dim()))
    for label in call.labels(x):
        pool(call, label, pooled)
    call.put(combine(call.graph, [call.operand(tensor) for tensor in call.tensors]))


def pool(call: Call, label: Tensor, pooled: set[int]) -> Tensor | None:
    """Channels may be exchanged within what is pooled; returns the label of the axes that remain, if any."""
    axes = set(varying(label))
    call.graph.touch(label, 4)
    if not (axes & pooled and axes - pooled):
        return None
    return call.graph.within(label, sorted(axes - pooled))


def group_norm(call: Call) -> None:
    """Pools blocks of consecutive channels."""
    x, *vectors = call.tensors
    groups = call["group"]
    for label in call.labels(x):
        kept = call.graph.collapse(label, (1,))
        if kept is None:
            continue
        call.graph.touch(kept, 4)
        width = kept.numel() // groups
        if groups > 1 and width > 1:
            call.graph.own(kept.reshape(-1), call.graph.fresh(groups).repeat_interleave(width))
    call.put(combine(call.graph, [call.operand(x), *(call.vector(vector, 1) for vector in vectors)]))


def weight_norm(call: Call) -> None:
    """A weight whose rows have lengths of their own: all other axes are pooled."""
    direction, length = call["v"], call["g"]
    for label in call.labels(direction):
        pool(call, label, {axis for axis in range(direction.dim()) if length.shape[axis] == 1})
    call.put(combine(call.graph, [call.operand(direction), call.operand(length)]))


def softmax(call: Call) -> None:
    """Pools one axis and keeps it."""
    x = call["self"]
    for label in call.labels(x):
        pool(call, label, {call["dim"] % x.dim()})
    call.put(call.labels(x))


NORMS: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "native_batch_norm",
            "cudnn_batch_norm",
            "miopen_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
            "_batch_norm_no_update",
            "_batch_norm_with_update",
        ),
        batch_norm,
    ),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), layer_norm),
    "native_group_norm": group_norm,
    "_weight_norm_interface": weight_norm,
    **dict.fromkeys(("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax"), softmax),
}
