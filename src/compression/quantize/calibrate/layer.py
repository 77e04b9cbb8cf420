"""Quantizing one weight with the moments of its inputs: a clustering, then the steps of `steps`, then 16-bit or 8-bit
values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..clustering import Clustering
from ..kmeans import cluster
from ..plan import LayerPlan
from ..sixteen_bits import range_problem
from ..subvectors import to_subvectors
from .layout import rows_of
from .moments import Moments
from .steps import feedback, least_squares, recode, round_codebook, weighted_start
from .target import AIM_DAMPING, DAMPING, State, Target, asymmetric_aim, caution, damped, quadratic

Step = Callable[[Target, State], State]
STEPS: tuple[tuple[str, Step], ...] = (
    ("weighted", weighted_start),
    ("feedback", feedback),
    ("codebook", least_squares),
    ("codes", recode),
    ("codebook again", least_squares),
    ("codes again", recode),
    ("codebook at last", least_squares),
)
"""In this order; later rounds gain less than a thousandth of the output's energy."""
START_ITERATIONS = 30
"""Of the clustering that they start from, at most: with more, what is lost at last differs by some thousandths."""


@dataclass(frozen=True)
class CalibratedLayer:
    """One weight, quantized.

    Attributes:
        clustering: codebook, in units of the plan's scale, and codes of the subvectors in the weight's order.
        lost: after every step, which share of the energy of the layer's outputs is lost.
    """

    clustering: Clustering
    lost: tuple[tuple[str, float], ...]


def quantize_layer(
    weight: Tensor, layout: Tensor, moments: Moments, plan: LayerPlan, generator: torch.Generator
) -> CalibratedLayer:
    """Quantize one weight.

    Args:
        weight: the dense one, any shape.
        layout: (B, r, m), which of its subvectors, in the weight's order, stands where (`layout.layout_of`).
        moments: of its inputs.
        plan: d, k, scale and the clustering that it starts from.
        generator: draws the start.

    Raises:
        ValueError: the weight cannot be clustered, or the moments are not finite.
    """
    device = moments.hessian.device
    vectors = to_subvectors(weight.detach().to(device), plan.d, plan.layout).float() / plan.scale
    blocks = rows_of(vectors[layout.to(device)], plan.layout)
    more = caution(blocks.shape[2], moments.count)
    aim = asymmetric_aim(blocks, moments.hessian, moments.cross / plan.scale, AIM_DAMPING + more)
    if range_problem(aim):  # solved for, but not for a codebook of 16 bits
        aim = blocks
    zero = ~vectors.any(1)[layout.to(device)]
    pruned = zero if bool(zero.any()) and not bool(zero.all()) else None
    hessian = damped(moments.hessian, DAMPING + more)
    target = Target(aim=aim, hessian=hessian, d=plan.d, pruned=pruned, along=plan.layout)
    cut = target.vectors(aim)
    if pruned is not None:  # what the others make up for
        cut = cut.masked_fill(pruned.flatten()[:, None], 0)
    iterations = min(plan.k_means_n_iters, START_ITERATIONS)
    start = cluster(plan.k_means_type, cut, plan.k, iterations, generator, plan.k_means_tolerance)
    state = first = _started(target, start)
    power = quadratic(blocks, target.hessian) or 1.0
    lost = [("clustering", state.loss / power)]
    for name, step in STEPS:
        state = step(target, state)
        lost.append((name, state.loss / power))
    state = round_codebook(target, state, plan.codebook_bits, weight.dtype)
    first = first if plan.codebook_bits == 16 else round_codebook(target, first, plan.codebook_bits, weight.dtype)
    if first.loss < state.loss:
        state = first
    lost.append(("rounded", state.loss / power))
    codes = torch.empty(vectors.shape[0], dtype=torch.int64, device=device)
    codes[layout.to(device).flatten()] = state.codes.flatten()
    distortion = float((vectors - state.codebook[codes]).square().sum(1).double().mean())
    found = Clustering(state.codebook.cpu(), codes.cpu(), distortion, start.iterations)
    return CalibratedLayer(clustering=found, lost=tuple(lost))


def _started(target: Target, start: Clustering) -> State:
    """The state of a plain clustering; where blocks were pruned its first centroid is zero."""
    codes = start.codes.view(target.aim.shape[0], -1, target.m)
    if target.pruned is not None and bool(start.codebook[0].any()):
        raise ValueError("the clustering has no centroid of zeros for blocks that were pruned")
    return target.state(start.codebook, codes)
