"""Channels from the graph: nodes that are the same, and a signature that equals where nothing tells channels apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from .graph import Graph, Hashes, Nodes, mix
from .labels import Labels

ROUNDS = 3
"""Each round lets a node's hash say what stands one edge further away."""


@dataclass(frozen=True)
class Slot:
    """One label of a parameter or buffer.

    Attributes:
        tensor: its name.
        shape: of the label.
        channel: (positions,) the channel of each position.
        role: (positions,) a hash of what the node at each position is used for.
        reads: whether these are inputs of a weight.
    """

    tensor: str
    shape: tuple[int, ...]
    channel: Nodes
    role: Hashes
    reads: bool


@dataclass(frozen=True)
class Channels:
    """All channels of the pass.

    Attributes:
        signature: (channels,) equal where no operator tells two channels apart, whoever owns them.
        first: (channels,) the earliest node, which orders channels as the network does.
        placed: (channels,) whether a parameter or buffer holds it.
        owned: (pairs,) channels that have an owner, and
        owners: (pairs,) the channel that owns each; pairs are sorted by owner.
        slots: where the channels stand.
    """

    signature: Hashes
    first: Nodes
    placed: np.ndarray
    owned: Nodes
    owners: Nodes
    slots: list[Slot]


def _joined(pairs: list[tuple[np.ndarray, np.ndarray]], types: tuple[type, type]) -> tuple[np.ndarray, np.ndarray]:
    if not pairs:
        return np.empty(0, types[0]), np.empty(0, types[1])
    return np.concatenate([pair[0] for pair in pairs]), np.concatenate([pair[1] for pair in pairs])


def _add(total: Hashes, at: Nodes, values: Hashes) -> None:
    with np.errstate(over="ignore"):
        np.add.at(total, at, values)


def channels_of(graph: Graph, labelled: Mapping[str, Labels]) -> Channels:
    """Find the channels of a finished pass."""
    n = graph.n_nodes
    a, b = _joined(graph.edges, (np.int64, np.int64))
    n_channels, channel = connected_components(coo_matrix((np.ones(a.size, np.int8), (a, b)), shape=(n, n)), False)
    hashes = np.zeros(n, np.uint64)
    _add(hashes, *_joined(graph.colours, (np.int64, np.uint64)))
    read = np.zeros(n, bool)
    for nodes in graph.read:
        read[nodes] = True
    flat = [
        (name, number, label.reshape(-1).numpy(), label)
        for name, labels in labelled.items()
        for number, label in enumerate(labels)
    ]
    placed = np.zeros(n_channels, bool)
    for slot, (_, _, nodes, _) in enumerate(flat):
        placed[channel[nodes]] = True
        _add(hashes, nodes, np.broadcast_to(mix(slot + 123_456_789), nodes.shape))
    with np.errstate(over="ignore"):
        for _ in range(ROUNDS):
            spread = np.zeros(n, np.uint64)
            _add(spread, a, mix(hashes[b]))
            _add(spread, b, mix(hashes[a]))
            hashes = mix(hashes + spread)
    signature = np.zeros(n_channels, np.uint64)
    _add(signature, channel, hashes)
    first = np.full(n_channels, n, np.int64)
    np.minimum.at(first, channel, np.arange(n))
    owned, owners = _owner_pairs(graph, channel)
    slots = [
        Slot(name, tuple(label.shape), channel[nodes], hashes[nodes], bool(read[nodes].any()))
        for name, _, nodes, label in flat
    ]
    return Channels(signature, first, placed, owned, owners, slots)


def _owner_pairs(graph: Graph, channel: Nodes) -> tuple[Nodes, Nodes]:
    """Each pair of channel and owner once, sorted by owner."""
    nodes, owners = _joined(graph.owners, (np.int64, np.int64))
    if not nodes.size:
        return nodes, owners
    pairs = np.unique(np.stack([channel[owners], channel[nodes]], axis=1), axis=0)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return pairs[:, 1], pairs[:, 0]


def exchangeable(channels: Channels) -> list[Nodes]:
    """Sets of two or more channels that may be exchanged, each in the network's order; sets in that order, too."""
    by_owner = np.zeros_like(channels.signature)
    _add(by_owner, channels.owned, mix(channels.owners))
    free = channels.placed.copy()
    free[channels.owners] = False  # an owner moves with what it owns, see `whole_blocks`
    held = np.flatnonzero(free)
    keys = np.stack([channels.signature[held], by_owner[held]], axis=1)
    return sorted_sets(held, keys, channels.first)


def sorted_sets(members: Nodes, keys: Hashes, first: Nodes) -> list[Nodes]:
    """The sets of two or more members with equal keys (members, 2), in the order of `first`."""
    if not members.size:
        return []
    order = np.lexsort((first[members], keys[:, 1], keys[:, 0]))
    members, keys = members[order], keys[order]
    cuts = np.flatnonzero((keys[1:] != keys[:-1]).any(axis=1)) + 1
    sets = [found for found in np.split(members, cuts) if found.size > 1]
    return sorted(sets, key=lambda found: int(first[found[0]]))
