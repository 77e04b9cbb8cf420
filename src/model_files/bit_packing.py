"""Whole numbers packed at a given number of bits each, without a gap between them.

Number i occupies the bits [i*w, (i+1)*w) of the stream; bit b is bit b % 8 of byte b // 8, the lowest first. The unused
bits of the last byte are zero, so that equal numbers give equal bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MOST_BITS = 31
CHUNK = 1 << 18
"""Numbers handled at a time, a multiple of 8 so that chunks meet at whole bytes: the work arrays stay in the cache."""

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int32]


def packed_size(n: int, width: int) -> int:
    """Bytes that `n` numbers of `width` bits occupy."""
    return (n * width + 7) // 8


def pack(numbers: Numbers, width: int) -> Bytes:
    """Pack `numbers` (n,), all in 0 ... 2^width - 1, into `packed_size(n, width)` bytes.

    Raises:
        ValueError: a number does not fit, or `width` is not in 1 ... 31.
    """
    _check_width(width)
    if numbers.size and (int(numbers.min()) < 0 or int(numbers.max()) >> width):
        raise ValueError(f"numbers from {int(numbers.min())} to {int(numbers.max())} do not fit into {width} bits")
    if width == 8:
        return numbers.astype(np.uint8)
    packed = np.zeros(packed_size(numbers.size, width), np.uint8)
    n_bytes = (width + 7) // 8
    for start in range(0, numbers.size, CHUNK):
        chunk = np.ascontiguousarray(numbers[start : start + CHUNK], dtype="<u4")
        low = chunk.view(np.uint8).reshape(-1, 4)[:, :n_bytes]
        bits = np.unpackbits(low, axis=1, count=width, bitorder="little")
        piece = np.packbits(bits, bitorder="little")
        at = start // 8 * width
        packed[at : at + piece.size] = piece
    return packed


def unpack(packed: Bytes, n: int, width: int) -> Numbers:
    """The `n` numbers of `width` bits in `packed`; the inverse of `pack`.

    Raises:
        ValueError: `packed` has another number of bytes than they need, its unused bits are not zero, or `width` is not
            in 1 ... 31.
    """
    _check_width(width)
    if packed.size != packed_size(n, width):
        raise ValueError(f"{packed.size} bytes for {n} numbers of {width} bits, expected {packed_size(n, width)}")
    spare = packed.size * 8 - n * width
    if spare and int(packed[-1]) >> (8 - spare):
        raise ValueError("the unused bits of the last byte are not zero")
    if width == 8:
        return packed.astype(np.int32)
    numbers = np.empty(n, np.int32)
    n_bytes = (width + 7) // 8
    for start in range(0, n, CHUNK):
        count = min(CHUNK, n - start)
        at = start // 8 * width
        bits = np.unpackbits(
            packed[at : at + packed_size(count, width)], count=count * width, bitorder="little"
        ).reshape(count, width)
        words = np.zeros((count, 4), np.uint8)
        words[:, :n_bytes] = np.packbits(bits, axis=1, bitorder="little")
        numbers[start : start + count] = words.view("<u4")[:, 0]
    return numbers


def _check_width(width: int) -> None:
    if not 1 <= width <= MOST_BITS:
        raise ValueError(f"{width} bits per number; expected 1 to {MOST_BITS}")
