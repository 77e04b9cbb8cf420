"""ONNX files compute what the network computes, in onnxruntime, whatever the network is made of; and what cannot be
written is said in one line."""

from __future__ import annotations

import builtins
import contextlib
import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.onnx_files import quantized_at_random, settle
from src import api, convert
from src.architectures.named import find
from src.common.errors import RunError, SettingsError
from src.compression.quantize.dequantize import dense_again
from src.compression.quantize.layers import QuantizedLayer
from src.exports import onnx_package
from src.exports.onnx_check import SCORE, NotTheSame, _compare_detections
from src.exports.onnx_file import OnnxOptions, Written, graph_of, write_onnx
from src.exports.onnx_outputs import Called
from src.exports.onnx_pooling import pooled
from src.exports.onnx_weights import check_size
from src.model_files.size import model_size
from tests.conftest import ROOT
from tests.support.helpers import quantized, spec
from tests.support.onnx_networks import Branching, Maps, OneSize, Pooled, Tied, Unknown

onnx = pytest.importorskip("onnx", reason="pip install onnx onnxruntime")
runtime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxruntime")
CLOSE = 1e-4


def coded(network: type[nn.Module], **how: Any) -> nn.Module:
    torch.manual_seed(0)
    return quantized(network(), spec(8, **how)).eval()


def write(model: nn.Module, path: Path, side: int = 32, **how: Any) -> Written:
    dense = dense_again(copy.deepcopy(model)).eval()
    return write_onnx(dense, model, path, OnnxOptions(image_size=side, **how), {})


def in_onnxruntime(path: Path, images: Tensor, **options: Any) -> dict[str, np.ndarray]:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"], **options)
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images.numpy()}), strict=True))


def same(path: Path, model: nn.Module, images: Tensor, names: tuple[str, ...]) -> None:
    """The file gives these outputs and no others, and they are PyTorch's."""
    found, called = in_onnxruntime(path, images), Called(model)
    with torch.no_grad():
        wanted = dict(zip(names, called(images), strict=True))
    assert tuple(found) == called.names == names
    for name, tensor in wanted.items():
        assert found[name].shape == tuple(tensor.shape)
        assert np.abs(found[name] - tensor.numpy()).max() <= CLOSE * max(1.0, float(tensor.abs().max()))


def quantized_in(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]


# --- networks of every kind ---


@pytest.mark.parametrize(
    ("network", "names", "unused", "free"),
    [
        (Pooled, ("logits",), 0, "free"),
        (Maps, ("out",), 1, "free"),
        (Tied, ("output.0", "output.1"), 0, "batch"),  # torch's tracing fixes the length of its sequences
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_network_of_any_kind_keeps_its_codes(
    network: type[nn.Module], names: tuple[str, ...], unused: int, free: str, tmp_path: Path
) -> None:
    model = coded(network)
    made = write(model, tmp_path / "model.onnx")
    assert (made.free, bool(made.why_not_free), made.outputs) == (free, free != "free", names)
    shapes = [(1, 3, 32, 32), (3, 3, 44, 60), (1, 3, 97, 71)]
    for images in (torch.randn(shape) for shape in (shapes if free == "free" else shapes[:1])):
        same(tmp_path / "model.onnx", model, images, names)
    assert len(made.filled.unused) == unused
    assert len(made.filled.coded) + unused == len(
        {id(dict(model.named_modules())[n].codebook) for n in quantized_in(model)}
    )
    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = {one.name for one in graph.initializer}
    for weight in made.filled.coded:
        prefix = weight.removesuffix(".weight")
        assert {f"{prefix}.codes", f"{prefix}.codebook"} <= stored
        assert weight not in stored


def test_weights_left_out_are_those_of_auxiliary_heads(tmp_path: Path) -> None:
    made = write(coded(Maps), tmp_path / "model.onnx")
    assert made.filled.unused == ("beside.weight",)
    assert not any("beside" in one.name for one in onnx.load(tmp_path / "model.onnx").graph.initializer)


def test_a_weight_with_two_names_is_stored_once(tmp_path: Path) -> None:
    made = write(coded(Tied), tmp_path / "model.onnx")
    assert "first.weight" in made.filled.coded
    names = [one.name for one in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert names.count("first.codes") == 1
    assert "again.codes" not in names


def test_equal_weights_of_two_layers_are_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1))
    net[3].load_state_dict(net[1].state_dict())
    model = quantized(net, spec(8)).eval()
    model[3].set_codes(model[1].codebook.detach(), model[1].codes_matrix)
    made = write(model, tmp_path / "model.onnx")
    assert not made.filled.unused
    same(tmp_path / "model.onnx", model, torch.randn(2, 3, 20, 30), ("logits",))


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("network", [Pooled, Maps], ids=lambda net: net.__name__)
def test_either_exporter_makes_the_same_file(exporter: str, network: type[nn.Module], tmp_path: Path) -> None:
    if exporter == "dynamo":
        pytest.importorskip("onnxscript", reason="pip install onnxscript")
    model = coded(network)
    made = write(model, tmp_path / "model.onnx", size="fixed", exporter=exporter)
    assert made.exporter == exporter
    # the newer exporter of earlier versions of torch may leave no batch free
    earlier = exporter == "dynamo" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10)
    assert made.free == "batch" or earlier
    same(tmp_path / "model.onnx", model, torch.randn(2 if made.free == "batch" else 1, 3, 32, 32), made.outputs)
    assert set(made.filled.coded) == set(write(model, tmp_path / "other.onnx").filled.coded)


@pytest.mark.parametrize("opset", [13, 17, 20])
def test_the_opset_is_the_one_that_was_asked_for(opset: int, tmp_path: Path) -> None:
    model = coded(Pooled)
    write(model, tmp_path / "model.onnx", opset=opset)
    assert [one.version for one in onnx.load(tmp_path / "model.onnx").opset_import if not one.domain] == [opset]
    same(tmp_path / "model.onnx", model, torch.randn(2, 3, 32, 32), ("logits",))


# --- sizes ---


@pytest.mark.parametrize(
    ("network", "why"),
    [(OneSize, "images of one size only"), (Branching, "Python code")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_network_that_cannot_take_any_size_gets_one(network: type[nn.Module], why: str, tmp_path: Path) -> None:
    model = coded(network)
    made = write(model, tmp_path / "model.onnx")
    assert made.free == "batch"
    assert why in made.why_not_free
    same(tmp_path / "model.onnx", model, torch.randn(3, 3, 32, 32), ("logits",))
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]
    with pytest.raises((SettingsError, NotTheSame), match=r"one size only|differ"):
        write(model, tmp_path / "other.onnx", size="free")
    assert not (tmp_path / "other.onnx").exists()


def test_a_fixed_size_is_fixed(tmp_path: Path) -> None:
    made = write(coded(Pooled), tmp_path / "model.onnx", size="fixed")
    assert (made.free, made.why_not_free) == ("batch", "")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]


def test_pooling_by_products_is_adaptive_pooling() -> None:
    draw = torch.Generator().manual_seed(0)
    for height, width, wanted in [(7, 7, (7, 7)), (2, 3, (6, 6)), (13, 40, (6, 5)), (9, 11, (1, 4)), (8, 8, (None, 3))]:
        x = torch.randn(2, 4, height, width, generator=draw, dtype=torch.float64)
        found = pooled(x, *wanted)
        assert torch.allclose(found, F.adaptive_avg_pool2d(x, wanted), rtol=1e-12, atol=1e-12)


# --- the networks of torchvision ---


def check_torchvision(name: str, side: int, tmp_path: Path) -> Written:
    torch.manual_seed(0)
    model = quantized_at_random(find(f"torchvision:{name}").build(1000))
    dense = dense_again(copy.deepcopy(model)).eval()
    settle(dense, model, max(side, 96))
    path = tmp_path / "model.onnx"
    made = write_onnx(dense, model, path, OnnxOptions(image_size=side), {})
    assert len(made.filled.coded) + len(made.filled.unused) == len(quantized_in(model))
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    (found,) = in_onnxruntime(path, images).values()
    with torch.no_grad():
        wanted = Called(model)(images)[0].numpy()
    assert np.abs(wanted).max() > 0.05  # a signal came through
    assert np.abs(found - wanted).max() <= CLOSE * np.abs(wanted).max()
    if not made.filled.unused:
        assert path.stat().st_size < 1.25 * model_size(model).bits / 8
    return made


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_small_networks_of_torchvision_take_any_size(name: str, tmp_path: Path) -> None:
    assert check_torchvision(name, 64, tmp_path).free == "free"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "free", "unused"),
    [
        ("alexnet", 64, "free", 0),
        ("googlenet", 64, "free", 6),
        ("inception_v3", 96, "free", 3),
        ("densenet121", 64, "free", 0),
        ("efficientnet_b0", 64, "free", 0),
        ("convnext_tiny", 64, "free", 0),
        ("swin_v2_t", 64, "batch", 0),
        ("vit_b_32", 224, "batch", 0),
        ("lraspp_mobilenet_v3_large", 64, "free", 0),
        ("deeplabv3_mobilenet_v3_large", 64, "free", 0),
    ],
)
def test_networks_of_torchvision_are_written(name: str, side: int, free: str, unused: int, tmp_path: Path) -> None:
    made = check_torchvision(name, side, tmp_path)
    assert (made.free, len(made.filled.unused)) == (free, unused)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("ssdlite320_mobilenet_v3_large", ("boxes", "scores", "labels")),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", ("boxes", "labels", "scores")),
    ],
)
def test_detectors_are_written(name: str, outputs: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantized_at_random(find(f"torchvision:{name}").build(5))
    dense = dense_again(copy.deepcopy(model)).eval()
    settle(dense, model, 160)
    made = write_onnx(dense, model, tmp_path / "model.onnx", OnnxOptions(image_size=96), {})
    assert made.outputs == outputs
    found = in_onnxruntime(tmp_path / "model.onnx", torch.rand(1, 3, 96, 96))
    assert found["boxes"].shape[1] == 4
    assert len(found["boxes"]) == len(found["scores"]) == len(found["labels"])


def detections(n: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "boxes": draw.uniform(0, 200, (n, 4)).astype(np.float32),
        "scores": np.sort(draw.uniform(0.1, 1, n).astype(np.float32))[::-1].copy(),
        "labels": draw.integers(1, 5, n),
    }


def test_detections_are_compared_as_sets() -> None:
    wanted = detections(40)
    order = np.random.default_rng(1).permutation(40)
    _compare_detections({name: values[order] for name, values in wanted.items()}, wanted)
    one_less = {name: values[:-1] for name, values in wanted.items()}
    _compare_detections(one_less, wanted)  # near the threshold one may come or go
    for key, change in (("boxes", 5.0), ("scores", 10 * SCORE), ("labels", 1)):
        with pytest.raises(RunError, match="of which 0 are the same"):
            _compare_detections({**wanted, key: wanted[key] + np.asarray(change, wanted[key].dtype)}, wanted)
    half = {name: values[:20] for name, values in wanted.items()}
    with pytest.raises(RunError, match="finds 20 objects and PyTorch 40"):
        _compare_detections(half, wanted)
    none = detections(0)
    _compare_detections(none, none)


# --- as a user ---


def saved(network: type[nn.Module], folder: Path) -> list[str]:
    """A packed file of one of the networks here, and the flags that name it."""
    api.save(coded(network), folder / "model.safetensors", arch=f"tests.support.onnx_networks:{network.__name__}")
    return [str(folder / "model.safetensors"), "--arch", f"tests.support.onnx_networks:{network.__name__}"]


def test_the_command_says_what_became_of_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, *flags = saved(OneSize, tmp_path)
    assert convert.main([source, str(tmp_path / "model.onnx"), "--image_size", "32", *flags]) == 0
    said = capsys.readouterr()
    assert "any number of images of 32 x 32 pixels only" in said.out + said.err
    assert "images of one size only" in said.out + said.err
    assert "onnxruntime's logits are PyTorch's to" in said.out
    assert "2 weights as codebook and codes" in said.out


@pytest.mark.parametrize(
    ("network", "more", "words"),
    [
        (Unknown, [], ["special_bessel_j0", "no ONNX for the operation"]),
        (Pooled, ["--opset", "3"], ["--opset 3", "expected 13 to"]),
        (Pooled, ["--opset", "99"], ["--opset 99", "expected 13 to"]),
        (OneSize, ["--image_size", "48"], ["48 x 48 pixels", "--image_size"]),
        (OneSize, ["--size", "free"], ["images of one size only"]),
    ],
    ids=["operation", "low", "high", "size", "free"],
)
def test_what_cannot_be_written_is_said_in_one_line(
    network: type[nn.Module], more: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, *flags = saved(network, tmp_path)
    assert convert.main([source, str(tmp_path / "model.onnx"), "--image_size", "32", *flags, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(("package", "more"), [("onnx", []), ("onnxscript", ["--exporter", "dynamo"])])
def test_a_package_that_is_missing_is_named(
    package: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, *flags = saved(OneSize, tmp_path)
    whole = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return whole(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert convert.main([source, str(tmp_path / "model.onnx"), "--image_size", "32", *flags, *more]) == 2
    error = capsys.readouterr().err
    assert "pip install pqf[onnx]" in error
    assert package in error
    assert error.count("\n") == 1


def test_a_package_that_is_too_old_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript", reason="pip install onnxscript")
    source, *flags = saved(OneSize, tmp_path)
    monkeypatch.setattr(onnx_package, "version", lambda _: "0.5.7")
    target = str(tmp_path / "model.onnx")
    assert convert.main([source, target, "--image_size", "32", *flags, "--exporter", "dynamo"]) == 2
    assert "needs onnxscript 0.6.2 or later, and this is 0.5.7: pip install -U onnxscript" in capsys.readouterr().err
    assert convert.main([source, target, "--image_size", "32", *flags]) == 0  # with torch's older exporter


def test_a_full_disk_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)]
    mounted = subprocess.run(done, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        source, *flags = saved(OneSize, tmp_path)
        with contextlib.suppress(OSError):
            (disk / "filler").write_bytes(bytes(1 << 16))
        assert convert.main([source, str(disk / "model.onnx"), "--image_size", "32", *flags]) == 1
        assert "no space left on the disk" in capsys.readouterr().err
        assert [entry.name for entry in disk.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_above_2_gb_is_refused_before_any_work() -> None:
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(20_000, 20_000) for _ in range(2)))
    tensors = dict(net.named_parameters())
    with pytest.raises(SettingsError, match=r"3,200,160,000 bytes.*leave --dense out"):
        check_size(tensors, None)
    check_size({name: one for name, one in tensors.items() if name.startswith("0.")}, None)


def test_a_dense_network_is_written_densely(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Pooled().eval()
    made = write_onnx(net, None, tmp_path / "model.onnx", OnnxOptions(image_size=32), {"arch": "Pooled"})
    assert not made.filled.coded
    same(tmp_path / "model.onnx", net, torch.randn(2, 3, 32, 32), ("logits",))
    (about,) = onnx.load(tmp_path / "model.onnx").metadata_props
    assert (about.key, about.value) == ("arch", "Pooled")


def test_the_graph_is_small() -> None:
    """Names and constants do not make up for the bytes that codes save."""
    model = coded(Tied)
    graph = graph_of(dense_again(copy.deepcopy(model)).eval(), model, 32)
    constants = [
        one.SerializeToString()
        for one in graph.graph.initializer
        if one.name.startswith("c") and one.name[1:].isdigit()
    ]
    assert len(constants) > 5
    assert not [node for node in graph.graph.node if node.op_type == "Constant"]
    assert sum(node.ByteSize() for node in graph.graph.node) < 60 * len(graph.graph.node)


def test_the_documentation_s_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = coded(Pooled)
    write(model, tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    usual, unfolded = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8"), flags=re.S
    )
    given: dict[str, Any] = {}
    exec(usual, given)
    with torch.no_grad():
        wanted = model(torch.zeros(1, 3, 224, 224)).numpy()
    assert np.abs(given["logits"] - wanted).max() <= CLOSE
    exec(unfolded, given)
    (found,) = given["session"].run(None, {"images": given["images"]})
    assert np.abs(found - wanted).max() <= CLOSE
