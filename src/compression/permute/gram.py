"""Inner products of all pairs of columns of a weight, as fast as BLAS and side by side with other groups."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cython_blas
from scipy.linalg.blas import dsyrk

Floats = NDArray[np.float64]


def upper_gram(columns: Floats, scale: float) -> Floats:
    """(W, W) with `scale` times the inner products of columns (R, W) on and above the diagonal, half the arithmetic of
    a whole product.

    Entries below the diagonal are undefined: that half of the memory is never touched. Python's lock is released
    meanwhile, so that other threads run.
    """
    columns = np.ascontiguousarray(columns, dtype=np.float64)
    rows, width = columns.shape
    room = np.empty((width, width))
    routine = _without_lock()
    if routine is None:
        return dsyrk(scale, columns.T, beta=0.0, c=room.T, lower=1, overwrite_c=1).T
    # Fortran's arrays are column by column: it reads `columns` as columns.T and fills the lower triangle of the
    # result's transpose
    lower, plain = ctypes.create_string_buffer(b"L"), ctypes.create_string_buffer(b"N")
    sizes, factors = np.array([width, rows], dtype=np.intc), np.array([scale, 0.0])
    n, k = sizes.ctypes.data, sizes.ctypes.data + sizes.itemsize
    alpha, beta = factors.ctypes.data, factors.ctypes.data + factors.itemsize
    routine(
        ctypes.addressof(lower), ctypes.addressof(plain), n, k, alpha, columns.ctypes.data, n, beta, room.ctypes.data, n
    )
    return room


@cache
def _without_lock() -> Callable[..., None] | None:
    """BLAS's dsyrk as SciPy offers it to C; `scipy.linalg.blas` calls the same one, but holds Python's lock.

    None where its integers are not C's (SciPy built for 64-bit BLAS).
    """
    capsule: Any = cython_blas.__pyx_capi__["dsyrk"]
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    signature = name_of(capsule)
    if signature is None or signature.count(b" int *") + signature.count(b"(int *") != 4:  # n, k, lda, ldc
        return None
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 10)(pointer_of(capsule, signature))
