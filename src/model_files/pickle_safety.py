"""What a model file may contain before it is read, and what came out of it: nothing may cost more than the file's size
warrants.

`torch.load(weights_only=True)` executes no code, but allows calls that fill any amount of memory (`bytearray(10**10)`),
compressed archives that unpack to a thousand times their size, and tensors that are a number repeated 10^12 times. Nor
does it look at the checksums of the archive: nearly every flipped bit of a `.pth` file would give a wrong network
without a word. (Files in torch's format from before version 1.6, the authors' among them, have no checksum; packed
files have one of their own.)
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..common.errors import CheckpointError

LARGEST_FACTOR = 16
LARGEST_FREE = 64 << 20
"""A file may unpack to LARGEST_FACTOR times its size and LARGEST_FREE bytes: names that share a tensor are common."""

_FOLDER = 0x10
"""Attribute by which torch takes an entry for a folder, and gives memory with arbitrary contents for its tensor."""
_LEGACY_PICKLES = 5
"""Magic number, version, system, contents, storage keys; the storages follow."""
_CONTAINERS = {
    "collections OrderedDict", "torch Size", "torch device", "torch.nn.parameter Parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
}  # fmt: skip
_DTYPES = {f"torch {name}" for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}


def check_pickle_safety(path: Path) -> None:
    """Look through a `.pth` file without building anything from it.

    Raises:
        CheckpointError: its pickle names anything but tensors and containers, it would unpack to far more than its
            size, or its contents do not have their checksums.
        Exception: it is damaged; any kind.
    """
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            for _ in range(_LEGACY_PICKLES):
                _check_pickle(file, path)
            return
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check_kind([entry.filename for entry in entries], path)
            if sum(entry.file_size for entry in entries) > _limit(path):
                raise CheckpointError(f"{path} was refused: it would unpack to far more than its size.")
            damaged = next(
                (e.filename for e in entries if e.external_attr & _FOLDER or e.compress_type != zipfile.ZIP_STORED),
                None,
            )
            damaged = damaged or archive.testzip()
            if damaged is not None:
                raise CheckpointError(
                    f"{path} cannot be read: damaged ({damaged[:80]!r} in it is not as torch.save writes it, or does "
                    "not have its checksum)."
                )
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    with archive.open(entry) as contents:
                        _check_pickle(contents, path)  # type: ignore[arg-type]


def _check_kind(names: list[str], path: Path) -> None:
    """Name the archives of torch that are no state dicts."""
    below = {name.partition("/")[2] for name in names}
    if "constants.pkl" in below or any(name.startswith("code/") for name in below):
        raise CheckpointError(
            f"{path} is a TorchScript program, and loading one could execute code. Expected a state dict: "
            "torch.save(torch.jit.load(PATH).state_dict(), ...)"
        )
    if "archive_format" in below or any(name.startswith("serialized_exported_program") for name in names):
        raise CheckpointError(
            f"{path} is a program of torch.export. Expected a state dict: "
            "torch.save(torch.export.load(PATH).state_dict, ...)"
        )


def _check_pickle(file: BinaryIO, path: Path) -> None:
    for operation, argument, _ in pickletools.genops(file):
        if operation.name in ("GLOBAL", "INST") and not _is_known(str(argument)):
            raise CheckpointError(
                f"{path} was refused: it holds Python objects ({str(argument)[:80]!r}), which could execute code or "
                "fill the memory when read. "
                "Expected a dict of tensors saved with torch.save, or a .safetensors file."
            )


def _is_known(name: str) -> bool:
    module, _, leaf = name.partition(" ")
    is_storage = module in ("torch", "torch.cuda", "torch.storage") and leaf.endswith("Storage")
    return is_storage or name in _CONTAINERS or name in _DTYPES


def check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check that what was read are plain tensors with values, of no more bytes than the file warrants.

    Raises:
        CheckpointError: one is sparse, quantized, without values, or there are too many bytes.
    """
    total = 0
    for name, tensor in tensors.items():
        if (
            type(tensor) not in (Tensor, torch.nn.Parameter)
            or tensor.layout != torch.strided
            or tensor.device.type != "cpu"
            or tensor.is_quantized
        ):
            raise CheckpointError(f"{path}: {name!r} is not a plain tensor of numbers")
        total += tensor.numel() * tensor.element_size()
    if total > _limit(path):
        raise CheckpointError(f"{path} was refused: its tensors would take {total:,} bytes, far more than the file has")


def _limit(path: Path) -> int:
    return LARGEST_FACTOR * path.stat().st_size + LARGEST_FREE
