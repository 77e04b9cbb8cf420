"""Subvectors along outputs: what they are cut from, what they become in files and programs, what the rule of the Neural
Engine refuses, and that search, calibration and sizes take them for what they are."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import src.api as pqf
from src import architectures, convert
from src.common.errors import CheckpointError, PlanError
from src.common.randomness import stream
from src.compression.permute.groups import Group
from src.compression.permute.permute import permute
from src.compression.permute.results import SearchSpec
from src.compression.quantize.budget.options import settings_for
from src.compression.quantize.calibrate.layer import quantize_layer
from src.compression.quantize.calibrate.layout import layout_of, rows_of, vectors_of
from src.compression.quantize.calibrate.moments import Moments
from src.compression.quantize.compress import compress
from src.compression.quantize.layers import QuantizedLayer
from src.compression.quantize.plan import LayerPlan, LayerSpec, QuantizationSpec, make_plan
from src.compression.quantize.subvector_size import BlockRule
from src.compression.quantize.subvectors import AlongOutputs, from_subvectors, to_subvectors
from src.compression.quantize.weights import matrices
from src.model_files import packed as packed_files
from src.model_files.open_model_file import open_model_file
from src.model_files.packed import ModelInfo, load_packed, save_packed
from src.model_files.pth import save_compressed
from tests.support.helpers import lively
from tests.support.own_network import Net

ALONG = QuantizationSpec(k=16, k_means_type="kmeans", k_means_n_iters=3, layout="output")
ARCH = "tests.support.own_network:Net"


def dense(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return lively(Net())


def along_outputs(how: QuantizationSpec = ALONG) -> nn.Module:
    model = dense()
    return compress(model, make_plan(model, how), show_progress=False)[0].eval()


def layers_of(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}


def check_same(found: nn.Module, wanted: nn.Module) -> None:
    """The same weights, and outputs to the rounding of norms that are stored as scale and shift."""
    ours, theirs = layers_of(found), layers_of(wanted)
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        assert torch.equal(layer.weight, theirs[name].weight)
    x = torch.randn(2, 3, 8, 8, generator=stream(0))
    with torch.no_grad():
        assert torch.allclose(found(x), wanted(x), atol=1e-5)


@given(st.sampled_from([(8, 3), (8, 3, 3, 3), (16, 1, 3, 3), (4, 5, 7)]), st.sampled_from([1, 2, 4]))
def test_a_subvector_is_what_neighbouring_outputs_do_with_one_input(shape: tuple[int, ...], d: int) -> None:
    weight = torch.arange(float(torch.Size(shape).numel())).view(shape)
    vectors = to_subvectors(weight, d, "output")
    assert torch.equal(from_subvectors(vectors, shape, "output"), weight)
    matrix = weight.flatten(1)
    for number in (0, 1, len(vectors) - 1):
        first, column = number // matrix.shape[1] * d, number % matrix.shape[1]
        assert torch.equal(vectors[number], matrix[first : first + d, column])
    turned = to_subvectors(matrix.t().contiguous(), d)
    assert torch.equal(torch.unique(turned, dim=0), torch.unique(vectors, dim=0))


def test_a_quantized_layer_trains_copies_and_compiles_along_outputs() -> None:
    layer = nn.Conv2d(6, 8, 3)
    model = compress(nn.Sequential(layer), make_plan(nn.Sequential(layer), ALONG), show_progress=False)[0]
    assert isinstance(layer, QuantizedLayer)
    assert layer.codes_matrix.shape == (2, 54)
    assert "layout=output" in repr(layer)
    codebook, codes = layer.codebook, layer.codes_matrix.long()
    wanted = codebook[codes].transpose(1, 2).reshape(8, 6, 3, 3)
    assert torch.equal(layer.dequantize(), wanted)
    target = torch.randn(8, 6, 3, 3, generator=stream(0))
    (found,) = torch.autograd.grad((model.train()[0].weight * target).sum(), codebook)
    (by_hand,) = torch.autograd.grad((wanted * target).sum(), codebook)
    assert torch.allclose(found, by_hand, atol=1e-5)
    model.eval()
    x = torch.randn(1, 6, 5, 5, generator=stream(1))
    with torch.no_grad():
        for other in (copy.deepcopy(model), torch.jit.script(model), torch.jit.trace(model, x)):
            assert torch.allclose(other(x), model(x), atol=1e-6)


def test_the_layout_of_every_weight_is_what_it_can_be() -> None:
    model = nn.ModuleDict(
        {
            "even": nn.Conv2d(8, 12, 3),
            "two": nn.Linear(64, 10),
            "odd": nn.Linear(64, 15),
            "up": nn.ConvTranspose2d(8, 16, 4),
            "words": nn.Embedding(64, 16),
            "own": nn.Linear(64, 64),
        }
    )
    how = QuantizationSpec(k=16, layout="output", layer_specs={"own": LayerSpec(layout="input", k=256)})
    plan = make_plan(model, how)
    found = {name: (layer.layout, layer.d) for name, layer in plan.layers.items()}
    assert found == {
        "even": ("output", 4),
        "two": ("output", 2),
        "odd": ("input", 4),
        "up": ("input", 16),
        "words": ("input", 4),
        "own": ("input", 4),
    }
    said = "\n".join(plan.notes)
    assert "two: layout: output: fc_subvector_size 4 does not divide 10 outputs: subvectors of 2 are used" in said
    assert "odd: layout: output: 15 outputs cannot be paired: subvectors run along inputs" in said
    assert "up, words: layout: output is for layers whose weight has a row for each output" in said
    assert {name for name, d in plan.sizes.items() if isinstance(d, AlongOutputs)} == {"even", "two"}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (QuantizationSpec(layout="output"), "k * d may be 256 at most: k up to 64 for subvectors of 4"),
        (QuantizationSpec(k=16, rule=BlockRule(pw_subvector_size=3), layout="output"), "have 2, 4, 8 or 16 values"),
        (QuantizationSpec(k=16, layer_specs={"0": LayerSpec(layout="output", subvector_size=16)}), "its 8 outputs"),
        (QuantizationSpec(k=16, layer_specs={"0": LayerSpec(layout="output", k=128)}), "d = 4 and k = 128"),
        (QuantizationSpec(k=16, layer_specs={"0": LayerSpec(layout="output", subvector_size=3)}), "sizes: 2, 4, 8"),
    ],
)
def test_what_breaks_the_rule_is_refused(how: QuantizationSpec, said: str) -> None:
    with pytest.raises(PlanError) as error:
        make_plan(nn.Sequential(nn.Conv2d(16, 8, 3)), how)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_packed_file_tells_it_and_earlier_readers_refuse_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = along_outputs(), tmp_path / "model.safetensors"
    save_packed(model, path, ModelInfo(arch=ARCH, num_classes=10, producer="pqf"))
    again = open_model_file(path, ARCH).model
    check_same(again, model)
    assert {name: layer.layout for name, layer in layers_of(again).items()} == {
        name: layer.layout for name, layer in layers_of(model).items()
    }
    monkeypatch.setattr(packed_files, "READABLE_VERSIONS", ("1", "2", "3", "4", "5"))
    with pytest.raises(CheckpointError, match="format version '6'"):
        load_packed(path)
    save_packed(along_outputs(QuantizationSpec(k=16, k_means_n_iters=0)), path, ModelInfo(producer="pqf"))
    load_packed(path)  # only a file that needs it has the later version


def test_every_form_of_file_computes_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = along_outputs()
    save_compressed(model, tmp_path / "model.pth")
    here = tmp_path / "model.pth"
    for number, ending in enumerate((".safetensors", ".pth", ".safetensors")):
        there = tmp_path / f"{number}{ending}"
        assert convert.main([str(here), str(there), "--arch", ARCH]) == 0
        here = there
    check_same(open_model_file(here, ARCH).model, model)
    capsys.readouterr()
    pytest.importorskip("onnxruntime", reason="ONNX files are checked by onnxruntime: pip install pqf[onnx]")
    assert convert.main([str(here), str(tmp_path / "a.onnx"), "--arch", ARCH, "--image_size", "8"]) == 0
    assert f"{len(layers_of(model))} weights as codebook and codes" in capsys.readouterr().out


def test_a_permutation_of_outputs_makes_them_easier_to_quantize_and_changes_nothing() -> None:
    """Rows that come in groups of four alike, shuffled: the search finds them again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 1)).eval()
    with torch.no_grad():
        alike = torch.randn(8, 1, 4, 3, 3).expand(8, 4, 4, 3, 3).reshape(32, 4, 3, 3)
        model[0].weight.copy_(alike[torch.randperm(32)] + 0.05 * torch.randn(32, 4, 3, 3))
    how = QuantizationSpec(k=16, k_means_type="kmeans", k_means_n_iters=20, layout="output", ignored_modules=["2"])
    plan = make_plan(model, how)
    x = torch.randn(2, 4, 6, 6, generator=stream(0))
    losses = []
    with torch.no_grad():
        before = model(x)
    for searched in (False, True):
        network = copy.deepcopy(model)
        if searched:
            (result,) = permute(
                network, [Group(parents=["0"], children=["2"])], plan.sizes, SearchSpec(), show_progress=False
            )
            assert result.children == ("0",)
            assert result.after < result.before
            with torch.no_grad():
                assert torch.allclose(network(x), before, atol=1e-5)
        losses.append(compress(network, plan, show_progress=False)[1][0].relative_error)
    assert losses[1] < 0.5 * losses[0]


def test_found_groups_are_searched_by_their_parents_too() -> None:
    model = architectures.ARCHITECTURES["resnet18"].build(10).eval()
    groups = pqf.groups(model, torch.zeros(1, 3, 32, 32))
    names = ["layer1.0.conv1", "layer1.0.conv2"]
    others = [place.name for place in matrices(model) if place.name not in names]
    plan = make_plan(model, QuantizationSpec(k=16, layout="output", ignored_modules=others))
    results = permute(model, groups, plan.sizes, SearchSpec(sls_iterations=10, thorough=False), show_progress=False)
    searched = [result.children for result in results if result.permutation is not None]
    assert sorted(searched) == [("layer1.0.conv1",), ("layer1.0.conv2",)]


SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(2, 7), st.sampled_from([2, 4]), st.integers(0, 99))
"""B, r, C, d, seed."""


@settings(max_examples=10, deadline=None)
@given(SHAPES)
def test_calibration_along_outputs_is_that_of_inputs_that_d_outputs_share(
    shape: tuple[int, int, int, int, int],
) -> None:
    """The d outputs of a row of subvectors are one row of C d columns, with the moments H ⊗ I."""
    blocks, rows, columns, d, seed = shape
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(blocks, rows * d, columns, generator=draw)
    inputs = torch.randn(blocks, 50, columns, generator=draw) @ torch.randn(columns, columns, generator=draw)
    hessian = inputs.transpose(1, 2) @ inputs / 50
    cross = 0.1 * weight @ hessian
    assert torch.equal(rows_of(vectors_of(weight, d, "output"), "output"), weight)

    def found(aim: Tensor, moments: Tensor, products: Tensor, along: str) -> tuple[Tensor, list[float]]:
        empty = torch.zeros(blocks, aim.shape[1])
        given_moments = Moments(moments, products, torch.zeros(moments.shape[:2]), empty, empty, 10**6)
        plan = LayerPlan("layer", d, 2, "kmeans", 10, layout=along)
        flat = aim.flatten(0, 1)
        layout = layout_of(flat.shape, d, blocks, along=along)
        assert layout is not None
        result = quantize_layer(flat, layout, given_moments, plan, stream(0))
        clustering = result.clustering
        quantized = from_subvectors(clustering.codebook[clustering.codes], tuple(flat.shape), along)
        return quantized.view(aim.shape), [share for _, share in result.lost]

    as_rows = vectors_of(weight, d, "output").flatten(2)
    shared = torch.stack([torch.kron(one, torch.eye(d)) for one in hessian])
    mine, shares = found(weight, hessian, cross, "output")
    theirs, wanted = found(as_rows, shared, vectors_of(cross, d, "output").flatten(2), "input")
    assert shares == pytest.approx(wanted, rel=2e-2, abs=1e-4)
    assert torch.allclose(vectors_of(mine, d, "output").flatten(2), theirs, atol=0.2)


def test_calibrating_along_outputs_loses_less_of_the_outputs_than_clustering() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    draw = stream(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 8)
    inputs = torch.randn(2000, 32, generator=draw) @ torch.randn(32, 32, generator=draw)
    with torch.no_grad():
        wanted = model(inputs)
    errors = []
    for calibration in (None, inputs):
        made, _ = pqf.compress(
            copy.deepcopy(model), calibration=calibration, k=16, layout="output", k_means_type="kmeans",
            k_means_n_iters=20, show_progress=False,
        )  # fmt: skip
        assert all(layer.layout == "output" for layer in layers_of(made).values())
        with torch.no_grad():
            errors.append(float((made.eval()(inputs) - wanted).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_a_wanted_size_is_chosen_among_what_the_rule_allows() -> None:
    model = nn.Sequential(nn.Conv2d(8, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 36, 20)).eval()
    made, _ = pqf.compress(
        copy.deepcopy(model), ratio=14, layout="output", k=16, k_means_n_iters=3, show_progress=False
    )
    for layer in layers_of(made).values():
        assert layer.layout == "output"
        assert layer.d in (2, 4, 8, 16)
        assert layer.k * layer.d <= 256
    place, _ = matrices(model)
    planned = make_plan(model, QuantizationSpec(k=16, layout="output")).layers["0"]
    assert {d for d, _, _ in settings_for(place, planned, None)} == {2, 4, 8}
    own = LayerSpec(k=64)
    assert {(d, k) for d, k, _ in settings_for(place, planned, own)} == {(2, 64), (4, 64), (8, 32), (4, 16)}
