"""Core ML packages hold our weights to the last bit, compute our logits, are as small as is reported, and are written
whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from src import convert
from src.common.randomness import stream
from src.compression.quantize.compress import build_quantized
from src.compression.quantize.dequantize import dequantized_state
from src.compression.quantize.layers import QuantizedLayer
from src.compression.quantize.placing import dense_name
from src.compression.quantize.plan import LayerPlan, Plan, QuantizationSpec, make_plan
from src.exports.fewer_centroids import fit_centroids
from src.model_files.open_model_file import open_model_file
from src.model_files.packed import ModelInfo, save_packed
from src.model_files.pth import save_dense
from src.model_files.size import model_size
from tests.conftest import ROOT
from tests.support.coreml_networks import Kinds, Unknown, two_layers
from tests.support.coreml_package import Package
from tests.support.helpers import lively
from tests.support.own_network import Net
from tests.support.patience import PATIENCE

pytest.importorskip("coremltools", reason="Core ML packages are made with coremltools: pip install pqf[coreml]")

from src.exports.coreml import write_coreml

DIGITS = ROOT / "compressed_models" / "digits_resnet18.pth"
ARCH = "tests.support.own_network:Net"
ABOUT = {"producer": "pqf", "arch": "test"}


def plan_of(model: nn.Module, k: int, bits: int, scale: float, layout: str) -> Plan:
    layers = make_plan(model, QuantizationSpec(k=k, layout=layout)).layers
    return Plan(
        {
            n: LayerPlan(n, p.d, p.k, "kmeans", 0, scale=scale, codebook_bits=bits, layout=p.layout)
            for n, p in layers.items()
        },
        (),
    )


def coded(
    make: Callable[[], nn.Module], k: int, bits: int = 16, scale: float = 1.0, layout: str = "input"
) -> nn.Module:
    """A network of random codebooks and codes; all codes are used where there are enough."""
    torch.manual_seed(0)
    model = lively(make())
    model = build_quantized(model, plan_of(model, k, bits, scale, layout))
    draw = stream(0, "coded")
    for layer in quantized(model).values():
        fan = int(np.prod(layer.weight_shape[1:]))
        codebook = (torch.randn(layer.codebook.shape, generator=draw) * (2 / fan) ** 0.5).half().float() * scale
        layer.set_codes(codebook, torch.randperm(layer.codes_matrix.numel(), generator=draw) % layer.k)
    return model.eval()


def quantized(model: nn.Module) -> dict[str, QuantizedLayer]:
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)]
    return {dense_name(name, layer): layer for name, layer in layers}


def written(model: nn.Module, make: Callable[[], nn.Module], path: Path, size: int = 16, fit: bool = False) -> Package:
    def dense() -> nn.Module:
        copy = make()
        copy.load_state_dict(dequantized_state(model))
        return copy.eval()

    write_coreml(model, dense, path, ABOUT, dense=False, image_size=size, fit=fit)
    return Package(path)


def check_weights(package: Package, model: nn.Module, dense: set[str] = frozenset()) -> None:
    """Every quantized weight but those of `dense` is in the package as table and codes, equal to the last bit."""
    found = package.decoded()
    layers = {f"{name.replace('.', '_')}_coded": layer for name, layer in quantized(model).items() if name not in dense}
    distinct = {id(layer.codebook) for layer in layers.values()}
    assert found.keys() <= layers.keys()
    assert len(found) == len(distinct)
    for name, values in found.items():
        weight = layers[name].dequantize_stored().detach().numpy()
        assert np.array_equal(values.astype(np.float32).reshape(weight.shape), weight), name
        assert np.array_equal(values.astype(np.float64), values.astype(np.float32).astype(np.float64))


def check_logits(package: Package, model: nn.Module, size: int) -> None:
    """What the program computes is what the network does, to the rounding of its other values to 16 bits."""
    images = torch.randn(1, 3, size, size, generator=stream(0, "images"))
    with torch.no_grad():
        wanted = model(images)
    assert (package.run(images) - wanted).abs().max() < 5e-3 * wanted.abs().max()


def test_the_digits_network_keeps_every_weight_and_its_size(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "digits.mlpackage"
    assert convert.main([str(DIGITS), str(target), "--image_size", "64"]) == 0
    said = capfd.readouterr()
    assert said.err == ""
    assert "20 weights as codebook and codes" in said.out
    assert len(said.out.splitlines()) == 3  # nothing of what coremltools says
    package, model = Package(target), open_model_file(DIGITS).model
    check_weights(package, model)
    check_logits(package, model, 64)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    assert size <= 1.05 * model_size(model).bits / 8
    assert f"{size:,} bytes" in said.out
    (images,), (logits,) = package.spec.description.input, package.spec.description.output
    assert (images.name, list(images.type.multiArrayType.shape), logits.name) == ("images", [1, 3, 64, 64], "logits")
    about = package.spec.description.metadata.userDefined
    assert (about["arch"], about["weights"]) == ("resnet18", "codebook and codes")
    assert about["producer"].startswith("pqf ")
    manifest = json.loads((target / "Manifest.json").read_text())
    listed = {entry["path"] for entry in manifest["itemInfoEntries"].values()}
    assert listed == {"com.apple.CoreML/weights", "com.apple.CoreML/model.mlmodel"}
    assert {oct(file.stat().st_mode)[-3:] for file in target.rglob("*")} <= {"644", "755"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits.mlpackage"]


@pytest.mark.parametrize("k", [2, 8, 32, 256])
def test_codes_of_any_length_decode_to_the_last_bit(k: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="pqf")
    model = coded(two_layers, k)
    package = written(model, two_layers, tmp_path / "a.mlpackage")
    check_weights(package, model)
    assert ("a code takes 6 bits in Core ML, not 5" in caplog.text) == (k == 32)


@pytest.mark.parametrize(("bits", "scale"), [(16, 1.0), (8, 1.0), (16, 2.0**-20)])
def test_every_kind_of_weight_goes_where_core_ml_takes_it(
    bits: int, scale: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A weight that is computed from its table, reshaped or scaled, is none where only constants are taken."""
    caplog.set_level("INFO", logger="pqf")
    model = coded(Kinds, 16, bits, scale)
    package = written(model, Kinds, tmp_path / "a.mlpackage")
    left = {"dilated.weight", "transposed.weight"}
    left |= {"pointwise_transposed.weight"} if (bits, scale) != (16, 1.0) else set()
    check_weights(package, model, left)
    for name in left:
        assert name in caplog.text
    for kind in ("conv", "conv_transpose"):
        assert f"{kind} takes constants only" in caplog.text


def test_attention_and_batch_norms_compute_the_same(tmp_path: Path) -> None:
    model = coded(Net, 16)
    package = written(model, Net, tmp_path / "a.mlpackage")
    check_weights(package, model)
    for norm in package.of_type("batch_norm"):
        assert not package.given(norm, "mean").any()


def test_tables_along_outputs_need_no_reshape(tmp_path: Path) -> None:
    """So does the Neural Engine want them: along the first axis of the weight."""
    model = coded(Net, 16, layout="output")
    assert {layer.layout for layer in quantized(model).values()} == {"output"}
    package = written(model, Net, tmp_path / "a.mlpackage")
    check_weights(package, model)
    tables = package.of_type("constexpr_lut_to_dense")
    assert [int(package.given(table, "vector_axis")) for table in tables] == [0] * len(tables)
    for table in tables:
        values = package.given(table, "lut")
        assert values.shape[-1] in (2, 4, 8, 16)
        assert values.shape[-1] * values.shape[-2] <= 256
        users = [op.type for op in package.operations if reads(op, table.outputs[0].name)]
        assert "reshape" not in users


def reads(op: Any, name: str) -> bool:
    return any(argument.name == name for given in op.inputs.values() for argument in given.arguments)


def test_more_centroids_than_codes_can_tell_go_in_densely_or_are_fitted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="pqf")
    model = coded(two_layers, 1024)
    assert {name: layer.k for name, layer in quantized(model).items()} == {"conv.weight": 128, "fc.weight": 1024}
    package = written(model, two_layers, tmp_path / "a.mlpackage")
    check_weights(package, model, {"fc.weight"})
    assert "dense in the package: fc.weight: k = 1024 is above 256 (--fit gives them 256 centroids)" in caplog.text
    caplog.clear()
    before = quantized(model)["fc.weight"].dequantize_stored().detach()
    package = written(model, two_layers, tmp_path / "b.mlpackage", fit=True)
    check_weights(package, model)
    layer = quantized(model)["fc.weight"]
    assert layer.k == 256
    lost = float((layer.dequantize_stored().detach() - before).square().sum() / before.square().sum())
    assert f"fc: 256 of 1,024 centroids, which adds an error of {lost:.4f} of its energy" in caplog.text
    assert 0 < lost < 0.3


def test_fitting_loses_nothing_where_few_centroids_are_used_and_is_the_same_every_time() -> None:
    def few() -> nn.Module:
        model = coded(two_layers, 1024)
        layer = quantized(model)["fc.weight"]
        layer.set_codes(layer.codebook.detach().clone(), layer.codes_matrix % 200)
        return model

    model = few()
    weight = quantized(model)["fc.weight"].dequantize_stored().detach()
    (fitted,) = fit_centroids(model, 256)
    assert (fitted.name, fitted.k) == ("fc", 1024)
    assert fitted.lost < 1e-6  # the means of equal ones, rounded
    assert torch.allclose(quantized(model)["fc.weight"].dequantize_stored(), weight, atol=1e-4)
    again, other = coded(two_layers, 1024), coded(two_layers, 1024)
    fit_centroids(again, 256)
    fit_centroids(other, 256)
    codes = [quantized(m)["fc.weight"].codes_matrix for m in (again, other)]
    assert torch.equal(*codes)


def test_tied_weights_stay_tied_when_they_are_fitted() -> None:
    model = coded(Kinds, 256)
    one, two = model.one, model.two
    assert one.k == 64
    (fitted,) = [found for found in fit_centroids(model, 32) if found.name in ("one", "two")]
    assert fitted.k == 64
    assert one.codebook is two.codebook
    assert one.k == two.k == 32
    assert torch.equal(one.weight, two.weight)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed network of a user's own."""
    path = tmp_path_factory.mktemp("small") / "model.safetensors"
    info = ModelInfo(arch=ARCH, num_classes=10, producer="pqf")
    save_packed(coded(Net, 16), path, info)
    return path


def test_a_package_that_is_there_is_replaced_only_when_asked(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "a.mlpackage"
    arguments = [str(small), str(target), "--image_size", "8", "--arch", ARCH]
    assert convert.main(arguments) == 0
    (target / "of the old one").write_text("")
    capsys.readouterr()
    assert convert.main(arguments) == 2
    assert "already exists; name another file, or replace it with --overwrite" in capsys.readouterr().err
    assert convert.main([*arguments, "--overwrite"]) == 0
    assert not (target / "of the old one").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mlpackage"]


@pytest.mark.parametrize(
    ("target", "flags", "said"),
    [
        ("a.mlmodel", [], ["ends in '.mlmodel'", ".mlpackage"]),
        ("a.onnx", ["--fit"], ["--fit is for Core ML packages"]),
        ("a.mlpackage", ["--fit", "--dense"], ["--fit is for Core ML packages"]),
        ("a.mlpackage", ["--entropy"], ["--entropy is for packed files"]),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    target: str, flags: list[str], said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.main([str(DIGITS), str(tmp_path / target), *flags]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in said)
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_package_s_place_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.mlpackage").write_text("mine")
    assert convert.main([str(DIGITS), str(tmp_path / "a.mlpackage"), "--overwrite"]) == 2
    assert "is a file; name another folder to write" in capsys.readouterr().err
    assert (tmp_path / "a.mlpackage").read_text() == "mine"


def test_detectors_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ROOT / "compressed_models" / "digits_maskrcnn.pth"
    assert convert.main([str(source), str(tmp_path / "a.mlpackage"), "--arch", "maskrcnn"]) == 2
    said = capsys.readouterr().err
    assert "Core ML packages are written for classification networks; maskrcnn is for detection" in said
    assert said.count("\n") == 1


def test_an_operation_that_core_ml_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_dense(Unknown(), tmp_path / "model.pth")
    arguments = [str(tmp_path / "model.pth"), str(tmp_path / "a.mlpackage"), "--image_size", "8"]
    assert convert.main([*arguments, "--arch", "tests.support.coreml_networks:Unknown"]) == 2
    said = capsys.readouterr().err
    assert "coremltools cannot convert this network" in said
    assert "erfcx" in said
    assert said.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pth"]


def test_values_that_16_bits_cannot_hold_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Net()
    with torch.no_grad():
        model.head.bias[0] = 1e5
    save_dense(model, tmp_path / "model.pth")
    arguments = [str(tmp_path / "model.pth"), str(tmp_path / "a.mlpackage"), "--image_size", "8"]
    assert convert.main([*arguments, "--arch", ARCH]) == 2
    assert "computes in 16-bit floats, and head.bias holds values above 65,504" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pth"]


def test_a_full_disk_leaves_the_old_package(small: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE in a process of its own stands for the full disk."""
    old, new = tmp_path / "old.mlpackage", tmp_path / "new.mlpackage"
    old.mkdir()
    (old / "mine").write_text("mine")
    limited = f"""
import resource
import torch.distributed.nn  # which writes a file when it is imported, in earlier versions
from src import convert
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
for target in ({str(old)!r}, {str(new)!r}):
    print(convert.main([{str(small)!r}, target, "--image_size", "8", "--overwrite", "--arch", {ARCH!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", limited], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE, check=False
    )
    first, second = done.stderr.splitlines()
    assert first.startswith(f"error: cannot write {old}: ")
    assert "the previous old.mlpackage is unchanged" in first
    assert second.startswith(f"error: cannot write {new}: ")
    assert "nothing was left behind" in second
    assert [line for line in done.stdout.splitlines() if line in ("0", "1")] == ["1", "1"]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "old.mlpackage",
        "old.mlpackage/mine",
    ]


def test_a_disk_that_is_really_full_is_called_so(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The package's own, and that on which coremltools writes it first."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    flags = ["--image_size", "8", "--arch", ARCH]
    try:
        assert convert.main([str(small), str(disk / "a.mlpackage"), *flags]) == 1
        assert "a.mlpackage: no space left on the disk; nothing was left behind" in capsys.readouterr().err
        assert not list(disk.iterdir())
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        assert convert.main([str(small), str(tmp_path / "b.mlpackage"), *flags]) == 1
        assert f"no space left in {disk}, where coremltools writes first" in capsys.readouterr().err
        assert [entry.name for entry in tmp_path.iterdir()] == ["disk"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_without_coremltools_one_line_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)  # so that an import finds that it is not there
    assert convert.main([str(DIGITS), str(tmp_path / "a.mlpackage")]) == 2
    said = capsys.readouterr().err
    assert "pip install pqf[coreml]" in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
