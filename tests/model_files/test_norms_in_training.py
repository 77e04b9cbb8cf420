"""A network from a file trains as the one that was saved; where a file does not say how its norms train, they warn."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from src.common.errors import CheckpointError
from src.compression.quantize.compress import build_quantized, compress
from src.compression.quantize.plan import QuantizationSpec, make_plan
from src.model_files.norm_training import ATTRIBUTE
from src.model_files.norms import TRAINING_VECTORS, folded_norms
from src.model_files.packed import ModelInfo, load_packed, save_packed
from src.model_files.packed_norms import STREAM
from src.model_files.pth import compressed_state, read_tensors, save_compressed
from src.model_files.safetensors_file import read_container, write_container
from src.model_files.state_dict import load_state
from tests.support.helpers import relative

SPEC = QuantizationSpec(k=8, k_means_n_iters=3)
WIDTH = 24
Make = Callable[[int], nn.Module]


def network(norm: Make, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, padding=1), norm(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3), norm(WIDTH), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 12),
    )  # fmt: skip


def images(seed: int = 3) -> Tensor:
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def trained(norm: Make) -> nn.Module:
    """A quantized network whose norms have seen images, with a channel that is switched off, one that is constant, and a
    negative weight."""
    model = network(norm)
    with torch.no_grad():
        for module in model:
            if isinstance(module, _BatchNorm) and module.weight is not None:
                module.weight.uniform_(0.3, 2)
                module.weight[1], module.weight[2] = 0, -0.7
                if module.bias is not None:
                    module.bias.normal_()
        first = model[0]
        assert isinstance(first, nn.Conv2d)
        assert first.bias is not None
        first.weight[5], first.bias[5] = 0, 20
        for step in range(60):
            model.train()(images(step))
    return compress(model.eval(), make_plan(model, SPEC), show_progress=False)[0].eval()


def state_of(model: nn.Module, how: str, folder: Path) -> dict[str, Tensor]:
    """The tensors of a file of `model`, read."""
    if how == "pth":
        save_compressed(model, folder / "model.pth")
        return read_tensors(folder / "model.pth")
    save_packed(model, folder / "model.safetensors", ModelInfo())
    return load_packed(folder / "model.safetensors").state()


def loaded(state: dict[str, Tensor], norm: Make) -> nn.Module:
    fresh = network(norm, seed=1)
    model = build_quantized(fresh, make_plan(fresh, SPEC)).eval()
    load_state(model, state, "the file")
    return model


def without_training(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As in a file that the authors, or an earlier version, wrote."""
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in TRAINING_VECTORS}


def outputs(model: nn.Module, training: bool) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).train(training)(images())


NORMS: dict[str, Make] = {
    "plain": nn.BatchNorm2d,
    "eps 1e-3": lambda n: nn.BatchNorm2d(n, eps=1e-3),
    "not affine": lambda n: nn.BatchNorm2d(n, affine=False),
    "group norm": lambda n: nn.GroupNorm(4, n),
    "instance norm": lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True),
}
ROUNDED = {"pth": 2e-3, "packed": 2e-2}
"""Of 16-bit floats, and of steps of 1 / 32."""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("how", ["pth", "packed"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_loaded_network_trains_as_the_saved_one(norm: Make, how: str, tmp_path: Path) -> None:
    model = trained(norm)
    twin = loaded(state_of(model, how, tmp_path), norm)
    assert relative(outputs(twin, training=False), outputs(model, training=False)) < 1e-5
    assert relative(outputs(twin, training=True), outputs(model, training=True)) < ROUNDED[how]


def test_a_network_that_was_trained_on_after_loading_is_saved_as_it_is_then(tmp_path: Path) -> None:
    twin = loaded(state_of(trained(nn.BatchNorm2d), "packed", tmp_path), nn.BatchNorm2d)
    twin.train()(images(7))
    again = loaded(state_of(twin.eval(), "packed", tmp_path), nn.BatchNorm2d)
    assert relative(outputs(again, training=False), outputs(twin, training=False)) < 1e-5
    assert relative(outputs(again, training=True), outputs(twin, training=True)) < ROUNDED["packed"]


def test_from_file_to_file_the_two_vectors_stay_the_same_to_the_bit(tmp_path: Path) -> None:
    model = trained(nn.BatchNorm2d)
    wanted = compressed_state(model)
    for how in ("pth", "packed", "packed", "pth"):
        model = loaded(state_of(model, how, tmp_path), nn.BatchNorm2d)
        found = compressed_state(model)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_readers_of_the_published_format_see_what_they_always_saw(tmp_path: Path) -> None:
    model = trained(nn.BatchNorm2d)
    save_compressed(model, tmp_path / "model.pth")
    contents = torch.load(tmp_path / "model.pth", weights_only=True)
    assert {name: tensor.shape for name, tensor in contents.items()} == {
        name: tensor.shape for name, tensor in compressed_state(model).items()
    }
    twin = loaded(dict(contents), nn.BatchNorm2d)
    assert relative(outputs(twin, training=False), outputs(model, training=False)) < 1e-5


def test_a_norm_that_is_used_twice_trains_right(tmp_path: Path) -> None:
    def shared() -> nn.Sequential:
        model = network(nn.BatchNorm2d)
        model[4] = model[1]
        return model

    model = shared()
    with torch.no_grad():
        for step in range(20):
            model.train()(images(step))
    save_packed(model.eval(), tmp_path / "model.safetensors", ModelInfo())
    twin = shared().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_state(twin, load_packed(tmp_path / "model.safetensors").state(), "the file")
        assert relative(outputs(twin, training=False), outputs(model, training=False)) < 1e-5
        assert relative(outputs(twin, training=True), outputs(model, training=True)) < ROUNDED["packed"]


def test_folded_norms_warn_once_when_they_are_trained_and_are_not_saved_as_whole_ones(tmp_path: Path) -> None:
    state = without_training(state_of(trained(nn.BatchNorm2d), "pth", tmp_path))
    twin = loaded(state, nn.BatchNorm2d)
    assert list(folded_norms(twin)) == ["1", "4"]
    assert not set(state_of(twin, "pth", tmp_path)) - set(state)
    save_packed(twin, tmp_path / "again.safetensors", ModelInfo())
    assert STREAM not in load_file(tmp_path / "again.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin(images())
    learner = copy.deepcopy(twin).train()
    with pytest.warns(UserWarning, match=r"the file holds 2 batch norms folded .*\(1, 4\).*reestimate_norms") as told:
        learner(images())
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner(images())
    assert not folded_norms(learner)  # what it has learnt is its own
    assert list(folded_norms(twin)) == ["1", "4"]
    load_state(twin, state_of(learner, "pth", tmp_path), "a whole one")
    assert not folded_norms(twin)


def test_frozen_norms_need_nothing(tmp_path: Path) -> None:
    model = network(FrozenBatchNorm2d).eval()
    state = state_of(model, "pth", tmp_path)
    assert not any(name.endswith(TRAINING_VECTORS) for name in state)
    twin = network(FrozenBatchNorm2d, seed=1)
    load_state(twin, state, "the file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(twin.train()(images()), model(images()), atol=1e-5)


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found["widths"].update({"1": 3}),
        lambda found: found["widths"].update({"1": -WIDTH, "x": 2 * WIDTH}),
        lambda found: found.pop("numbers"),
        lambda found: found.update(numbers=found["numbers"].float()),
        lambda found: found.update(numbers=found["numbers"][:1].expand(2, -1)),
        lambda found: found["numbers"].fill_(float("nan")),
        lambda found: found["numbers"].fill_(60000),
    ],
    ids=["width", "negative", "missing", "type", "expanded", "nan", "too large"],
)
def test_a_damaged_attribute_is_refused(damage: Callable, tmp_path: Path) -> None:
    save_compressed(trained(nn.BatchNorm2d), tmp_path / "model.pth")
    contents = torch.load(tmp_path / "model.pth", weights_only=True)
    damage(getattr(contents, ATTRIBUTE))
    torch.save(contents, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"damaged|not finite|deviation"):
        loaded(read_tensors(tmp_path / "model.pth"), nn.BatchNorm2d)


@pytest.mark.parametrize("cut", [0, 5, 6 * 2 * WIDTH + 3, -1])
def test_a_damaged_stream_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_packed(trained(nn.BatchNorm2d), path, ModelInfo())
    tensors, metadata = read_container(path)
    write_container(path, {**tensors, STREAM: tensors[STREAM][:cut]}, metadata)
    with pytest.raises(CheckpointError, match="batch norms are damaged"):
        load_packed(path)
    write_container(path, {**tensors, "1.weight": torch.ones(WIDTH)}, metadata)
    with pytest.raises(CheckpointError, match="twice"):
        load_packed(path)
    for widths in ("{}", '{"1": -3}', "[1]"):
        write_container(path, tensors, {**metadata, "norms": widths})
        with pytest.raises(CheckpointError, match="metadata are damaged"):
            load_packed(path)
