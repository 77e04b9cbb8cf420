"""Whatever a network calls its tensors: files hold them under their names, or say which one they cannot hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from src.common.errors import CheckpointError
from src.compression.finetune.checkpoint import MODEL, _is_of_bytes
from src.compression.quantize.compress import build_quantized
from src.model_files.packed import AppliedPermutation, ModelInfo, load_packed, save_packed
from src.model_files.plan_of_file import plan_of
from src.model_files.pth import (
    is_compressed,
    read_tensors,
    save_compressed,
    save_dense,
    save_dense_safetensors,
)
from src.model_files.state_dict import load_state
from tests.support.helpers import quantized, spec

NAMES = [
    "permutations", "codes_packed", "codes_huffman", "codes_entropy", "codes_matrix", "codebook", "__metadata__",
    "num_batches_tracked", "renamed", "running_mean", "weight", "pqf", "checksum", "a codes_matrix", "mycodes_matrix",
]  # fmt: skip
VALUES = {
    "float": torch.tensor([0.5, -1.25, 3.0]),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "negative": torch.tensor([[-1, -300]], dtype=torch.int16),
    "infinite": torch.tensor([0.0, -float("inf")]),
    "none": torch.zeros(0, 4),
}
INFO = ModelInfo(
    permutations=(AppliedPermutation(parents=("l",), children=(), permutation=torch.arange(16), reshapes={}),)
)


class Inner(nn.Module):
    """A module with a tensor of its own."""


def network(names: list[str], value: Tensor, as_parameter: bool) -> nn.Module:
    """A quantizable layer, and tensors of these names beside it and in a module below."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("l", nn.Linear(16, 16))
    model.add_module("renamed", Inner())
    model.add_module("inner", Inner())
    for module in (model, model.get_submodule("inner"), model.get_submodule("renamed")):
        for name in names:
            if as_parameter:
                module.register_parameter(name, nn.Parameter(value.clone()))
            elif not hasattr(module, name):
                module.register_buffer(name, value.clone())
    return model


def same(found: nn.Module, wanted: nn.Module) -> bool:
    ours, theirs = found.state_dict(), wanted.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], value.half().float() if name == "l.codebook" else value)
        for name, value in theirs.items()
    )


def fresh(names: list[str], value: Tensor, as_parameter: bool) -> nn.Module:
    return network(names, torch.zeros_like(value), as_parameter).eval()


@pytest.mark.parametrize("kind", ["parameter", *VALUES])
@pytest.mark.parametrize("form", ["packed", "entropy coded", "published"])
def test_a_tensor_of_any_name_comes_back_with_its_value(form: str, kind: str, tmp_path: Path) -> None:
    value, as_parameter = VALUES["float" if kind == "parameter" else kind], kind == "parameter"
    for name in (*([[one] for one in NAMES if not (as_parameter and one == "renamed")]), NAMES[:8]):
        model = quantized(network(name, value, as_parameter), spec(4)).eval()
        if form == "published":
            path = tmp_path / "model.pth"
            save_compressed(model, path)
            state = read_tensors(path)
            assert is_compressed(state)
            dense = fresh(name, value, as_parameter)
            twin = build_quantized(dense, plan_of(dense, state, str(path))).eval()
        else:
            path = tmp_path / "model.safetensors"
            save_packed(model, path, INFO, entropy_coding=form == "entropy coded")
            packed = load_packed(path)
            assert packed.info.permutations is not None
            state, twin = packed.state(), build_quantized(fresh(name, value, as_parameter), packed.plan).eval()
        load_state(twin, state, str(path))
        assert same(twin, model), name


@pytest.mark.parametrize("name", NAMES)
def test_a_dense_file_holds_every_name_or_says_which_one_it_cannot_hold(name: str, tmp_path: Path) -> None:
    model = network([name], VALUES["float"], as_parameter=False)
    save_dense(model, tmp_path / "model.pth")
    assert not is_compressed(read_tensors(tmp_path / "model.pth"))
    twin = fresh([name], VALUES["float"], as_parameter=False)
    load_state(twin, read_tensors(tmp_path / "model.pth"), "model.pth")
    assert same(twin, model)
    path = tmp_path / "model.safetensors"
    if name == "__metadata__":
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot hold the tensor '__metadata__'"):
            save_dense_safetensors(model, path)
        assert not path.exists()
        return
    save_dense_safetensors(model, path)
    twin = fresh([name], VALUES["float"], as_parameter=False)
    load_state(twin, read_tensors(path), str(path))
    assert same(twin, model)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(
        st.one_of(
            st.sampled_from(NAMES), st.text(st.characters(codec=None, exclude_characters="."), min_size=1, max_size=12)
        ),
        unique=True,
        max_size=5,
    )
)
def test_names_of_any_letters_come_back_or_are_refused_by_name(names: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, twin = nn.Sequential(nn.Linear(16, 16)), nn.Sequential(nn.Linear(16, 16))
    for number, name in enumerate(name for name in names if not hasattr(model, name)):
        model.register_buffer(name, torch.full((2,), float(number)))
        twin.register_buffer(name, torch.zeros(2))
    quantized(model, spec(4)).eval()
    path = tmp_path / "model.safetensors"
    path.unlink(missing_ok=True)
    try:
        save_packed(model, path, ModelInfo())
    except CheckpointError as error:
        assert any(ascii(name)[1:-1] in str(error) for name in names)  # noqa: PT017
        assert not path.exists()
        return
    packed = load_packed(path)
    found = build_quantized(twin, packed.plan).eval()
    load_state(found, packed.state(), str(path))
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in model.named_buffers())


def test_tied_tensors_with_names_of_the_file_stay_tied_in_it(tmp_path: Path) -> None:
    model = network(["codes_packed"], VALUES["float"], as_parameter=True)
    model.get_submodule("inner").codes_packed = model.codes_packed
    save_packed(quantized(model, spec(4)).eval(), tmp_path / "model.safetensors", ModelInfo())
    packed = load_packed(tmp_path / "model.safetensors")
    assert packed.tied == {"inner.codes_packed": "codes_packed"}
    assert torch.equal(packed.state()["inner.codes_packed"], VALUES["float"])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(1, dtype=torch.complex64), "complex64"),
        (torch.zeros(1, 1, 1, 1, 1, 1, 1, 1, 1), "9 dimensions"),
        (torch.zeros(2, 2).to_sparse(), "sparse"),
    ],
    ids=["complex", "dimensions", "sparse"],
)
def test_a_tensor_that_could_not_be_read_back_is_refused_by_name(value: Tensor, words: str, tmp_path: Path) -> None:
    model = network(["odd"], value, as_parameter=False)
    for save in (lambda path: save_packed(model, path, ModelInfo()), lambda path: save_dense_safetensors(model, path)):
        with pytest.raises(CheckpointError, match=rf"odd'.*{words}"):
            save(tmp_path / "model.safetensors")
        assert list(tmp_path.iterdir()) == []


def test_names_that_take_more_than_a_header_can_have_are_refused(tmp_path: Path) -> None:
    model = nn.Module()
    for number in range(5):
        model.register_buffer("x" * 1_000_000 + str(number), torch.zeros(1))
    with pytest.raises(CheckpointError, match="names and shapes of 5 tensors"):
        save_dense_safetensors(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_a_network_with_usual_names_says_nothing_about_names(tmp_path: Path) -> None:
    model = quantized(network(["scale"], VALUES["float"], as_parameter=True), spec(4)).eval()
    save_packed(model, tmp_path / "model.safetensors", INFO)
    assert b"renamed" not in (tmp_path / "model.safetensors").read_bytes().replace(b"renamed.scale", b"")


@pytest.mark.parametrize("table", ["[]", "{", '{"none": "x"}', '{"l.codebook": 3}'])
def test_damaged_tables_of_names_are_refused(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from src.model_files import packed as module

    model = quantized(network(["permutations"], VALUES["float"], as_parameter=True), spec(4)).eval()
    write = module.write_container
    monkeypatch.setattr(
        module, "write_container", lambda path, tensors, metadata: write(path, tensors, {**metadata, "renamed": table})
    )
    save_packed(model, tmp_path / "model.safetensors", ModelInfo())
    with pytest.raises(CheckpointError, match="renamed"):
        load_packed(tmp_path / "model.safetensors")


def test_a_checkpoint_of_a_training_keeps_tensors_that_are_called_codes() -> None:
    assert MODEL
    assert _is_of_bytes(torch.tensor([0, 255]))
    for value in (torch.tensor([0.5]), torch.tensor([-1]), torch.tensor([256]), torch.zeros(0)):
        assert not _is_of_bytes(value)
