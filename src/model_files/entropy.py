"""Entropy coding of codes by zlib's Huffman coding: a frequent code gets fewer bits than log2(k).

Deflate knows no symbols beyond a byte. A stream holds, where k > 256, the bits above the low byte of all codes as they
are (`bit_packing`), and then the low bytes of all codes as one zlib stream (with its checksum): sorted by the higher
bits, otherwise as the codes are, and a new block, with a Huffman table of its own, for each value of the higher bits.
So the low bytes are coded given the higher bits, which is what a table of all k codes would gain over one of 256.
"""

from __future__ import annotations

import zlib

import numpy as np

from .bit_packing import Bytes, Numbers, pack, packed_size, unpack

LOW_BITS = 8
MOST_MEMORY = 9
"""zlib's largest blocks: each has a table of its own."""


def encode(codes: Numbers, k: int) -> Bytes:
    """The stream for `codes` (n,), all below k, a power of two.

    A code takes a bit at least, which bounds what a stream can decode to by its own size.
    """
    coder = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, MOST_MEMORY, zlib.Z_HUFFMAN_ONLY)
    low, width = (codes & 0xFF).astype(np.uint8), _high_bits(k)
    if not width:
        return np.frombuffer(coder.compress(low.tobytes()) + coder.flush(), np.uint8).copy()
    high = codes >> LOW_BITS
    by_high = np.argsort(high, kind="stable")
    first, *others = np.split(low[by_high], np.flatnonzero(np.diff(high[by_high])) + 1)
    parts = [coder.compress(first.tobytes())]
    for group in others:
        parts += [coder.flush(zlib.Z_BLOCK), coder.compress(group.tobytes())]
    stream = np.frombuffer(b"".join([*parts, coder.flush()]), np.uint8)
    return np.concatenate([pack(high, width), stream])


def decode(stream: Bytes, n: int, k: int) -> Numbers:
    """The `n` codes below `k` of a stream; the inverse of `encode`.

    Raises:
        ValueError: the stream is not one of `n` codes; nothing is allocated that its size does not warrant.
    """
    if not 1 <= n <= stream.size * 8:
        raise ValueError(f"{stream.size} bytes for {n} codes of {k} centroids")
    width = _high_bits(k)
    low_at = packed_size(n, width)
    decoder = zlib.decompressobj()
    try:
        low = decoder.decompress(stream[low_at:].tobytes(), n + 1)
    except zlib.error as error:
        raise ValueError(f"the entropy coding is damaged ({error})") from error
    if len(low) != n or not decoder.eof or decoder.unused_data:
        raise ValueError(f"the entropy coding does not hold {n} codes")
    codes = np.frombuffer(low, np.uint8).astype(np.int32)
    if width:
        high = unpack(stream[:low_at], n, width)
        by_high = np.argsort(high, kind="stable")
        high[by_high] = (high[by_high] << LOW_BITS) | codes
        codes = high
    if int(codes.max()) >= k:
        raise ValueError(f"a code is not below {k}")
    return codes


def _high_bits(k: int) -> int:
    """Bits of a code below `k` that the low byte does not hold."""
    return max(0, (k - 1).bit_length() - LOW_BITS)
