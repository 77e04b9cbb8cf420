"""Model files by their names on the Hugging Face hub, as the commands take them: from its cache, offline, and what is
said where there is no such model, no network or no package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

import src as pqf
from tests.conftest import ROOT
from tests.support import small_runs
from tests.support.hub import in_cache, local_hub
from tests.support.launching import environment
from tests.support.patience import PATIENCE

NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A packed ResNet-18 for three classes."""
    torch.manual_seed(0)
    how = {"k": 4, "k_means_type": "kmeans", "k_means_n_iters": 1, "use_permutations": False, "show_progress": False}
    model, _ = pqf.compress(resnet18(num_classes=3), **how)
    file = tmp_path_factory.mktemp("small") / "model.safetensors"
    pqf.save(model, file, arch="resnet18")
    return file.read_bytes()


def ran(arguments: list[str], cache: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment({"HF_HUB_CACHE": str(cache), "HF_ENDPOINT": NOBODY, **more}),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    for word in words:
        assert word in done.stderr, done.stderr


def evaluation(name: str, images: Path) -> list[str]:
    files = ["--model.state_dict_compressed", name, "--dataloader.imagenet_path", str(images)]
    return ["src.evaluate_resnet", *files, *small_runs.evaluation()]


def test_a_model_in_the_cache_is_evaluated_offline(small: bytes, small_images: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="pip install huggingface-hub")
    in_cache(tmp_path, "me/small", {"model.safetensors": small})
    done = ran([*evaluation("hf:me/small", small_images), "--model.decode", "each_forward"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "top-1 accuracy: " in done.stdout
    assert "models--me--small" in done.stdout


@pytest.mark.slow
def test_convert_fetches_its_file(small: bytes, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="pip install huggingface-hub")
    with local_hub() as hub:
        hub.repositories["me/small"] = {"deep/er.safetensors": small}
        name, out = "hf:me/small/deep/er.safetensors@main", tmp_path / "out.pth"
        done = ran(["src.convert", name, str(out)], tmp_path / "cache", HF_ENDPOINT=hub.address)
        assert done.returncode == 0, done.stderr
        assert out.exists()
        missing = ran(evaluation("hf:me/nothing", tmp_path), tmp_path / "cache", HF_ENDPOINT=hub.address)
    refused(missing, "model.state_dict_compressed: me/nothing", "no such model", "hf auth login")


def test_without_a_network_or_a_name_it_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="pip install huggingface-hub")
    refused(ran(evaluation("hf:me/small", tmp_path), tmp_path), "me/small: model.safetensors is not in the cache",
            str(tmp_path), "the hub cannot be reached", "refused")  # fmt: skip
    weights = ["src.train_resnet", "--model.weights", "hf:me/small", "--output_path", str(tmp_path / "run")]
    refused(ran(weights, tmp_path, HF_HUB_OFFLINE="1"), "model.weights: me/small", "HF_HUB_OFFLINE is set")
    refused(ran(evaluation("hf:small", tmp_path), tmp_path), "hf:small is no name of a model", "hf:OWNER/NAME")
    assert not (tmp_path / "run").exists()


def test_without_the_package_one_line_says_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('not here')\n")
    found = ran(evaluation("hf:me/small", tmp_path), tmp_path, PYTHONPATH=str(tmp_path))
    refused(found, "model.state_dict_compressed: me/small", "huggingface-hub, which is not installed", "pqf[hub]")
