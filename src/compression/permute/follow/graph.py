"""What one forward pass says about channels: nodes, edges, colours and owners.

Every position along an axis of a parameter is a node. An edge says that two nodes are the same channel. A colour says
that an operator treats a node in a way of its own. An owner says that a channel belongs to a larger thing (a block of a
grouped convolution, a head of an attention) and may be exchanged only within it, or with it as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .labels import varying

Nodes = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def mix(values: npt.ArrayLike) -> Hashes:
    """A hash of each integer (splitmix64), so that sums of hashes tell multisets apart."""
    x = np.asarray(values).astype(np.uint64)
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _flat(label: Tensor) -> Nodes:
    return label.reshape(-1).numpy()


class Graph:
    """Collects what the operators say.

    Attributes:
        n_nodes: nodes made so far.
        edges: pairs of arrays of nodes.
        colours: arrays of nodes, and a hash for each.
        owners: arrays of nodes, and the node of the owner of each.
        read: arrays of nodes that stand for the inputs of a weight.
        step: number of the operator that speaks; colours of different operators differ.
    """

    def __init__(self) -> None:
        self.n_nodes = 0
        self.edges: list[tuple[Nodes, Nodes]] = []
        self.colours: list[tuple[Nodes, Hashes]] = []
        self.owners: list[tuple[Nodes, Nodes]] = []
        self.read: list[Nodes] = []
        self.step = 0

    def fresh(self, size: int) -> Tensor:
        """New nodes (size,)."""
        self.n_nodes += size
        return torch.arange(self.n_nodes - size, self.n_nodes)

    def axes(self, shape: Sequence[int]) -> list[Tensor]:
        """A label of new nodes for every axis."""
        rank = len(shape)
        return [
            self.fresh(size).reshape([size if axis == other else 1 for other in range(rank)])
            for axis, size in enumerate(shape)
            if size > 1
        ]

    def edge(self, first: Tensor, second: Tensor) -> None:
        """The nodes at the same position of two labels (broadcast) are the same channel."""
        first, second = torch.broadcast_tensors(first, second)
        self.edges.append((_flat(first), _flat(second)))

    def colour(self, label: Tensor, values: Tensor) -> None:
        """Nodes whose `values` (broadcast) differ are treated differently by this operator."""
        label, values = torch.broadcast_tensors(label, values)
        with np.errstate(over="ignore"):
            self.colours.append((_flat(label), mix(mix(self.step) + mix(_flat(values)))))

    def touch(self, label: Tensor, tag: int = 0) -> None:
        """The operator treats all these nodes alike, but others not."""
        self.colour(label, torch.tensor(1_000_003 + tag))

    def fix(self, label: Tensor, axes: Sequence[int] | None = None) -> None:
        """Positions along `axes` (None: all) are told apart, each pair of positions along two axes on its own: a node
        that stands at several of them is known by their set."""
        axes = [axis for axis in (varying(label) if axes is None else axes) if label.shape[axis] > 1]
        if axes:
            shape = [size if axis in axes else 1 for axis, size in enumerate(label.shape)]
            at = torch.arange(int(np.prod(shape))).reshape(shape)
            self.colour(label, at + 1_000_000_007 * (1 + sum(2**axis for axis in axes)))

    def own(self, label: Tensor, owner: Tensor) -> None:
        """Each node belongs to the owner at the same position (broadcast)."""
        self.touch(label, 5)
        label, owner = torch.broadcast_tensors(label, owner)
        self.owners.append((_flat(label), _flat(owner)))

    def within(self, label: Tensor, axes: Sequence[int]) -> Tensor:
        """Channels must not leave their position along `axes`, whose positions are treated alike; returns the label of
        those positions (of no varying axis, where there are none)."""
        shape = [size if axis in axes else 1 for axis, size in enumerate(label.shape)]
        order = [*axes, *(axis for axis in range(label.dim()) if axis not in axes)]
        rows = label.permute(order).reshape(int(np.prod(shape)), -1)
        # the same channels at several positions, as in the windows of one image, are one position
        found, which = rows.unique(dim=0, return_inverse=True)
        owner = self.fresh(found.shape[0])[which].reshape(shape)
        if owner.numel() > 1:
            self.own(label, owner)
        return owner

    def collapse(self, label: Tensor, keep: Sequence[int]) -> Tensor | None:
        """The label along the axes `keep` only: positions along the others become one channel that the operator sees
        in a fixed order; None, and all told apart, where no axis is kept."""
        rest = [axis for axis in varying(label) if axis not in keep]
        if len(rest) == len(varying(label)):
            self.fix(label)
            return None
        first = label
        for axis in rest:
            first = first.narrow(axis, 0, 1)
        if rest:
            self.edge(first, label)
            self.fix(label, rest)
        return first

    def is_read(self, label: Tensor) -> None:
        """These nodes are inputs of a weight."""
        self.read.append(_flat(label))
