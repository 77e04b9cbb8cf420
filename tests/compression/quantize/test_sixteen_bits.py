"""What the 16-bit floats of codebooks lose is measured, reported, and refused where it is too much."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from src.common.errors import PlanError
from src.compression.quantize.compress import compress
from src.compression.quantize.plan import make_plan
from src.compression.quantize.sixteen_bits import energies, rounding_loss, weight_problem
from tests.support.helpers import spec


def weight(scale: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale).to(dtype)


@pytest.mark.parametrize("scale", [1e-5, 1e-6, 3e-7, 1e-7, 1e-8, 1e-20, 1e-40])
def test_the_loss_of_the_rounding_is_that_of_its_definition(scale: float) -> None:
    w = weight(scale)
    exact = w.double()
    wanted = float((exact - w.half().double()).square().sum() / exact.square().sum())
    assert rounding_loss(w) == pytest.approx(wanted, rel=1e-9)
    assert (rounding_loss(w) > 0.99) == (scale < 1.1e-8)


def test_squares_that_no_float_can_hold_are_not_lost() -> None:
    assert rounding_loss(weight(1e-200, torch.float64)) == 1.0
    assert rounding_loss(torch.zeros(4, 4)) == 0.0
    assert rounding_loss(torch.zeros(0, 4)) == 0.0
    w = weight(1e-30)
    lost, energy = energies(w, torch.zeros(2, 4), torch.zeros(1024, dtype=torch.int32))
    assert lost == energy == pytest.approx(float(w.double().square().sum()), rel=1e-12)
    assert energy > 1e-58


def test_normal_values_and_a_few_tiny_ones_lose_nothing_worth_a_word() -> None:
    w = weight(1.0)
    w[:10] *= 1e-12  # dead filters
    assert rounding_loss(w) < 1e-6
    assert weight_problem(w) is None
    assert weight_problem(weight(1e-3)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-7, 1e-20, 1e-38])
def test_all_layers_that_rounding_would_lose_are_refused_at_once(scale: float, dtype: torch.dtype) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3))).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(weight(scale))
        model[2].weight.copy_(weight(scale))
    before = copy.deepcopy(model)
    with pytest.raises(PlanError, match=r"layer '0'.*too small.*ignored_modules") as error:
        compress(model, make_plan(model, spec(64)), show_progress=False)
    assert "layer '2'" in str(error.value)
    assert "layer '1'" not in str(error.value)
    assert type(model[1]) is nn.Linear
    assert torch.equal(model[1].weight, before[1].weight)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-6])
def test_the_reported_error_holds_the_rounding(scale: float) -> None:
    layer = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight(scale))
    dense = layer.weight.detach().double().clone()
    coded, results = compress(layer, make_plan(layer, spec(256)), show_progress=False)
    (result,) = results
    decoded = coded.eval().weight.detach().double()  # type: ignore[union-attr, operator]
    wanted = float((dense - decoded).square().sum() / dense.square().sum())
    assert result.relative_error == pytest.approx(wanted, rel=1e-6)
    assert result.rounding == pytest.approx(rounding_loss(dense), rel=1e-6)
    assert (result.rounding > 1e-5) == (scale < 1e-5)
    assert not math.isnan(result.relative_error)
