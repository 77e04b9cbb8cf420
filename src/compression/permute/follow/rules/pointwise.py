"""Operators that compute each value from the values at the same position."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..call import Call, Rule
from ..graph import Graph
from ..labels import Labels, Operand, nested, varying


def combine(graph: Graph, operands: Sequence[Operand]) -> Labels:
    """The labels of a result whose values come from the operands' values at the same position.

    Channels that meet are the same. Where an operand has its values at every position but no channels there, it tells
    the positions apart.

    Args:
        graph: what is said goes here.
        operands: shapes and labels, all of the result's rank.
    """
    held: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    for number, (_, labels) in enumerate(operands):
        own: dict[tuple[int, ...], Tensor] = {}
        for label in labels:
            axes = varying(label)
            if axes in own:  # two numberings of the same positions: neither can be followed any further
                graph.fix(label)
                graph.fix(own[axes])
            elif axes:
                own[axes] = label
                held.setdefault(axes, []).append((number, label))
    followed: dict[tuple[int, ...], Tensor] = {}
    together: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for axes in sorted(held, key=len, reverse=True):
        first = held[axes][0][1]
        for _, other in held[axes][1:]:
            graph.edge(first, other)
        graph.touch(first)
        holders = {number for number, _ in held[axes]}
        # a weight of a grouped convolution has rows, and within them inputs: both go on
        beside = {varying(label) for number in holders for label in operands[number][1]}
        together |= {(axes, other) for other in beside}
        unnamed: set[int] = set()
        for number, operand in enumerate(operands):
            if number not in holders:
                unnamed |= _meet(graph, first, operand, beside)
        if unnamed != set(axes):  # else every position is told apart: there is nothing to follow any further
            followed[axes] = first
    return [
        label
        for axes, label in followed.items()
        if not nested(axes, (other for other in followed if (other, axes) not in together))
    ]


def _meet(graph: Graph, label: Tensor, operand: Operand, beside: set[tuple[int, ...]]) -> set[int]:
    """A label meets an operand that has none for just these axes, but perhaps for some of them; returns the axes whose
    positions it tells apart. What stands `beside` the label meets the operand on its own."""
    shape, labels = operand
    axes = set(varying(label))
    if any(axes < set(varying(other)) for other in labels):
        return set()  # said where the larger one is looked at
    unnamed = {axis for axis in axes if shape[axis] > 1}
    for other in labels:
        inner = set(varying(other))
        if inner and inner < axes:
            if varying(other) not in beside:
                join_part(graph, label, other)
            unnamed -= inner
    graph.fix(label, sorted(unnamed))
    return unnamed


def join_part(graph: Graph, label: Tensor, part: Tensor) -> None:
    """A label meets one for only some of its axes. Where those lead, they number the blocks that own the channels (the
    heads of an attention); else they number the channels, and each has many positions."""
    inner = set(varying(part))
    rest = [axis for axis in varying(label) if axis not in inner]
    if max(inner) < min(rest):
        graph.own(label, part)
    else:
        graph.edge(label, part)
        graph.fix(label, rest)


def pointwise(call: Call) -> None:
    """Addition, multiplication, activations, comparisons, in place or not."""
    target = call.outputs[0] if call.outputs else call.tensors[0]
    labels = combine(call.graph, [call.operand(tensor, target.dim()) for tensor in call.tensors if tensor.dim()])
    for number in range(len(call.outputs)):
        call.put(labels, number)


def nothing(_call: Call) -> None:
    """The values are overwritten or stay; no channel is told apart."""


def gated(call: Call) -> None:
    """`glu`: one half of the channels gates the other."""
    x: Tensor = call["self"]
    axis = call["dim"] % x.dim()
    shape = tuple(call.outputs[0].shape)
    halves: list[Labels] = [[], []]
    for label in call.labels(x):
        parts = label.chunk(2, axis) if label.shape[axis] > 1 else (label, label)
        for half, part in zip(halves, parts, strict=True):
            half.append(part)
    call.put(combine(call.graph, [(shape, half) for half in halves]))


POINTWISE: dict[str, Rule] = {
    **dict.fromkeys(
        (
            *("copy_", "prelu", "_prelu_kernel", "log_sigmoid_forward", "masked_fill", "masked_fill_", "where"),
            *("dropout", "native_dropout", "hardswish", "hardswish_", "hardsigmoid", "add_", "sub_", "mul_", "div_"),
            # which earlier versions of torch do not tag
            *("hardtanh_", "hardsigmoid_", "leaky_relu", "leaky_relu_", "elu_", "celu_", "selu_", "gelu_", "mish_"),
            "threshold_",
        ),
        pointwise,
    ),
    "glu": gated,
    **dict.fromkeys(("zero_", "fill_", "detach_"), nothing),
}
