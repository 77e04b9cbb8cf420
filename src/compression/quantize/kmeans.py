"""k-means and annealed k-means on the subvectors of a layer (paper section 3.3).

Shapes: n training vectors (here: subvectors), d their length, k centroids. X (n, d), codebook C (k, d), codes (n,).

`src` is the stochastic relaxation of the codebook, SR-C (Zeger, Vaisey, Gersho 1992): before the mean update of
iteration t the training set is perturbed by Gaussian noise whose standard deviation per dimension is that of the
training set, scaled by (1 - t/T)^0.5. Given the codes, the mean of n_c perturbed vectors is their mean plus Gaussian
noise of standard deviation scale * sigma_j / sqrt(n_c), independent between centroids: exactly the same law with k*d
random numbers instead of n*d.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.compiling import CompiledLoop
from .assign import assign
from .clustering import Clustering
from .members import Members
from .registry import QUANTIZERS
from .revive import revive
from .sixteen_bits import range_problem
from .stored_codebook import as_stored


def _accumulate() -> Any:
    from .accumulate import accumulate

    return accumulate


ACCUMULATE = CompiledLoop(_accumulate)
START_NOISE = 1e-5
CHUNK = 1 << 19
"""Vectors that are compared at a time."""

PATIENCE = 10
"""Updates of Lloyd's k-means over which the distortion must fall by more than the tolerance."""

RELAXATION = 1.8
"""How far an update of `src` with a tolerance goes, in units of the way to the mean (over-relaxation; below 2, where
Lloyd's stays stable)."""

QUIET = 3
"""Plain updates without noise at the end of each annealing of `src` with a tolerance."""

VISITS = 12_800
"""Vectors per centroid that one annealing of `src` with a tolerance visits: small layers need more iterations, and can
afford them."""

SHORTEST, LONGEST = 50, 400
"""Iterations of one annealing, whatever `VISITS` asks for."""


def never() -> bool:
    """A run that nobody stops."""
    return False


def means(vectors: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sum-of-members divided by count for every centroid, (k, d), and the counts (k,); empty ones come back as
    zeros."""
    if vectors.device.type == "cpu" and vectors.dtype == torch.float32:
        total, members = np.zeros((k, vectors.shape[1])), np.zeros(k, dtype=np.int64)
        arrays = (vectors.contiguous().numpy(), codes.numpy(), total, members)
        if accumulate := ACCUMULATE.ready(*arrays):
            accumulate(*arrays)
            return torch.from_numpy(total / np.maximum(members, 1)[:, None]).float(), torch.from_numpy(members).float()
    counts = torch.bincount(codes, minlength=k).to(vectors.dtype)
    if vectors.device.type == "cuda":  # index_add_ there adds in another order at every call
        sums = Members.of(codes, k).sums(vectors)
    else:
        sums = torch.zeros(k, vectors.shape[1], dtype=vectors.dtype, device=vectors.device).index_add_(
            0, codes, vectors
        )
    return sums / counts.clamp_min(1).unsqueeze(1), counts


def _start(vectors: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k training vectors drawn without replacement, plus N(0, 1e-5) noise (standard deviation)."""
    drawn = torch.randperm(vectors.shape[0], generator=generator, device=generator.device)[:k]
    noise = (
        torch.randn(k, vectors.shape[1], generator=generator, device=generator.device, dtype=torch.float32)
        * START_NOISE
    )
    return vectors[drawn.to(vectors.device)] + noise.to(vectors.device, vectors.dtype)


def _iterate(
    vectors: Tensor,
    codebook: Tensor,
    iterations: int,
    noise: Callable[[int, Tensor], Tensor] | None = None,
    relaxed: int = 0,
    stopped: Callable[[], bool] = never,
) -> tuple[Tensor, float]:
    """`iterations` times: assign, mean update (plus the noise of iteration t, given the counts), revive.

    The first `relaxed` updates go `RELAXATION` times the way to the mean.

    Returns the codebook, and the distortion at the last assignment (that of the codebook before the last update).
    """
    codes, distances = torch.zeros(0), torch.zeros(1)
    for t in range(1, iterations + 1):
        if stopped():
            raise InterruptedError
        del codes, distances  # before the next ones are made
        codes, distances = assign(vectors, codebook)
        updated, counts = means(vectors, codes, codebook.shape[0])
        if t <= relaxed:
            updated = codebook + RELAXATION * (updated - codebook)
        if noise is not None:
            updated = updated + noise(t, counts)
        updated = torch.where(counts.unsqueeze(1) > 0, updated, codebook)
        revive(updated, vectors, distances, counts)
        codebook = updated
    return codebook, float(distances.mean())


def _finish(vectors: Tensor, codebook: Tensor, iterations: int, still: int = 0) -> Clustering:
    """Round the codebook to 16 bits and code every vector with its nearest centroid; no empty cluster is left.

    Two centroids can become one by the rounding; the second of them then has no members. A moved centroid may take the
    last member of another, so this is repeated; every round codes at least one vector as well as 16 bits can, and a
    bound guards against ties.

    Args:
        vectors: (n, d).
        codebook: (k, d).
        iterations: that it took.
        still: so many of the first centroids stay where they are, whether or not they have members.
    """
    codebook = _to_half(codebook)
    codes, distances = assign(vectors, codebook)
    for _ in range(32):
        counts = torch.bincount(codes, minlength=codebook.shape[0])
        counts[:still] += 1
        if int(counts.min()) > 0:
            break
        # a vector whose own 16-bit value is its centroid cannot be quantized better, however far it is
        pieces = zip(vectors.split(CHUNK), codes.split(CHUNK), strict=True)
        as_well_as_can_be = torch.cat([(_to_half(piece) == codebook[own]).all(1) for piece, own in pieces])
        curable = distances.masked_fill(as_well_as_can_be, 0)
        if not revive(codebook, vectors, curable, counts, rounded=True):
            break
        del as_well_as_can_be, curable, codes, distances
        codes, distances = assign(vectors, codebook)
    total = sum(float(piece.double().sum()) for piece in distances.cpu().split(CHUNK))
    return Clustering(codebook, codes, total / vectors.shape[0], iterations)


def _to_half(codebook: Tensor) -> Tensor:
    """The nearest values that 16-bit floats can hold, in the codebook's own dtype."""
    return codebook.to(torch.float16).to(codebook.dtype)


def kmeans(
    vectors: Tensor,
    k: int,
    iterations: int,
    generator: torch.Generator,
    tolerance: float = 0.0,
    stopped: Callable[[], bool] = never,
) -> Clustering:
    """Lloyd's k-means: `iterations` mean updates, then a last assignment.

    Args:
        vectors: (n, d) float32, n >= k.
        k: centroids.
        iterations: mean updates; 0 codes with the start codebook.
        generator: draws the start.
        tolerance: stop when 10 updates lower the distortion by less than this share of it; 0: make all updates.
        stopped: asked before every update whether to give up.

    Raises:
        InterruptedError: `stopped` said so.
    """
    codebook, made, earlier = _start(vectors, k, generator), 0, math.inf
    while made < iterations:
        some = min(PATIENCE, iterations - made) if tolerance else iterations
        codebook, now = _iterate(vectors, codebook, some, stopped=stopped)
        made += some
        if earlier - now <= tolerance * now:
            break
        earlier = now
    return _finish(vectors, codebook, made)


def src(
    vectors: Tensor,
    k: int,
    iterations: int,
    generator: torch.Generator,
    tolerance: float = 0.0,
    stopped: Callable[[], bool] = never,
) -> Clustering:
    """Annealed k-means, SR-C, with T = `iterations`; the last update is noise-free. Arguments as for `kmeans`.

    With a tolerance, shorter annealings follow each other, each from the codebook that the one before reached, until
    one gains less than `tolerance` or T iterations are spent; their updates are over-relaxed. The length depends on
    n/k: with many vectors per centroid the noise of a mean is small, and little is left for a long annealing to find.
    """
    noise = partial(_noise, vectors.std(dim=0, correction=0), generator)
    codebook = _start(vectors, k, generator)
    if not tolerance:
        codebook, _ = _iterate(vectors, codebook, iterations, partial(noise, iterations), stopped=stopped)
        return _finish(vectors, codebook, iterations)
    length = min(max(SHORTEST, VISITS * k // vectors.shape[0]), LONGEST)
    best, lowest, made = codebook, math.inf, 0
    while made < iterations:
        some = min(length, iterations - made)
        relaxed = max(0, some - QUIET)
        codebook, now = _iterate(vectors, codebook, some, partial(noise, relaxed), relaxed, stopped)
        made += some
        gained = lowest - now
        if gained > 0:
            best, lowest = codebook, now
        if gained < tolerance * now:
            break
    return _finish(vectors, best, made)


def _noise(sigma: Tensor, generator: torch.Generator, total: int, t: int, counts: Tensor) -> Tensor:
    """(k, d) noise of the means of counts (k,) vectors in iteration t of an annealing over `total` iterations."""
    scale = max(0.0, 1 - t / total) ** 0.5 if total else 0.0
    drawn = torch.randn(
        counts.shape[0], sigma.shape[0], generator=generator, device=generator.device, dtype=torch.float32
    )
    return drawn.to(sigma.device, sigma.dtype) * sigma * (scale / counts.clamp_min(1).sqrt().unsqueeze(1))


Quantizer = Callable[[Tensor, int, int, torch.Generator, float, Callable[[], bool]], Clustering]


def cluster(
    kind: str,
    vectors: Tensor,
    k: int,
    iterations: int,
    generator: torch.Generator,
    tolerance: float = 0.0,
    stopped: Callable[[], bool] = never,
) -> Clustering:
    """Cluster with the method called `kind`.

    Where some vectors are all zero (a pruned weight), one centroid is zero exactly and they have its code, so that they
    stay zero; the others are clustered without them, and coded with the zero where that is nearest. A training moves
    centroids, this one too.

    Raises:
        ValueError: fewer vectors than centroids, or values that are not finite.
        InterruptedError: `stopped` said so.
    """
    if vectors.shape[0] < k:
        raise ValueError(f"{k} centroids were asked for, but there are only {vectors.shape[0]} subvectors")
    problem = range_problem(vectors)
    if problem:
        raise ValueError(problem)
    quantizer: Quantizer = QUANTIZERS[kind]
    live = vectors.any(1)
    if live.all():
        return quantizer(vectors, k, iterations, generator, tolerance, stopped)
    others = vectors[live]
    if not others.shape[0]:
        return Clustering(vectors.new_zeros(k, vectors.shape[1]), live.long(), 0.0, 0)
    found = quantizer(others, min(k - 1, others.shape[0]), iterations, generator, tolerance, stopped)
    codebook = vectors.new_zeros(k, vectors.shape[1])
    codebook[1 : 1 + found.codebook.shape[0]] = found.codebook
    found = _finish(others, codebook, found.iterations, still=1)  # the zero may have taken the members of another
    codebook, iterations = found.codebook, found.iterations
    del others, found
    return _coded(vectors, codebook, live, iterations)


def with_eight_bits(vectors: Tensor, found: Clustering, dtype: torch.dtype) -> Clustering:
    """A clustering of the vectors (n, d) with its codebook rounded to 8 bits, and each vector with the centroid that is
    nearest then; those that are zero keep the first. `dtype`: in which the codebook will be kept."""
    codebook = as_stored(found.codebook.to(dtype), 8, None).type_as(vectors)
    return _coded(vectors, codebook, vectors.any(1), found.iterations)


def _coded(vectors: Tensor, codebook: Tensor, live: Tensor, iterations: int) -> Clustering:
    """All `vectors` with the nearest centroid; those that are not `live` with the first."""
    codes = torch.empty(vectors.shape[0], dtype=torch.int64, device=vectors.device)
    total = 0.0
    for start in range(0, vectors.shape[0], CHUNK):
        own, distances = assign(vectors[start : start + CHUNK], codebook)
        codes[start : start + CHUNK] = own.masked_fill_(~live[start : start + CHUNK], 0)
        total += float(distances.cpu().double().sum())
    return Clustering(codebook, codes, total / vectors.shape[0], iterations)
