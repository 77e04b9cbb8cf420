"""Reductions, and operators that work along one axis."""

from __future__ import annotations

from torch import Tensor

from ..call import Call, Rule
from ..labels import varying
from .norms import pool


def reduce_axes(call: Call) -> None:
    """Mean, sum, norm ...: pools axes that vanish or keep one position."""
    x = call.tensors[0]
    given = call["dim"]
    given = [given] if isinstance(given, int) and not isinstance(given, bool) else given
    pooled = {axis % x.dim() for axis in given} if given else set(range(x.dim()))
    keep = call.outputs[0].dim() == x.dim()
    result = []
    for label in call.labels(x):
        axes = set(varying(label))
        rest = pool(call, label, pooled) if axes & pooled else label
        if rest is not None and axes - pooled:
            result.append(rest if keep else _without(rest, pooled))
    for number in range(len(call.outputs)):
        call.put(result, number)


def _without(label: Tensor, axes: set[int]) -> Tensor:
    return label.reshape([size for axis, size in enumerate(label.shape) if axis not in axes])


def along_axis(call: Call) -> None:
    """Sums so far, sorting, the largest: positions along one axis are told apart, the other axes pass."""
    x = call.tensors[0]
    axis = call["dim"] % x.dim() if call["dim"] is not None else None
    result = []
    for label in call.labels(x):
        if axis is None or label.shape[axis] > 1:
            call.graph.fix(label)
            continue
        call.graph.touch(label)
        same_rank = call.outputs[0].dim() == x.dim()
        result.append(label if same_rank else _without(label, {axis}))
    for number in range(len(call.outputs)):
        call.put(result, number)


def selects(call: Call) -> None:
    """What it gives depends on the values: everything is told apart."""
    call.fix(*call.tensors)


REDUCTIONS: dict[str, Rule] = {
    **dict.fromkeys(
        (
            *("mean", "sum", "amax", "amin", "linalg_vector_norm", "var_mean", "var", "std", "std_mean", "prod"),
            *("logsumexp", "norm", "nansum", "all", "any"),
        ),
        reduce_axes,
    ),
    **dict.fromkeys(
        (
            *("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "topk", "argsort", "argmax", "argmin"),
            *("max", "min"),
        ),
        along_axis,
    ),
    **dict.fromkeys(
        (
            *("nms", "nonzero", "_local_scalar_dense", "_unique2", "unique_dim", "bincount", "searchsorted", "equal"),
            *("_assert_async", "is_nonzero", "bucketize"),
        ),
        selects,
    ),
}
