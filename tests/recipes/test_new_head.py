"""`model.new_head`: what is new, what is kept, and where it is refused or has no effect."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from src import architectures, train_resnet
from src.architectures.maskrcnn import build_frozen
from src.architectures.resnet import RESNET18
from src.model_files.pth import read_tensors, save_compressed, save_dense, save_dense_safetensors
from src.recipes.initial_model import dense_model, starting_model
from src.run.fingerprint import OF_THE_NETWORK, RunFingerprint, is_among
from src.settings import load
from tests.support import small_runs
from tests.support.helpers import lively, quantized, spec
from tests.support.logs import logged

FLAGS = small_runs.training(batch=8, workers=0, sls=10, k_means=2)
MASKRCNN = architectures.get("maskrcnn", "detection")
HEADS = {
    f"roi_heads.{layer}.{leaf}"
    for layer in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits")
    for leaf in ("weight", "bias")
}


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 with 5 classes, as `.pth`, `.safetensors` and quantized."""
    folder = tmp_path_factory.mktemp("five")
    model = lively(RESNET18.build(5))
    save_dense(model, folder / "model.pth")
    save_dense_safetensors(model, folder / "model.safetensors")
    save_compressed(quantized(model, spec(4)), folder / "quantized.pth")
    return folder


def train(images: Path, output: Path, weights: Path, *flags: str) -> int:
    places = ["--dataloader.imagenet_path", str(images), "--output_path", str(output), "--epochs", "0"]
    return train_resnet.main([*FLAGS, *places, "--model.weights", str(weights), *flags])


def new_tensors(model: nn.Module, start: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors of `model` that are not those of `start`."""
    return {
        name
        for name, tensor in model.state_dict().items()
        if name not in start or tensor.shape != start[name].shape or not torch.equal(tensor, start[name])
    }


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_classifier_for_other_classes_is_trained(
    name: str, five: Path, small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model.new_head", "True", "--model.use_compression", "False"]
    assert train(small_images, tmp_path / "a", five / name, *flags) == 0
    said = capsys.readouterr().out
    assert "new random weights: fc.weight (3, 512), before (5, 512), fc.bias (3,), before (5,); all others" in said
    assert train(small_images, tmp_path / "b", five / name, *flags, "--seed", "1") == 0
    start = read_tensors(five / "model.pth")
    first, second = (read_tensors(tmp_path / run / "trained_models" / "0.pth") for run in "ab")
    assert all(torch.equal(first[key], tensor) for key, tensor in start.items() if not key.startswith("fc."))
    assert first["fc.weight"].shape == (3, 512)
    assert {key for key in first if not torch.equal(first[key], second[key])} == {"fc.weight", "fc.bias"}


def test_a_new_head_is_quantized_with_the_rest(five: Path, small_images: Path, tmp_path: Path) -> None:
    assert train(small_images, tmp_path, five / "model.pth", "--model.new_head", "True") == 0
    assert read_tensors(tmp_path / "trained_models" / "0.pth")["fc.codes_matrix"].shape[0] == 3


def test_the_same_seed_gives_the_same_head(five: Path) -> None:
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(dense_model(RESNET18, five / "model.pth", 3, False, new_head=True).get_parameter("fc.weight"))
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_without_it_the_error_names_it(
    five: Path, small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(small_images, tmp_path / "run", five / "model.pth") == 2
    error = capsys.readouterr().err
    for words in ("3 class folders", "5 outputs", "model.new_head True"):
        assert words in error
    assert not (tmp_path / "run" / "trained_models").exists()


def test_a_compressed_file_gets_no_new_head(
    five: Path, small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(small_images, tmp_path / "run", five / "quantized.pth", "--model.new_head", "True") == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    for words in ("model.new_head", "compressed model", "--dense"):
        assert words in error


def test_with_random_weights_it_has_no_effect() -> None:
    with logged("model.new_head has no effect", logging.INFO):
        dense_model(RESNET18, "none", 3, False, new_head=True)


def test_a_detector_keeps_all_but_the_layers_of_its_classes(tmp_path: Path) -> None:
    start = build_frozen(7)
    save_dense(start, tmp_path / "seven.pth")
    settings = load("../config/train_maskrcnn.yaml", ["--model.new_head", "True"])
    with logged("new random weights: roi_heads.box_predictor.cls_score.weight .*before", logging.INFO):
        model = starting_model(settings, MASKRCNN, tmp_path / "seven.pth", 4, False).model
    assert new_tensors(model, start.state_dict()) == HEADS
    assert model.get_parameter("roi_heads.box_predictor.bbox_pred.weight").shape == (16, 1024)
    assert model.get_parameter("roi_heads.mask_predictor.mask_fcn_logits.weight").shape == (4, 256, 1, 1)
    # also where there are as many classes as before: they are others
    assert new_tensors(dense_model(MASKRCNN, tmp_path / "seven.pth", 7, False, new_head=True), start.state_dict()) >= {
        name for name in HEADS if name.endswith("weight")
    }
    assert new_tensors(dense_model(MASKRCNN, tmp_path / "seven.pth", 4, False), start.state_dict()) == set()


def test_a_run_is_not_resumed_with_another_head() -> None:
    with_it, without = (
        RunFingerprint.of(load("../config/train_resnet18.yaml", ["--model.new_head", flag]))
        for flag in ("True", "False")
    )
    assert with_it.differences(without) == ["model.new_head"]
    assert is_among("model.new_head", OF_THE_NETWORK)
