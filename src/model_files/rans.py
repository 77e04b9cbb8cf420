"""Reads the entropy-coded codes of packed files of format 1, of which users have some; nothing writes them any more
(see `entropy`).

Range asymmetric numeral systems (Duda 2013, arXiv 1311.2540) with 32-bit states and 16-bit words, on several
interleaved lanes: code i belongs to lane i % n_lanes, and one NumPy operation advances all lanes. The stream is

    one byte w | frequencies of the k codes, w bits each | final state of every lane (4 bytes) | words (2 bytes)

with little-endian numbers. Decoding ends in the known state in which encoding began, with all words used up: a damaged
stream is found with near certainty even without a checksum.
"""

from __future__ import annotations

import numpy as np

from .bit_packing import Bytes, Numbers, packed_size, unpack

LOWEST = 1 << 16
"""Every state is in [LOWEST, 2^32) between two codes; encoding started at LOWEST."""

MOST_CENTROIDS = 1 << 14
MOST_LANES = 256
CODES_PER_LANE = 1024
"""At least so many codes share the two bytes that a lane costs."""


def scale_bits(k: int) -> int:
    """Frequencies add up to 2^scale_bits: fine enough that rounding them costs under 0.1 % at k codes."""
    return min(16, max(12, k.bit_length() + 5))


def lanes(n: int) -> int:
    """Number of lanes for `n` codes."""
    return max(1, min(MOST_LANES, n // CODES_PER_LANE))


def decode(stream: Bytes, n: int, k: int) -> Numbers:
    """The `n` codes below `k` of a stream.

    Raises:
        ValueError: the stream is not one of `n` codes; nothing is allocated that its size does not warrant.
    """
    scale, width = scale_bits(k), lanes(n)
    if not 2 <= k <= MOST_CENTROIDS or not 1 <= n <= stream.size * 8:
        raise ValueError(f"{stream.size} bytes for {n} codes of {k} centroids")
    bits = int(stream[0])
    states_at = 1 + packed_size(k, bits)
    words_at = states_at + 4 * width
    if not 1 <= bits <= scale + 1 or words_at > stream.size or (stream.size - words_at) % 2:
        raise ValueError("the tables of the entropy coding are damaged")
    frequency = unpack(stream[1:states_at], k, bits).astype(np.int64)
    if int(frequency.sum()) != 1 << scale:
        raise ValueError("the frequencies of the entropy coding do not add up")
    symbol_of = np.repeat(np.arange(k, dtype=np.int32), frequency)
    f_of = frequency[symbol_of].astype(np.uint32)
    offset_of = (np.arange(1 << scale) - (np.cumsum(frequency) - frequency)[symbol_of]).astype(np.uint32)
    # copies: a view would not be aligned
    state = np.frombuffer(stream[states_at:words_at].tobytes(), "<u4").astype(np.uint32)
    words = np.frombuffer(stream[words_at:].tobytes(), "<u2").astype(np.uint32)
    if (state < LOWEST).any():
        raise ValueError("a state of the entropy coding is damaged")
    codes = np.empty(n, np.int32)
    used = 0
    mask, shift = np.uint32((1 << scale) - 1), np.uint32(scale)
    for at in range(0, n, width):
        x = state[: min(width, n - at)]
        slot = x & mask
        symbol_of.take(slot, out=codes[at : at + width])
        x >>= shift
        x *= f_of.take(slot)
        x += offset_of.take(slot)
        low = np.flatnonzero(x < LOWEST)
        if low.size:
            new = words[used : used + low.size]
            if new.size < low.size:
                raise ValueError("the entropy coding ends too early")
            x[low] = (x[low] << np.uint32(16)) | new
            used += low.size
    if used != words.size or (state != LOWEST).any():
        raise ValueError("the entropy coding does not end where it should")
    return codes
