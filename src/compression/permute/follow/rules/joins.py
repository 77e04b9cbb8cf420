"""Joining tensors, and writing one into a part of another."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Call, Rule
from ..labels import Labels, Operand, along, varying
from .pointwise import combine


def join(call: Call) -> None:
    """`cat` and `stack`: channels along the joined axis stand one after the other; others meet, as in an addition."""
    pieces = [tensor for tensor in call.tensors if tensor.numel()]
    rank = call.outputs[0].dim()
    axis = call["dim"] % rank
    operands: list[Operand] = []
    for tensor in pieces:
        labels = call.labels(tensor)
        shape = list(tensor.shape)
        if call.name == "stack":
            labels = [label.unsqueeze(axis) for label in labels]
            shape.insert(axis, 1)
        operands.append((tuple(shape), labels))
    lying = [[label for label in labels if axis in varying(label)] for _, labels in operands]
    meeting = [
        (
            tuple(1 if at == axis else size for at, size in enumerate(shape)),
            [x for x in labels if axis not in varying(x)],
        )
        for shape, labels in operands
    ]
    result = combine(call.graph, meeting)
    if any(lying):
        result.append(_end_to_end(call, operands, lying, axis))
    call.put(result)


def _end_to_end(call: Call, operands: list[Operand], lying: list[Labels], axis: int) -> Tensor:
    graph = call.graph
    if all(len(labels) == 1 and varying(labels[0]) == varying(lying[0][0]) for labels in lying):
        alike = {tuple(1 if at == axis else n for at, n in enumerate(labels[0].shape)) for labels in lying}
        if len(alike) == 1:
            return torch.cat([labels[0] for labels in lying], axis)
    parts = []
    for (shape, _), labels in zip(operands, lying, strict=True):
        kept = [graph.collapse(label, (axis,)) for label in labels]
        for label in kept[1:]:
            if label is not None:
                graph.fix(label)
        if kept and kept[0] is not None:
            parts.append(kept[0])
        else:  # values without channels, each of its own kind
            nodes = graph.fresh(shape[axis])
            graph.colour(nodes, nodes)
            parts.append(nodes.reshape(along(shape[axis], axis, len(shape))))
    return torch.cat(parts, axis)


def write(call: Call) -> None:
    """`x[index] = values`: which positions are written is told apart along the indexed axis; other channels meet."""
    x, values = call["self"], call["values"]
    indexed = [axis for axis, index in enumerate(call["indices"]) if index is not None]
    call.fix(*(tensor for tensor in call.tensors if tensor is not x and tensor is not values))
    if len(indexed) != 1 or call["indices"][indexed[0]].dim() != 1:
        call.fix(x, values)
        return
    (axis,) = indexed
    operands: list[Operand] = []
    for tensor in (x, values):
        shape, labels = call.operand(tensor, x.dim())
        for label in labels:
            call.graph.fix(label, [axis])
        one_place = tuple(1 if at == axis else size for at, size in enumerate(shape))
        operands.append((one_place, [label for label in labels if label.shape[axis] == 1]))
    combine(call.graph, operands)


JOINS: dict[str, Rule] = {
    **dict.fromkeys(("cat", "stack"), join),
    **dict.fromkeys(("index_put_", "_index_put_impl_"), write),
}
