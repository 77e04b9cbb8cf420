"""Operators that only move values: the labels are moved by the same operator.

Along an axis that plays no part a label is stretched without memory, so that views cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..call import Call, Rule
from ..labels import Labels, without_constant_axes

SAME = (
    *("_to_copy", "clone", "contiguous", "detach", "alias", "lift_fresh_copy", "lift_fresh", "positive"),
    *("_conj", "resolve_conj", "resolve_neg"),
)
RESHAPES = ("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy")
MOVERS = (
    *("permute", "transpose", "t", "unsqueeze", "squeeze", "slice", "select", "expand", "flip", "roll", "split"),
    *("split_with_sizes", "chunk", "unbind", "repeat", "unfold", "pixel_shuffle", "pixel_unshuffle", "narrow"),
    *("channel_shuffle", "native_channel_shuffle", "tile", "expand_copy", "permute_copy", "unsafe_split", "movedim"),
    "diagonal",
)
LOOKUPS = ("index", "index_select", "embedding", "gather", "take_along_dim")
IGNORED = ("dtype", "device", "memory_format", "layout", "pin_memory", "non_blocking", "implicit")


def same(call: Call) -> None:
    """A copy, perhaps in another type."""
    call.put(call.labels(call.tensors[0]))


def move(call: Call) -> None:
    """Move the labels as the values were moved."""
    x = call.tensors[0]
    call.fix(*call.tensors[1:])
    if any(output.numel() == 0 for output in call.outputs):
        call.fix(x)
        return
    results: list[Labels] = [[] for _ in call.outputs]
    for label in call.labels(x):
        moved = _moved(call, label.expand(x.shape))
        for result, part in zip(results, moved, strict=True):
            short = without_constant_axes(part)
            if short.numel() == 1:  # one channel was picked out: it is not like the others
                call.graph.touch(short, 3)
            result.append(short.contiguous())
    for number, labels in enumerate(results):
        call.put(labels, number)


def _moved(call: Call, label: Tensor) -> list[Tensor]:
    if call.name in RESHAPES:
        return [label.reshape(call.outputs[0].shape)]
    x, *_ = call.tensors

    def stand_in(value: Any) -> Any:
        if value is x:
            return label
        return value.cpu() if isinstance(value, Tensor) else value

    kwargs = {key: value for key, value in call.kwargs.items() if key not in IGNORED}
    moved = call.func(*tree_map(stand_in, call.args), **tree_map(stand_in, kwargs))
    return [moved] if isinstance(moved, Tensor) else list(moved)


def look_up(call: Call) -> None:
    """Indexing: with known positions it moves values; with positions that depend on data nothing is known along the
    axes that are indexed."""
    x = call.tensors[0]
    if not all(call.is_known(tensor) for tensor in call.tensors[1:]):
        indexed = _indexed_axes(call["indices"]) if call.name == "index" else {0}
        if call.name in ("index_select", "gather", "take_along_dim"):
            indexed = {call["dim"] % x.dim()}
        for label in call.labels(x):
            call.graph.fix(label, sorted(indexed))
    move(call)


def _indexed_axes(indices: Sequence[Tensor | None]) -> set[int]:
    """The axes that `x[indices]` replaces; a mask stands for as many as it has itself."""
    axes: set[int] = set()
    at = 0
    for index in indices:
        span = index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        if index is not None:
            axes.update(range(at, at + span))
        at += span
    return axes


def triangle(call: Call) -> None:
    """`tril` and `triu` set values to zero by their position on the last two axes."""
    x = call.tensors[0]
    kept = []
    for label in call.labels(x):
        call.graph.fix(label, [axis for axis in (x.dim() - 2, x.dim() - 1) if label.shape[axis] > 1])
        kept.append(label)
    call.put(kept)


def restride(call: Call) -> None:
    """`as_strided_` to the same shape: other strides for the same values (pooling of channels-last maps does that)."""
    if tuple(call["size"]) != tuple(call.tensors[0].shape):
        call.unknown()


MOVES: dict[str, Rule] = {
    **dict.fromkeys(SAME, same),
    **dict.fromkeys((*RESHAPES, *MOVERS), move),
    **dict.fromkeys(LOOKUPS, look_up),
    **dict.fromkeys(("tril", "triu"), triangle),
    "as_strided_": restride,
}
