"""Every step keeps or lowers the loss, whatever the weight and the inputs are like."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.common.randomness import stream
from src.compression.quantize.calibrate.layer import STEPS, quantize_layer
from src.compression.quantize.calibrate.layout import layout_of
from src.compression.quantize.calibrate.moments import Moments
from src.compression.quantize.calibrate.steps import least_squares
from src.compression.quantize.calibrate.target import (
    Target,
    asymmetric_aim,
    damped,
    lower_factor,
    quadratic,
    upper_factor,
)
from src.compression.quantize.kmeans import cluster
from src.compression.quantize.plan import LayerPlan

SHAPES = st.tuples(st.integers(1, 3), st.integers(2, 9), st.integers(2, 6), st.integers(1, 4), st.integers(0, 10_000))
"""B, R, m, d, seed."""


def plan_of(d: int, k: int, scale: float = 1.0) -> LayerPlan:
    return LayerPlan(name="layer", d=d, k=k, k_means_type="src", k_means_n_iters=10, scale=scale)


def moments_of(inputs: Tensor, dense: Tensor, weight: Tensor) -> Moments:
    """Of inputs (B, P, C) in the quantized and the dense network, for a weight (B, R, C)."""
    n, n_rows = inputs.shape[1], weight.shape[1]
    return Moments(
        hessian=inputs.transpose(1, 2) @ inputs / n,
        cross=weight @ (dense - inputs).transpose(1, 2) @ inputs / n,
        mean=inputs.mean(1),
        output_mean=torch.zeros(inputs.shape[0], n_rows),
        output_variance=torch.zeros(inputs.shape[0], n_rows),
        count=n,
    )


def problem(shape: tuple[int, int, int, int, int], n_places: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (B, R, C) and correlated inputs (B, P, C) of the quantized and of the dense network."""
    blocks, rows, m, d, seed = shape
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(blocks, rows, m * d, generator=draw)
    mixing = torch.randn(blocks, m * d, m * d, generator=draw)
    inputs = torch.randn(blocks, n_places, m * d, generator=draw) @ mixing
    return weight, inputs, inputs + 0.3 * torch.randn(inputs.shape, generator=draw)


@settings(max_examples=25, deadline=None)
@given(SHAPES)
def test_no_step_raises_the_loss(shape: tuple[int, int, int, int, int]) -> None:
    weight, inputs, dense = problem(shape)
    blocks, rows, m, d, seed = shape
    layout = layout_of((blocks * rows, m * d), d, blocks)
    assert layout is not None
    flat = weight.reshape(blocks * rows, m * d)
    found = quantize_layer(flat, layout, moments_of(inputs, dense, weight), plan_of(d, 4), stream(seed))
    shares = [share for _, share in found.lost]
    assert all(later <= earlier for earlier, later in pairwise(shares[:-1]))  # the last one rounds
    assert shares[-1] <= shares[0]
    codebook = found.clustering.codebook
    assert torch.equal(codebook, codebook.half().float())
    assert len(shares) == len(STEPS) + 2


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.sampled_from([1.0, 2.0**-20, 2.0**10]))
def test_with_white_inputs_it_is_never_worse_than_clustering(
    shape: tuple[int, int, int, int, int], scale: float
) -> None:
    weight, _, _ = problem(shape)
    blocks, rows, m, d, seed = shape
    flat = scale * weight.reshape(blocks * rows, m * d)
    white = Moments(
        hessian=torch.eye(m * d).repeat(blocks, 1, 1),
        cross=torch.zeros(blocks, rows, m * d),
        mean=torch.zeros(blocks, m * d),
        output_mean=torch.zeros(blocks, rows),
        output_variance=torch.zeros(blocks, rows),
        count=1,
    )
    layout = layout_of(flat.shape, d, blocks)
    assert layout is not None
    found = quantize_layer(flat, layout, white, plan_of(d, 4, scale), stream(seed))
    plain = cluster("src", flat.reshape(-1, d) / scale, 4, 10, stream(seed))
    assert found.clustering.distortion <= plain.distortion * (1 + 1e-5)  # of sums of 32-bit floats


def test_correlated_inputs_lose_less_than_by_clustering() -> None:
    shape = (1, 64, 16, 4, 0)
    weight, inputs, dense = problem(shape, 500)
    layout = layout_of((64, 64), 4, 1)
    assert layout is not None
    moments = moments_of(inputs, dense, weight)
    found = quantize_layer(weight[0], layout, moments, plan_of(4, 16), stream(0)).clustering
    plain = cluster("src", weight[0].reshape(-1, 4), 16, 10, stream(0))
    wanted = dense[0] @ weight[0].T
    ours, theirs = (
        float((inputs[0] @ one.codebook[one.codes].view(64, 64).T - wanted).square().mean()) for one in (found, plain)
    )
    assert ours < 0.7 * theirs


def test_a_scale_of_the_codebook_changes_nothing_else() -> None:
    weight, inputs, dense = problem((1, 16, 8, 4, 7), 100)
    layout = layout_of((16, 32), 4, 1)
    assert layout is not None
    one, other = (
        quantize_layer(
            scale * weight[0], layout, moments_of(inputs, dense, scale * weight), plan_of(4, 16, scale), stream(0)
        ).clustering
        for scale in (1.0, 2.0**-30)
    )
    assert torch.equal(one.codebook, other.codebook)
    assert torch.equal(one.codes, other.codes)


@pytest.mark.parametrize("dead", [1, 10, 64])
def test_inputs_that_are_always_zero_do_no_harm(dead: int) -> None:
    """H is singular: some inputs are zero, or all are, and there are fewer places than columns."""
    weight, inputs, dense = problem((2, 16, 16, 4, 1), 20)
    inputs, dense = inputs.clone(), dense.clone()
    inputs[:, :, :dead] = dense[:, :, :dead] = 0
    inputs[1] = dense[1] = 0
    layout = layout_of((32, 64), 4, 2)
    assert layout is not None
    moments = moments_of(inputs, dense, weight)
    found = quantize_layer(weight.reshape(32, 64), layout, moments, plan_of(4, 32), stream(0)).clustering
    decoded = found.codebook[found.codes].view(2, 16, 64)
    assert bool(torch.isfinite(decoded).all())
    # what no input tells of is quantized for itself
    assert float((decoded[1] - weight[1]).square().sum() / weight[1].square().sum()) < 0.6


def test_pruned_subvectors_stay_zero() -> None:
    weight, inputs, dense = problem((1, 32, 8, 4, 2), 200)
    flat = weight[0].clone().view(32, 8, 4)
    flat[::2, ::3] = 0
    layout = layout_of((32, 32), 4, 1)
    assert layout is not None
    moments = moments_of(inputs, dense, weight)
    found = quantize_layer(flat.view(32, 32), layout, moments, plan_of(4, 16), stream(0)).clustering
    decoded = found.codebook[found.codes].view(32, 8, 4)
    assert not decoded[::2, ::3].any()
    assert decoded[1::2].any()


def test_the_codebook_solves_its_least_squares() -> None:
    weight, inputs, _ = problem((2, 12, 4, 2, 3), 100)
    target = Target(aim=weight, hessian=damped(inputs.transpose(1, 2) @ inputs / 100, 0.01), d=2)
    codes = torch.randint(0, 4, (2, 12, 4), generator=torch.Generator().manual_seed(0))
    found = least_squares(target, target.state(torch.zeros(4, 2), codes), steps=60)
    # the same by the normal equations: Ŵ is linear in the codebook
    basis = torch.stack([torch.eye(8)[i].view(4, 2)[codes].flatten(2) for i in range(8)]).double()
    hessian = target.hessian.double()
    normal = torch.einsum("ibrc,bcd,jbrd->ij", basis, hessian, basis)
    right = torch.einsum("ibrc,bcd,brd->i", basis, hessian, weight.double())
    exact = torch.linalg.solve(normal, right).view(4, 2)
    assert torch.allclose(found.codebook.double(), exact, atol=1e-3)


def test_the_aim_gives_from_one_input_what_the_weight_gives_from_the_other() -> None:
    weight, inputs, _ = problem((1, 5, 3, 2, 4), 400)
    change = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) * 0.2 + torch.eye(6)
    dense = inputs @ change
    moments = moments_of(inputs, dense, weight)
    aim = asymmetric_aim(weight, moments.hessian, moments.cross, damping=1e-6)
    assert torch.allclose(inputs @ aim.transpose(1, 2), dense @ weight.transpose(1, 2), rtol=1e-2, atol=1e-2)
    assert asymmetric_aim(weight, moments.hessian, torch.zeros_like(moments.cross)) is weight


def test_factors_multiply_to_what_they_are_of() -> None:
    _, inputs, _ = problem((3, 2, 4, 3, 5), 50)
    hessian = damped(inputs.transpose(1, 2) @ inputs, 0.01)
    upper = upper_factor(hessian)
    assert torch.allclose(upper @ upper.transpose(1, 2), hessian, rtol=1e-4, atol=1e-2)
    assert torch.equal(upper, upper.triu())
    singular = torch.ones(1, 6, 6) - 1e-4 * torch.eye(6)  # not even positive
    assert bool(torch.isfinite(lower_factor(singular)).all())
    with pytest.raises(ValueError, match="not finite"):
        lower_factor(torch.full((1, 2, 2), torch.nan))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 4]))
def test_a_layout_of_a_transposed_convolution_reads_it_by_outputs(
    inputs: int, outputs: int, groups: int, d: int
) -> None:
    weight = torch.arange(groups * inputs * outputs * 4).view(groups * inputs, outputs, 2, 2)
    layout = layout_of(weight.shape, d, groups, transposed=True)
    assert layout is not None
    read = weight.reshape(-1, d)[layout].flatten(2)
    wanted = weight.view(groups, inputs, outputs, 4).transpose(1, 2).flatten(2)
    assert torch.equal(read, wanted)
    assert layout_of(weight.shape, 8, groups, transposed=True) is None


def test_the_loss_is_what_outputs_lose() -> None:
    weight, inputs, _ = problem((2, 4, 3, 2, 6), 50)
    hessian = inputs.transpose(1, 2) @ inputs
    lost = float((inputs @ weight.transpose(1, 2)).square().sum())
    assert quadratic(weight, hessian) == pytest.approx(lost, rel=1e-4)
    state = Target(aim=weight, hessian=hessian, d=2).state(torch.zeros(1, 2), torch.zeros(2, 4, 3, dtype=torch.int64))
    assert replace(state, loss=0.0).loss < state.loss == pytest.approx(lost, rel=1e-4)
