"""What reading model files takes in memory, in a process of its own: no more than the files warrant, whatever they
claim."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import torch

from tests.conftest import ROOT
from tests.support.memory import in_a_process_of_its_own, read_files


def test_files_that_claim_much_memory_get_none(tmp_path: Path) -> None:
    whole = (ROOT / "tests" / "data" / "format1.safetensors").read_bytes()
    claims = [
        {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 4 << 30]},
        {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [0, 1 << 40], "data_offsets": [0, 0]},
    ]
    names = []
    for number, claim in enumerate(claims):
        header = json.dumps({"__metadata__": {"pqf": "{}"}, "x": claim}).encode()
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + whole[:4000])
        names.append(path)
    bomb = tmp_path / "bomb.pth"
    bomb.write_bytes(zlib.compress(bytes(1 << 28)))
    torch.save({"x": torch.zeros(1).expand(1 << 34)}, tmp_path / "expanded.pth")
    names += [bomb, tmp_path / "expanded.pth"]
    assert in_a_process_of_its_own(read_files, *names) < 64 << 20


def test_a_file_is_read_in_a_few_times_its_size(tmp_path: Path) -> None:
    size = 64 << 20
    torch.save({"conv1.weight": torch.randn(size // 4)}, tmp_path / "model.pth")
    assert in_a_process_of_its_own(read_files, tmp_path / "model.pth") < 3 * size
