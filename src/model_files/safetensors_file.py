"""The safetensors container, written the same way every time and read with suspicion.

    8 bytes: length of the header | header: JSON, padded with blanks to a multiple of 8 | the tensors' bytes, without gaps

The metadata hold a checksum: SHA-256 over the whole file with 64 zeros in its own place. Every other reader of safetensors can open
these files. This one exists because the library's writer puts metadata in random order (equal models should give equal files), and
because sizes must be known to fit the file before anything is allocated.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch
from torch import Tensor

from ..common.errors import CheckpointError
from ..common.paths import write_atomically

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHECKSUM = "checksum"
_NO_CHECKSUM = "0" * 64
MOST_HEADER = 4 << 20
"""Bytes of a header; that of the largest network here takes a hundredth of it."""
MOST_DIMENSIONS = 8
LARGEST = 1 << 48
"""Above every size in a file."""


def write_container(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named CPU tensors and metadata with a checksum, atomically; equal contents give equal bytes.

    Raises:
        RunError: the disk is full or the folder cannot be written; an existing file is unchanged.
    """
    header: dict[str, Any] = {"__metadata__": {CHECKSUM: _NO_CHECKSUM, **metadata}}
    parts, at = [], 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)):  # so that every tensor is aligned
        tensor = tensors[name].contiguous()
        n_bytes = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
        if n_bytes:
            parts.append(memoryview(tensor.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    beginning = len(text).to_bytes(8, "little") + text

    def write(temporary: Path) -> None:
        digest = hashlib.sha256(beginning)
        with open(temporary, "wb") as file:
            file.write(beginning)
            for data in parts:  # one after the other: nothing is copied
                file.write(data)
                digest.update(data)
            file.seek(beginning.index(_NO_CHECKSUM.encode()))  # the first value of the file
            file.write(digest.hexdigest().encode())

    write_atomically(path, write)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, unchecked; empty where there are none or the header is not readable."""
    try:
        with open(path, "rb") as file:
            header = _header(file, path.stat().st_size, str(path))
    except (OSError, CheckpointError):
        return {}
    found = header.get("__metadata__")
    return found if _is_text_map(found) else {}


def read_container(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata that `write_container` wrote.

    Memory: the file's size; the tensors are views into its bytes.

    Raises:
        CheckpointError: the file cannot be read, is truncated or damaged, or its checksum is missing or wrong.
    """
    source = str(path)
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            header = _header(file, size, source)
            start = file.tell()
            file.seek(0)
            contents = bytearray(file.read(size))
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error.strerror}") from error
    if len(contents) != size:
        raise _damaged(source, "it changed while it was read")
    metadata = header.pop("__metadata__", None)
    if not _is_text_map(metadata):
        raise _damaged(source, "it has no metadata")
    _check_checksum(contents, start, metadata, source)
    tensors = {}
    end = start
    for name, entry in sorted(header.items(), key=lambda item: _offset(item[1])):
        tensor, end = _tensor(contents, start, end, name, entry, source)
        tensors[name] = tensor
    if end != size:
        raise _damaged(source, f"{size - end:,} bytes belong to no tensor")
    return tensors, metadata


def _header(file: BinaryIO, size: int, source: str) -> dict[str, Any]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise _damaged(source, "it is shorter than its header says")
    if length > MOST_HEADER:
        raise _damaged(source, f"its header would take {length:,} bytes")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise _damaged(source, "its header is not JSON with every key once") from error
    if not isinstance(header, dict):
        raise _damaged(source, "its header is not a table")
    return header


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _is_text_map(found: object) -> TypeGuard[dict[str, str]]:
    return isinstance(found, dict) and all(isinstance(value, str) for value in found.values())


def _check_checksum(contents: bytearray, start: int, metadata: Mapping[str, str], source: str) -> None:
    wanted = metadata.get(CHECKSUM, "")
    place = contents.find(wanted.encode(), 8, start) if len(wanted) == 64 else -1
    if place < 0:
        raise _damaged(source, "it has no checksum")
    digest = hashlib.sha256(contents[:place])
    digest.update(_NO_CHECKSUM.encode())
    digest.update(memoryview(contents)[place + 64 :])
    if digest.hexdigest() != wanted:
        raise _damaged(source, "its checksum does not match its contents")


def _offset(entry: object) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return offsets[0] if isinstance(offsets, list) and offsets and type(offsets[0]) is int else -1


def _tensor(contents: bytearray, start: int, at: int, name: str, entry: Any, source: str) -> tuple[Tensor, int]:
    """The tensor of a header's entry, which must begin at byte `at`; and where the next one begins."""
    good = (
        isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"} and isinstance(entry["dtype"], str)
    )
    if not good or entry["dtype"] not in DTYPES:
        raise _damaged(source, f"the entry of {name!r} is not one of a tensor")
    dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not _whole_numbers(shape, MOST_DIMENSIONS) or not _whole_numbers(offsets, 2) or len(offsets) != 2:
        raise _damaged(source, f"shape or place of {name!r} are not whole numbers")
    if math.prod(max(n, 1) for n in shape) >= LARGEST:  # of an empty tensor too: its strides would overflow
        raise _damaged(source, f"{name!r} would have the shape {tuple(shape)}")
    n_bytes = math.prod(shape) * dtype.itemsize
    if offsets[0] + start != at or offsets[1] - offsets[0] != n_bytes or offsets[1] + start > len(contents):
        raise _damaged(source, f"{name!r} does not lie where its shape {tuple(shape)} says")
    if offsets[0] % dtype.itemsize:
        raise _damaged(source, f"{name!r} is not aligned")
    if dtype == torch.bool and any(byte > 1 for byte in memoryview(contents)[at : at + n_bytes]):
        raise _damaged(source, f"{name!r} holds truth values that are neither true nor false")
    flat = (
        torch.frombuffer(contents, dtype=dtype, count=n_bytes // dtype.itemsize, offset=at)
        if n_bytes
        else torch.empty(0, dtype=dtype)
    )
    return flat.view(shape), at + n_bytes


def _whole_numbers(found: object, most: int) -> bool:
    return isinstance(found, list) and len(found) <= most and all(type(n) is int and 0 <= n < LARGEST for n in found)


def _damaged(source: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{source} cannot be read: truncated, damaged or not a packed model ({reason}).")
