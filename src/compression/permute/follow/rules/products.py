"""Matrix products and attention.

Shapes: a (..., n, k), b (..., k, m); the leading axes are a batch. What both sides carry along the batch (the heads of
an attention) owns the channels that are contracted.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..call import Call, Rule
from ..graph import Graph
from ..labels import Labels, Operand, nested, varying
from .pointwise import combine


def multiply(graph: Graph, a: Operand, b: Operand, weights: Sequence[bool] = (False, False)) -> Labels:
    """The labels of a @ b.

    Args:
        graph: what is said goes here.
        a: shape and labels of a.
        b: shape and labels of b, of the same rank.
        weights: which of them were computed from parameters alone; their inputs are read.
    """
    rank = len(a[0])
    contracted = {0: rank - 1, 1: rank - 2}
    heads = _contract(graph, a, b, weights)
    batch: dict[tuple[int, ...], dict[int, Tensor]] = {}
    outer: list[tuple[int, Tensor]] = []
    for side, (_, labels) in enumerate((a, b)):
        for label in labels:
            axes = varying(label)
            if contracted[side] in axes or not axes:
                continue
            if max(axes) < rank - 2:
                batch.setdefault(axes, {})[side] = label
            else:
                outer.append((side, label))
    if heads is not None:
        held = batch.setdefault(varying(heads), {})
        for label in held.values():
            graph.edge(label, heads)
        held.update({0: heads, 1: heads})
    result = []
    for side, label in outer:
        other = (b, a)[side][0]
        unnamed = {axis for axis in varying(label) if axis < rank - 2 and other[axis] > 1}
        for axes, held in batch.items():
            if 1 - side in held and set(axes) <= unnamed:
                graph.own(label, held[1 - side])
                unnamed -= set(axes)
        graph.fix(label, sorted(unnamed))
        graph.touch(label, side)
        result.append(label)
    shared = [varying(label) for label in result]
    for axes, held in batch.items():
        first = next(iter(held.values()))
        if len(held) == 2:
            graph.edge(held[0], held[1])
        elif not any(set(axes) <= set(other) for other in shared):
            other_shape = (b if 0 in held else a)[0]
            graph.fix(first, [axis for axis in axes if other_shape[axis] > 1])
        graph.touch(first, 2)
        if not nested(axes, shared):
            result.append(first)
    return result


def _contract(graph: Graph, a: Operand, b: Operand, weights: Sequence[bool]) -> Tensor | None:
    """Join the contracted axes; returns the label of the batch positions that own them, if both sides carry such."""
    rank = len(a[0])
    inner = (rank - 1, rank - 2)
    sides = [
        [label for label in labels if axis in varying(label)] for (_, labels), axis in zip((a, b), inner, strict=True)
    ]
    for label in (*sides[0][1:], *sides[1][1:]):
        graph.fix(label)
    if not (sides[0] and sides[1]):
        for label in (*sides[0][:1], *sides[1][:1]):
            graph.fix(label)
        return None
    left, right = sides[0][0], sides[1][0]
    common = [axis for axis in varying(left) if axis in varying(right) and axis < rank - 2]
    first = graph.collapse(left, (*common, inner[0]))
    second = graph.collapse(right, (*common, inner[1]))
    if first is None or second is None:  # never: the contracted axis is kept
        return None
    second = second.transpose(-1, -2)
    graph.edge(first, second)
    graph.touch(first)
    if weights[1]:
        graph.is_read(second)
    elif weights[0]:
        graph.is_read(first)
    if not common:
        return None
    return graph.within(first, common)


def product(call: Call) -> None:
    """`mm` and `bmm`."""
    a, b = call.tensors[:2]
    call.put(_product(call, a, b))


def _product(call: Call, a: Tensor, b: Tensor) -> Labels:
    return multiply(
        call.graph,
        (tuple(a.shape), call.labels(a)),
        (tuple(b.shape), call.labels(b)),
        (call.is_weight(a), call.is_weight(b)),
    )


def product_and_sum(call: Call) -> None:
    """`addmm` and `baddbmm`."""
    total, a, b = call.tensors[:3]
    shape = tuple(call.outputs[0].shape)
    call.put(combine(call.graph, [call.operand(total), (shape, _product(call, a, b))]))


def attention(call: Call) -> None:
    """Scaled dot products of queries and keys (softmax), times values; a mask is added before the softmax."""
    query, key, value = call["query"], call["key"], call["value"]
    turned = [label.transpose(-1, -2) for label in call.labels(key)]
    shape = (*query.shape[:-1], key.shape[-2])
    scores = multiply(
        call.graph,
        (tuple(query.shape), call.labels(query)),
        ((*key.shape[:-2], key.shape[-1], key.shape[-2]), turned),
    )
    masks = [tensor for tensor in call.tensors if tensor is not query and tensor is not key and tensor is not value]
    scores = combine(call.graph, [(shape, scores), *(call.operand(mask, len(shape)) for mask in masks)])
    call.put(multiply(call.graph, (shape, scores), (tuple(value.shape), call.labels(value))))


PRODUCTS: dict[str, Rule] = {
    **dict.fromkeys(("mm", "bmm"), product),
    **dict.fromkeys(("addmm", "baddbmm"), product_and_sum),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_attention_math",
            "_scaled_dot_product_attention_math_for_mps",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        attention,
    ),
}
