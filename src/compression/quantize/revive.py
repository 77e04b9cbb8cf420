"""Centroids without members are moved to where the codebook serves worst."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Distances whose largest are looked for at a time."""


def revive(codebook: Tensor, vectors: Tensor, distances: Tensor, counts: Tensor, *, rounded: bool = False) -> int:
    """Move the centroids without members to the worst quantized vectors, distinct ones, in place.

    Crowds of equal vectors that come first can hide the others; `rounded` looks behind them, however many they are, and
    takes the vectors as 16-bit floats hold them.

    Returns the number that was moved: fewer than were empty only where there are not enough distinct badly quantized
    vectors.
    """
    empty = torch.nonzero(counts == 0).flatten()
    if empty.numel() == 0:
        return 0
    looked_at = 2 * empty.numel()
    most = distances.numel() if rounded else 64 * empty.numel()
    candidates = _worst(vectors, distances, looked_at, rounded)
    while candidates.shape[0] < empty.numel() and looked_at < most:
        looked_at *= 4
        candidates = _worst(vectors, distances, looked_at, rounded)
    moved = min(empty.numel(), candidates.shape[0])
    codebook[empty[:moved]] = candidates[:moved]
    return moved


def _worst(vectors: Tensor, distances: Tensor, most: int, rounded: bool) -> Tensor:
    """The distinct ones among the `most` worst quantized vectors, worst first; those at distance 0 are not among
    them."""
    # equal distances in the order of the vectors, which topk does not promise
    order = _largest(distances, most).sort().values
    order = order[distances[order].sort(descending=True, stable=True).indices]
    found = vectors[order[distances[order] > 0]]
    return _distinct(found.to(torch.float16).to(found.dtype) if rounded else found)


def _largest(values: Tensor, most: int) -> Tensor:
    """Where the `most` largest of `values` are; in chunks, as topk copies all it is given, with a number to each."""
    if values.numel() <= CHUNK:
        return torch.topk(values, min(most, values.numel())).indices
    starts = range(0, values.numel(), CHUNK)
    pieces = [torch.topk(piece, min(most, piece.numel())).indices for piece in values.split(CHUNK)]
    found = torch.cat([piece + start for start, piece in zip(starts, pieces, strict=True)])
    return found[torch.topk(values[found], min(most, found.numel())).indices]


def _distinct(vectors: Tensor) -> Tensor:
    """The distinct ones among `vectors` (n, d), in the order of their first appearance."""
    if not vectors.shape[0]:
        return vectors
    _, inverse = torch.unique(vectors, dim=0, return_inverse=True)
    position = torch.arange(vectors.shape[0], device=vectors.device)
    first = torch.full((int(inverse.max()) + 1,), vectors.shape[0], device=vectors.device)
    first = first.scatter_reduce(0, inverse, position, "amin")
    return vectors[first.sort().values]
