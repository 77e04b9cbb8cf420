"""Entropy coding of codes by zlib's Huffman coding: a frequent code gets fewer bits than log2(k).

A stream holds the low bytes of all codes, Huffman coded by zlib (with its checksum), and behind them, where k > 256,
the higher bits of all codes as they are (`bit_packing`): deflate knows no symbols beyond a byte, and a codebook has no
order that would make the higher bits alone worth coding.
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
    low = coder.compress((codes & 0xFF).astype(np.uint8).tobytes()) + coder.flush()
    stream = np.frombuffer(low, np.uint8)
    width = _high_bits(k)
    return np.concatenate([stream, pack(codes >> LOW_BITS, width)]) if width else stream.copy()


def decode(stream: Bytes, n: int, k: int) -> Numbers:
    """The `n` codes below `k` of a stream; the inverse of `encode`.

    Raises:
        ValueError: the stream is not one of `n` codes; nothing is allocated that its size does not warrant.
    """
    if not 1 <= n <= stream.size * 8:
        raise ValueError(f"{stream.size} bytes for {n} codes of {k} centroids")
    decoder = zlib.decompressobj()
    try:
        low = decoder.decompress(stream.tobytes(), n + 1)
    except zlib.error as error:
        raise ValueError(f"the entropy coding is damaged ({error})") from error
    rest = np.frombuffer(decoder.unused_data, np.uint8)
    width = _high_bits(k)
    if len(low) != n or not decoder.eof or rest.size != (packed_size(n, width) if width else 0):
        raise ValueError(f"the entropy coding does not hold {n} codes")
    codes = np.frombuffer(low, np.uint8).astype(np.int32)
    if width:
        codes |= unpack(rest, n, width) << LOW_BITS
    if int(codes.max()) >= k:
        raise ValueError(f"a code is not below {k}")
    return codes


def _high_bits(k: int) -> int:
    """Bits of a code below `k` that the low byte does not hold."""
    return max(0, (k - 1).bit_length() - LOW_BITS)
