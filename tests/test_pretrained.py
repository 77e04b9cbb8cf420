"""A compressed network as a model of the Hugging Face hub: in a folder, and sent to and fetched from a hub on this
machine, by the hub's own package."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import src as pqf
from src.common.errors import CheckpointError, RunError, SettingsError
from src.model_files.card import MARK, UNKNOWN_LICENCE
from tests.conftest import ROOT
from tests.support.hub import local_hub
from tests.support.launching import environment
from tests.support.logs import logged
from tests.support.own_network import Net
from tests.support.patience import PATIENCE

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
OWN = "tests.support.own_network:Net"


@cache
def made() -> nn.Module:
    torch.manual_seed(0)
    return pqf.compress(Net().eval(), X, k=16, k_means_n_iters=2, show_progress=False)[0].eval()


def network() -> nn.Module:
    return copy.deepcopy(made())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = pqf.PQFModel(
        network(), arch=OWN, metric={"accuracy": 81.5}, task="classification", license="cc-by-4.0", base_model="me/big"
    )
    model.save_pretrained(folder)
    return folder


def header(page: Path) -> dict:
    return yaml.safe_load(page.read_text(encoding="utf-8").split("---\n")[1])


@torch.no_grad()
def test_a_saved_model_is_loaded_evaluated_fine_tuned_and_saved_again(saved: Path, tmp_path: Path) -> None:
    expected = network()(X)
    for how in ({"arch": OWN}, {"into": Net()}, {"arch": OWN, "decode": "each_forward"}):
        model = pqf.PQFModel.from_pretrained(saved, **how)
        assert not model.training
        assert torch.allclose(model(X), expected, atol=1e-6)
        assert (model.license, model.base_model, model.task) == ("cc-by-4.0", "me/big", "classification")
        assert model.metric == {"accuracy": 81.5}
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with torch.enable_grad():
        model(X).square().sum().backward()
    optimizer.step()
    assert model.metric is None  # what was measured was another network
    model.metric = {"accuracy": 82.0}
    model.eval().save_pretrained(tmp_path)
    again = pqf.PQFModel.from_pretrained(str(tmp_path), arch=OWN)
    assert again.metric == {"accuracy": 82.0}
    assert torch.allclose(again(X), model(X), atol=1e-5)
    assert not torch.allclose(again(X), expected, atol=1e-3)
    assert torch.equal(copy.deepcopy(again)(X), again(X))


def test_the_page_says_what_it_is_how_small_how_it_was_made_and_whose(saved: Path) -> None:
    text = (saved / "README.md").read_text(encoding="utf-8")
    assert header(saved / "README.md") == {
        "library_name": "pqf",
        "tags": ["pqf", "quantization", "product-quantization", "model-compression", "arxiv:2010.15703"],
        "pipeline_tag": "image-classification",
        "license": "cc-by-4.0",
        "base_model": "me/big",
        "base_model_relation": "quantized",
    }
    size = pqf.inspect(saved / "model.safetensors", arch=OWN).size
    for words in (
        f"{size.ratio:.1f} times smaller",
        f"| {size.megabytes:.2f} | {size.bits:,} |",
        "| accuracy | 81.5 |",
        "- clustering iterations: 2",
        "- calibration: none, or not known",
        "| Conv2d | 9 | 8 | 1 |",
        f'arch="{OWN}"',
        "## Licence\n\ncc-by-4.0.",
    ):
        assert words in text, words
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    assert config["bits"] == size.bits
    assert config["measured"] == {"accuracy": 81.5}


def test_the_licence_is_that_of_the_starting_weights_or_not_known(tmp_path: Path) -> None:
    pqf.PQFModel(network()).save_pretrained(tmp_path / "unknown")
    assert header(tmp_path / "unknown" / "README.md")["license"] == "unknown"
    assert UNKNOWN_LICENCE in (tmp_path / "unknown" / "README.md").read_text(encoding="utf-8")
    model = pqf.PQFModel(network(), arch="resnet50ssl")
    model.save_pretrained(tmp_path / "known")
    assert "CC BY-NC 4.0: not for commercial use" in (tmp_path / "known" / "README.md").read_text(encoding="utf-8")
    assert header(tmp_path / "known" / "README.md")["license"] == "other"
    config = json.loads((tmp_path / "known" / "config.json").read_text(encoding="utf-8"))
    assert (config["architecture"], config["task"]) == ("resnet50ssl", "classification")


def test_a_page_that_somebody_else_wrote_stays(tmp_path: Path) -> None:
    model, page = pqf.PQFModel(network()), tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    page.write_text("old, but of ours " + MARK, encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert "## Layers" in page.read_text(encoding="utf-8")
    page.write_text("mine", encoding="utf-8")
    with logged("README.md stays as it is", logging.INFO):
        model.save_pretrained(tmp_path)
    assert page.read_text(encoding="utf-8") == "mine"


def test_bad_input_is_one_message(saved: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], *words: str, name: object = saved, **options: object) -> None:
        with pytest.raises(error) as found:
            pqf.PQFModel.from_pretrained(name, **options)
        assert "\n" not in str(found.value)
        for word in words:
            assert word in str(found.value)

    refused(CheckpointError, OWN, "is not run", "arch=", "into=")
    refused(CheckpointError, OWN, "is not run", arch="tests.support.own_network:fixed")
    refused(CheckpointError, "head", into=Net(num_classes=3))
    refused(SettingsError, "decode = 'never': expected one of kept, each_forward, compiled", arch=OWN, decode="never")
    refused(SettingsError, "there is no folder", "OWNER/NAME", name=tmp_path / "nothing")
    refused(SettingsError, "there is no folder", "OWNER/NAME", name="nothing")
    refused(SettingsError, "holds no model.safetensors", name=tmp_path)
    broken = tmp_path / "broken"
    pqf.PQFModel(network()).save_pretrained(broken)
    refused(CheckpointError, "does not say which network it is of", "into=", name=broken)
    for text in ("{", "[1]", "\0"):
        (broken / "config.json").write_text(text, encoding="utf-8")
        refused(CheckpointError, "config.json cannot be read", name=broken)
    (broken / "config.json").unlink()
    assert pqf.PQFModel.from_pretrained(broken, into=Net()).license == ""
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    refused(CheckpointError, "model.safetensors cannot be read", name=broken, into=Net())
    with pytest.raises(SettingsError, match="is not compressed"):
        pqf.PQFModel(Net())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        pqf.PQFModel(network()).save_pretrained(tmp_path / "file")


SENT_AND_FETCHED = """
import sys, torch, src as pqf
from tests.support.own_network import Net
from tests.test_pretrained import X, OWN, network
model = pqf.PQFModel(network(), arch=OWN, metric={"accuracy": 81.5})
print(model.push_to_hub("me/small"))
again = pqf.PQFModel.from_pretrained("me/small", arch=OWN)
assert torch.allclose(again(X), model(X), atol=1e-6) and again.metric == {"accuracy": 81.5}
assert isinstance(pqf.load("hf:me/small@main", Net()), Net)
for call in (
    lambda: pqf.PQFModel.from_pretrained("me/none"),
    lambda: pqf.PQFModel.from_pretrained("me/small", revision="v9"),
    lambda: pqf.load("hf:me/small/other.pth", Net()),
    lambda: model.push_to_hub("me/small", token="of_nobody"),
    lambda: model.push_to_hub("me/small/x"),
    lambda: pqf.load("hf:me", Net()),
):
    try:
        call()
    except ValueError as error:
        print(f"{error.status} {error}")
"""


def test_a_model_is_sent_to_a_hub_and_fetched_from_there(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="pip install huggingface-hub")
    with local_hub() as hub:
        known = {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path), "HF_TOKEN": "hf_of_the_test"}
        done = subprocess.run(
            [sys.executable, "-c", SENT_AND_FETCHED],
            cwd=ROOT,
            env=environment(known),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
    assert done.returncode == 0, done.stderr
    commit, *errors = done.stdout.splitlines()
    assert commit.startswith(f"{hub.address}/me/small/commit/")
    sent = hub.repositories["me/small"]
    assert sent.keys() == {"model.safetensors", "config.json", "README.md"}
    assert b"# me/small" in sent["README.md"]
    assert len(errors) == 6, done.stdout
    for error, words in zip(
        errors,
        (
            "2 from_pretrained: me/none: the Hugging Face hub has no such model",
            "2 from_pretrained: me/small@v9: the model has no such branch, tag or commit",
            "2 pqf: me/small holds no file other.pth; name the one that it holds",
            "1 push_to_hub: me/small was not sent: ",
            "2 push_to_hub: 'me/small/x' is no name of a model",
            "2 pqf: hf:me is no name of a model on the Hugging Face hub; expected hf:OWNER/NAME",
        ),
        strict=True,
    ):
        assert error.startswith(words), error
