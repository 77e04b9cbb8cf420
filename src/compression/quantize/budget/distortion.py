"""What quantizing a weight would lose, for many d and k, without clustering it for each.

A codebook is grown on a sample of the subvectors: from one centroid each is split in two, and a few mean updates
follow, so that one growth gives the distortion of k = 2, 4, 8, ... A sample of s subvectors is fitted more closely than
all n of them would be, and other ones less closely, by the same share: if the sample loses A and another one B per
subvector, a codebook of very many would lose (A + B) / 2, and one of n (A + B) / 2 * (1 - (B - A) / (B + A) * s/n).
Beyond the k for which the sample is large enough the distortion falls along the slope of rate and distortion,
2^(-2 log2(k) / d), and that share rises in proportion to k.

Shapes: n subvectors of length d, k centroids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..assign import assign
from ..revive import revive
from ..sixteen_bits import largest_size
from ..stored_codebook import as_stored

Floats = NDArray[np.float64]

SAMPLE = 16_384
"""Subvectors that a codebook is grown on, at most, and as many that it is tried on."""
MEMBERS = 16
"""Subvectors of a sample per centroid, at least; of all subvectors there may be as few as a layer's clamp allows."""
MANY = 1 << 22
"""Subvectors that are not put into a random order to draw some."""
UPDATES = 8
"""Mean updates after each doubling of the codebook."""


def distortions(vectors: Tensor, ks: Sequence[int], generator: torch.Generator) -> Floats:
    """About the distortion of all `vectors` with k centroids, for every k, with codebooks of 16-bit and 8-bit values.

    Args:
        vectors: (n, d) of a weight, finite.
        ks: powers of two, rising.
        generator: draws the sample and how centroids split.

    Returns:
        (2, len(ks)) sums of squares of what is lost, never rising, with 16 bits and with 8, which lose no less.
    """
    n, d = vectors.shape
    size = largest_size(vectors)
    if not size:
        return np.zeros((2, len(ks)))
    if n <= SAMPLE:
        ready = vectors.float().cpu() / size
        all_of_them = np.array(
            [(one.own, one.own + one.rounded) for one in _grown(ready, ready[:0], max(ks), generator).values()]
        )
        return _falling(n * size**2 * all_of_them[[k.bit_length() - 1 for k in ks]].T)
    s = min(SAMPLE, n // 2)
    drawn = _some(n, 2 * s, generator).to(vectors.device)
    ready = vectors[drawn].float().cpu() / size
    most = min(max(ks), s // MEMBERS)
    grown = _grown(ready[:s], ready[s:], most, generator)
    last = max(grown)
    found = []
    for k in ks:
        one = grown[min(k, last)]
        limit, share = (one.own + one.other) / 2, (one.other - one.own) / (one.other + one.own) if one.own else 0.0
        if k > last:
            limit, share = limit * (k / last) ** (-2 / d), share * k / last
        lost = limit * (1 - min(share * s / n, 1.0))
        found.append((lost, lost + one.rounded))  # of which steps of 8 bits do not lose less with more centroids
    return _falling(n * size**2 * np.array(found).T)


def _some(n: int, few: int, generator: torch.Generator) -> Tensor:
    """`few` of n numbers; of very many hardly any is drawn twice."""
    if n > MANY:
        return torch.randint(n, (few,), generator=generator)
    return torch.randperm(n, generator=generator)[:few]


def _falling(values: Floats) -> Floats:
    """With more centroids nothing more is lost, whatever the sample says."""
    return np.minimum.accumulate(values, axis=1)


@dataclass(frozen=True)
class _Grown:
    """What a grown codebook loses, mean squared errors per vector.

    Attributes:
        own: of the vectors that it is grown on.
        other: of others, 0 where there are none.
        rounded: what its rounding to 8 bits adds.
    """

    own: float
    other: float
    rounded: float


def _grown(vectors: Tensor, others: Tensor, most: int, generator: torch.Generator) -> dict[int, _Grown]:
    """Codebooks of 1, 2, 4, ..., `most` centroids, each grown from the one before, on `vectors`."""
    codebook = vectors.mean(0, keepdim=True)
    codes, distances = assign(vectors, codebook)
    found = {1: _looked_at(vectors, others, codebook, distances)}
    k = 1
    while 2 * k <= most:
        # half way towards and away from one of its members: the two halves lie across the cluster's spread
        member = torch.zeros(k, dtype=torch.int64)
        order = torch.randperm(vectors.shape[0], generator=generator)
        present, first = np.unique(codes[order].numpy(), return_index=True)
        member[torch.from_numpy(present)] = order[torch.from_numpy(first)]
        apart = (vectors[member] - codebook) / 2
        codebook = torch.cat([codebook + apart, codebook - apart])
        k *= 2
        for _ in range(UPDATES):
            codes, distances = assign(vectors, codebook)
            counts = torch.bincount(codes, minlength=k)
            sums = torch.zeros(k, vectors.shape[1], dtype=torch.float64).index_add_(0, codes, vectors.double())
            updated = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], codebook.double()).float()
            revive(updated, vectors, distances, counts)
            codebook = updated
        codes, distances = assign(vectors, codebook)
        found[k] = _looked_at(vectors, others, codebook, distances)
    return found


def _looked_at(vectors: Tensor, others: Tensor, codebook: Tensor, distances: Tensor) -> _Grown:
    """What a codebook loses; `distances` are those of the vectors to its centroids."""
    own, rounded = float(distances.double().mean()), as_stored(codebook, 8, None)
    return _Grown(own=own, other=_tried(others, codebook), rounded=max(_tried(vectors, rounded) - own, 0.0))


def _tried(vectors: Tensor, codebook: Tensor) -> float:
    """Mean squared error of vectors with the nearest centroids."""
    return float(assign(vectors, codebook)[1].double().mean()) if vectors.shape[0] else 0.0
