"""Labels: which channel each position of a tensor belongs to.

A label of a tensor is an int64 array of node numbers with the tensor's rank, of size 1 along every axis that plays no
part in it: (1, C, 1, 1) says that positions along axis 1 are channels. A tensor can have several, one for each set of
axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

Labels = list[Tensor]
Operand = tuple[tuple[int, ...], Labels]
"""Shape and labels of a tensor, brought to the rank of the result."""


def varying(label: Tensor) -> tuple[int, ...]:
    """The axes that play a part."""
    return tuple(axis for axis, size in enumerate(label.shape) if size > 1)


def along(size: int, axis: int, rank: int) -> list[int]:
    """The shape of a vector laid along one axis."""
    return [size if other == axis else 1 for other in range(rank)]


def trailing(shape: Sequence[int], labels: Labels, rank: int) -> Operand:
    """A tensor's shape and labels as broadcasting reads them: its axes are the last ones of the result."""
    lead = (1,) * (rank - len(shape))
    return (*lead, *shape), [label.reshape(*lead, *label.shape) for label in labels]


def vector_along(size: int, labels: Labels, axis: int, rank: int) -> Operand:
    """Shape and labels of a vector (size,) that runs along one axis of the result."""
    shape = along(size, axis, rank)
    return tuple(shape), [label.reshape(shape) for label in labels]


def without_constant_axes(full: Tensor) -> Tensor:
    """A label given at every position, reduced to size 1 along the axes on which nothing changes."""
    for axis, size in enumerate(full.shape):
        first = full.narrow(axis, 0, 1) if size > 1 else full
        if size > 1 and (full.stride(axis) == 0 or bool((full == first).all())):
            full = first
    return full


def nested(axes: tuple[int, ...], others: Iterable[tuple[int, ...]]) -> bool:
    """Whether some other label plays a part in all these axes and in more."""
    return any(set(axes) < set(other) for other in others)
