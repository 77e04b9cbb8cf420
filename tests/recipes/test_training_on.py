"""Training that starts from a compressed file: what stays, what is said, and norms of which the file holds scale and shift
only."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from src import train_resnet
from src.model_files.norm_estimation import reestimate_norms
from src.model_files.norms import TRAINING_VECTORS, folded_norms
from src.model_files.open_model_file import open_model_file
from src.model_files.packed import load_packed
from src.model_files.pth import compressed_state, read_tensors
from src.model_files.state_dict import load_state
from tests.support import small_runs
from tests.support.helpers import lively, outputs, quantized, relative, spec

FLAGS = small_runs.training(batch=8, workers=0, sls=10, k_means=2)


def train(images: Path, output: Path, *flags: str) -> int:
    places = ["--dataloader.imagenet_path", str(images), "--output_path", str(output)]
    return train_resnet.main([*FLAGS, *places, "--epochs", "1", "--save_format", "both", *flags])


@pytest.fixture(scope="module")
def first(small_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of a run that compressed a network."""
    output = tmp_path_factory.mktemp("first")
    assert train(small_images, output, "--model.compression_parameters.large_subvectors", "True") == 0
    return output / "trained_models"


@pytest.fixture(scope="module")
def folded(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as the authors' files hold theirs."""
    path = tmp_path_factory.mktemp("folded") / "model.pth"
    state = read_tensors(first / "1.pth")
    torch.save({name: tensor for name, tensor in state.items() if not name.endswith(TRAINING_VECTORS)}, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_compressed_model_is_trained_on_as_it_is(
    suffix: str, first: Path, small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = first / f"1{suffix}"
    assert train(small_images, tmp_path, "--model.weights", str(start)) == 0
    said = capsys.readouterr().out
    assert "is a compressed model, which is trained on" in said
    assert "scale and shift" not in said
    before, zero, after = (
        load_packed(path).state()
        for path in (first / "1.safetensors", *(tmp_path / "trained_models" / f"{n}.safetensors" for n in (0, 1)))
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if not name.endswith(TRAINING_VECTORS):
            assert torch.equal(tensor, zero[name]), name
            assert torch.equal(tensor, after[name]) == name.endswith("codes_matrix"), name
    made, found = (
        load_packed(path).info for path in (first / "1.safetensors", tmp_path / "trained_models" / "1.safetensors")
    )
    if suffix == ".safetensors":
        assert found.settings == made.settings
    assert found.permutations is not None
    assert made.permutations is not None
    assert [p.permutation.tolist() for p in found.permutations] == [p.permutation.tolist() for p in made.permutations]


def test_folded_norms_are_named_before_training(
    folded: Path, small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(small_images, tmp_path, "--model.weights", str(folded)) == 0
    said = capsys.readouterr().out
    assert said.count("batch norms folded into scale and shift") == 1
    for words in ("warning: model.weights", "20 batch norms", "bn1, layer1.0.bn1", "--model.reestimate_norms True"):
        assert words in said
    assert folded_norms(open_model_file(tmp_path / "trained_models" / "0.pth").model)  # not saved as what they are not
    assert not folded_norms(open_model_file(tmp_path / "trained_models" / "1.pth").model)


def test_rebuilt_norms_start_from_the_same_network(
    folded: Path, small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model.weights", str(folded), "--model.reestimate_norms", "True"]
    assert train(small_images, tmp_path, *flags) == 0
    said = capsys.readouterr().out
    assert "norms: running statistics of 20 batch norms rebuilt from 24 training images" in said
    assert "scale and shift" not in said
    start, zero = read_tensors(folded), read_tensors(tmp_path / "trained_models" / "0.pth")
    assert all(torch.equal(zero[name], tensor) for name, tensor in start.items())
    assert not folded_norms(open_model_file(tmp_path / "trained_models" / "0.pth").model)


def test_whole_norms_of_a_compressed_start_are_taken_anew(
    first: Path, small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model.weights", str(first / "1.pth"), "--model.reestimate_norms", "True", "--epochs", "0"]
    assert train(small_images, tmp_path, *flags) == 0
    said = capsys.readouterr().out
    assert "norms: running statistics of 20 batch norms taken anew from 24 training images" in said
    assert "no effect" not in said
    before, after = (read_tensors(path) for path in (first / "1.pth", tmp_path / "trained_models" / "0.pth"))
    for name, tensor in before.items():
        in_a_norm = f"{name.rpartition('.')[0]}.{TRAINING_VECTORS[0]}" in before
        assert torch.equal(tensor, after[name]) or in_a_norm, name
        if name.endswith(TRAINING_VECTORS[0]):
            assert not torch.equal(tensor, after[name]), name


def test_nothing_to_rebuild_is_said(small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(small_images, tmp_path, "--model.reestimate_norms", "True", "--epochs", "0") == 0
    assert "note: model.reestimate_norms has no effect" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.use_compression", "False"], ["use_compression False trains a dense one", "src.convert"]),
        (["--model.arch", "resnet50"], ["holds a resnet18", "--model.arch resnet18"]),
    ],
    ids=["dense", "architecture"],
)
def test_what_contradicts_a_compressed_file_is_refused(
    flags: list[str],
    words: list[str],
    first: Path,
    small_images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "output"
    assert train(small_images, output, "--model.weights", str(first / "1.safetensors"), *flags) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (output / "trained_models").exists()


def images(seed: int) -> Tensor:
    return torch.randn(128, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def folded_network(**norm: float) -> nn.Module:
    torch.manual_seed(0)
    model = quantized(
        lively(
            nn.Sequential(
                nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, **norm), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16, **norm),
                nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 12),
            )
        ),
        spec(8),
    ).eval()  # fmt: skip
    load_state(model, compressed_state(model), "a file")
    return model


@pytest.mark.parametrize("norm", [{}, {"eps": 1e-2}], ids=["plain", "eps"])
def test_a_rebuilt_network_evaluates_as_before_and_trains_as_it_evaluates(norm: dict[str, float]) -> None:
    model = folded_network(**norm)
    evaluated = outputs(model, images(1))
    worse = relative(outputs(copy.deepcopy(model).train(), images(1)), evaluated)
    with torch.no_grad():
        assert reestimate_norms(model, lambda network: [network(images(seed)) for seed in range(8)]) == ["1", "4"]
    assert not model.training
    assert relative(outputs(model, images(1)), evaluated) < 1e-6
    assert relative(outputs(model.train(), images(1)), evaluated) < 0.05 < 0.3 < worse


def test_norms_that_no_image_reaches_stay_folded() -> None:
    model = folded_network()
    assert reestimate_norms(model, lambda _network: None) == []
    assert len(folded_norms(model)) == 2
