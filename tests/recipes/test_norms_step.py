"""Running statistics of batch norms taken anew from images, for any model file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import src.compress as compress
from src import convert
from src.common.errors import DataError
from src.model_files.norm_estimation import retake_norms
from src.model_files.norms import TRAINING_VECTORS
from src.model_files.open_model_file import open_model_file
from src.model_files.pth import read_tensors
from src.tasks.calibration import CalibrationImages, CalibrationSpec
from tests.support.own_network import Net

OWN = "tests.support.own_network:Net"
RETAKE = [
    "--arch", OWN, "--model.reestimate_norms", "True", "--calibration.image_size=16", "--calibration.num_workers", "0",
    "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for number in range(15):
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One network in every form, with norms that have seen something else."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = Net().train()
    model(3 * torch.randn(8, 3, 16, 16) + 1)
    dense = folder / "dense.pth"
    torch.save(model.state_dict(), dense)
    flags = ["--model.arch", OWN, "--model.weights", str(dense), "--model.compression_parameters.k", "16"]
    fast = ["--model.compression_parameters.k_means_n_iters", "2", "--calibration.image_size", "16"]
    assert compress.main([*flags, *fast, "--save_format", "both", "--output_path", str(folder / "out")]) == 0
    (folder / "packed.safetensors").write_bytes((folder / "out" / "model.safetensors").read_bytes())
    (folder / "published.pth").write_bytes((folder / "out" / "model.pth").read_bytes())
    assert convert.main([str(dense), str(folder / "dense.safetensors"), "--arch", OWN]) == 0
    state = read_tensors(folder / "published.pth")
    torch.save({n: t for n, t in state.items() if not n.endswith(TRAINING_VECTORS)}, folder / "folded.pth")
    return {path.name: path for path in sorted(folder.glob("*.*"))}


def seen(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What each batch norm sees: mean and variance over all of x, in evaluation."""
    found = {}

    def look(name: str) -> object:
        def hook(_norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            values = inputs[0].double().transpose(0, 1).flatten(1)
            found[name] = values.mean(1), values.var(1)

        return hook

    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    handles = [norm.register_forward_pre_hook(look(name)) for name, norm in norms.items()]  # type: ignore[arg-type]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


def statistics(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What each batch norm holds."""
    return {
        name: (module.running_mean.double(), module.running_var.double())  # type: ignore[union-attr]
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }


def differ(one: dict, other: dict) -> float:
    """The largest relative difference of means (to the deviation) and variances."""
    assert one.keys() == other.keys()
    return max(
        max(float(((m - n).abs() / w.sqrt()).max()), float(((v - w).abs() / w).max()))
        for (m, v), (n, w) in ((one[name], other[name]) for name in one)
    )


@pytest.mark.parametrize("name", ["dense.pth", "dense.safetensors", "packed.safetensors", "published.pth"])
def test_the_statistics_become_those_of_the_images(
    name: str, files: dict[str, Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / name
    flags = [*RETAKE, "--calibration.images", str(photos)]
    assert convert.main([*flags[2:], str(files[name]), *flags[:2], str(target)]) == 0  # keys may stand anywhere
    assert "running statistics of 2 batch norms taken anew from 15 images" in capsys.readouterr().out
    (x,) = CalibrationImages(photos, CalibrationSpec(batch_size=15, image_size=16, resize=18), False)
    before, after = (open_model_file(path, OWN).model for path in (files[name], target))
    assert differ(statistics(before), seen(before, x)) > 0.5
    # of 3,840 values: a norm in training divides by their number, and keeps the variance by one less
    assert differ(statistics(after), seen(after, x)) < 2 / 3840
    # nothing else changes
    theirs, ours = before.state_dict(), after.state_dict()
    for key, tensor in theirs.items():
        if "running" not in key and "num_batches" not in key:
            assert torch.allclose(tensor, ours[key], rtol=1e-5, atol=1e-6), key


def test_batches_of_any_size_give_nearly_the_same(files: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """The first norm exactly: it sees what no norm has changed."""
    found = []
    for size in ("15", "4", "1"):
        target = tmp_path / f"{size}.safetensors"
        flags = [*RETAKE, "--calibration.images", str(photos), "--calibration.batch_size", size]
        assert convert.main([str(files["packed.safetensors"]), str(target), *flags]) == 0
        found.append(statistics(open_model_file(target, OWN).model))
    for other in found[1:]:
        first = next(iter(other))
        assert differ({first: other[first]}, {first: found[0][first]}) < 1e-4
        assert differ(other, found[0]) < 0.3


def test_norms_of_which_only_scale_and_shift_are_known_compute_what_they_did(
    files: dict[str, Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "whole.pth"
    flags = [*RETAKE, "--calibration.images", str(photos)]
    assert convert.main([str(files["folded.pth"]), str(target), *flags]) == 0
    assert "of 2 batch norms the file holds scale and shift only" in capsys.readouterr().out
    x = torch.randn(4, 3, 16, 16)
    before, after = (open_model_file(path, OWN).model.eval() for path in (files["folded.pth"], target))
    with torch.no_grad():
        assert torch.allclose(before(x), after(x), atol=1e-5)
    assert any(name.endswith(TRAINING_VECTORS) for name in read_tensors(target))


def test_the_same_images_give_the_same_file(files: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    contents = set()
    for name in ("one", "two"):
        target = tmp_path / f"{name}.safetensors"
        flags = [*RETAKE, "--calibration.images", str(photos), "--calibration.count", "9", "--seed", "3"]
        assert convert.main([str(files["packed.safetensors"]), str(target), *flags]) == 0
        contents.add(target.read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.reestimate_norms", "True"], ["model.reestimate_norms is True", "calibration.images is not set"]),
        ([*RETAKE, "--calibration.images", "/nowhere"], ["calibration.images", "/nowhere", "does not exist"]),
        ([*RETAKE, "--calibration.images", "EMPTY"], ["there are no images below"]),
        ([*RETAKE, "--calibration.use", "True"], ["calibration.use is not read by this command"]),
        ([*RETAKE, "--model.arch", "resnet18"], ["model.arch is not read by this command", "calibration.*"]),
        ([*RETAKE, "--calibration.counts", "3"], ["calibration.counts", "did you mean calibration.count?"]),
        ([*RETAKE, "--calibration.count", "no"], ["command line: calibration.count", "at least 1"]),
        ([*RETAKE, "--calibration.images"], ["--calibration.images has no value"]),
        (
            [*RETAKE, "--calibration.images", "EMPTY", "--calibration.resize", "8"],
            ["calibration.image_size 16 is larger than calibration.resize 8"],
        ),
    ],
)
def test_bad_input_is_one_message(
    flags: list[str], words: list[str], files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EMPTY").mkdir()
    given = [str(tmp_path / flag) if flag == "EMPTY" else flag for flag in flags]
    assert convert.main([str(files["packed.safetensors"]), str(tmp_path / "out.safetensors"), *given]) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "out.safetensors").exists()


def test_a_network_without_batch_norms_is_refused_and_keys_without_the_switch_do_nothing(
    files: dict[str, Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(12, 8)).state_dict(), tmp_path / "plain.pth")
    flags = [*RETAKE[2:], "--arch", "tests.recipes.test_norms_step:plain", "--calibration.images", str(photos)]
    assert convert.main([str(tmp_path / "plain.pth"), str(tmp_path / "out.pth"), *flags]) == 2
    assert "has no batch norms with running statistics" in capsys.readouterr().err
    flags = ["--calibration.images", str(photos)]
    assert convert.main([str(files["packed.safetensors"]), str(tmp_path / "out.safetensors"), *flags]) == 0
    assert "calibration.images: no effect without --model.reestimate_norms True" in capsys.readouterr().out


def plain() -> nn.Module:
    """A network without batch norms."""
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8))


def test_what_is_not_finite_is_named_and_leaves_the_network_as_it_was() -> None:
    model = Net().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DataError, match=r"what batch norm 'body.1' sees is not finite"):
        retake_norms(model, [torch.full((2, 3, 8, 8), torch.nan)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert retake_norms(model, []) == []
    assert retake_norms(model, [torch.randn(2, 3, 8, 8)]) == ["body.1", "body.4"]
    assert not any(module.training for module in model.modules())
