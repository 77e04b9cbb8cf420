"""The steps from a clustering to a codebook and codes that keep what a layer computes.

None of them knows how the first codebook was found. Each takes a state and returns another one, never a worse one: a
proposal that raises the loss is dropped. Notation and shapes as in `target`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..members import Members
from ..stored_codebook import as_stored
from .target import State, Target, sums_by_code

LLOYD_UPDATES = 6
"""Of the weighted start; the steps after it make up for the rest."""
CG_STEPS = 10
"""Of the least squares; later ones gain next to nothing."""
ROUNDINGS = 2
"""Of a codebook to 8 bits, after the first."""
CHUNK = 1 << 22
"""Scores of vectors and centroids that are held at a time."""


def better(state: State, proposed: State) -> State:
    """The proposal, where its loss is lower, else `state`."""
    return proposed if proposed.loss < state.loss else state


def weighted_start(target: Target, state: State, updates: int = LLOYD_UPDATES) -> State:
    """Lloyd's k-means with every position of a row weighted by the diagonal of H."""
    h = target.hessian.diagonal(dim1=1, dim2=2)
    h = h / h.mean()
    vectors = target.vectors(target.aim)
    weights = target.vectors(h[:, None].expand(target.aim.shape))
    codebook, k = state.codebook, state.codebook.shape[0]
    pruned = None if target.pruned is None else target.pruned.flatten()
    for _ in range(updates):
        codes = _nearest(vectors, weights, codebook, pruned)
        total = sums_by_code(weights, codes, k)
        means = sums_by_code(weights * vectors, codes, k) / total.clamp_min(torch.finfo(total.dtype).tiny)
        codebook = _keep_zero(target, torch.where(total > 0, means, codebook))
    codes = _nearest(vectors, weights, codebook, pruned)
    return better(state, target.state(codebook, codes.view(state.codes.shape)))


def _nearest(vectors: Tensor, weights: Tensor, codebook: Tensor, pruned: Tensor | None) -> Tensor:
    """(n,) the centroid with the least weighted distance to each of the vectors (n, d), weights (n, d)."""
    step = max(1, CHUNK // codebook.shape[0])
    squares, centroids = codebook.square().t().contiguous(), codebook.t().contiguous()
    codes = torch.empty(vectors.shape[0], dtype=torch.int64, device=vectors.device)
    for start in range(0, vectors.shape[0], step):
        w = weights[start : start + step]
        scores = torch.addmm(w @ squares, w * vectors[start : start + step], centroids, alpha=-2)
        torch.argmin(scores, dim=1, out=codes[start : start + step])
    return codes if pruned is None else codes.masked_fill_(pruned, 0)


def feedback(target: Target, state: State) -> State:
    """Code the subvectors of every row one after the other, each by the nearest centroid in the triangular factor of H;
    its error is passed on to those that are not coded yet (GPTQ, or Babai's nearest plane, with vectors)."""
    aim, factor, width = target.aim, target.factor, target.width
    n_columns = aim.shape[2]
    carried = torch.zeros_like(aim)
    codes = torch.empty_like(state.codes)
    for number in range(target.m):
        a, e = number * width, (number + 1) * width
        own = factor[:, a:e, a:e]
        wanted = target.stacked(aim[:, :, a:e] @ own + carried[:, :, a:e])
        centroids = target.times(state.codebook, own)  # (B, k, d)
        scores = centroids.square().sum(2)[:, None] - 2 * (wanted @ centroids.transpose(1, 2))
        chosen = _pinned(target, scores.argmin(2), number)
        codes[:, :, number] = chosen
        if e < n_columns:
            error = aim[:, :, a:e] - target.columns(state.codebook[chosen])
            carried[:, :, e:].baddbmm_(error, factor[:, a:e, e:])
    return better(state, target.state(state.codebook, codes))


def recode(target: Target, state: State) -> State:
    """One sweep of coordinate descent: every subvector takes the centroid that is best given all others of its rows."""
    aim, hessian, width = target.aim, target.hessian, target.width
    codebook, codes = state.codebook, state.codes.clone()
    error, slope = aim - target.rows(codebook, codes), state.slope.clone()
    for number in range(target.m):
        a, e = number * width, (number + 1) * width
        own = hessian[:, a:e, a:e]
        # the loss of a centroid c here, but for what does not depend on it: c own cᵀ - 2 (W* own + others) cᵀ
        linear = target.stacked((aim[:, :, a:e] - error[:, :, a:e]) @ own + slope[:, :, a:e])
        scores = (target.times(codebook, own) * codebook).sum(2)[:, None] - 2 * (linear @ codebook.t())
        chosen = _pinned(target, scores.argmin(2), number)
        block, row = (chosen != codes[:, :, number]).nonzero(as_tuple=True)
        if not block.numel():
            continue
        change = codebook[codes[block, row, number]] - codebook[chosen[block, row]]
        codes[:, :, number] = chosen
        if hessian.shape[0] == 1 and target.along == "input":
            error[block, row, a:e] += change
            slope[0].index_add_(0, row, change @ hessian[0, a:e])
        else:
            full = torch.zeros_like(linear)
            full[block, row] = change
            error[:, :, a:e] += target.columns(full)
            slope.baddbmm_(target.columns(full), hessian[:, a:e])
    return better(state, target.state(codebook, codes, slope))


def _pinned(target: Target, chosen: Tensor, number: int) -> Tensor:
    return chosen if target.pruned is None else chosen.masked_fill_(target.pruned[:, :, number], 0)


def _keep_zero(target: Target, codebook: Tensor) -> Tensor:
    """The codebook, whose first centroid stays zero where blocks were pruned."""
    if target.pruned is not None:
        codebook[0] = 0
    return codebook


def least_squares(target: Target, state: State, steps: int = CG_STEPS) -> State:
    """The codebook that is best for these codes, by preconditioned conjugate gradients from the one that there is.

    Products are taken in the weights' precision, the scalars that steer the descent in double precision.
    """
    codebook = state.codebook
    flat, k = state.codes.flatten(), codebook.shape[0]
    members = Members.of(flat, k) if Members.serve(codebook.device) else None

    def gathered(matrix: Tensor) -> Tensor:
        vectors = target.vectors(matrix)
        found = sums_by_code(vectors, flat, k) if members is None else members.sums(vectors)
        return _keep_zero(target, found)

    h = target.hessian.diagonal(dim1=1, dim2=2)
    scale = gathered(h[:, None].expand(target.aim.shape)).clamp_min(torch.finfo(h.dtype).tiny)
    slope, residual = state.slope, gathered(state.slope)
    ready = residual / scale
    direction, gain = ready, _dot(residual, ready)
    found = codebook
    for _ in range(steps):
        change = target.rows(direction, state.codes) @ target.hessian
        image = gathered(change)
        curvature = _dot(direction, image)
        if curvature <= 0 or gain <= 0:
            break
        length = gain / curvature
        found, residual = found + length * direction, residual - length * image
        slope = slope - length * change
        ready = residual / scale
        earlier, gain = gain, _dot(residual, ready)
        direction = ready + (gain / earlier) * direction
    return better(state, target.state(found, state.codes, slope))


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one.cpu().double() * other.cpu().double()).sum())


def round_codebook(target: Target, state: State, bits: int = 16, dtype: torch.dtype = torch.float32) -> State:
    """The codebook as files hold it, and codes that are best for it; the loss may rise by what is rounded.

    The steps of 8 bits are coarse enough for other codes, and these for another codebook.

    Args:
        target: of the weight.
        state: any.
        bits: of a value of the codebook, 16 or 8.
        dtype: in which the codebook will be kept.
    """
    found = _rounded(target, state, bits, dtype)
    if bits == 16:
        return found
    for _ in range(ROUNDINGS):
        again = _rounded(target, least_squares(target, found), bits, dtype)
        if again.loss >= found.loss:
            break
        found = again
    return found


def _rounded(target: Target, state: State, bits: int, dtype: torch.dtype) -> State:
    kept = state.codebook if bits == 16 else state.codebook.to(dtype)
    codebook = as_stored(kept, bits, None).to(state.codebook.dtype)
    return recode(target, target.state(codebook, state.codes))
