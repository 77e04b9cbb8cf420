"""train_resnet and evaluate_resnet on classifiers that no registry knows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from src import evaluate_resnet, train_resnet
from src.model_files.packed import load_packed
from tests.support.own_network import Net
from tests.support.small_runs import training

OWN = "tests.support.own_network:Net"
SIZES = ["--dataloader.resize", "20", "--dataloader.image_size", "16", "--dataloader.num_workers", "0"]


@pytest.fixture(scope="module")
def run(small_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("own") / "run"
    flags = [*training(4, 0, 20, 2), *SIZES, "--model.arch", OWN, "--model.weights", "none", "--epochs", "1"]
    flags += [
        "--model.compression_parameters.layer_specs",
        "{}",
        "--model.compression_parameters.ignored_modules",
        "[]",
    ]
    flags += ["--dataloader.imagenet_path", str(small_images), "--output_path", str(output), "--save_format", "both"]
    assert train_resnet.main(flags) == 0
    return output


def test_a_users_own_classifier_is_trained_with_groups_that_nobody_wrote(run: Path) -> None:
    report = json.loads((run / "compression.json").read_text())
    assert sum(group["permutation"] is not None for group in report["groups"]) >= 2
    assert {layer["name"] for layer in report["layers"]} >= {"body.0", "attention.in_proj_weight", "head"}
    info = load_packed(run / "trained_models" / "best.safetensors").info
    assert (info.arch, info.num_classes) == (OWN, 3)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_its_files_are_evaluated_to_the_figures_of_the_run(
    run: Path, small_images: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((run / "results.json").read_text())
    file = run / "trained_models" / f"best{suffix}"
    flags = ["--dataloader.imagenet_path", str(small_images), "--dataloader.batch_size", "4", *SIZES]
    flags += ["--model.state_dict_compressed", str(file), "--model.arch", OWN]
    flags += [
        "--model.compression_parameters.layer_specs",
        "{}",
        "--model.compression_parameters.ignored_modules",
        "[]",
    ]
    assert evaluate_resnet.main([*flags, "--expected.accuracy", "null"]) == 0
    printed = capsys.readouterr().out
    accuracy = float(re.search(r"top-1 accuracy: ([\d.]+) %", printed)[1])  # type: ignore[index]
    assert accuracy == pytest.approx(results["best"], abs=0.006)


def test_a_training_spends_a_wanted_size_by_its_own_images(
    small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    flags = [*training(4, 0, 20, 2), *SIZES, "--model.arch", OWN, "--model.weights", "none", "--epochs", "1"]
    flags += ["--dataloader.imagenet_path", str(small_images), "--output_path", str(output), "--recipe", "best"]
    flags += ["--compression.ratio", "7", "--model.compression_parameters.layer_specs", "{}"]
    flags += ["--model.compression_parameters.ignored_modules", "[]", "--calibration.use", "True"]
    assert train_resnet.main(flags) == 0
    assert "chosen for compression.ratio 7 by what losing them changes" in capsys.readouterr().out
    assert json.loads((output / "results.json").read_text())["ratio"] >= 7


def test_a_file_that_names_code_runs_it_only_where_the_user_says_the_same(
    run: Path, small_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "trained_models" / "best.safetensors"
    flags = ["--dataloader.imagenet_path", str(small_images), *SIZES, "--model.state_dict_compressed", str(file)]
    assert evaluate_resnet.main(flags) == 2
    assert "Code that a file names is not run" in capsys.readouterr().err


def test_weights_with_other_classes_get_a_new_head(small_images: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(Net(num_classes=10).state_dict(), tmp_path / "ten.pth")
    flags = [*training(4, 0, 20, 2), *SIZES, "--model.arch", OWN, "--model.weights", str(tmp_path / "ten.pth")]
    flags += ["--dataloader.imagenet_path", str(small_images), "--epochs", "0"]
    assert train_resnet.main([*flags, "--output_path", str(tmp_path / "refused")]) == 2
    assert train_resnet.main([*flags, "--output_path", str(tmp_path / "run"), "--model.new_head", "True"]) == 0


def test_groups_of_an_architecture_that_has_them_can_be_found_too(small_images: Path, tmp_path: Path) -> None:
    flags = [*training(4, 0, 5, 1), "--dataloader.resize", "36", "--dataloader.image_size", "32"]
    flags += ["--dataloader.num_workers", "0", "--model.permutations", "auto", "--recipe", "published"]
    flags += ["--dataloader.imagenet_path", str(small_images), "--output_path", str(tmp_path / "run"), "--epochs", "0"]
    flags += ["--model.weights", "none"]
    assert train_resnet.main(flags) == 0
    report = json.loads((tmp_path / "run" / "compression.json").read_text())
    assert len(report["groups"]) == 12


def test_a_classifier_of_a_wanted_size_is_trained_and_its_files_are_evaluated(
    small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [*SIZES, "--dataloader.imagenet_path", str(small_images), "--model.arch", OWN, "--compression.size", "7KB"]
    plain = ["--model.compression_parameters.layer_specs", "{}", "--model.compression_parameters.ignored_modules", "[]"]
    flags = [*training(4, 0, 20, 2), *data, *plain, "--model.weights", "none", "--epochs", "1", "--save_format", "both"]
    assert train_resnet.main([*flags, "--output_path", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    packed = tmp_path / "run" / "trained_models" / "best.safetensors"
    assert results["bits"] / 8 < 7168 - 1100 < packed.stat().st_size <= 7168
    for suffix in (".pth", ".safetensors"):
        file = str(tmp_path / "run" / "trained_models" / f"best{suffix}")
        own = [*data, "--dataloader.batch_size", "4", "--expected.accuracy", "null"]
        capsys.readouterr()
        assert evaluate_resnet.main([*own, "--model.state_dict_compressed", file]) == 0
        accuracy = float(re.search(r"top-1 accuracy: ([\d.]+) %", capsys.readouterr().out)[1])  # type: ignore[index]
        assert accuracy == pytest.approx(results["best"], abs=0.006)
