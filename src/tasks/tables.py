"""Tables of images in Arrow files, as the package `datasets` keeps them: the one file that imports `pyarrow`, which
comes with it. They are read by row; only what is read is brought into memory."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np

from ..common.errors import DataError
from .sources import INSTALL, PACKAGE


def open_table(file: str) -> Any:
    """A table on the disk.

    Raises:
        OSError: it is damaged, or not there.
        DataError: the package is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"{file} is read by the package {PACKAGE}, which is not installed: {INSTALL}") from error
    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(file)).read_all()
    except pyarrow.ArrowException as error:
        raise OSError(f"{file} is damaged: {error}") from error


def images_in(table: Any, column: str) -> tuple[list[int | None], list[str | None]] | None:
    """For every row the size in bytes of its image (None: there is none) and the path that it names; None where the
    column is not stored as images are."""
    import pyarrow
    from pyarrow import compute

    found = table.column(column)
    if not pyarrow.types.is_struct(found.type):
        return None
    sizes = compute.binary_length(compute.struct_field(found, "bytes"))
    return sizes.to_pylist(), compute.struct_field(found, "path").to_pylist()


def bytes_of_row(file: str, column: str, row: int) -> bytes:
    """The bytes of an image as stored; none where the row holds none. Raises as `open_table`, and OSError where there
    is no such row."""
    found = os.stat(file)
    chunks, starts = _column(file, column, found.st_size, found.st_mtime_ns, os.getpid())
    number = int(np.searchsorted(starts, row, side="right")) - 1
    if row >= starts[-1]:
        raise OSError(f"{file} has {starts[-1]:,} rows: it was changed since it was listed")
    content = chunks[number][row - int(starts[number])]["bytes"].as_py()
    return b"" if content is None else bytes(content)


@cache
def _column(file: str, column: str, *version: int) -> tuple[list[Any], np.ndarray]:  # noqa: ARG001 (of the cache)
    """The parts of a column, and the first row of each, then of none. Opened once by every process, and again where the
    file changes."""
    chunks = open_table(file).column(column).chunks
    return chunks, np.cumsum([0, *map(len, chunks)])
