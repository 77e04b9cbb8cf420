"""python -m src.compress: any network, without data; and files of networks that are not known here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import src.compress as command
import src.inspect as inspect_command
from src import convert
from src.architectures.named import find
from src.compression.quantize.layers import QuantizedLayer
from src.model_files.building import build_and_load
from src.model_files.inspection import examine
from src.model_files.open_model_file import open_model_file
from src.model_files.packed import load_packed
from src.model_files.pth import read_tensors
from src.model_files.state_dict import load_state
from src.recipes.data import images_of_folder
from src.settings import Settings
from src.tasks.calibration import CalibrationImages, CalibrationSpec
from tests.support.own_network import Net

OWN = "tests.support.own_network:Net"
FAST = ["--model.compression_parameters.k_means_n_iters", "2", "--model.compression_parameters.k", "16"]
SMALL = ["--model.arch", OWN, "--calibration.image_size", "16", *FAST]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's weights, with norms that say something."""
    torch.manual_seed(0)
    model = Net()
    model.train()
    for _ in range(8):
        model(torch.randn(8, 3, 16, 16))
    path = tmp_path_factory.mktemp("start") / "own.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in a folder and one below it, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    draw = np.random.default_rng(0)
    for number in range(12):
        pixels = draw.integers(0, 256, (30 + number, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if number % 2 else ".") / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def made(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made")
    assert (
        command.main([*SMALL, "--model.weights", str(start), "--output_path", str(output), "--overwrite", "True"]) == 0
    )
    return output


def own_from(file: Path) -> nn.Module:
    packed = load_packed(file)
    return build_and_load(Net, lambda _: packed.plan, packed.state(), str(file))


def test_a_users_network_is_compressed_by_one_command(made: Path, start: Path) -> None:
    results = json.loads((made / "results.json").read_text())
    assert results["ratio"] > 3
    assert "best" not in results
    report = json.loads((made / "compression.json").read_text())
    assert {layer["name"] for layer in report["layers"]} == {
        "body.0", "body.3", "attention.in_proj_weight", "attention.out_proj", "head",
    }  # fmt: skip
    assert sum(group["permutation"] is not None for group in report["groups"]) >= 2
    assert load_packed(made / "model.safetensors").info.arch == OWN
    model, dense = own_from(made / "model.safetensors"), Net().eval()
    dense.load_state_dict(torch.load(start))
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        wanted, found = dense(x), model(x)
    assert float((found - wanted).norm() / wanted.norm()) < 0.7  # 16 centroids: near, not equal
    assert not torch.equal(found, wanted)


def test_the_same_seed_gives_the_same_file(made: Path, start: Path, tmp_path: Path) -> None:
    assert command.main([*SMALL, "--model.weights", str(start), "--output_path", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def test_images_calibrate(
    made: Path, start: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--calibration.images", str(photos), "--calibration.num_workers", "0", "--calibration.batch_size", "5"]
    for output in (tmp_path / "out", tmp_path / "again"):
        assert command.main([*SMALL, *flags, "--model.weights", str(start), "--output_path", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "calibrated 5 weights with 12 inputs" in printed
    assert "statistics of 2 batch norms adjusted" in printed
    assert "12 inputs are few" in printed
    assert "left out 1 unreadable images" in printed
    assert "broken.jpg" in printed
    files = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert all(next(iter(layer["outputs_lost"])) == "clustering" for layer in report["layers"])
    plain, calibrated, dense = own_from(made / "model.safetensors"), own_from(files[0]), Net().eval()
    dense.load_state_dict(torch.load(start))
    spec = CalibrationSpec(batch_size=12, image_size=16, resize=18)
    (images,) = CalibrationImages(photos, spec, False)
    with torch.no_grad():
        wanted, ours, theirs = dense(images), calibrated(images), plain(images)
    assert float((ours - wanted).norm()) < 0.5 * float((theirs - wanted).norm())
    assert set(load_packed(files[0]).info.outputs_lost) == {layer["name"] for layer in report["layers"]}
    assert inspect_command.main([str(files[0]), "--arch", OWN]) == 0
    assert "output energy lost" in capsys.readouterr().out
    assert (made / "model.safetensors").stat().st_size == pytest.approx(files[0].stat().st_size, rel=0.02)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--calibration.images", "/nowhere"], ["calibration.images", "/nowhere", "does not exist"]),
        (["--calibration.images", __file__], ["calibration.images", "is a file"]),
        (["--calibration.use", "True"], ["calibration.use is True, and calibration.images is not set"]),
        (["--model.arch", "resnet19"], ["model.arch", "resnet19"]),
        (["--model.arch", "tests.support.own_network:broken"], ["cannot be built"]),
        (["--model.weights", "/nowhere.pth"], ["model.weights", "/nowhere.pth"]),
        (["--model.arch", "mobilenet_v2"], ["does not fit"]),
        (["--calibration.resize", "8"], []),
    ],
)
def test_bad_input_is_one_message(
    flags: list[str], words: list[str], start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    status = command.main([*SMALL, "--model.weights", str(start), "--output_path", str(output), *flags])
    error = capsys.readouterr().err
    if not words:
        assert status == 0  # a setting of calibration without images has no effect
        return
    assert status == 2, error
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert all(word in error for word in words), error
    assert not (output / "model.safetensors").exists()


def test_a_folder_without_images_and_a_compressed_file_are_refused(
    made: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    flags = ["--model.weights", str(start), "--output_path", str(tmp_path / "out")]
    assert command.main([*SMALL, *flags, "--calibration.images", str(tmp_path / "empty")]) == 2
    assert "there are no images below" in capsys.readouterr().err
    flags = ["--model.weights", str(made / "model.safetensors"), "--output_path", str(tmp_path / "out")]
    assert command.main([*SMALL, *flags]) == 2
    assert "is a compressed model already" in capsys.readouterr().err


def test_a_file_of_an_unknown_network_is_shown_and_converted_by_its_tensors(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = made / "model.safetensors"
    known = open_model_file(file, OWN)
    skeleton = open_model_file(file, needs_network=False)
    assert skeleton.why_unknown
    found, wanted = examine(file), examine(file, arch=OWN)
    assert found.size == wanted.size
    rows = {row.name: (row.shape, row.k, row.d, row.bits, row.entropy) for row in wanted.rows if row.k}
    assert {row.name: (row.shape, row.k, row.d, row.bits, row.entropy) for row in found.rows if row.k} == rows
    assert any("Code that a file names is not run" in note for note in found.notes)
    assert inspect_command.main([str(file)]) == 0
    assert "attention.in_proj_weight_quantized" in capsys.readouterr().out
    # to the published format, and back into the network
    assert convert.main([str(file), str(tmp_path / "model.pth")]) == 0
    state = read_tensors(tmp_path / "model.pth")
    assert examine(tmp_path / "model.pth").size == wanted.size
    from src.model_files.open_model_file import build_network, read_model_file

    again = build_network(read_model_file(tmp_path / "model.pth"), find(OWN))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(again(x), known.model(x), atol=1e-6)
    assert "body.4.weight" in state
    # entropy coding needs no network either
    assert convert.main([str(file), str(tmp_path / "packed.safetensors"), "--entropy"]) == 0
    assert torch.equal(own_from(tmp_path / "packed.safetensors").head.codes_matrix, known.model.head.codes_matrix)
    capsys.readouterr()
    assert convert.main([str(file), str(tmp_path / "dense.pth"), "--dense"]) == 2
    assert "Code that a file names is not run" in capsys.readouterr().err
    assert convert.main([str(file), str(tmp_path / "dense.pth"), "--dense", "--arch", OWN]) == 0
    dense = Net().eval()
    load_state(dense, read_tensors(tmp_path / "dense.pth"), "dense")
    with torch.no_grad():
        assert torch.allclose(dense(x), known.model(x), atol=1e-6)


def test_compressing_goes_on_where_it_was_interrupted(start: Path, tmp_path: Path) -> None:
    """The clusterings that are there are not made again."""
    flags = [*SMALL, "--model.weights", str(start), "--output_path", str(tmp_path / "out")]
    assert command.main(flags) == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert command.main(flags) == 2  # a finished run is not replaced without a word
    assert command.main([*flags, "--overwrite", "True"]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_the_skeleton_computes_nothing_and_holds_everything(made: Path) -> None:
    skeleton = open_model_file(made / "model.safetensors", needs_network=False).model
    assert sum(isinstance(module, QuantizedLayer) for module in skeleton.modules()) == 5
    with pytest.raises(NotImplementedError):
        skeleton(torch.zeros(1))


@pytest.mark.parametrize(
    ("arch", "given", "white"),
    [
        (OWN, {}, [2.2489, 2.4286, 2.64]),  # ImageNet's: nothing is known of the network
        (OWN, {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.25, 0.125)}, [1.0, 2.0, 4.0]),
        ("timm:tf_efficientnet_lite0", {}, [1.0, 1.0, 1.0]),
        ("timm:tf_efficientnet_lite0", {"mean": (0.0, 0.0, 0.0)}, [2.0, 2.0, 2.0]),
    ],
)
def test_images_are_normalised_as_the_network_knows_them(
    arch: str, given: dict[str, tuple[float, ...]], white: list[float], tmp_path: Path
) -> None:
    if arch.startswith("timm:"):
        pytest.importorskip("timm", reason="timm is not installed")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "white.png")
    settings = Settings.model_validate({"calibration": {"images": str(tmp_path), "num_workers": 0, **given}})
    shown = images_of_folder(settings, find(arch), False)
    assert shown is not None
    (images,) = shown.read(False)
    assert images[0, :, 100, 100].tolist() == pytest.approx(white, abs=1e-3)
