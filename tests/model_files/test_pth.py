"""Laws of model files: what is saved is what is loaded, bad files are refused, and nothing in a file is executed."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet18, vgg11_bn
from torchvision.ops import FrozenBatchNorm2d

from src.architectures import ARCHITECTURES
from src.common.errors import CheckpointError, RunError
from src.compression.quantize.compress import build_quantized
from src.compression.quantize.layers import QUANTIZED_LAYERS, QuantizedLayer
from src.compression.quantize.plan import LayerSpec, QuantizationSpec, make_plan
from src.model_files.pth import compressed_state, is_compressed, read_tensors, save_compressed, save_dense
from src.model_files.size import ModelSize, model_size
from src.model_files.state_dict import check_codes, load_state
from src.recipes import load_compressed, quantization_spec
from src.settings import load
from tests.conftest import ROOT
from tests.support.helpers import lively, outputs, quantized, relative, spec
from tests.support.patience import PATIENCE

CLOSE = 1e-5
"""Two float32 vectors per norm and float32 activations: 6e-8 per operation, through at most a few dozen of them."""


def small(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 16, 3), norm(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 20),
    )  # fmt: skip


def with_variances(model: nn.Module, low: float = 1e-8, high: float = 1e4) -> nn.Module:
    """Lively norms whose variances span `low` to `high`, with means of the size of the standard deviation."""
    lively(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d) and module.running_var is not None:
            n = module.running_var.numel()
            module.running_var.copy_(torch.logspace(float(np.log10(low)), float(np.log10(high)), n)[torch.randperm(n)])
            module.running_mean.copy_(torch.randn(n) * module.running_var.sqrt())
    return model


def reloaded(model: nn.Module, fresh: nn.Module, how: QuantizationSpec, path: Path) -> nn.Module:
    """Save `model`, and load the file into `fresh` built for the same coding."""
    save_compressed(model, path)
    twin = build_quantized(fresh, make_plan(fresh, how)).eval()
    load_state(twin, read_tensors(path), str(path))
    return twin


NORMS = {
    "eps 1e-5": nn.BatchNorm2d,
    "eps 1e-3": lambda n: nn.BatchNorm2d(n, eps=1e-3),
    "frozen, eps 0": lambda n: FrozenBatchNorm2d(n, eps=0.0),
    "frozen, eps 1e-5": FrozenBatchNorm2d,
    "not affine": lambda n: nn.BatchNorm2d(n, affine=False),
    "not affine, eps 1e-3": lambda n: nn.BatchNorm2d(n, eps=1e-3, affine=False),
    "no statistics": lambda n: nn.BatchNorm2d(n, track_running_stats=False),
    "instance norm with statistics": lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True),
    "instance norm beside batch norm": lambda n: (
        nn.InstanceNorm2d(n, track_running_stats=True) if n == 16 else nn.BatchNorm2d(n)
    ),
    "group norm": lambda n: nn.GroupNorm(4, n),
    "none": lambda _n: nn.Identity(),
}
if "bias" in inspect.signature(nn.BatchNorm2d).parameters:  # in later versions of torch than the oldest
    NORMS["no bias"] = lambda n: nn.BatchNorm2d(n, bias=False)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_saved_and_loaded_network_gives_the_logits_it_had_in_memory(
    norm: Callable[[int], nn.Module], tmp_path: Path
) -> None:
    model = quantized(with_variances(small(norm)), spec(8)).eval()
    x = torch.randn(16, 3, 9, 9)
    wanted = outputs(model, x)
    twin = reloaded(model, small(norm), spec(8), tmp_path / "model.pth")
    assert relative(outputs(twin, x), wanted) < CLOSE
    # and once more: the file of the loaded network is the same file
    assert all(torch.allclose(value.double(), compressed_state(model)[key].double(), rtol=1e-6, atol=1e-7)
               for key, value in compressed_state(twin).items())  # fmt: skip


@pytest.mark.parametrize("norm", [NORMS["eps 1e-5"], NORMS["frozen, eps 0"]], ids=["plain", "frozen"])
def test_every_channel_survives_whatever_its_variance(norm: Callable[[int], nn.Module], tmp_path: Path) -> None:
    """Channel by channel, so that one of small variance cannot hide behind the others."""
    layer = with_variances(nn.Sequential(norm(25)))
    twin = reloaded(layer, nn.Sequential(norm(25)), spec(), tmp_path / "norm.pth")
    x = torch.randn(64, 25, 2, 2) * layer[0].running_var.sqrt()[:, None, None]
    wanted, found = outputs(layer.double(), x.double()), outputs(twin.double(), x.double())
    for channel in range(25):
        assert relative(found[:, channel], wanted[:, channel]) < CLOSE


@pytest.mark.parametrize("frozen_first", [True, False])
def test_frozen_norms_without_eps_and_plain_ones_load_each_others_files(frozen_first: bool, tmp_path: Path) -> None:
    first, second = NORMS["frozen, eps 0"], NORMS["eps 1e-5"]
    if not frozen_first:
        first, second = second, first
    model = quantized(with_variances(small(first)), spec(8)).eval()
    twin = reloaded(model, small(second), spec(8), tmp_path / "model.pth")
    x = torch.randn(16, 3, 9, 9)
    assert relative(outputs(twin, x), outputs(model, x)) < CLOSE


@pytest.mark.parametrize(("build", "how"), [
    (lambda: resnet18(num_classes=10), spec(64, iterations=1, layers={"fc": LayerSpec(k=256)}, ignored=["conv1"])),
    (lambda: vgg11_bn(num_classes=4, init_weights=False), spec(16, iterations=0, ignored=["classifier"])),
], ids=["resnet18", "vgg11 with batch norm"])  # fmt: skip
def test_whole_networks_with_norms_anywhere_survive(
    build: Callable[[], nn.Module], how: QuantizationSpec, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build()
    if hasattr(model, "classifier"):
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Sequential(nn.Linear(512, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    model = with_variances(model, 0.01, 10)
    fresh = lively(copy.deepcopy(model), seed=7)
    quantized(model, how).eval()
    x = torch.randn(2, 3, 32, 32)
    twin = reloaded(model, fresh, how, tmp_path / "model.pth")
    assert relative(outputs(twin, x), outputs(model, x)) < CLOSE
    n_norms = sum(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in model.modules())
    state = read_tensors(tmp_path / "model.pth")
    assert sum(key.endswith(".weight") and value.dim() == 1 for key, value in state.items()) == n_norms


def test_a_compressed_network_in_another_precision_survives(tmp_path: Path) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float16, 0.02)):  # 16 bits: 5e-4 per operation
        model = quantized(lively(small()).to(dtype), spec(8)).eval()
        twin = reloaded(model, small().to(dtype), spec(8), tmp_path / "model.pth")
        x = torch.randn(4, 3, 9, 9).to(dtype)
        assert relative(outputs(twin, x), outputs(model, x)) < tolerance


@pytest.mark.parametrize(("k", "dtype"), [
    (2, torch.uint8), (256, torch.uint8), (512, torch.int16), (2048, torch.int16), (32768, torch.int16),
    (65536, torch.int32),
])  # fmt: skip
def test_codes_have_the_smallest_type_and_survive_up_to_the_highest(k: int, dtype: torch.dtype, tmp_path: Path) -> None:
    dense = nn.Linear(8, max(4, k // 4))
    model = nn.Sequential(QUANTIZED_LAYERS[nn.Linear](dense, 1 if k > 2048 else 4, k))
    layer = model[0]
    codes = torch.arange(layer.codes_matrix.numel()) % k
    codes[-1] = k - 1
    layer.set_codes(torch.randn(k, layer.d).half().float(), codes)
    save_compressed(model, tmp_path / "model.pth")
    state = read_tensors(tmp_path / "model.pth")
    assert state["0.codes_matrix"].dtype == dtype
    twin = nn.Sequential(QUANTIZED_LAYERS[nn.Linear](nn.Linear(8, dense.out_features), layer.d, k))
    load_state(twin, state, "file")
    assert twin[0].codes_matrix.dtype == torch.int32
    assert torch.equal(twin[0].codes_matrix.flatten().long(), codes)


def test_codes_that_were_stored_as_int16_beyond_its_range_are_read_as_unsigned(tmp_path: Path) -> None:
    model = nn.Sequential(QUANTIZED_LAYERS[nn.Linear](nn.Linear(8, 16), 4, 65536))
    codes = torch.randint(65536, (16, 2))
    codes[0, 0] = 40000
    state = {
        "0.codes_matrix": codes.to(torch.int16),
        "0.codebook": torch.zeros(65536, 4).half(),
        "0.bias": torch.zeros(16),
    }
    torch.save(state, tmp_path / "model.pth")
    load_state(model, read_tensors(tmp_path / "model.pth"), "file")
    assert torch.equal(model[0].codes_matrix.long(), codes)


def test_the_file_has_exactly_the_keys_and_types_of_the_format(tmp_path: Path) -> None:
    model = quantized(lively(small()), spec(8, layers={"8": LayerSpec(k=16)}))
    model[0].codebook.data.mul_(1.0001)  # as training leaves it: no longer 16-bit values
    save_compressed(model, tmp_path / "model.pth")
    contents = torch.load(tmp_path / "model.pth", weights_only=True)
    assert isinstance(contents, dict)
    found = {key: (tuple(value.shape), value.dtype) for key, value in contents.items()}
    assert found == {
        "0.codes_matrix": ((8, 3), torch.uint8), "0.codebook": ((4, 9), torch.float16),
        "1.weight": ((8,), torch.float32), "1.bias": ((8,), torch.float32),
        "3.codes_matrix": ((16, 8), torch.uint8), "3.codebook": ((8, 9), torch.float16),
        "3.bias": ((16,), torch.float32),
        "4.weight": ((16,), torch.float32), "4.bias": ((16,), torch.float32),
        "8.codes_matrix": ((20, 4), torch.uint8), "8.codebook": ((16, 4), torch.float16),
        "8.bias": ((20,), torch.float32),
    }  # fmt: skip


def test_what_is_measured_in_memory_is_what_the_file_gives(tmp_path: Path) -> None:
    """Trained codebooks are 32-bit; evaluation rounds them as the file does."""
    model = quantized(lively(small()), spec(8))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, QuantizedLayer):
                module.codebook.add_(torch.randn_like(module.codebook) * 1e-2)
    model.eval()
    twin = reloaded(model, small(), spec(8), tmp_path / "model.pth")
    assert torch.equal(twin[3].weight, model[3].weight)


def test_a_file_is_little_larger_than_its_contents(tmp_path: Path) -> None:
    model = quantized(nn.Sequential(nn.Linear(256, 512)), spec(256, iterations=0))
    save_compressed(model, tmp_path / "model.pth")
    # 1-byte codes, 2-byte codebooks, 4-byte biases, and the zip's own 2 kB per file and key
    assert os.path.getsize(tmp_path / "model.pth") < 512 * 64 + 256 * 4 * 2 + 512 * 4 + 6000


def test_a_parameter_that_is_shared_or_a_view_is_saved_whole_and_alone(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.randn(1000, 4)[10:14])
    save_compressed(model, tmp_path / "model.pth")
    assert torch.equal(read_tensors(tmp_path / "model.pth")["weight"], model.weight)
    tied = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    tied[1].weight = tied[0].weight
    how, fresh = spec(8), copy.deepcopy(tied)
    tied = quantized(tied, how).eval()
    twin = reloaded(tied, fresh, how, tmp_path / "tied.pth")
    x = torch.randn(3, 16)
    assert torch.equal(outputs(twin, x), outputs(tied, x))
    assert twin[0].codebook is twin[1].codebook


def test_a_bare_coded_layer_survives(tmp_path: Path) -> None:
    model = quantized(nn.Linear(16, 16), spec(8)).eval()
    save_compressed(model, tmp_path / "model.pth")
    assert sorted(read_tensors(tmp_path / "model.pth")) == ["bias", "codebook", "codes_matrix"]
    fresh = nn.Linear(16, 16)
    twin = build_quantized(fresh, make_plan(fresh, spec(8))).eval()
    load_state(twin, read_tensors(tmp_path / "model.pth"), "file")
    x = torch.randn(3, 16)
    assert torch.equal(outputs(twin, x), outputs(model, x))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("wrap", ["", "module.", "state_dict", "model"])
def test_ordinary_state_dicts_load(suffix: str, wrap: str, tmp_path: Path) -> None:
    model = with_variances(small())
    path = tmp_path / f"dense{suffix}"
    if suffix == ".pth" and not wrap:
        save_dense(model, path)
    else:
        state: dict = {(wrap if wrap == "module." else "") + key: value for key, value in model.state_dict().items()}
        if suffix == ".safetensors":
            save_file(state, path)
        else:
            torch.save({wrap: state, "epoch": 3} if wrap in ("state_dict", "model") else state, path)
    state = read_tensors(path)
    assert not is_compressed(state)
    twin = small().eval()
    load_state(twin, state, str(path))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in twin.state_dict().items())


def test_a_dense_file_without_num_batches_tracked_loads() -> None:
    model = with_variances(small())
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    for twin in (small(), small(FrozenBatchNorm2d)):
        load_state(twin, state, "file")
        load_state(twin, model.state_dict(), "file")
    assert torch.equal(twin[1].running_var, model[1].running_var)


def good() -> tuple[nn.Module, dict[str, Tensor], nn.Module]:
    """A quantized network, its file's contents, and an empty network for them."""
    model = quantized(lively(small()), spec(8))
    fresh = small()
    return model, compressed_state(model), build_quantized(fresh, make_plan(fresh, spec(8)))


def change(**entries: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def apply(state: dict[str, Tensor]) -> None:
        for key, value in entries.items():
            name = key.replace("__", ".")
            if value is None:
                del state[name]
            else:
                state[name] = value

    return apply


def edit(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def apply(state: dict[str, Tensor]) -> None:
        state[name] = state[name].clone()
        state[name].flatten()[1] = value

    return apply


NAN = float("nan")
BAD = [
    ("missing", change(**{"3__bias": None, "8__codebook": None}), ["2 keys missing", "3.bias", "8.codebook"]),
    ("unexpected", change(extra=torch.zeros(1), **{"1__gain": torch.zeros(1)}), ["2 keys unexpected", "extra", "1.gain"]),
    ("both", change(**{"3__bias": None, "3__bais": torch.zeros(16)}), ["1 keys missing: 3.bias", "1 keys unexpected: 3.bais"]),
    ("another k", change(**{"8__codebook": torch.zeros(16, 4)}), ["8.codebook", "k = 16", "--model.compression_parameters.layer_specs.8.k 16"]),
    ("another d", change(**{"3__codebook": torch.zeros(8, 18), "3__codes_matrix": torch.zeros(16, 4).int()}),
     ["3.codebook", "18 values", "give 9", "large_subvectors", "3.codes_matrix", "(16, 4)", "(16, 8)"]),
    ("other classes", change(**{"8__bias": torch.zeros(10)}), ["8.bias", "(10,)", "(20,)"]),
    ("a norm's shape", change(**{"1__weight": torch.zeros(4)}), ["1.weight", "(4,)", "(8,)"]),
    ("a code too high", edit("0.codes_matrix", 4), ["'0'", "codes up to 4", "4 centroids"]),
    ("a negative code", change(**{"0__codes_matrix": torch.full((8, 3), -1, dtype=torch.int32)}), ["'0'", "4 centroids"]),
    ("codes that are not whole", change(**{"0__codes_matrix": torch.zeros(8, 3)}), ["0.codes_matrix", "torch.float32", "integers"]),
    ("NaN in a codebook", edit("3.codebook", NAN), ["3.codebook", "not finite"]),
    ("NaN in a bias", edit("8.bias", NAN), ["8.bias", "not finite"]),
    ("infinity in a norm", edit("4.weight", float("inf")), ["4.weight", "not finite"]),
    ("dense where quantized", change(**{"8__codebook": None, "8__codes_matrix": None, "8__weight": torch.zeros(20, 16)}),
     ["to be quantized with these settings but dense in the file", "8.weight"]),
    ("quantized where dense", change(**{"9__codebook": torch.zeros(2, 2), "9__codes_matrix": torch.zeros(2, 2).int()}),
     ["quantized in the file but not with these settings", "9"]),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_file_that_does_not_fit_is_refused_with_every_reason_and_changes_nothing(spoil, words: list[str]) -> None:
    _, state, fresh = good()
    spoil(state)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(CheckpointError) as error:
        load_state(fresh, state, "file.pth")
    assert "file.pth" in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())


def test_a_norm_that_cannot_hold_the_files_scale_is_refused_and_nothing_is_changed() -> None:
    state = compressed_state(lively(small()))
    model = small(NORMS["not affine"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r"1.*without weight and bias"):
        load_state(model, state, "file.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_codes_are_checked_against_the_files_own_codebooks() -> None:
    _, state, _ = good()
    check_codes(state, "file")
    state["3.codes_matrix"][5, 5] = 8
    with pytest.raises(CheckpointError, match=r"file: layer '3' holds codes up to 8.*8 centroids"):
        check_codes(state, "file")


def test_codebooks_that_16_bits_cannot_hold_are_not_saved(tmp_path: Path) -> None:
    model, _, _ = good()
    save_compressed(model, tmp_path / "model.pth")
    kept = (tmp_path / "model.pth").read_bytes()
    for value in (NAN, 70000.0):
        with torch.no_grad():
            model[3].codebook[0, 0] = value
        with pytest.raises(CheckpointError, match=r"'3'.*16-bit"):
            save_compressed(model, tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == kept


@pytest.fixture(scope="module")
def file_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("file") / "model.pth"
    save_compressed(good()[0], path)
    return path.read_bytes()


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused(share: float, suffix: str, file_bytes: bytes, tmp_path: Path) -> None:
    whole = file_bytes
    if suffix == ".safetensors":
        save_file(small().state_dict(), tmp_path / "whole.safetensors")
        whole = (tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / f"model{suffix}"
    path.write_bytes(whole[: min(int(len(whole) * share), len(whole) - 1)])
    with pytest.raises(CheckpointError, match=f"model{suffix}"):
        read_tensors(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=400),
    start=st.sampled_from(
        [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02}q\x00", b"\x80\x02G", b"\x80\x02X", b"\x80\x02ctorch\n"]
    ),
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_arbitrary_bytes_are_refused(data: bytes, start: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(start + data)
    with pytest.raises(CheckpointError):
        read_tensors(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.binary(min_size=1, max_size=8))
def test_a_damaged_file_is_read_or_refused_but_never_crashes(
    place: float, value: bytes, file_bytes: bytes, tmp_path: Path
) -> None:
    at = int(place * len(file_bytes))
    path = tmp_path / "model.pth"
    path.write_bytes(file_bytes[:at] + value + file_bytes[at + len(value) :])
    fresh = build_quantized(small(), make_plan(small(), spec(8)))
    try:
        load_state(fresh, read_tensors(path), str(path))
    except CheckpointError:
        return


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.binary(min_size=1, max_size=4))
def test_a_damaged_pickle_inside_a_whole_archive_is_read_or_refused(
    place: float, value: bytes, file_bytes: bytes, tmp_path: Path
) -> None:
    source, path = tmp_path / "source.pth", tmp_path / "model.pth"
    source.write_bytes(file_bytes)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            contents = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                at = int(place * len(contents))
                contents = contents[:at] + value + contents[at + len(value) :]
            new.writestr(entry.filename, contents)
    try:
        state = read_tensors(path)
    except CheckpointError:
        return
    assert all(isinstance(value, Tensor) for value in state.values())


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("way", ["torch.save", "pickle", "beside tensors", "legacy", "renamed"])
def test_a_file_that_would_execute_code_is_refused_and_nothing_is_executed(way: str, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    path = tmp_path / ("model.safetensors" if way == "renamed" else "model.pth")
    payload = Payload(touched)
    if way in ("pickle", "renamed"):
        path.write_bytes(pickle.dumps(payload))
    else:
        contents = {"fc.weight": torch.zeros(2), "x": payload} if way == "beside tensors" else payload
        torch.save(contents, path, _use_new_zipfile_serialization=way != "legacy")
    with pytest.raises(CheckpointError, match="model") as error:
        read_tensors(path)
    assert not touched.exists()
    assert error.value.status == 2
    if way in ("torch.save", "beside tensors"):
        assert "could execute code" in str(error.value)
    if way == "torch.save":  # the payload is real
        torch.load(path, weights_only=False)
        assert touched.exists()


@pytest.mark.parametrize(
    "contents", [{}, [], torch.zeros(3), {"a": 1}, {1: torch.zeros(1)}, {"a": {"b": torch.zeros(1)}}], ids=str
)
def test_files_without_named_tensors_are_refused(contents: object, tmp_path: Path) -> None:
    torch.save(contents, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"model\.pth"):
        read_tensors(tmp_path / "model.pth")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(CheckpointError):
            read_tensors(path)


def big() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(512, 1024))


def test_a_save_that_is_interrupted_leaves_the_old_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE in a process of its own stands for the full disk."""
    path = tmp_path / "folder" / "model.pth"
    save_dense(small(), path)
    kept = path.read_bytes()
    program = f"""
import resource, sys
from pathlib import Path
from torch import nn
from src.model_files.pth import save_compressed
from src.common.errors import RunError
model = nn.Sequential(nn.Linear(512, 1024))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name in ("model.pth", "new.pth"):
    try:
        save_compressed(model, Path({str(path.parent)!r}) / name)
    except RunError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"cannot write {path}" in done.stdout
    assert "the previous model.pth is unchanged" in done.stdout
    assert "nothing was left behind" in done.stdout
    assert path.read_bytes() == kept
    assert [entry.name for entry in path.parent.iterdir()] == ["model.pth"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        path = disk / "model.pth"
        save_compressed(small(), path)
        kept = path.read_bytes()
        for save in (save_compressed, save_dense):
            with pytest.raises(
                RunError,
                match=r"cannot write .*model\.pth: no space left on the disk; the previous model\.pth is unchanged",
            ):
                save(big(), path)
            assert path.read_bytes() == kept
            assert [entry.name for entry in disk.iterdir()] == ["model.pth"]
        assert RunError.status == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*model\.pth"):
        save_compressed(small(), tmp_path / "file" / "model.pth")


def test_saving_makes_the_folder_and_a_file_that_others_may_read(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "model.pth"
    save_compressed(small(), path)
    assert [entry.name for entry in path.parent.iterdir()] == ["model.pth"]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode


def test_saving_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = quantized(lively(small()), spec(8)).train()
    before = copy.deepcopy(model.state_dict())
    save_compressed(model, tmp_path / "model.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training


@pytest.mark.published
def test_the_published_resnet18_loads_and_is_what_the_specification_says(published: Path, tmp_path: Path) -> None:
    path = published / "published" / "resnet18.pth"
    how = quantization_spec(load("../config/train_resnet18.yaml"))
    model = load_compressed(path, ARCHITECTURES["resnet18"], how)
    assert model_size(model) == ModelSize(codes=11_516_928, codebooks=770_048, other=640_256, original=374_064_384)
    state = read_tensors(path)
    ours = compressed_state(model)
    assert {key: (value.shape, value.dtype) for key, value in ours.items()} == {
        key: (v.shape, v.dtype) for key, v in state.items()
    }
    assert all(
        torch.equal(ours[key], value)
        for key, value in state.items()
        if not key.endswith((".weight", ".bias")) or value.dim() > 1
    )
    # norms are unfolded and folded again in float64
    assert all(torch.allclose(ours[key], value, rtol=1e-6, atol=1e-7) for key, value in state.items())
    save_compressed(model, tmp_path / "again.pth")
    twin = load_compressed(tmp_path / "again.pth", ARCHITECTURES["resnet18"], how)
    x = torch.randn(1, 3, 64, 64)
    assert relative(outputs(twin, x), outputs(model, x)) < CLOSE


@pytest.mark.published
def test_the_published_file_with_the_wrong_settings_names_the_key_to_set(published: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--model\.compression_parameters\.layer_specs\.fc\.k 2048"):
        load_compressed(
            published / "published" / "resnet18.pth", ARCHITECTURES["resnet18"], spec(256, ignored=["conv1"])
        )


def test_loading_a_compressed_network_for_other_classes_takes_them_from_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    how = spec(16, iterations=0, ignored=["conv1"])
    model = quantized(lively(ARCHITECTURES["resnet18"].build(12)), how).eval()
    save_compressed(model, tmp_path / "model.pth")
    twin = load_compressed(tmp_path / "model.pth", ARCHITECTURES["resnet18"], how)
    x = torch.randn(2, 3, 32, 32)
    assert relative(outputs(twin, x), outputs(model, x)) < CLOSE
    assert not twin.training
    assert all(not t.is_meta for t in [*twin.parameters(), *twin.buffers()])
