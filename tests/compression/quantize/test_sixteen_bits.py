"""What the 16-bit floats of codebooks lose is measured, reported, and refused where it is too much."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from src.common.errors import CheckpointError, PlanError
from src.compression.quantize.compress import compress
from src.compression.quantize.dequantize import dequantized_state
from src.compression.quantize.plan import make_plan
from src.compression.quantize.sixteen_bits import energies, rounding_loss, scale_of, weight_problem
from src.exports.onnx_file import graph_of
from src.model_files.building import build_and_load
from src.model_files.packed import ModelInfo, load_packed, save_packed
from src.model_files.plan_of_file import plan_of
from src.model_files.pth import read_tensors, save_compressed
from src.model_files.size import model_size
from tests.support.helpers import relative, spec


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


@pytest.mark.parametrize("scale", [1e-60, 1e-300, 1e60])
def test_all_layers_that_rounding_would_lose_are_refused_at_once(scale: float) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3))).double()
    with torch.no_grad():
        model[0].weight.copy_(weight(scale, torch.float64))
        model[2].weight.copy_(weight(scale, torch.float64))
    before = copy.deepcopy(model)
    with pytest.raises(PlanError, match=r"layer '0'.*too small or too large.*ignored_modules") as error:
        compress(model, make_plan(model, spec(64)), show_progress=False)
    assert "layer '2'" in str(error.value)
    assert "layer '1'" not in str(error.value)
    assert type(model[1]) is nn.Linear
    assert torch.equal(model[1].weight, before[1].weight)


def network(scale: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two layers that share a weight of this size, and an ordinary one."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 64)).to(dtype)
    for seed, layer in enumerate((model[0], model[2])):
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(64, 64, generator=draw))
            layer.bias.zero_()
    with torch.no_grad():
        model[0].weight.mul_(scale)
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("power", [-118, -60, -24, 20, 100])
def test_a_weight_of_any_size_is_quantized_like_one_of_usual_size(power: int, dtype: torch.dtype) -> None:
    scale = 2.0**power
    usual, results = compress(network(1.0, dtype), make_plan(network(1.0), spec(64)), show_progress=False)
    scaled, found = compress(network(scale, dtype), make_plan(network(1.0), spec(64)), show_progress=False)
    assert scaled[0].has_scale
    assert scaled[0].codebook_scale is scaled[1].codebook_scale
    assert not scaled[2].has_scale
    assert not usual[0].has_scale
    # powers of two change nothing but the exponents; the starts of clusterings may differ in the last bits
    for one, other in zip(found, results, strict=True):
        assert one.relative_error == pytest.approx(other.relative_error, rel=0.02)
    weights = scaled[0].eval().weight.double() / scale
    assert relative(weights, network(1.0, torch.float64)[0].weight.detach()) == pytest.approx(
        found[0].relative_error ** 0.5, rel=1e-2
    )
    assert model_size(scaled).bits == model_size(usual).bits + 32


@pytest.mark.parametrize("power", [-60, 20])
def test_files_hold_weights_of_any_size(power: int, tmp_path: Path) -> None:
    model = compress(network(2.0**power), make_plan(network(1.0), spec(64)), show_progress=False)[0].eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        wanted = model(x)
        save_compressed(model, tmp_path / "model.pth")
        save_packed(model, tmp_path / "model.safetensors", ModelInfo())
        packed = load_packed(tmp_path / "model.safetensors")
        state = read_tensors(tmp_path / "model.pth")
        with torch.device("meta"):
            dense = network(1.0)
        for plan, tensors in ((packed.plan, packed.state()), (plan_of(dense, state, "file"), state)):
            loaded = build_and_load(lambda: network(1.0), lambda _, plan=plan: plan, tensors, "file")
            assert torch.equal(loaded(x), wanted)
            assert torch.equal(loaded[0].codebook, model[0].stored_codebook().float() * model[0].codebook_scale)
        for wrong in (torch.tensor(0.0), torch.tensor(math.inf), torch.tensor([1.0]), torch.tensor(2)):
            with pytest.raises(CheckpointError, match=r"0\.codebook_scale must be one positive"):
                plan_of(dense, {**state, "0.codebook_scale": wrong}, "file")


def test_onnx_multiplies_by_the_scale(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")

    def convolutions() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3))

    small = convolutions()
    with torch.no_grad():
        small[0].weight.mul_(2.0**-30)
        small[0].bias.zero_()
    model = compress(small, make_plan(small, spec(8)), show_progress=False)[0].eval()
    assert model[0].has_scale
    dense = convolutions()
    dense.load_state_dict(dequantized_state(model))
    onnx.save(graph_of(dense.eval(), model, 8), tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(2, 3, 8, 8)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), model(x), rtol=1e-5, atol=1e-7)
        first = (model(x) - model[1].bias[:, None, None]).abs().max()
        assert float((torch.from_numpy(found) - model(x)).abs().max()) < 1e-3 * float(first)


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
    assert result.rounding == pytest.approx(rounding_loss(dense, scale_of(dense)), rel=1e-6)
    assert result.rounding < 1e-5
    assert not math.isnan(result.relative_error)
