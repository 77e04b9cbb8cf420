"""Architectures by any name: what is built, where its head is, and one message where it cannot be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from src import architectures
from src.architectures.architecture import n_outputs
from src.architectures.named import canonical, find
from src.architectures.structure import shapes_of, with_memory, without_weights
from src.common.errors import SettingsError

OTHER_PARTS = ("video", "optical_flow", "quantization")


def image_models() -> list[str]:
    parts = {name: models.get_model_builder(name).__module__.split(".")[2] for name in models.list_models()}
    return [name for name, part in parts.items() if part not in OTHER_PARTS]


@pytest.mark.parametrize(
    ("name", "task", "head", "n_classes", "side"),
    [
        ("mobilenet_v2", "classification", "classifier.1", 1000, 224),
        ("torchvision:vit_b_16", "classification", "heads.head", 1000, 224),
        ("inception_v3", "classification", "fc", 1000, 299),
        ("fcn_resnet50", "segmentation", "classifier.4", 21, 224),
        ("tests.support.own_network:Net", "classification", "head", 10, 224),
        ("tests.support.own_network:fixed", "classification", "head", 7, 224),
    ],
)
def test_a_name_gives_the_network_and_its_head(name: str, task: str, head: str, n_classes: int, side: int) -> None:
    found = find(name)
    assert (found.task, found.head, found.n_classes, found.image_size) == (task, head, n_classes, side)
    if found.sizes_by_classes:
        model = without_weights(lambda: found.build(5))
        assert n_outputs(found, model) == 5
        assert found.classes_of(model.state_dict()) == 5
        assert canonical(name) == found.name


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if number % 10 == 0 else pytest.mark.slow)
        for number, name in enumerate(image_models())
    ],
)
def test_every_image_model_of_torchvision_is_found_with_all_its_heads(name: str) -> None:
    found = find(f"torchvision:{name}")
    for n in (3, 8):
        model = without_weights(lambda n=n: found.build(n))
        assert found.classes_of(model.state_dict()) == n
    assert (found.task == "detection") == (found.build_frozen is not None)


def test_timm_models_are_found() -> None:
    pytest.importorskip("timm")
    found = find("timm:mobilenetv3_small_050")
    assert (found.task, found.head, found.n_classes, found.image_size) == ("classification", "classifier", 1000, 224)
    assert n_outputs(found, found.build(3)) == 3
    with pytest.raises(SettingsError, match=r"timm has no model 'mobilnetv3_small_050'.*did you mean"):
        find("timm:mobilnetv3_small_050")


@pytest.mark.slow
def test_pretrained_weights_of_timm_that_cannot_be_had_are_one_message() -> None:
    timm = pytest.importorskip("timm")
    published = {name.partition(".")[0] for name in timm.list_pretrained()}
    name = next(name for name in timm.list_models() if name not in published)
    with pytest.raises(SettingsError, match=rf"timm cannot load the weights of timm:{name}.*model\.weights"):
        find(f"timm:{name}").published_weights(False)


def test_published_weights_of_torchvision_have_todays_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DenseNet's file has names of 2017; its builder knows."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = models.DenseNet121_Weights.DEFAULT
    torch.manual_seed(0)
    state = models.densenet121(weights=None).state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): tensor for name, tensor in state.items()}
    old = {name: tensor for name, tensor in old.items() if not name.endswith("num_batches_tracked")}
    assert old.keys() != state.keys()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(old, folder / weights.url.rpartition("/")[2])
    found = find("densenet121").published_weights(False)
    assert found.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())


def test_published_weights_that_cannot_be_had_are_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]).write_bytes(b"half a file")
    with pytest.raises(SettingsError, match=r"cannot load https://.*squeezenet1_1.*\n.*by hand"):
        find("squeezenet1_1").published_weights(False)


def test_torchvisions_names_are_known_without_loading_it() -> None:
    assert architectures._torchvisions() == sorted(models.list_models())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mobilenet_v22", ["not known", "did you mean mobilenet_v2"]),
        ("torchvision:nothing", ["not known"]),
        ("r3d_18", ["video", "Python interface"]),
        ("quantized_resnet18", ["quantization"]),
        ("no_such_package.module:Net", ["cannot import no_such_package"]),
        ("tests.support.own_network:Nett", ["has no Nett"]),
        ("tests.support.own_network:__doc__", ["a str, expected a function or class"]),
        ("tests.support.own_network:broken", ["cannot be built", "no weights of any kind"]),
        ("tests.support.own_network:nothing", ["makes a str"]),
        ("a b:c", ["expected package.module:callable"]),
    ],
)
def test_a_wrong_name_is_one_message(name: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        find(name)
    assert str(error.value).startswith("model.arch: ")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_network_for_another_task_is_refused() -> None:
    with pytest.raises(SettingsError, match="is a network for detection, and one for classification is wanted"):
        find("fasterrcnn_resnet50_fpn", "classification")
    with pytest.raises(SettingsError, match="not known for detection"):
        architectures.check("resnet18", "detection")
    architectures.check("mobilenet_v2", "classification")
    architectures.check("own.module:Net", "detection")


def test_a_network_without_weights_has_the_same_shapes_and_its_tables() -> None:
    class WithTable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.linear.weight
            self.register_buffer("table", torch.arange(6), persistent=False)
            places = torch.empty(6, dtype=torch.long)  # filled place by place, as LeViT's and Swin's are
            for place in range(6):
                places[place] = 5 - place
            self.register_buffer("places", places, persistent=False)

    model = without_weights(WithTable)
    assert model.linear.weight.is_meta
    assert torch.equal(model.table, torch.arange(6))
    model = with_memory(model)
    assert torch.equal(model.places, torch.arange(6).flip(0))
    assert not model.linear.weight.is_meta
    assert model.tied.weight is model.linear.weight
    model.linear.weight.data.zero_()
    shapes = shapes_of(model)
    assert shapes.tied.weight is shapes.linear.weight
    assert shapes.linear.weight.is_meta
    assert not model.linear.weight.is_meta
