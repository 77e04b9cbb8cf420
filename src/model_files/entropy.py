"""Entropy coding of codes: a frequent code gets fewer bits than log2(k).

Range asymmetric numeral systems (Duda 2013, arXiv 1311.2540) with 32-bit states and 16-bit words, on several interleaved lanes:
code i belongs to lane i % n_lanes, and one NumPy operation advances all lanes. The stream is

    one byte w | frequencies of the k codes, w bits each | final state of every lane (4 bytes) | words (2 bytes)

with little-endian numbers. Decoding ends in the known state in which encoding began, with all words used up: a damaged stream is
found with near certainty even without a checksum.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .bit_packing import Bytes, Numbers, pack, packed_size, unpack

LOWEST = 1 << 16
"""Every state is in [LOWEST, 2^32) between two codes; encoding starts at LOWEST."""

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


def encode(codes: Numbers, k: int) -> Bytes | None:
    """The stream for `codes` (n,), all below k; None where k is too large, or a code would cost less than a bit on average.

    The second rule bounds what a stream can decode to by its own size, so that a forged file cannot claim memory.
    """
    n = codes.size
    if not n or k > MOST_CENTROIDS:
        return None
    scale, width = scale_bits(k), lanes(n)
    frequency = _frequencies(np.bincount(codes, minlength=k), scale)
    start = np.cumsum(frequency) - frequency
    state = np.full(width, LOWEST, np.uint64)
    f_of, start_of, limit_of = (array.astype(np.uint64) for array in (frequency, start, frequency << (32 - scale)))
    steps = -(-n // width)
    words: list[NDArray[np.uint16]] = []
    for step in reversed(range(steps)):
        symbols = codes[step * width : (step + 1) * width]
        x = state[: symbols.size]
        full = x >= limit_of[symbols]
        words.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
        x[full] >>= np.uint64(16)
        quotient, rest = np.divmod(x, f_of[symbols])
        x[:] = (quotient << np.uint64(scale)) + rest + start_of[symbols]
    bits = int(frequency.max()).bit_length()
    parts = [
        np.array([bits], np.uint8),
        pack(frequency.astype(np.int32), bits),
        state.astype("<u4").view(np.uint8),
        np.concatenate(words[::-1]).view(np.uint8),
    ]
    stream = np.concatenate(parts)
    return stream if stream.size * 8 >= n else None


def decode(stream: Bytes, n: int, k: int) -> Numbers:
    """The `n` codes below `k` of a stream; the inverse of `encode`.

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


def _frequencies(counts: NDArray[np.int64], scale: int) -> NDArray[np.int64]:
    """Counts (k,) scaled to whole numbers that add up to 2^scale, at least 1 for what occurs."""
    total = 1 << scale
    exact = counts * (total / counts.sum())
    frequency = np.where(counts > 0, np.maximum(1, np.floor(exact)), 0).astype(np.int64)
    short = total - int(frequency.sum())
    if short > 0:
        frequency[np.argsort(frequency - exact, kind="stable")[:short]] += 1
    for _ in range(-short):
        frequency[np.argmax(frequency)] -= 1
    return frequency
