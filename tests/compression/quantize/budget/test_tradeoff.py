"""Laws of a size instead of settings, on real small networks."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from src.common.errors import PlanError
from src.common.randomness import stream
from src.compression.quantize.budget.distortion import distortions
from src.compression.quantize.budget.options import allowed_sizes
from src.compression.quantize.budget.tradeoff import Tradeoff, measure
from src.compression.quantize.budget.wanted import Budget
from src.compression.quantize.compress import build_quantized, compress, with_scales
from src.compression.quantize.kmeans import cluster, with_eight_bits
from src.compression.quantize.plan import LayerSpec, Plan, QuantizationSpec
from src.compression.quantize.weights import matrices
from src.model_files.size import ModelSize, model_size
from tests.support.helpers import lively, spec

ITERATIONS = 30


def network(width: int = 16) -> nn.Module:
    """Convolutions of several kernels, grouped and depthwise ones, attention, tied weights, weights of tiny values."""
    torch.manual_seed(0)
    tied = nn.Linear(4 * width, 4 * width)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.Conv2d(width, 2 * width, 5),
        nn.Conv2d(2 * width, 2 * width, 3, groups=2 * width),
        nn.Conv2d(2 * width, 4 * width, 1, groups=2),
        nn.ConvTranspose2d(4 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        tied,
        nn.Linear(4 * width, 4 * width),
        nn.MultiheadAttention(4 * width, 2),
        nn.Linear(4 * width, 30),
    )
    model[9].weight = tied.weight
    with torch.no_grad():
        model[11].weight.mul_(1e-8)  # its codebook has a scale
    return lively(model)


def measured(model: nn.Module, how: QuantizationSpec | None = None, **more) -> Tradeoff:
    how = how or spec(256, "kmeans", ITERATIONS)
    return measure(model, how, model_size(model).bits, show_progress=False, **more)


@pytest.fixture(scope="module")
def tradeoff() -> Tradeoff:
    return measured(network())


def size_of(plan: Plan) -> ModelSize:
    model = network()
    return model_size(build_quantized(model, with_scales(model, plan)))


def budgets(tradeoff: Tradeoff, n: int = 12) -> list[Budget]:
    sizes = np.geomspace(-(-tradeoff.smallest // 8), tradeoff.largest // 8, n).astype(int)
    return [Budget(size=int(size)) for size in sizes]


def test_the_size_is_counted_as_files_count_it_and_never_above_the_budget(tradeoff) -> None:
    last = np.inf
    for budget in budgets(tradeoff):
        found = tradeoff.plan_for(budget)
        size = size_of(found.plan)
        assert found.bits == size.bits <= 8 * budget.size
        assert found.dense_bits == size.original == model_size(network()).bits
        assert sum(layer.bits for layer in found.layers) == size.codes + size.codebooks
        assert found.ratio == size.ratio
        assert found.loss <= last  # a larger budget never loses more
        last = found.loss


def test_a_ratio_is_a_size(tradeoff) -> None:
    found = tradeoff.plan_for(Budget(ratio=8))
    assert found.ratio >= 8
    same = tradeoff.plan_for(Budget(size=tradeoff.dense_bits // 8 // 8 + 100, beside=100))
    assert found.plan.layers == same.plan.layers


def test_more_room_is_spent_with_the_subvector_lengths_that_are_there(tradeoff) -> None:
    for budget in budgets(tradeoff):
        assert budget.size is not None
        first = tradeoff.plan_for(budget)
        lengths = {name: layer.d for name, layer in first.plan.layers.items()}
        before = first
        for share in (1, 1.01, 1.05, 1.3):
            size = int(share * budget.size)
            more = tradeoff.plan_for(Budget(size=size), first.plan)
            assert {name: layer.d for name, layer in more.plan.layers.items()} == lengths
            assert more.bits <= 8 * size
            assert more.loss <= before.loss
            before = more
        assert before.loss < first.loss or first.loss == tradeoff.curve()[-1].loss


def test_the_curve_rises_in_size_and_falls_in_loss_and_each_point_is_the_plan_of_its_size(tradeoff) -> None:
    curve = tradeoff.curve()
    assert (curve[0].bits, curve[-1].bits) == (tradeoff.smallest, tradeoff.largest)
    for earlier, later in itertools.pairwise(curve):
        assert earlier.bits < later.bits
        assert earlier.loss >= later.loss
    for one in curve[:: len(curve) // 5]:
        size = -(-one.bits // 8)
        assert tradeoff.plan_for(Budget(size=size)).loss <= one.loss


@pytest.mark.parametrize("large", [False, True])
def test_at_the_size_of_the_settings_the_plan_is_not_worse(large) -> None:
    own = measured(network(), spec(256, "kmeans", ITERATIONS, large=large, layers={"11": LayerSpec(k=64)}))
    settings = own.of_settings()
    assert settings.bits == size_of(settings.plan).bits
    chosen = own.plan_for(Budget(size=settings.bits // 8 + 1))
    assert chosen.loss <= settings.loss
    assert chosen.plan.layers["11"].k == 64
    assert chosen.plan.notes == ()  # where pairs of channels were impossible is not what was chosen
    assert bool(settings.plan.notes) == large


def test_every_plan_can_be_carried_out_and_loses_about_what_was_predicted(tradeoff) -> None:
    model = network()
    found = tradeoff.plan_for(Budget(ratio=10))
    coded, results = compress(copy.deepcopy(model), found.plan, show_progress=False)
    assert model_size(coded).bits == found.bits
    lost = sum(result.distortion for result in results)
    assert lost == pytest.approx(sum(layer.distortion for layer in found.layers), rel=0.15)
    names = {layer.name for layer in found.layers}
    assert names == {result.name for result in results}
    assert {"8", "9"} <= set(found.plan.layers)  # tied: both in the plan, once in the sum
    assert len(names & {"8", "9"}) == 1
    again = measured(network()).plan_for(Budget(ratio=10))
    assert again == found  # the same seed, the same plan


def test_layer_specs_and_ignored_modules_stand() -> None:
    layers = {
        "4": LayerSpec(subvector_size=8),
        "5": LayerSpec(k=32),
        "2": LayerSpec(large_subvectors=True, k=16),
        "11": LayerSpec(k_means_type="src", k_means_n_iters=7),
    }
    own = measured(network(), spec(256, "kmeans", 100, ignored=["0"], layers=layers))
    for budget in budgets(own, 6):
        plan = own.plan_for(budget).plan
        assert "0" not in plan.layers
        assert plan.layers["4"].d == 8
        assert plan.layers["5"].k == 32
        assert (plan.layers["2"].d, plan.layers["2"].k) == (50, 16)
        assert (plan.layers["11"].k_means_type, plan.layers["11"].k_means_n_iters) == ("src", 7)
        assert all(50 <= layer.k_means_n_iters <= 100 for name, layer in plan.layers.items() if name != "11")


def test_codebooks_of_8_bits_are_taken_where_they_pay_and_never_cost(tradeoff) -> None:
    how = spec(256, "kmeans", ITERATIONS)
    sixteen, eight = (measured(network(), replace(how, codebook_bits=bits)) for bits in (16, 8))
    taken = set()
    for budget in budgets(sixteen):
        found = tradeoff.plan_for(budget)
        assert found.loss <= sixteen.plan_for(budget).loss
        taken |= {layer.codebook_bits for layer in found.layers}
        assert {layer.codebook_bits for layer in found.layers} == {
            found.plan.layers[one.name].codebook_bits for one in found.layers
        }
    assert 8 in taken
    assert {layer.codebook_bits for layer in sixteen.plan_for(Budget(ratio=8)).layers} == {16}
    assert {layer.codebook_bits for layer in eight.plan_for(Budget(ratio=8)).layers} == {8}
    assert {layer.codebook_bits for layer in eight.of_settings().layers} == {8}
    own = measured(network(), replace(how, codebook_bits=8, layer_specs={"5": LayerSpec(codebook_bits=16)}))
    bits = {layer.name: layer.codebook_bits for layer in own.plan_for(Budget(ratio=8)).layers}
    assert {name for name, one in bits.items() if one == 16} == {"5"}


def test_a_sensitive_layer_gets_more_bits(tradeoff) -> None:
    def bits(one: Tradeoff) -> int:
        layers = {layer.name: layer for layer in one.plan_for(Budget(ratio=12)).layers}
        return layers["5"].bits

    more = tradeoff.with_sensitivities({"5": 50.0})
    assert bits(more) > bits(tradeoff) > bits(tradeoff.with_sensitivities({"5": 0.02}))
    nothing = tradeoff.with_sensitivities(dict.fromkeys(tradeoff.plan.layers, 0.0)).plan_for(Budget(ratio=12))
    assert nothing.loss == nothing.share == 0
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(PlanError, match="sensitivity of '5'"):
            tradeoff.with_sensitivities({"5": wrong})


def test_sizes_that_are_impossible_are_told_with_those_that_are_possible(tradeoff) -> None:
    smallest, largest = -(-tradeoff.smallest // 8), tradeoff.largest // 8
    for budget, word in ((Budget(size=smallest - 1), "smaller"), (Budget(size=largest + 1), "larger")):
        with pytest.raises(PlanError) as error:
            tradeoff.plan_for(budget)
        for part in (f"{budget.size:,} bytes", f"is {word} than", f"{smallest:,} bytes", f"{largest:,} bytes"):
            assert part in str(error.value)
    tradeoff.plan_for(Budget(size=smallest))
    tradeoff.plan_for(Budget(size=largest))
    with pytest.raises(PlanError, match=r"compression.ratio 5000, that is .* is smaller than"):
        tradeoff.plan_for(Budget(ratio=5000, prefix="compression."))
    left = measured(network(), spec(ignored=["8", "10"]))
    with pytest.raises(PlanError, match=r"stays dense is \d+ % of the smallest: .*8"):
        left.plan_for(Budget(size=smallest))


def test_weights_that_cannot_be_quantized_are_refused() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(PlanError, match="not finite"):
        measured(model)


def test_weights_without_values_lose_nothing() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    nn.init.zeros_(model[0].weight)
    found = measured(model).plan_for(Budget(ratio=6))
    assert found.layers[0].distortion == 0
    assert model_size(build_quantized(model, found.plan)).bits == found.bits


def test_subvectors_hold_whole_kernels_or_equal_parts() -> None:
    sizes = {place.name: allowed_sizes(place) for place in matrices(network())}
    assert sizes["0"] == [1, 3, 9, 27]
    assert sizes["2"] == [1, 5, 25]
    assert sizes["3"] == [1, 3, 9]
    assert sizes["4"] == [1, 2, 4, 8, 16]
    assert sizes["5"] == [1, 2, 4, 8, 16, 32]
    assert sizes["10.in_proj_weight"] == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(("n", "d", "ks"), [(6000, 4, (16, 256)), (60_000, 9, (16, 256)), (30_000, 2, (16, 64))])
def test_estimates_are_near_the_distortion_of_a_clustering(n, d, ks) -> None:
    draw = stream(0, "vectors")
    vectors = torch.randn(n, d, generator=draw) * torch.linspace(0.5, 2, d)
    found, rounded = distortions(vectors, [1 << bits for bits in range(1, 13)], stream(0, "estimate"))
    for one in (found, rounded):
        assert all(later <= earlier for earlier, later in itertools.pairwise(one))
    assert (rounded >= found).all()
    for k in ks:
        real = cluster("src", vectors, k, 200, stream(0, "real"))
        assert found[k.bit_length() - 2] == pytest.approx(n * real.distortion, rel=0.1)
        real = with_eight_bits(vectors, real, torch.float32)
        assert rounded[k.bit_length() - 2] == pytest.approx(n * real.distortion, rel=0.1)


def test_estimates_scale_with_the_values() -> None:
    vectors = torch.randn(500, 4, generator=stream(0, "vectors"))
    plain, small, large = (distortions(vectors * by, [2, 16], stream(1)) for by in (1.0, 2.0**-60, 2.0**60))
    assert small == pytest.approx(plain * 2.0**-120)
    assert large == pytest.approx(plain * 2.0**120)


@pytest.mark.slow
@pytest.mark.parametrize("large", [False, True])
def test_at_the_published_sizes_of_resnet18_the_plan_is_not_worse_and_fills_the_size(large) -> None:
    torch.manual_seed(0)
    model = resnet18()
    own = measured(model, spec(256, "src", 100, large=large, ignored=["conv1"], layers={"fc": LayerSpec(k=2048)}))
    settings = own.of_settings()
    assert f"{settings.bits / 8 / 2**20:.2f}" == ("1.03" if large else "1.54")
    chosen = own.plan_for(Budget(size=-(-settings.bits // 8)))
    assert chosen.loss <= settings.loss
    assert 0.995 * settings.bits <= chosen.bits <= 8 * -(-settings.bits // 8)
    with torch.device("meta"):
        empty = resnet18()
    assert model_size(build_quantized(empty, chosen.plan)).bits == chosen.bits
