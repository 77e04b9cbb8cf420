"""Codebooks of 8-bit values with one scale: laws of the rounding, and everything that 16-bit ones can do."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from src.common.errors import CheckpointError, PlanError
from src.common.randomness import stream
from src.compression.quantize.calibrate.calibrate import calibrate
from src.compression.quantize.compress import compress
from src.compression.quantize.dequantize import dense_again, dequantized_state
from src.compression.quantize.kmeans import cluster, with_eight_bits
from src.compression.quantize.plan import LayerSpec, make_plan
from src.compression.quantize.stored_codebook import as_stored, eight_bit_scale, stored_values
from src.exports.onnx_file import graph_of
from src.model_files.building import build_and_load
from src.model_files.inspection import examine, examine_model
from src.model_files.open_model_file import open_model_file
from src.model_files.packed import ModelInfo, load_packed, save_packed
from src.model_files.plan_of_file import plan_of
from src.model_files.pth import compressed_state, read_tensors, save_compressed
from src.model_files.safetensors_file import read_metadata
from src.model_files.size import model_size
from src.model_files.skeleton import skeleton_of_state
from tests.support.helpers import quantized, spec

MIXED = {
    "0": LayerSpec(codebook_bits=8),
    "5": LayerSpec(codebook_bits=8),
    "7.in_proj_weight": LayerSpec(codebook_bits=8),
}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A convolution, a norm, two linear layers that share a weight, attention, and a layer of 16-bit values."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 32),
        nn.Linear(32, 32),
        nn.Linear(32, 32, bias=False),
        nn.MultiheadAttention(32, 2),
        nn.Linear(32, 20),
    )
    model[6].weight = model[5].weight
    with torch.no_grad():
        model[5].weight[:4] = 0  # pruned
    return model.to(dtype).eval()


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for layer in model[:7]:
        x = layer(x)
    return model[8](model[7](x, x, x)[0])


def mixed(dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = {**MIXED, "6": LayerSpec(codebook_bits=8)}
    return quantized(network(dtype), spec(16, layers=layers)).eval()


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(-100, 100),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 40), st.integers(1, 8)),
    st.sampled_from([0.0, 0.5]),
)
def test_rounding_is_done_once_moves_by_half_a_step_and_keeps_zeros(seed, power, dtype, shape, zeros) -> None:
    draw = torch.Generator().manual_seed(seed)
    if dtype == torch.float16:
        power //= 10
    codebook = torch.randn(shape, generator=draw, dtype=torch.float64) * 2.0**power
    codebook[torch.rand(shape, generator=draw) < zeros] = 0
    codebook = codebook.to(dtype)
    step = float(eight_bit_scale(codebook))
    rounded = as_stored(codebook, 8, None)
    assert rounded.dtype == dtype
    assert torch.equal(as_stored(rounded, 8, None), rounded)
    assert float(eight_bit_scale(rounded)) == step or not rounded.any()
    assert float((rounded.double() - codebook.double()).abs().max()) <= step / 2
    assert bool((rounded[codebook == 0] == 0).all())
    whole = stored_values(codebook, 8, None)
    assert whole.dtype == torch.int8
    assert torch.equal(whole.double() * step, rounded.double())  # a product is exact in every type
    most = 1.01 if dtype in (torch.float32, torch.float64) else 2.0
    assert step <= most * float(codebook.double().abs().max()) / 127 or not codebook.any()


def test_values_at_the_ends_of_their_type_stay_finite() -> None:
    for dtype in DTYPES:
        largest = torch.finfo(dtype).max if dtype != torch.float64 else torch.finfo(torch.float32).max
        codebook = torch.tensor([[largest, -largest], [largest / 2, 0.0]]).to(dtype)
        rounded = as_stored(codebook, 8, None)
        assert bool(torch.isfinite(rounded).all())
        assert torch.equal(as_stored(rounded, 8, None), rounded)
        assert float((rounded.double() / codebook.double())[0].min()) > 0.9
    assert not as_stored(torch.zeros(2, 3), 8, None).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_computed_is_what_files_hold(dtype, tmp_path: Path) -> None:
    model = mixed(dtype)
    eight = [model[0], model[5], model[7].in_proj_weight_quantized]
    assert [layer.codebook_bits for layer in eight] == [8, 8, 8]
    assert model[8].codebook_bits == model[4].codebook_bits == 16
    for layer in eight:
        with torch.no_grad():  # as training leaves it
            layer.codebook.add_(torch.randn_like(layer.codebook) * 0.01 * layer.codebook.abs().max())
        layer.forget()
        values, scale = layer.stored_codebook(), layer.stored_scale()
        weight = (values.double() * scale.double())[layer.codes_matrix.long()].view(layer.weight_shape)
        assert torch.equal(layer.weight.double(), weight)
    with torch.no_grad():
        model = model.float()
        wanted = run(model, X)
        save_compressed(model, tmp_path / "model.pth")
        save_packed(model, tmp_path / "model.safetensors", ModelInfo())
        state, packed = read_tensors(tmp_path / "model.pth"), load_packed(tmp_path / "model.safetensors")
        assert state["0.codebook"].dtype == packed.state()["0.codebook"].dtype == torch.int8
        with torch.device("meta"):
            dense = network()
        for plan, tensors in ((packed.plan, packed.state()), (plan_of(dense, state, "file"), state)):
            loaded = build_and_load(network, lambda _, plan=plan: plan, tensors, "file")
            assert torch.equal(run(loaded, X), wanted)
            assert loaded[5].codebook is loaded[6].codebook or plan is not packed.plan
            again = compressed_state(loaded)
            assert all(torch.equal(value, again[name]) for name, value in compressed_state(model).items())
            save_packed(loaded, tmp_path / "again.safetensors", ModelInfo())
            save_compressed(loaded, tmp_path / "again.pth")
            assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_sizes_are_those_of_the_file_and_older_programs_are_told(tmp_path: Path) -> None:
    model, file = mixed(), tmp_path / "model.safetensors"
    plain = model_size(quantized(network(), spec(16)))
    size = model_size(model)
    values = 16 * 9 + 16 * 4 + 16 * 4  # of the three codebooks
    assert (size.codes, size.other, size.original) == (plain.codes, plain.other, plain.original)
    assert size.codebooks == plain.codebooks - 8 * values + 3 * 32
    save_packed(model, file, ModelInfo())
    packed = load_packed(file)
    names = [name for name in packed.tensors if name.endswith(("codebook", "codebook_scale", "codes_packed"))]
    assert sum(packed.tensors[name].numel() * packed.tensors[name].element_size() for name in names) * 8 == (
        size.codes + size.codebooks
    )
    assert read_metadata(file)["format_version"] == "5"
    save_packed(quantized(network(), spec(16)), file, ModelInfo())
    assert read_metadata(file)["format_version"] in ("2", "3")
    row = {row.name: row for row in examine_model(model).rows}["0"]
    assert row.codebook_bits == 16 * 9 * 8 + 32
    shown = str(examine_model(model))
    assert "codebook bits" in shown
    assert "codebook bits" not in str(examine_model(quantized(network(), spec(16))))


def test_a_file_without_its_network_is_shown_and_rewritten(tmp_path: Path) -> None:
    save_packed(mixed(), tmp_path / "model.safetensors", ModelInfo(arch="no.such:network"))
    found = examine(tmp_path / "model.safetensors")
    own = {row.name: (row.value_bits, row.codebook_bits) for row in examine_model(mixed()).rows}
    shown = {row.name: (row.value_bits, row.codebook_bits) for row in found.rows if row.k is not None}
    assert shown.items() >= {name: bits for name, bits in own.items() if bits[0] is not None}.items()
    assert shown["0"] == (8, 16 * 9 * 8 + 32)
    skeleton = open_model_file(tmp_path / "model.safetensors", needs_network=False).model
    again = compressed_state(skeleton)
    state = load_packed(tmp_path / "model.safetensors").state()
    assert {name for name in again if "code" in name} == {name for name in state if "code" in name}
    assert all(torch.equal(again[name], value) for name, value in state.items() if "code" in name)
    save_compressed(skeleton, tmp_path / "model.pth")
    assert compressed_state(skeleton_of_state(read_tensors(tmp_path / "model.pth"), "file")).keys() == again.keys()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    state = compressed_state(mixed())
    with torch.device("meta"):
        dense = network()
    missing = {name: value for name, value in state.items() if name != "0.codebook_scale"}
    for broken in (
        missing,
        {**state, "0.codebook_scale": torch.tensor(-1.0)},
        {**state, "0.codebook_scale": torch.ones(2)},
    ):
        with pytest.raises(CheckpointError, match=r"0\.codebook_scale must be one positive"):
            plan_of(dense, broken, "file")
    huge = {**state, "0.codebook_scale": torch.tensor(3e38)}
    with pytest.raises(CheckpointError, match=r"0\.codebook holds values that are not finite"):
        build_and_load(network, lambda model: plan_of(model, huge, "file"), huge, "file")
    model = mixed()
    with torch.no_grad():
        model[0].codebook[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="layer '0': its codebook holds values that are not finite"):
        save_compressed(model, tmp_path / "model.pth")


def test_training_sees_floats_and_copies_programs_and_dense_networks_what_is_stored() -> None:
    model = mixed()
    layer = model[0]
    layer.train()
    with torch.no_grad():
        layer.codebook.mul_(1.001)
    assert torch.equal(layer.weight.reshape(-1, 9), layer.codebook[layer.codes_matrix.reshape(-1).long()])
    (layer(X).square().sum()).backward()
    assert bool((layer.codebook.grad != 0).any())
    with torch.no_grad():
        layer.codebook[0] += 0.3 * eight_bit_scale(layer.codebook)
    layer.eval()
    stored = layer.dequantize_stored().detach()
    assert not torch.equal(stored, layer.dequantize().detach())
    with torch.no_grad():
        wanted = layer(X)
        assert torch.equal(layer.weight, stored)
        assert torch.equal(copy.deepcopy(model)[0](X), wanted)
        twin = mixed()
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin[0](X), wanted)
        dense = network()
        dense.load_state_dict(dequantized_state(model))
        assert torch.equal(dense[0](X), wanted)
        assert torch.equal(dense_again(copy.deepcopy(model))[0](X), wanted)
        assert not hasattr(dense_again(copy.deepcopy(model))[0], "codebook_bits")
        assert torch.allclose(torch.compile(layer, backend="aot_eager", fullgraph=True)(X), wanted, atol=1e-5)
        assert torch.equal(torch.jit.trace(layer, (X,), check_trace=False)(X), wanted)
    program = torch.export.export(layer, (X,))
    assert torch.equal(program.module()(X), wanted)
    assert "codebook_bits=8" in repr(layer)
    assert bool((model[5].weight[:4] == 0).all())  # pruned blocks


def test_clustering_again_after_the_rounding_loses_least() -> None:
    draw = stream(0, "vectors")
    vectors = torch.randn(4000, 2, generator=draw)
    vectors[:50] = 0
    found = cluster("src", vectors, 64, 60, stream(1))
    rounded = with_eight_bits(vectors, found, torch.float32)
    codebook = as_stored(found.codebook, 8, None)
    assert torch.equal(rounded.codebook, codebook)
    kept = float((vectors - codebook[found.codes]).square().sum(1).mean())
    assert found.distortion <= rounded.distortion <= kept
    assert rounded.distortion < 1.02 * found.distortion
    assert bool((rounded.codes[:50] == 0).all())
    assert not codebook[0].any()


def test_calibrated_layers_are_rounded_as_files_hold_them() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 8)
    ).eval()
    batches = list(torch.randn(4, 8, 3, 8, 8))
    lost = {}
    for bits in (16, 8):
        how = spec(16, "src", 50, layers={"4": LayerSpec(subvector_size=4), "0": LayerSpec(subvector_size=9)})
        plan = make_plan(dense, how.__class__(**{**vars(how), "codebook_bits": bits}))
        found = calibrate(dense, plan, batches, show_progress=False)
        lost[bits] = found.lost_after()["rounded"]
        for clustering in found.clusterings.values():
            assert torch.equal(as_stored(clustering.codebook, bits, None), clustering.codebook)
        model, results = compress(copy.deepcopy(dense), plan, finished=found, show_progress=False)
        assert [result.codebook_bits for result in results] == [bits, bits]
        for name, layer in (("0", model[0]), ("4", model[4])):
            assert layer.codebook_bits == bits
            assert torch.equal(layer.codebook, found.clusterings[name].codebook)
    assert lost[8] < 1.1 * lost[16]


def test_other_bits_are_refused_by_name() -> None:
    with pytest.raises(PlanError, match="codebook_bits = 7: expected 16 or 8"):
        make_plan(network(), spec(layers={"0": LayerSpec(codebook_bits=7)}))
    tied = make_plan(network(), spec(16, layers=MIXED))
    assert "5" not in tied.layers  # 6 has its weight, and other bits
    assert any("shares its weight with 6.weight, which is not quantized alike" in note for note in tied.notes)


def test_onnx_multiplies_8_bit_values(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")

    def convolutions() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3))

    model = quantized(convolutions(), spec(8, layers={"0": LayerSpec(codebook_bits=8)})).eval()
    dense = convolutions()
    dense.load_state_dict(dequantized_state(model))
    onnx.save(graph_of(dense.eval(), model, 8), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx")
    (codebook,) = [tensor for tensor in graph.graph.initializer if tensor.name == "0.codebook"]
    assert codebook.data_type == onnx.TensorProto.INT8
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(2, 3, 8, 8)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(x).numpy(), rtol=1e-5, atol=1e-6)
