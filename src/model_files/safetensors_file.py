"""Safetensors files that are the same whenever their contents are, with a checksum over the whole file.

The safetensors library writes and reads them. It writes metadata in random order, so all of ours stand in one key,
`pqf`, as JSON with sorted keys; equal models give equal files. Among them is `checksum`: SHA-256 over the file with 64
zeros in the checksum's own place. Files of format 1, which a writer of our own made, have the same metadata as keys of
their own, and are read too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save_file
from torch import Tensor

from ..common.errors import CheckpointError
from ..common.paths import BINARY_TEMPORARY_SUFFIX, write_atomically

KEY = "pqf"
CHECKSUM = "checksum"
_NO_CHECKSUM = "0" * 64
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MOST_HEADER = 4 << 20
"""Bytes of a header; that of the largest network here takes a hundredth of it."""
MOST_DIMENSIONS = 8
CHUNK = 1 << 20
"""Bytes read at a time."""
LARGEST = 1 << 48
"""Above every size in a file."""


def write_container(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named CPU tensors and metadata with a checksum, atomically; equal contents give equal bytes.

    Raises:
        RunError: the disk is full or the folder cannot be written; an existing file is unchanged.
        CheckpointError: a tensor that such a file cannot hold, by its name, its type or its shape.
    """
    _check_writable(path, tensors)
    # the checksum first: its zeros are then the first of the file, whatever the metadata say
    texts = {KEY: json.dumps({CHECKSUM: _NO_CHECKSUM, **dict(sorted(metadata.items()))}, separators=(",", ":"))}
    owned = _without_sharing(tensors)

    def write(temporary: Path) -> None:
        _save(owned, temporary, texts)
        with open(temporary, "r+b") as file:
            header = file.read(8)
            header += file.read(int.from_bytes(header, "little"))
            if len(header) - 8 > MOST_HEADER:
                raise CheckpointError(
                    f"{path}: the names and shapes of {len(owned)} tensors take {len(header):,} bytes, a file can have "
                    f"{MOST_HEADER:,}; nothing was written"
                )
            digest = hashlib.sha256(header)
            while chunk := file.read(CHUNK):
                digest.update(chunk)
            file.seek(header.index(_NO_CHECKSUM.encode()))  # metadata come first in a header
            file.write(digest.hexdigest().encode())

    write_atomically(path, write)


def _check_writable(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name == "__metadata__":
            problem = "a safetensors file uses that name for itself"
        elif any("\ud800" <= letter <= "\udfff" for letter in name):
            problem = "the name is not valid Unicode"
        elif tensor.dtype not in DTYPES.values():
            problem = f"it holds {tensor.dtype}"
        elif tensor.dim() > MOST_DIMENSIONS:
            problem = f"it has {tensor.dim()} dimensions, {MOST_DIMENSIONS} are the most"
        else:
            continue
        raise CheckpointError(
            f"{path} cannot hold the tensor {name!a}: {problem}. Rename or change it, or write a .pth file"
        )


def _save(tensors: dict[str, Tensor], path: Path, texts: dict[str, str]) -> None:
    """Let the library write `path`, which is there already and keeps its permissions.

    The library (0.8) writes to a file of its own beside the one it is given, which only its owner may read and which
    stays when the process is killed: here in a folder that is removed with the other half-written files.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    with tempfile.TemporaryDirectory(BINARY_TEMPORARY_SUFFIX, ".", path.parent) as folder:
        written = Path(folder) / path.name
        try:
            save_file(tensors, written, metadata=texts)
        except SafetensorError as error:  # the system's error stands in its text only
            number = re.search(r"\b(?:os error|code:) (\d+)", str(error))
            raise OSError(*((int(number[1]), os.strerror(int(number[1]))) if number else (str(error),))) from error
        written.chmod(mode)
        os.replace(written, path)


def _without_sharing(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors; a copy where another one has the same memory, which the library refuses to write twice."""
    seen: set[int] = set()
    owned = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        place = tensor.untyped_storage().data_ptr()
        if place in seen and tensor.numel():
            tensor = tensor.clone()
        seen.add(place)
        owned[name] = tensor
    return owned


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, unchecked; empty where there are none or the header is not readable."""
    try:
        with open(path, "rb") as file:
            beginning = file.read(8)
            size = path.stat().st_size
            return _metadata(_parsed(beginning + file.read(_header_length(beginning, size, str(path))), str(path)))
    except (OSError, CheckpointError):
        return {}


def read_container(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata that `write_container` wrote, or that stand in a file of format 1.

    Memory: twice the file's size while it is read.

    Raises:
        CheckpointError: the file cannot be read, is truncated or damaged, or its checksum is missing or wrong.
    """
    source = str(path)
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error.strerror}") from error
    end = 8 + _header_length(contents[:8], len(contents), source)
    metadata = _metadata(_parsed(contents[:end], source))
    _check_checksum(contents, end, metadata.pop(CHECKSUM, ""), source)
    try:
        entries = deserialize(contents)
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise _damaged(source, str(error).splitlines()[0][:100] if str(error) else type(error).__name__) from error
    tensors = {name: _tensor(name, entry, source) for name, entry in entries}
    return tensors, metadata


def _header_length(beginning: bytes, size: int, source: str) -> int:
    length = int.from_bytes(beginning, "little")
    if size < 8 or length > size - 8:
        raise _damaged(source, "it is shorter than its header says")
    if length > MOST_HEADER:
        raise _damaged(source, f"its header would take {length:,} bytes")
    return length


def _parsed(beginning: bytes, source: str) -> dict[str, Any]:
    try:
        header = json.loads(beginning[8:].decode("utf-8"), object_pairs_hook=_each_once)
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


def _metadata(header: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a header, those of format 2 taken out of their one key; empty where there are none."""
    found = header.get("__metadata__")
    if _is_text_map(found) and set(found) == {KEY}:
        try:
            found = json.loads(found[KEY], object_pairs_hook=_each_once)
        except (ValueError, RecursionError):
            return {}
    return dict(found) if _is_text_map(found) else {}


def _is_text_map(found: object) -> TypeGuard[dict[str, str]]:
    return isinstance(found, dict) and all(isinstance(value, str) for value in found.values())


def _check_checksum(contents: bytes, end: int, wanted: str, source: str) -> None:
    """Compare the checksum `wanted`, which stands somewhere in the header, with the contents."""
    place = contents.find(wanted.encode("utf-8", "replace"), 8, end) if len(wanted) == 64 else -1
    if place < 0:
        raise _damaged(source, "it has no checksum")
    digest = hashlib.sha256(memoryview(contents)[:place])
    digest.update(_NO_CHECKSUM.encode())
    digest.update(memoryview(contents)[place + 64 :])
    if digest.hexdigest() != wanted:
        raise _damaged(source, "its checksum does not match its contents")


def _tensor(name: str, entry: Mapping[str, Any], source: str) -> Tensor:
    """The tensor of the library's entry, which has as many bytes as type and shape say."""
    dtype, shape, data = DTYPES.get(entry["dtype"]), entry["shape"], entry["data"]
    if dtype is None:
        raise _damaged(source, f"{name!r} has the type {entry['dtype']}")
    # of an empty tensor too: its strides would overflow
    if len(shape) > MOST_DIMENSIONS or math.prod(max(n, 1) for n in shape) >= LARGEST:
        raise _damaged(source, f"{name!r} would have the shape {tuple(shape)}")
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    if dtype == torch.bool and bool((flat.view(torch.uint8) > 1).any()):
        raise _damaged(source, f"{name!r} holds truth values that are neither true nor false")
    return flat.view(shape)


def _damaged(source: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{source} cannot be read: truncated, damaged or not a packed model ({reason}).")
