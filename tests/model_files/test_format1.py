"""Packed files of format 1, which earlier versions of this program wrote, are read as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from src.common.errors import CheckpointError
from src.model_files.packed import load_packed
from src.model_files.pth import read_tensors
from tests.conftest import ROOT

DATA = ROOT / "tests" / "data"
"""A network of convolutions and linear layers, k = 8, 512 and 16, as a packed file, an entropy-coded one and a
`.pth`."""
FILES = ("format1.safetensors", "format1_entropy.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_format_1_holds_what_it_held(name: str) -> None:
    wanted, packed = read_tensors(DATA / "format1.pth"), load_packed(DATA / name)
    found = packed.state()
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert (
            torch.equal(found[key].to(torch.int64), tensor.to(torch.int64) % (1 << 16))
            if key.endswith("codes_matrix")
            else torch.equal(found[key], tensor)
        ), key
    assert {layer.k for layer in packed.layers.values()} == {8, 16, 512}
    assert (packed.info.arch, packed.info.num_classes, packed.info.metric) == ("small", 10, {"accuracy": 12.5})
    assert packed.info.permutations is not None
    assert sorted(packed.info.permutations[0].permutation.tolist()) == list(range(8))
    entropy_coded = {key for key in packed.tensors if key.endswith("codes_entropy")}
    assert entropy_coded == ({"3.codes_entropy", "8.codes_entropy"} if "entropy" in name else set())


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_format_1_with_a_wrong_byte_is_refused(name: str, tmp_path: Path) -> None:
    whole, path = (DATA / name).read_bytes(), tmp_path / "model.safetensors"
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(CheckpointError):
            load_packed(path)
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load_packed(path)


DENSE = DATA / "format1_dense.safetensors"
"""A dense network; value number n (from 1) of tensor number i (from 1) is n / (8 i), and one norm has seen 7 batches."""


def test_a_dense_file_of_format_1_holds_what_it_held_and_its_checksum_counts(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))
    found = read_tensors(DENSE)
    assert found.keys() == model.state_dict().keys()
    for number, (name, tensor) in enumerate(model.state_dict().items(), 1):
        wanted = (torch.arange(tensor.numel()) + 1).view(tensor.shape) / (8 * number) if tensor.dim() else 7
        assert torch.equal(found[name], torch.as_tensor(wanted, dtype=tensor.dtype)), name
    whole, path = DENSE.read_bytes(), tmp_path / "model.safetensors"
    for at in range(len(whole) - 604, len(whole), 7):  # all values
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match="checksum"):
            read_tensors(path)
