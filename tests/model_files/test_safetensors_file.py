"""Laws of the files that the safetensors library writes for us: others may read them, a full disk or a kill leaves
nothing, all comes back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.common.paths import remove_half_written
from src.model_files.safetensors_file import read_container, write_container
from tests.conftest import ROOT


def test_others_may_read_a_file_as_they_may_any_other(tmp_path: Path) -> None:
    """The library alone would let only the owner read it."""
    path, other = tmp_path / "model.safetensors", tmp_path / "other"
    other.touch()
    for _ in range(2):  # a new file and one in the place of another
        write_container(path, {"a": torch.zeros(3)}, {"format": "x"})
        assert path.stat().st_mode == other.stat().st_mode
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, other.name}


@pytest.mark.parametrize("metadata", [{}, {"a": "0" * 64}, {"0" * 64: "a"}, {"z": "0" * 64}, {"arch": 'é"\\\n\u2028'}])
def test_metadata_of_every_kind_come_back(metadata: dict[str, str], tmp_path: Path) -> None:
    """Zeros as long as a checksum too, before and behind it."""
    path = tmp_path / "model.safetensors"
    write_container(path, {"0" * 64: torch.arange(3)}, metadata)
    tensors, found = read_container(path)
    assert found == metadata
    assert torch.equal(tensors["0" * 64], torch.arange(3))


def test_empty_tensors_and_scalars_keep_their_shapes(tmp_path: Path) -> None:
    wanted = {"empty": torch.zeros(0, 4), "scalar": torch.tensor(3), "half": torch.ones(2, 0, dtype=torch.bfloat16)}
    write_container(tmp_path / "model.safetensors", wanted, {"format": "x"})
    found, _ = read_container(tmp_path / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {n: (t.shape, t.dtype) for n, t in wanted.items()}
    assert torch.equal(found["scalar"], wanted["scalar"])


def test_a_disk_that_is_full_is_one_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE in a process of its own stands for the full disk."""
    path = tmp_path / "model.safetensors"
    write_container(path, {"a": torch.zeros(3)}, {"format": "x"})
    kept = path.read_bytes()
    program = f"""
import resource, torch
from pathlib import Path
from src.common.errors import RunError
from src.model_files.safetensors_file import write_container
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_container(Path({str(path)!r}), {{"a": torch.zeros(100_000)}}, {{"format": "y"}})
except RunError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert f"cannot write {path}: File too large; the previous model.safetensors is unchanged" in done.stdout
    assert path.read_bytes() == kept
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    program = f"""
import torch
from pathlib import Path
from src.model_files.safetensors_file import write_container
tensors = {{str(i): torch.ones(1 << 20) for i in range(32)}}
print("ready", flush=True)
while True:
    write_container(Path({str(tmp_path)!r}) / "model.safetensors", tensors, {{"format": "x"}})
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            while process.poll() is None:  # until the library writes: it writes most of the time
                if [*tmp_path.glob(".*/*"), *tmp_path.glob(".tmp*")]:
                    break
        finally:
            process.kill()
    remove_half_written(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"model.safetensors"}
