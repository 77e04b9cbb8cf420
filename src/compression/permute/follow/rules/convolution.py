"""Convolutions: of all kinds, transposed ones, with groups, depthwise.

Shapes: x (B, C, ...), weight (C_out, C/G, ...), of a transposed one (C, C_out/G, ...).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Call, Rule
from ..graph import Graph
from ..labels import along, varying


def convolution(call: Call) -> None:
    """The input's channels meet the weight's inputs; the result has the weight's rows as channels."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    groups, transposed = call["groups"], call["transposed"]
    graph = call.graph
    incoming = _channels(call, x)
    depthwise = groups > 1 and weight.shape[1] == 1 and groups == x.shape[1]
    if depthwise:
        out = _depthwise(call, incoming, weight, x.shape[1])
    elif groups == 1:
        out = _dense(call, incoming, weight, transposed)
    else:
        out = _grouped(call, incoming, weight, groups, transposed)
    if bias is not None:
        numbers = [label.reshape(-1) for label in call.labels(bias)]
        if out is not None and numbers:
            graph.edge(out, numbers[0])
        elif out is not None:
            graph.fix(out)
        else:
            call.fix(bias)
    if out is not None:
        graph.touch(out, 1)
        call.put([out.reshape(along(out.numel(), 1, x.dim()))])


def _channels(call: Call, x: Tensor) -> Tensor | None:
    """The channels (C,) of the input; all else that it carries is told apart."""
    found: Tensor | None = None
    for label in call.labels(x):
        kept = call.graph.collapse(label, (1,))
        if kept is not None and found is None:
            found = kept.reshape(-1)
        elif kept is not None:
            call.graph.fix(label)
    return found


def _split(call: Call, weight: Tensor) -> dict[tuple[int, ...], Tensor]:
    """The labels of a weight along its first two axes; the others, over the kernel, are told apart."""
    found: dict[tuple[int, ...], Tensor] = {}
    for label in call.labels(weight):
        kept = call.graph.collapse(label, (0, 1))
        if kept is not None and varying(kept) not in found:
            found[varying(kept)] = kept
        elif kept is not None:
            call.graph.fix(label)
    return found


def _depthwise(call: Call, incoming: Tensor | None, weight: Tensor, channels: int) -> Tensor | None:
    """Every channel has rows of its own: they follow it."""
    rows = _split(call, weight).get((0,))
    if incoming is None:
        if rows is not None:
            call.graph.fix(rows)
        return None
    repeats = weight.shape[0] // channels
    out = incoming.repeat_interleave(repeats)
    if repeats > 1:
        call.graph.colour(out, 8_000_000 + torch.arange(repeats).repeat(channels))
    if rows is None:
        call.graph.fix(incoming)
    else:
        call.graph.edge(out, rows.reshape(-1))
    return out


def _dense(call: Call, incoming: Tensor | None, weight: Tensor, transposed: bool) -> Tensor | None:
    labels = _split(call, weight)
    inner, outer = ((0,), (1,)) if transposed else ((1,), (0,))
    inputs, out = labels.pop(inner, None), labels.pop(outer, None)
    for label in labels.values():
        call.graph.fix(label)
    meet(call.graph, incoming, None if inputs is None else inputs.reshape(-1))
    return None if out is None else out.reshape(-1)


def meet(graph: Graph, incoming: Tensor | None, inputs: Tensor | None) -> None:
    """Channels meet the inputs of a weight; where only one side is followed, its positions are told apart."""
    if incoming is not None and inputs is not None:
        graph.edge(incoming, inputs)
        graph.touch(incoming)
        graph.is_read(inputs)
        return
    for one in (incoming, inputs):
        if one is not None:
            graph.fix(one)


def _grouped(call: Call, incoming: Tensor | None, weight: Tensor, groups: int, transposed: bool) -> Tensor | None:
    """Channels stay in their block on both sides. Axis 0 of the weight counts rows, axis 1 the channels of each block:
    inputs, or for a transposed convolution outputs."""
    graph = call.graph
    labels = _split(call, weight)
    rows, columns = labels.pop((0,), None), labels.pop((0, 1), None)
    for label in labels.values():
        graph.fix(label)
    of_rows = None if rows is None else rows.reshape(-1)
    of_columns = None
    if columns is not None:
        by_row = columns.reshape(weight.shape[0], weight.shape[1])
        of_columns = by_row[:: weight.shape[0] // groups].reshape(-1)
    elif weight.shape[1] == 1:  # one output per block, which has no axis of its own in the weight
        of_columns = graph.fresh(groups)
    inputs, out = (of_rows, of_columns) if transposed else (of_columns, of_rows)
    blocks = graph.fresh(groups)
    for side in (inputs, out):
        if side is not None:
            graph.own(side, blocks.repeat_interleave(side.numel() // groups))
    if incoming is None or inputs is None or out is None:
        graph.fix(blocks)  # one side stays where it is, and so must the blocks of the other
    meet(graph, incoming, inputs)
    return out


CONVOLUTIONS: dict[str, Rule] = {"convolution": convolution}
