"""Laws of packed files: as small as reported, exact, complete, equal for equal models, and refused when anything in
them was altered."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from src.architectures import ARCHITECTURES
from src.architectures.architecture import Architecture
from src.common.errors import CheckpointError
from src.compression.permute.groups import Group
from src.compression.quantize.compress import build_quantized
from src.compression.quantize.layers import QuantizedLayer
from src.compression.quantize.plan import make_plan
from src.model_files import entropy
from src.model_files.bit_packing import pack, packed_size, unpack
from src.model_files.open_model_file import open_model_file
from src.model_files.packed import AppliedPermutation, ModelInfo, is_packed, load_packed, save_packed
from src.model_files.pth import compressed_state, read_tensors, save_compressed
from src.model_files.safetensors_file import CHECKSUM
from src.model_files.size import model_size
from src.model_files.state_dict import load_state
from src.recipes import quantization_spec
from src.run.model_writer import compression_settings
from src.settings import load
from tests.support.helpers import lively, outputs, quantized, spec

# --- packing and entropy coding ---


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_packed_numbers_come_back_from_exactly_their_bits(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 31))
    numbers = np.array(data.draw(st.lists(st.integers(0, 2**width - 1), max_size=70)), np.int32)
    packed = pack(numbers, width)
    assert packed.size == packed_size(numbers.size, width) == -(-numbers.size * width // 8)
    assert np.array_equal(unpack(packed, numbers.size, width), numbers)
    # number i lies at the bits i*w ..., the lowest first
    stream = int.from_bytes(packed.tobytes(), "little")
    assert [stream >> (i * width) & (2**width - 1) for i in range(numbers.size)] == numbers.tolist()
    assert stream >> (numbers.size * width) == 0


@pytest.mark.parametrize("width", [1, 7, 8, 10, 11, 16, 31])
def test_packing_in_chunks_is_packing_at_once(width: int) -> None:
    numbers = np.random.default_rng(width).integers(0, 2**width, (1 << 18) + 13).astype(np.int32)
    packed = pack(numbers, width)
    assert np.array_equal(unpack(packed, numbers.size, width), numbers)
    assert np.array_equal(packed[: packed_size(1 << 18, width)], pack(numbers[: 1 << 18], width))


def test_what_does_not_fit_is_not_packed_or_unpacked() -> None:
    for numbers, width in (([4], 2), ([-1], 8), ([0], 0), ([0], 32)):
        with pytest.raises(ValueError, match="bits"):
            pack(np.array(numbers, np.int32), width)
    with pytest.raises(ValueError, match="expected 2"):
        unpack(np.zeros(3, np.uint8), 5, 3)
    with pytest.raises(ValueError, match="unused bits"):
        unpack(np.array([0, 0x80], np.uint8), 5, 3)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 14), st.integers(1, 3000), st.sampled_from([0.01, 0.3, 5.0]), st.integers(0, 2**32 - 1))
def test_entropy_coding_is_exact_and_its_length_is_near_the_entropy(
    bits: int, n: int, spread: float, seed: int
) -> None:
    draw, k = np.random.default_rng(seed), 1 << bits
    codes = draw.choice(k, n, p=draw.dirichlet(np.full(k, spread))).astype(np.int32)
    stream = entropy.encode(codes, k)
    assert np.array_equal(entropy.decode(stream, n, k), codes)
    longest = 8 * packed_size(n, max(0, bits - 8)) + 256  # the higher bits go in as they are
    for high in np.unique(codes >> 8):
        counts = np.unique(codes[codes >> 8 == high], return_counts=True)[1]
        ideal = -float((counts * np.log2(counts / counts.sum())).sum())
        # a Huffman code costs at most a bit more than the entropy; the table of its lengths some bits per symbol; the
        # low bytes as they are, a few bytes
        longest += min(ideal + counts.sum() + 14 * min(k, 256), 8 * counts.sum()) + 64
    assert 8 * stream.size <= longest


def test_low_bytes_are_coded_given_the_higher_bits() -> None:
    """Codes of k = 512 whose low bytes are uniform, and half of them impossible once the ninth bit is known."""
    draw = np.random.default_rng(0)
    high = draw.integers(0, 2, 20_000)
    low = draw.permutation(256)[draw.integers(0, 128, 20_000) + 128 * high]
    codes = (low | high << 8).astype(np.int32)
    stream = entropy.encode(codes, 512)
    assert np.array_equal(entropy.decode(stream, codes.size, 512), codes)
    assert stream.size < 0.91 * packed_size(codes.size, 9)  # 8 of 9 bits and two tables


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_entropy_stream_is_refused_or_gives_codes_below_k(data: st.DataObject) -> None:
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    k = 2 ** data.draw(st.integers(2, 12))
    n = data.draw(st.integers(20, 2000))
    stream = entropy.encode(draw.integers(0, k, n).astype(np.int32), k)
    at = data.draw(st.integers(0, stream.size - 1))
    stream[at] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        stream = stream[: data.draw(st.integers(0, stream.size))]
    try:
        codes = entropy.decode(stream, n, k)
    except ValueError:
        return
    assert codes.shape == (n,)
    assert 0 <= codes.min() <= codes.max() < k


# --- sizes and completeness ---


def full_model(depth: int, flags: Sequence[str]) -> tuple[nn.Module, ModelInfo, Architecture]:
    """A network of the golden table with random codes and norms, and as much to say about it as a run can have."""
    settings = load(f"../config/train_resnet{depth}.yaml", flags)
    architecture = ARCHITECTURES[f"resnet{depth}"]
    draw = torch.Generator().manual_seed(0)
    dense = architecture.build(1000)
    groups = architecture.groups(dense)
    model = lively(build_quantized(dense, make_plan(dense, quantization_spec(settings))))
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            n = module.codes_matrix.numel()
            module.set_codes(
                torch.randn(module.codebook.shape, generator=draw) * module.weight_shape[1] ** -0.5 / 3,
                torch.randint(module.k, (n,), generator=draw),
            )
    return (
        model,
        ModelInfo(
            arch=architecture.name,
            num_classes=1000,
            settings=compression_settings(settings),
            metric={"accuracy": 75.04, "loss": 1.0123},
            permutations=applied(dense, groups),
            producer="pqf 0.1.0",
        ),
        architecture,
    )


def applied(model: nn.Module, groups: Sequence[Group]) -> tuple[AppliedPermutation, ...]:
    """A random permutation of every group, as a run reports it."""
    draw = torch.Generator().manual_seed(1)
    widths = [model.get_submodule(group.children[0]) for group in groups]
    sizes = [layer.weight_shape[1] if isinstance(layer, QuantizedLayer) else layer.weight.shape[1] for layer in widths]
    return tuple(
        AppliedPermutation(
            parents=g.parents, children=g.children, permutation=torch.randperm(n, generator=draw), reshapes={}
        )
        for g, n in zip(groups, sizes, strict=True)
    )


KEY = "--model.compression_parameters"
GOLDEN = {
    "resnet18 small": (18, [], 12_927_232),
    "resnet18 large": (18, [f"{KEY}.large_subvectors", "True"], 8_634_624),
    "resnet50 small": (50, [], 42_714_368),
    "resnet50 large": (50, [f"{KEY}.large_subvectors", "True", f"{KEY}.pw_subvector_size", "8"], 26_718_976),
}


@pytest.mark.parametrize(("depth", "flags", "bits"), GOLDEN.values(), ids=GOLDEN)
def test_a_packed_file_is_as_small_as_reported_and_gives_the_network_back(
    depth: int, flags: list[str], bits: int, tmp_path: Path
) -> None:
    model, info, _ = full_model(depth, flags)
    assert model_size(model).bits == bits
    path = tmp_path / "model.safetensors"
    save_packed(model, path, info)
    assert path.stat().st_size <= bits / 8 * 1.01 + 8 * 1024
    opened = open_model_file(path)
    assert opened.kind == "packed"
    assert opened.quantized
    x = torch.randn(2, 3, 64, 64)
    assert (
        torch.equal(outputs(opened.model, x), outputs(model, x))
        or (outputs(opened.model, x) - outputs(model, x)).abs().max() < 1e-4
    )
    wanted, found = compressed_state(model), compressed_state(opened.model)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items() if value.dim() > 1)
    assert (opened.info.arch, opened.info.num_classes, opened.info.metric) == (info.arch, 1000, info.metric)
    assert opened.info.settings == json.loads(json.dumps(info.settings))
    assert opened.info.producer == "pqf 0.1.0"
    assert info.permutations is not None
    assert opened.info.permutations is not None
    assert len(opened.info.permutations) == len(info.permutations) > 5
    for ours, theirs in zip(info.permutations, opened.info.permutations, strict=True):
        assert (ours.parents, ours.children) == (theirs.parents, theirs.children)
        assert torch.equal(ours.permutation, theirs.permutation)


@pytest.mark.published
def test_the_published_resnet18_packed_and_back_is_the_same_to_the_bit(published: Path, tmp_path: Path) -> None:
    source = published / "published" / "resnet18.pth"
    original, opened = read_tensors(source), open_model_file(source)
    assert (opened.architecture.name, opened.kind, opened.info.num_classes) == ("resnet18", "published", 1000)
    sizes = {}
    for coding in (False, True):
        packed, again = tmp_path / f"{coding}.safetensors", tmp_path / f"{coding}.pth"
        save_packed(opened.model, packed, opened.info, entropy_coding=coding)
        save_compressed(open_model_file(packed).model, again)
        found = read_tensors(again)
        assert found.keys() == original.keys()
        assert all(torch.equal(found[key], value) for key, value in original.items())
        sizes[coding] = packed.stat().st_size
    reported = 12_927_232 / 8
    assert sizes[False] <= 1.01 * reported
    assert sizes[True] <= 1_591_997 * 1.005  # what the range coder of format 1 gave
    assert source.stat().st_size > 1.05 * reported


def small(n: int = 20) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 16, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, n),
    )  # fmt: skip


def rebuilt(path: Path, dense: nn.Module) -> nn.Module:
    packed = load_packed(path)
    model = build_quantized(dense, packed.plan).eval()
    load_state(model, packed.state(), str(path))
    return model


@pytest.mark.parametrize("coding", [False, True])
@pytest.mark.parametrize("k", [2, 4, 8, 64])
def test_every_kind_of_layer_and_k_survives(k: int, coding: bool, tmp_path: Path) -> None:
    model = quantized(lively(small()), spec(k)).eval()
    path = tmp_path / "model.safetensors"
    save_packed(model, path, ModelInfo(), entropy_coding=coding)
    twin = rebuilt(path, small())
    for key, value in model.state_dict().items():
        if key.endswith(("codes_matrix", "codebook", "6.bias")):
            assert torch.equal(twin.state_dict()[key], value.half().float() if key.endswith("codebook") else value)
    x = torch.randn(3, 3, 9, 9)
    assert (outputs(twin, x) - outputs(model, x)).abs().max() < 1e-5


def test_layers_that_share_are_stored_once_and_share_again(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        torch.manual_seed(0)
        layer, norm = nn.Linear(32, 32), nn.BatchNorm1d(32)
        other = nn.Linear(32, 32)
        other.weight = layer.weight
        return nn.Sequential(layer, norm, other, norm, layer)

    model = quantized(lively(tied()), spec(16)).eval()
    path = tmp_path / "model.safetensors"
    save_packed(model, path, ModelInfo())
    stored = [name for name in load_file(path) if name.rpartition(".")[2] in ("codes_packed", "codebook")]
    assert sorted(stored) == ["0.codebook", "0.codes_packed"]
    assert model_size(model).bits / 8 <= path.stat().st_size <= model_size(model).bits / 8 + 3000
    x = torch.randn(4, 32)
    assert (outputs(rebuilt(path, tied()), x) - outputs(model, x)).abs().max() < 1e-5


def test_a_bare_layer_and_a_network_without_coded_layers_survive(tmp_path: Path) -> None:
    for name, make, how in (
        ("bare", lambda: nn.Linear(64, 64), spec(16)),
        ("plain", small, spec(16, ignored=["0", "3", "6"])),
    ):
        model = quantized(lively(make()), how).eval()
        path = tmp_path / f"{name}.safetensors"
        save_packed(model, path, ModelInfo())
        x = torch.randn(2, 64) if name == "bare" else torch.randn(2, 3, 9, 9)
        assert (outputs(rebuilt(path, make()), x) - outputs(model, x)).abs().max() < 1e-5


def test_equal_models_give_equal_files_that_other_programs_can_open(tmp_path: Path) -> None:
    model = quantized(lively(small()), spec(16)).eval()
    info = ModelInfo(
        arch="small", num_classes=20, settings={"k": 16}, metric={"accuracy": 1.0}, permutations=(), producer="test"
    )
    for name in ("a", "b"):
        save_packed(copy.deepcopy(model), tmp_path / f"{name}.safetensors", info)
    contents = (tmp_path / "a.safetensors").read_bytes()
    assert contents == (tmp_path / "b.safetensors").read_bytes()
    tensors = load_file(tmp_path / "a.safetensors")
    assert torch.equal(tensors["6.bias"], model[6].bias)
    with safe_open(str(tmp_path / "a.safetensors"), "pt") as opened:
        assert list(opened.metadata()) == ["pqf"]
        metadata = json.loads(opened.metadata()["pqf"])
    assert metadata["format"] == "pqf"
    assert metadata["format_version"] == "3"
    assert json.loads(metadata["layers"])["6"] == ["Linear", [20, 16], 4, 16]
    assert hashlib.sha256(contents.replace(metadata[CHECKSUM].encode(), b"0" * 64)).hexdigest() == metadata[CHECKSUM]
    assert is_packed(tmp_path / "a.safetensors")


def test_a_packed_file_can_be_replaced_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "model.safetensors"
    for k in (4, 8):
        save_packed(quantized(small(), spec(k)).eval(), path, ModelInfo())
    assert os.listdir(path.parent) == ["model.safetensors"]
    assert load_packed(path).layers["6"].k == 8


def test_tensors_of_every_type_survive(tmp_path: Path) -> None:
    model = nn.Module()
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ):
        model.register_buffer(
            "of_" + str(dtype).removeprefix("torch."), torch.tensor([[0, 1, 1], [1, 0, 1]], dtype=dtype)
        )
    model.register_buffer("number", torch.tensor(3.5))
    model.register_buffer("nothing", torch.zeros(0, 4))
    save_packed(model, tmp_path / "model.safetensors", ModelInfo())
    found = load_packed(tmp_path / "model.safetensors").state()
    wanted: dict[str, Tensor] = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in wanted.items())


def test_a_file_that_does_not_fit_its_architecture_is_refused(tmp_path: Path) -> None:
    model = quantized(lively(small()), spec(16)).eval()
    path = tmp_path / "model.safetensors"
    for arch, n, words in (
        (None, 20, "does not say which network"),
        ("os:system", 20, "Code that a file names is not run"),
        ("resnet99", 20, "not known"),
        ("resnet18", None, "classes"),
        ("resnet18", 20, "no such layer|another"),
    ):
        save_packed(model, path, ModelInfo(arch, n))
        with pytest.raises(CheckpointError, match=words):
            open_model_file(path)
