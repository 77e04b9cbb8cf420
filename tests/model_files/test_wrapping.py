"""State dicts as training programs wrap them: read where they then fit, named in a short message otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from src.architectures import ARCHITECTURES
from src.common.errors import CheckpointError
from src.model_files.open_model_file import open_model_file, state_for
from src.model_files.pth import read_tensors, save_compressed
from src.model_files.state_dict import load_state
from tests.support.helpers import quantized, spec
from tests.support.logs import logged

PREFIXES = [
    "",
    "module.",
    "_orig_mod.",
    "model.",
    "net.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.model.module.",
]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.Flatten(), nn.Linear(8, 12)))


def blank(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers()]:
            tensor.zero_()
    return twin


def loaded(model: nn.Module, contents: object, path: Path) -> bool:
    """Whether a file with these contents gives all of `model` back."""
    torch.save(contents, path)
    twin = blank(model)
    load_state(twin, read_tensors(path), str(path))
    return all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in twin.state_dict().items())


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_known_prefixes_are_taken_off_in_any_nesting(prefix: str, tmp_path: Path) -> None:
    model = network()
    assert loaded(model, under(prefix, model.state_dict()), tmp_path / "dense.pth")
    assert loaded(model, {"n_averaged": torch.tensor(3), **under(prefix, model.state_dict())}, tmp_path / "average.pth")
    coded = quantized(network(), spec(4)).eval()
    save_compressed(coded, tmp_path / "plain.pth")
    torch.save(under(prefix, torch.load(tmp_path / "plain.pth")), tmp_path / "coded.pth")
    twin = blank(coded)
    load_state(twin, read_tensors(tmp_path / "coded.pth"), "coded.pth")
    assert torch.equal(twin.get_buffer("0.codes_matrix"), coded.get_buffer("0.codes_matrix"))


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "net", "network", "module"])
def test_known_wrappers_are_opened_whatever_stands_beside_the_tensors(wrapper: str, tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    beside = {"epoch": 3, "acc": 90.0, "hyper_parameters": {"lr": 0.1}, "optimizer": optimizer.state_dict()}
    assert loaded(model, {wrapper: under("model.", model.state_dict()), **beside}, tmp_path / "checkpoint.ckpt")
    assert loaded(model, {"state_dict": {wrapper: model.state_dict()}, **beside}, tmp_path / "nested.pth")


def test_averaged_models_and_counters_of_operations_are_read(tmp_path: Path) -> None:
    model = network()
    assert loaded(model, AveragedModel(model).state_dict(), tmp_path / "averaged.pth")
    assert loaded(model, AveragedModel(nn.DataParallel(model)).state_dict(), tmp_path / "parallel.pth")
    counted = copy.deepcopy(model)
    for module in counted.modules():
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        module.register_buffer("total_params", torch.zeros(1, dtype=torch.float64))
    assert loaded(model, counted.state_dict(), tmp_path / "thop.pth")
    assert loaded(counted, counted.state_dict(), tmp_path / "own.pth")


def test_a_part_that_was_compiled_or_recomputed_has_its_plain_names(tmp_path: Path) -> None:
    model = network()
    for part in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"):
        state = {name.replace("2.1.", f"2.{part}.1."): tensor for name, tensor in model.state_dict().items()}
        assert loaded(model, state, tmp_path / "part.pth")


@pytest.mark.parametrize("name", ["module", "model", "net"])
def test_a_module_of_the_network_with_such_a_name_keeps_it(name: str, tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module(name, network())
    assert loaded(model, model.state_dict(), tmp_path / "own.pth")
    assert loaded(model, under("module.", model.state_dict()), tmp_path / "parallel.pth")
    assert loaded(network(), model.state_dict(), tmp_path / "inner.pth")


def test_nothing_is_lost_silently(tmp_path: Path) -> None:
    model, state = network(), network().state_dict()
    with pytest.raises(CheckpointError, match=r"holds the network 2 times, under the names model\., module\."):
        loaded(model, {**under("model.", state), **under("module.", state)}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match=r"1 keys unexpected: criterion\.weight"):
        loaded(model, {**under("model.", state), "criterion.weight": torch.ones(3)}, tmp_path / "loss.pth")
    with pytest.raises(CheckpointError, match=r"1 keys unexpected: 0\.weight"):
        loaded(model, {**under("model.", state), "0.weight": torch.ones(3)}, tmp_path / "same.pth")
    with logged("'model' was read; other tensors in it were not: model_ema"):
        assert loaded(model, {"model": state, "model_ema": state, "epoch": 1}, tmp_path / "ema.pth")


UNKNOWN: list[tuple[str, Callable[[dict[str, Tensor]], object], str]] = [
    ("prefix", lambda state: under("student.", state), "begins with 'student.'"),
    ("prefixes", lambda state: under("a.b.", state), "begins with 'a.b.'"),
    ("wrapper", lambda state: {"epoch": 1, "weights": state}, "named tensors under weights"),
    ("value", lambda state: {**state, "epoch": 3}, "'epoch' is of type int"),
    ("list", lambda state: [state], "of type list"),
    ("empty", lambda _: {}, "It is empty"),
    ("numbers", lambda state: dict(enumerate(state.values())), "keys are not names"),
]


@pytest.mark.parametrize(("wrap", "words"), [case[1:] for case in UNKNOWN], ids=[case[0] for case in UNKNOWN])
def test_an_unknown_wrapping_is_named_in_a_short_message(wrap, words: str, tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(300)))
    with pytest.raises(CheckpointError, match="unknown") as error:
        loaded(model, wrap(model.state_dict()), tmp_path / "unknown.pth")
    assert words in str(error.value)
    assert len(str(error.value)) < 700


def test_programs_are_named_for_what_they_are(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(network()), tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="TorchScript program"):
        read_tensors(tmp_path / "script.pt")
    torch.export.save(torch.export.export(network().eval(), (torch.zeros(1, 3, 3, 3),)), tmp_path / "export.pt2")
    with pytest.raises(CheckpointError, match=r"program of torch\.export"):
        read_tensors(tmp_path / "export.pt2")
    torch.save(network(), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"Python objects.*Sequential"):
        read_tensors(tmp_path / "whole.pth")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_whole_file_is_opened_and_its_architecture_found(prefix: str, tmp_path: Path) -> None:
    state = ARCHITECTURES["resnet18"].build(5).state_dict()
    torch.save({"epoch": 1, "state_dict": under(prefix, state)}, tmp_path / "resnet.ckpt")
    opened = open_model_file(tmp_path / "resnet.ckpt")
    assert (opened.architecture.name, opened.info.num_classes) == ("resnet18", 5)
    assert all(torch.equal(opened.model.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_wrapped_classifier_gives_the_backbone_of_a_detector() -> None:
    state = ARCHITECTURES["resnet50"].build(5).state_dict()
    detector = ARCHITECTURES["maskrcnn"]
    found = state_for(detector, {"n_averaged": torch.tensor(1), **under("module.", state)}, "classifier.pth")
    backbone = detector.backbone_of(found)
    assert backbone is not None
    assert set(backbone) == {name for name in state if not name.startswith("fc.")}
