"""DDP and FSDP2 around a quantized network, as in a user's own program: two processes train as one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from src.compression.quantize.layers import QuantizedLayer
from tests.support.launching import launch
from tests.support.wrapped import inputs, network, trained


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_train_a_quantized_network_as_one_does(how: str, tmp_path: Path) -> None:
    if how == "fsdp" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        pytest.skip("torch's own fully_shard does not run on CPUs before version 2.7")
    finished = launch("torchrun", ["-m", "tests.support.wrapped", how, str(tmp_path / "found.pth")])
    assert finished.status == 0, finished.text
    assert finished.left == 0
    found = torch.load(tmp_path / "found.pth")
    model = network()
    wanted = trained(model, inputs())
    books = {name: layer.codebook for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}
    assert found["books"].keys() == books.keys()
    # means of two halves are added in another order; float32, three steps
    for name, book in books.items():
        assert torch.allclose(found["books"][name], book, rtol=1e-4, atol=1e-6), name
    assert torch.allclose(found["outputs"], wanted, rtol=1e-4, atol=1e-6)
