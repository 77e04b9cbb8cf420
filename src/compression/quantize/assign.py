"""The nearest centroid of every vector, the inner loop of clustering: exact, and never n x k distances in memory.

On the CPU in float32 this is faiss's flat search, whose fused kernels were the fastest exact ones tried, ahead of a
chunked matrix product with argmin and of a kernel compiled by numba. Elsewhere, and without faiss, chunks of the
product are reduced one after the other.

Shapes: n vectors of length d, k centroids.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK_ENTRIES = 1 << 20
"""Entries of the distance matrix that are held at a time on the CPU; 64 times as many on other devices."""

WORTH_FAISS = 1 << 16
"""Distances below which the call is not worth its way through NumPy."""


def assign(vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of every vector and its squared distance.

    Args:
        vectors: (n, d) float.
        codebook: (k, d) of the same dtype and device.

    Returns:
        codes (n,) int64 (any of several equally near ones) and squared distances (n,) >= 0.
    """
    on_cpu = vectors.device.type == "cpu" and vectors.dtype == torch.float32
    if on_cpu and vectors.shape[0] * codebook.shape[0] >= WORTH_FAISS and _faiss() is not None:
        return _assign_faiss(vectors, codebook)
    return assign_in_chunks(vectors, codebook)


def assign_in_chunks(vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """As `assign`, by chunks of a matrix product, on any device."""
    half_norms = codebook.square().sum(1).mul_(0.5)
    transposed = codebook.t().contiguous()
    entries = CHUNK_ENTRIES if vectors.device.type == "cpu" else 64 * CHUNK_ENTRIES
    step = max(1, entries // codebook.shape[0])
    codes = torch.empty(vectors.shape[0], dtype=torch.int64, device=vectors.device)
    for start in range(0, vectors.shape[0], step):
        # |x - c|^2 / 2 = |x|^2 / 2 + (|c|^2 / 2 - x.c); the first term does not change the order
        scores = torch.addmm(half_norms, vectors[start : start + step], transposed, alpha=-1)
        torch.argmin(scores, dim=1, out=codes[start : start + step])
    return codes, squared_distances(vectors, codebook, codes)


def squared_distances(vectors: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """(n,) squared distance of every vector to its centroid."""
    return (vectors - codebook[codes]).square_().sum(1)


def _assign_faiss(vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    index = _faiss().IndexFlatL2(codebook.shape[1])
    index.add(codebook.contiguous().numpy())
    distances, codes = index.search(vectors.contiguous().numpy(), 1)
    np.maximum(
        distances, 0, out=distances
    )  # by NumPy: no team of threads of its own in a layer clustered beside others
    return torch.from_numpy(codes).view(-1), torch.from_numpy(distances).view(-1)


def one_thread() -> None:
    """From now on the calling thread assigns by itself, without a team of faiss's own."""
    if _faiss() is not None:
        _faiss().omp_set_num_threads(1)


@cache
def _faiss() -> Any:
    try:
        import faiss
    except Exception:  # not there for every platform and Python version, or libraries that do not fit each other
        return None
    # n * d below which faiss compares vectors one by one (its default, 128,000, holds most layers of a ResNet): with
    # the one nearest
    # centroid asked for, its fused kernels are 6 to 30 times as fast at every size
    faiss.cvar.distance_compute_blas_threshold = 0
    return faiss
